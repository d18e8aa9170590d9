"""Sections of typed fields: how values are read, which fields a run keeps when it resumes, and how a field is found.

A field may hold one of several sections, chosen by a tag: the model by its `family`, the objective by its `name`.
Which ones exist is read from a registry when it is needed, so that one can be added without a change here.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any, ClassVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationInfo, field_validator
from pydantic_core import CoreSchema, core_schema

from pipeline import home
from pipeline.config import typed


def _folder(path: str) -> str:
    if "://" in path:
        raise ValueError("it is a URL: name a file or a folder; only data may be on S3")
    return path


Place = Annotated[str, AfterValidator(home.expanded)]  # a path, a URL or a name; of an evaluation set also NAME=URL
Local = Annotated[Place, AfterValidator(_folder)]  # a path


@dataclass(frozen=True)
class Fixed:
    """Marks a field that a run must not change when it resumes.

    by: maps the value to the part of it that must not change; by default all of it.
    """

    by: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class OneOf:
    """Marks a field that holds one of several sections.

    tag: the field of each section whose value chooses it.  sections: returns the sections by that value.
    """

    tag: str
    sections: Callable[[], Mapping[str, "type[Section]"]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {tag: handler.generate_schema(section) for tag, section in self.sections().items()}
        # A function, because pydantic allows nothing else beside a validator of all fields.
        return core_schema.tagged_union_schema(choices, discriminator=self._chosen)

    def _chosen(self, value: Any) -> str | None:
        tag = value.get(self.tag) if isinstance(value, dict) else getattr(value, self.tag, None)
        return None if tag is None else str(tag)


class Section(BaseModel):
    """Fields that are read by their types: YAML gives the text of every value (pipeline/config/typed.py)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if get_origin(annotation) is dict:
            return typed.guess(value)
        if value is None and isinstance(annotation, type) and issubclass(annotation, Section):
            return {}  # a section whose lines are all comments
        return value

    @classmethod
    def describe(cls, prefix: str = "") -> str:
        """Return all fields with their defaults and meanings, one line each, for --help. Fixed ones have a star."""
        lines = []
        for name, field in cls.model_fields.items():
            options = {} if get_origin(field.annotation) is list else sections_of(cls, name)
            if name not in cls.hidden and (field.description or not options):
                default = "" if field.is_required() else json.dumps(field.get_default(), default=lambda _: None)
                star = "*" if any(isinstance(mark, Fixed) for mark in field.metadata) else " "
                lines.append(f"{star} {prefix + name + '=' + default:<34} {field.description or ''}".rstrip())
            for tag, section in options.items():
                if tag:
                    lines.append(f"  {prefix}{name}.{tag_of(cls, name)}={tag}:")
                lines.append(section.describe(f"{prefix}{name}."))
        return "\n".join(lines)

    hidden: ClassVar[tuple[str, ...]] = ()  # fields without a line of their own in `describe`


def sections_of(section: type[Section], name: str) -> dict[str, type[Section]]:
    """The sections that a field may hold, by tag; "" where there is only one; empty for a field of plain values."""
    field = section.model_fields[name]
    for mark in field.metadata:
        if isinstance(mark, OneOf):
            return dict(mark.sections())
    options = [field.annotation, *get_args(field.annotation)]
    found = next((each for each in options if isinstance(each, type) and issubclass(each, Section)), None)
    return {"": found} if found else {}


def tag_of(section: type[Section], name: str) -> str:
    return next((mark.tag for mark in section.model_fields[name].metadata if isinstance(mark, OneOf)), "")


def fixed(section: Section, prefix: str = "") -> dict[str, Any]:
    """Return the JSON values that a run must not change when it resumes, by dotted name."""
    found, values = {}, section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if mark := next((mark for mark in field.metadata if isinstance(mark, Fixed)), None):
            found[prefix + name] = values[name] if mark.by is None else mark.by(value)
        elif isinstance(value, Section):
            found |= fixed(value, f"{prefix}{name}.")
    return found


def same_as_before(root: type[Section], name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether a fixed value is unchanged. A field that did not exist before had its default.

    name: dotted.  before, now: values by name, as `fixed` returns them; the tags in `now` choose among sections.
    """
    section, above = root, ""
    *place, last = name.split(".")
    for part in place:
        options = sections_of(section, part) if part in section.model_fields else {}
        inside = options.get("") or options.get(now.get(f"{above}{part}.{tag_of(section, part)}", ""))
        if inside is None:  # it is no field of a recipe
            return name in before and before[name] == now[name]
        section, above = inside, f"{above}{part}."
    if last not in section.model_fields:
        return name in before and before[name] == now[name]
    if name not in before:
        return now[name] == _default(section, last)
    inner = sections_of(section, last).get("")
    return _completed(inner, before[name]) == now[name]


def _default(section: type[Section], name: str) -> Any:
    field = section.model_fields[name]
    mark = next((mark for mark in field.metadata if isinstance(mark, Fixed)), Fixed())
    default = None if field.is_required() else field.get_default()
    return default if mark.by is None else mark.by(default)


def _completed(section: type[Section] | None, value: Any) -> Any:
    if section and isinstance(value, list):
        return [_completed(section, each) for each in value]
    if section and isinstance(value, dict):
        return {name: _default(section, name) for name in section.model_fields} | value
    return value


def field_names(section: type[Section], prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields below a section."""
    for name in section.model_fields:
        options = sections_of(section, name).values()
        for option in options:
            yield from field_names(option, f"{prefix}{name}.")
        if not options:
            yield prefix + name


def suggestion(unknown: str, here: Collection[str], everywhere: Iterable[str]) -> str:
    """What to write instead of an unknown dotted name: the same name in another section, or a similar one in its own.

    here: the names of its section.  everywhere: all dotted names.
    """
    above, _, name = unknown.rpartition(".")
    same = [other for other in dict.fromkeys(everywhere) if other.rpartition(".")[2] == name and other != unknown]
    near = [f"{above}.{each}" if above else each for each in get_close_matches(name, here, 1)]
    hint = " or ".join(same or near)
    return f"did you mean {hint}?" if hint else f"known here: {', '.join(here)}"


class Registry(dict[str, str]):
    """The implementations of a thing that a recipe names, as its model's family: one package each, by name.

    The module `config` of a package has SECTION, the class of its section of a recipe. A section is imported without
    its package, so that a recipe can be read without torch.
    """

    def sections(self) -> dict[str, type[Section]]:
        return {name: import_module(f"{package}.config").SECTION for name, package in self.items()}

    def module(self, name: str, part: str) -> ModuleType:
        """The module `part` of the package of this name."""
        return import_module(f"{self[name]}.{part}")

    def register(self, name: str, package: str) -> None:
        """Add a package. Recipes accept its section from now on."""
        from pipeline.config import Recipe

        self[name] = package
        Recipe.model_rebuild(force=True)
