"""What people type, as a field of a recipe or an option means it.

YAML's own guesses depend on its version and surprise: `1e-5` is a string, `no` is false, `1:30` is 90. So the loader
guesses nothing: it keeps the text of a plain scalar, and each field reads it by its own type (`read`). Where there is
no type, in free-form mappings, `guess` reads what all would read alike.
"""

import re
from collections.abc import Hashable
from contextlib import suppress
from math import isfinite
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel

from pipeline.errors import PipelineError

_MOST_BYTES = 1 << 20
_MOST_VALUES = 100_000  # after aliases are expanded: a few lines of aliases can expand to billions of values
_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+")
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.?(inf|infinity|nan)", re.IGNORECASE)
_LONG = 1 << 63
_LEAST = 1.2e-38  # above 0 in float32, without loss
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
            raise _refusal(f"the tag {event.tag}: write the value alone", event)
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
        with suppress(ValueError):
            if guess(Plain(text)) == text:
                return self.represent_str(text)
        return self.represent_scalar(_TEXT, text, style='"')


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


def read(wanted: Any, value: Any) -> Any:
    """Convert a typed value to the field's type. A value that does not fit is returned as it is; pydantic refuses it.

    Raises ValueError, which says what to write, if the value is ambiguous.
    """
    kinds = options(wanted)
    section = any(isinstance(option, type) and issubclass(option, BaseModel) for option in kinds)
    if value is None:
        if NoneType in kinds:
            return None
        if section:  # its lines may all be comments
            return {}
        raise ValueError("it is empty: give a value, or leave it out for its default")
    if isinstance(value, str):
        return _read_text(kinds, value)
    if bool in kinds and value in (0, 1):
        return bool(value)
    if int in kinds and isinstance(value, float) and value.is_integer() and abs(value) < _LONG:
        return int(value)
    for option in kinds:
        if isinstance(value, list | tuple) and get_origin(option) is list:
            return [read(get_args(option)[0], each) for each in value]
        if isinstance(value, list | tuple) and get_origin(option) is tuple and len(value) == len(get_args(option)):
            return tuple(read(one, each) for one, each in zip(get_args(option), value, strict=True))
        if isinstance(value, dict) and get_origin(option) is dict:
            return guess(value)
    if isinstance(value, dict) and str in kinds and not section:
        raise ValueError("it is a mapping: write a text that has a colon and a space in quotes, 'key=\"a: b\"'")
    return value


def guess(value: Any) -> Any:
    """Convert a value of a free-form mapping: text without quotes may be a boolean or a number."""
    if isinstance(value, dict):
        return {key: guess(each) for key, each in value.items()}
    if isinstance(value, list):
        return [guess(each) for each in value]
    if isinstance(value, float) and not isfinite(value):
        raise ValueError(f"{value} is no number to train with")
    if not isinstance(value, Plain):
        return value
    if value.lower() in _BOOLEANS:
        return _BOOLEANS[value.lower()]
    number = _number(value)
    return str(value) if number is None else number


def _read_text(kinds: list[Any], text: str) -> Any:
    if any(get_origin(option) is Literal and text in get_args(option) for option in kinds):
        return str(text)
    if bool in kinds:
        word = {"1": "true", "0": "false"}.get(text, text.lower())
        if word in _BOOLEANS:
            return _BOOLEANS[word]
    if int in kinds or float in kinds:
        number = _number(text)
        if isinstance(number, float) and float not in kinds and number.is_integer():
            number = int(number)
        if isinstance(number, int) and abs(number) >= _LONG:
            raise ValueError(f"{text} is too large")
        return str(text) if number is None else number
    if str in kinds and isinstance(text, Plain) and text.lower() in ("true", "false"):
        raise ValueError(f'it is text, not {text}: write it in quotes, "{text}", if that is meant')
    if any(get_origin(option) in (list, tuple) for option in kinds):
        raise ValueError(f"it is a list: write [{text}]")
    return str(text)


def _number(text: str) -> int | float | None:
    """Return a number, or None. Raises ValueError for text that only some YAML readers read as a number."""
    digits = re.sub(r"(?<=[0-9])_(?=[0-9])", "", text)
    if re.fullmatch(r"[-+]?0[0-9]+", digits):
        raise ValueError(f"{text} is octal to some: write it without the leading zero")
    if re.fullmatch(r"[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?", digits):
        raise ValueError(f"{text} counts in sixties to some: write a plain number")
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not finite: write a number")
    if _INTEGER.fullmatch(digits):
        return int(digits, 0)
    if not _FLOAT.fullmatch(digits):
        return None
    if not isfinite(number := float(digits)):
        raise ValueError(f"{text} is too large")
    if abs(number) < _LEAST and re.search("[1-9]", digits.lower().partition("e")[0]):
        raise ValueError(f"{text} is too small, and would count as 0: write a larger number, or 0")
    return number


def options(wanted: Any) -> list[Any]:
    """Return the types of a field: each member of a union."""
    if get_origin(wanted) is Annotated:
        return options(get_args(wanted)[0])
    if get_origin(wanted) in (Union, UnionType):
        return [option for each in get_args(wanted) for option in options(each)]
    return [wanted]
