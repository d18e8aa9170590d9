"""YAML that people type: recipes and options.

YAML's own guesses depend on its version and surprise: `1e-5` is a string, `no` is false, `1:30` is 90. So the loader
guesses nothing: it keeps the text of a plain scalar, and pydantic reads it by the type of its field. Where there is no
type, in free-form mappings, `guess` reads booleans and numbers.
"""

import re
from collections.abc import Hashable
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any, cast

import yaml

from pipeline.errors import PipelineError

_MOST_BYTES = 1 << 20
_MOST_VALUES = 100_000  # after aliases are expanded: a few lines of aliases can expand to billions of values
_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_TEXT = "tag:yaml.org,2002:str"


class Plain(str):
    """A scalar that was written without quotes."""

    __slots__ = ()


def _refusal(problem: str, where: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=cast(yaml.Mark, where.start_mark))


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}  # noqa: RUF012 (as its base class has it)

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.sizes: dict[yaml.Node, int] = {}  # values in each complete node

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise _refusal(f"the YAML tag {event.tag} is not supported: write the value alone", event)
        node = cast(yaml.Node, super().compose_node(parent, index))
        if isinstance(event, yaml.AliasEvent):
            if node not in self.sizes:
                raise _refusal(f"*{event.anchor} contains itself", event)
            return node
        children = () if isinstance(node, yaml.ScalarNode) else node.value
        inner = (part for child in children for part in (child if isinstance(child, tuple) else (child,)))
        self.sizes[node] = 1 + sum(self.sizes[part] for part in inner)
        if self.sizes[node] > _MOST_VALUES:
            raise _refusal(f"more than {_MOST_VALUES:,} values", event)
        return node

    def scalar(self, node: yaml.ScalarNode) -> str | None:
        if node.style is not None:
            return node.value
        return None if node.value in _NULLS else Plain(node.value)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag == _TEXT and key.value in seen:
                raise _refusal(f"{key.value!r} is there twice", key)
            seen.add(key.value if key.tag == _TEXT else None)
        return {str(key or ""): value for key, value in super().construct_mapping(node, deep).items()}


class _Dumper(yaml.SafeDumper):
    def text(self, text: str) -> yaml.Node:
        """Quote text that `guess` would not read as text."""
        return self.represent_scalar(_TEXT, text, style=None if guess(Plain(text)) == text else '"')


_Loader.add_constructor(_TEXT, _Loader.scalar)
_Dumper.add_representer(str, _Dumper.text)


def parse(text: str, where: str) -> Any:
    """Parse YAML into mappings, lists, None and text: `Plain` if it had no quotes. Raises PipelineError."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        hint = "; indent with spaces, not tabs" if "'\\t'" in str(error) else ""
        why = " ".join(str(error).replace(' in "<unicode string>",', " at").split())
        raise PipelineError(f"cannot read {where}: {why}{hint}") from None
    except RecursionError:
        raise PipelineError(f"cannot read {where}: it is nested too deeply") from None


def dump(values: dict[str, Any]) -> str:
    """Write YAML that `parse` reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def read_text(path: Path) -> str:
    """Read a short text file that a person wrote. Raises PipelineError."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise PipelineError(f"{path} is larger than {_MOST_BYTES >> 20} MiB: that is no configuration")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PipelineError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise PipelineError(f"cannot read {path}: {error.strerror}") from None


def guess(value: Any) -> Any:
    """Convert a value of a free-form mapping: text without quotes may be a boolean or a number."""
    if isinstance(value, dict):
        return {key: guess(each) for key, each in value.items()}
    if isinstance(value, list):
        return [guess(each) for each in value]
    if not isinstance(value, Plain):
        return value
    if value.lower() in _BOOLEANS:
        return _BOOLEANS[value.lower()]
    for number in (int, float):
        with suppress(ValueError, OverflowError):
            if isfinite(converted := number(value)):
                return converted
    return str(value)
