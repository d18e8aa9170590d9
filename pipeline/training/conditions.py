"""The conditions under which a run may resume from a checkpoint and continue with the same batches."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import Recipe, former, is_offloaded
from pipeline.config.section import fixed, same_as_before
from pipeline.data.lengths import VERSION as LENGTHS_VERSION
from pipeline.data.order import VERSION as ORDER_VERSION
from pipeline.data.source import Source
from pipeline.errors import PipelineError
from pipeline.models.registry import training_of
from pipeline.objectives.objective import objective_of
from pipeline.training import checkpoint

# Values for runs that began before these conditions were stored.
_NOT_NOTED_ONCE = {
    "the order's version": 1,
    "the token lengths' version": 1,
    "the masks' version": 1,
    "model.images": "as_stored",
    "model.marks": "mended",
    "model.prompt": "chat",
    "white space around texts": "stripped",
    "the teacher vectors' fingerprint": None,
    "the mined negatives' fingerprint": None,
    "the neighbours' fingerprint": None,
}


def conditions_of_run(recipe: Recipe, source: Source, zero: dict[str, Any]) -> dict[str, Any]:
    """Return, by name, the recipe's fixed fields and all else that determines a run's batches and its state's shape.

    zero: the DeepSpeed config's "zero_optimization".
    """
    return (
        fixed(recipe)
        | source.fingerprints
        | {
            "the order's version": ORDER_VERSION,
            "the token lengths' version": LENGTHS_VERSION,
            checkpoint.STAGE: zero["stage"],
            "the optimizer is offloaded": is_offloaded(zero),
        }
        | training_of(recipe).conditions(recipe.model)
        | objective_of(recipe).conditions()
    )


def check(path: Path, conditions: Mapping[str, Any]) -> None:
    """Raise PipelineError unless a run under these conditions can resume from the checkpoint."""
    before = checkpoint.conditions_of(path)
    if changed := changes(before, conditions):
        raise PipelineError(
            f"cannot resume from {path}: {'; '.join(changed)}. Restore it, or set run= to a new directory"
        )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each condition that differs from those stored by a run of any version."""
    before = _NOT_NOTED_ONCE | former.conditions(before)
    different = (name for name in now if not same_as_before(Recipe, name, before, now))
    return [f"{name} was {before.get(name)} and is now {now[name]}" for name in different]
