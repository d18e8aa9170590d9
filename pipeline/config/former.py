"""What earlier versions wrote: recipes with `model.kind`, `train` and `loss`, and the conditions of runs of such.

A recipe of a person is refused, with the lines to write instead. What a run directory keeps is translated.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import typed
from pipeline.errors import PipelineError

# kind -> (family, objective). Every other kind is the family of the same name, with the contrastive objective.
_KINDS = {"caption": ("text_encoder", "contrastive"), "mntp": ("text_encoder", "masked_next_token")}
_LOSS, _TRAINED = "the loss", "what is trained"  # names of conditions


def refuse(values: Mapping[str, Any], overrides: Sequence[str], where: str) -> None:
    """Raise PipelineError for a recipe or an override in the form of an earlier version."""
    model = values.get("model")
    left = [name for name in ("train", "loss") if name in values]
    if left and isinstance(model, dict) and "family" in model:
        raise PipelineError(
            f"{where}: {' and '.join(left)}: sections of an earlier version. Move the fields of train to model.train, "
            "and those of loss to objective"
        )
    if left or (isinstance(model, dict) and "kind" in model):
        new = recipe(values)
        changed = {name: new["model"][name] for name in ("family", "train") if name in new["model"]}
        lines = typed.dump(typed.guess({"model": changed, "objective": new["objective"]}))
        raise PipelineError(
            f"{where}: model.kind, train and loss are fields of an earlier version. Remove them, and write instead, "
            f"with the other lines of model as they are:\n{lines}"
        )
    for text in overrides:
        key, _, value = text.partition("=")
        family, objective = _KINDS.get(value, (value, "contrastive"))
        for old, name in (("train", "model.train"), ("loss", "objective")):
            if key == old or key.startswith(f"{old}."):
                raise PipelineError(f"{key} is now {name}{key.removeprefix(old)}: write {name}{text.removeprefix(old)}")
        if key == "model.kind":
            raise PipelineError(f"{key} is now two: write model.family={family} objective.name={objective}")


def recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a recipe of any version to this version. Fields that the family or the objective lacks are dropped."""
    from pipeline.models.registry import FAMILIES  # imported here: its sections use classes of pipeline.config
    from pipeline.objectives import OBJECTIVES

    model = values.get("model") or {}
    model = dict(model) if isinstance(model, dict) else {}
    if "family" in model:
        return dict(values)
    kind = str(model.pop("kind", "llave"))
    family, objective = _KINDS.get(kind, (kind, "contrastive"))
    if family not in FAMILIES.sections():
        raise PipelineError(
            f"model.kind={kind} is unknown: set model.family to one of {', '.join(FAMILIES.sections())}"
        )
    section = FAMILIES.sections()[family]
    if isinstance(architecture := model.get("architecture"), dict):
        model["architecture"] = {name: part for name, part in architecture.items() if part}
    train = _known(values.get("train"), section.model_fields["train"].annotation)
    loss = _known(values.get("loss"), OBJECTIVES.sections()[objective])
    rest = {name: value for name, value in values.items() if name not in ("model", "train", "loss")}
    model = {"family": family} | _known(model, section) | ({"train": train} if train else {})
    return rest | {"model": model, "objective": {"name": objective} | loss}


def _known(values: Any, section: Any) -> dict[str, Any]:
    values = values if isinstance(values, dict) else {}
    return {name: value for name, value in values.items() if name in section.model_fields}


def conditions(before: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the conditions of a run that any version began to the names of this version."""
    if _LOSS not in before:
        return dict(before)
    model = {name: value for name, value in before["model"].items() if name != "images"}
    new = recipe({"model": model, "train": before[_TRAINED], "loss": before[_LOSS]})
    fields = {f"model.train.{name}": value for name, value in new["model"].pop("train").items()}
    fields |= {f"{section}.{name}": value for section in ("model", "objective") for name, value in new[section].items()}
    return fields | {name: value for name, value in before.items() if name not in (_LOSS, _TRAINED, "model")}
