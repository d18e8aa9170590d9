"""Read recipes, options and DeepSpeed configs; every error names the field and what to write."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from pipeline.config import former, typed
from pipeline.config.recipe import Recipe
from pipeline.config.section import Section, field_names, sections_of, suggestion, tag_of
from pipeline.errors import PipelineError, shown

_PACKAGE = Path(__file__).resolve().parents[1]
ROOT = _PACKAGE.parent  # a checkout, or the folder that the package is installed in

SectionType = TypeVar("SectionType", bound=Section)

# A field set on the command line replaces its alternative in the recipe.
_ALTERNATIVES = {
    "steps": "epochs",
    "epochs": "steps",
    "model.path": "model.architecture",
    "model.architecture": "model.path",
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides (values are YAML). Errors name the field and the nearest known one.

    `variant=NAME` first applies the overrides that the recipe lists under `variants`.
    """
    path = _existing(path, "recipes", "recipe")
    values = _read(path)
    former.refuse(values, overrides, str(path))
    variants = values.pop("variants", None)
    for name in [override.removeprefix("variant=") for override in overrides if override.startswith("variant=")]:
        for key, value in _variant(variants, name, path).items():
            _set(values, key, value, f"{path}: variants.{name}: {key}")
    overrides = [override for override in overrides if not override.startswith("variant=")]
    return _validated(Recipe, _overridden(values, overrides), f"{path}: ")


def _existing(name: str | Path, folder: str, kind: str) -> Path:
    """Find the file `name`: in the working directory, in the checkout, or among the project's own files.

    The project's own files can be named alone or by their path in a checkout: demo.yaml, pipeline/recipes/demo.yaml.
    """
    path = Path(name)
    for place in (path, ROOT / path):
        if os.path.exists(place):  # noqa: PTH110 (Path.exists raises for a name that is too long)
            return place
    own = {file.name: file for file in (_PACKAGE / folder).glob("*.*")}
    if path.name in own and path.parent.as_posix() in (".", folder, f"pipeline/{folder}"):
        return own[path.name]
    raise PipelineError(f"no {kind} at {path}; the project's own are {', '.join(sorted(own))}")


def recipe_of_run(run: Path) -> Recipe:
    """Load the recipe stored in a run directory, including one of an earlier version."""
    path = run / "recipe.yaml"
    if not path.exists():
        raise PipelineError(f"no recipe at {path}: is {run} a run directory?")
    return _validated(Recipe, former.recipe(_read(path)), f"{path}: ")


def _read(path: Path) -> dict[str, Any]:
    values = typed.parse(typed.read_text(path), str(path))
    if not isinstance(values, dict):
        raise PipelineError(f"{path} is not a recipe: expected `key: value` lines")
    return values


def _variant(variants: Any, name: str, path: Path) -> dict[str, Any]:
    """Return a variant's overrides by dotted name."""
    variants = variants if isinstance(variants, dict) else {}
    if name not in variants:
        raise PipelineError(f"{path} has no variant {name!r}; it has {', '.join(variants) or 'none'}")
    if not isinstance(fields := variants[name], dict):
        raise PipelineError(f"{path}: variants.{name}: list below it what it sets, such as optimizer.lr: 2e-5")
    return fields


def parse_options(section: type[SectionType], options: list[str]) -> SectionType:
    """Parse `key=value` arguments as a section. Raises the errors of `load_recipe`."""
    return _validated(section, _overridden({}, options), "")


def dump_recipe(recipe: Recipe) -> str:
    return typed.dump(recipe.model_dump(mode="json"))


def load_ds_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """Read the recipe's DeepSpeed config, fill each "auto" from the recipe, and refuse settings that contradict it.

    The contrastive batch is cut into chunks inside one optimizer step (pipeline/objectives/contrastive/step.py), so for
    DeepSpeed a rank's share of the global batch is one micro-batch.
    """
    from pipeline.config import deepspeed  # imported here because it imports DeepSpeed

    path = _existing(recipe.deepspeed, "ds_configs", "DeepSpeed config")
    try:
        return deepspeed.completed(path, recipe, world_size)
    except ValueError as error:
        raise PipelineError(f"{path}: {error}") from None


def is_offloaded(zero: dict[str, Any]) -> bool:
    """Return whether a DeepSpeed config's "zero_optimization" offloads the optimizer to the CPU."""
    return zero.get("offload_optimizer", {}).get("device", "none") == "cpu"


def _overridden(values: dict, overrides: list[str]) -> dict:
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key or text.startswith("="):
            raise PipelineError(f"cannot read {override!r}: write it as key=value, e.g. optimizer.lr=2e-5")
        value = typed.parse(text, override)
        if " #" in text and "#" not in str(value):
            raise PipelineError(
                f"cannot read {override!r}: YAML takes what follows ' #' for a comment: use quotes in it"
            )
        _set(values, key.strip(), value, override)
    return values


def _validated(section: type[SectionType], values: dict, where: str) -> SectionType:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise PipelineError(where + "; ".join(dict.fromkeys(_explain(section, e) for e in error.errors()))) from None


def _set(values: dict, name: str, value: Any, override: str) -> None:
    """Set a field by its dotted name, and remove its alternative.  override: what a user wrote, for messages."""
    *place, last = name.split(".")
    if not last or not all(place):
        raise PipelineError(f"cannot set {override!r}: a name is missing beside a dot")
    section = values
    for depth, key in enumerate(place, 1):
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if isinstance(section, list):
            raise PipelineError(
                f"cannot set {override!r}: {key} is a list: set all of it, {'.'.join(place[:depth])}=[...]"
            )
        if not isinstance(section, dict):
            raise PipelineError(f"cannot set {override!r}: {key} is a single value, not a section")
    section[last] = value
    if value is not None and name in _ALTERNATIVES:
        _set(values, _ALTERNATIVES[name], None, override)


def _explain(root: type[Section], error: Mapping[str, Any]) -> str:
    """Describe one pydantic error in a sentence; for an unknown field, suggest similar names."""
    place: list[str | int] = []
    section: type[Section] | None = root
    section_above = root
    options: Mapping[str, type[Section]] = {}
    for part in error["loc"]:  # pydantic includes the tags and types of unions
        if section is None and part in options:
            section = options[str(part)]
        elif isinstance(part, int) or (section and part in section.model_fields):
            place.append(part)
            if section and isinstance(part, str):
                options, section_above = sections_of(section, part), section
                section = options.get("")
        elif error["type"] == "extra_forbidden" and part == error["loc"][-1]:
            known = section.model_fields if section else options
            unknown = ".".join(map(str, [*place, part]))
            return f"unknown field {unknown}; {suggestion(unknown, known, field_names(root))}"
    name, kind = ".".join(map(str, place)), error["type"]
    if kind == "missing":
        return f"{name} is missing"
    if error["input"] is None:
        return f"{name}: it is empty: give a value, or leave it out for its default"
    if kind == "string_type" and isinstance(error["input"], dict):
        return f"{name} is a mapping: write a text that has a colon and a space in quotes, 'key=\"a: b\"'"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tag = tag_of(section_above, str(place[-1]))
        given = error["input"].get(tag) if isinstance(error["input"], dict) else None
        wrong = "is missing" if given is None else f"is {shown(str(given))}"
        return f"{name}.{tag} {wrong}: set it to one of {', '.join(options)}"
    if kind == "value_error":  # a check of a section names its fields
        return ("" if section else f"{name}: ") + str(error["msg"]).removeprefix("Value error, ")
    if kind in ("list_type", "tuple_type"):
        return f"{name} is a list: write [{error['input']}]"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        fields = ", ".join(section.model_fields) if section else ", ".join(options)
        return f"{name or 'this'} is a section{f', of {fields}' if fields else ''}; got {shown(error['input'])}"
    return f"{name}: {error['msg']}, got {shown(error['input'])}"
