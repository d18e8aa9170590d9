"""Write a trained model as a Hugging Face folder that transformers loads without this package."""

import logging
from pathlib import Path
from typing import cast

import deepspeed
import torch
import torch.distributed as dist

from pipeline.config import Recipe
from pipeline.distributed import on_first_rank
from pipeline.errors import PipelineError, disk_errors
from pipeline.models.chunks import Frozen
from pipeline.models.folder import note_sizes
from pipeline.models.lora import is_adapter, merge_adapters, save_adapters
from pipeline.models.registry import training_of
from pipeline.storage.atomic import remove_leftovers, replacing

logger = logging.getLogger(__name__)


def export(engine: deepspeed.DeepSpeedEngine, frozen: Frozen | None, recipe: Recipe, source: str, folder: Path) -> None:
    """Write the engine's weights, and the tokenizer and image processor of `source`, to `folder` atomically.

    frozen: the part outside the engine.  Collective; the first rank holds one copy of all weights in CPU memory.
    """
    weights = _gathered(engine)
    if dist.get_rank() == 0:
        weights = training_of(recipe).exported(weights, frozen)

    def write() -> None:
        with disk_errors(folder):
            write_folder(engine.module, weights, recipe, source, folder)

    on_first_rank(write)


def write_folder(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], recipe: Recipe, source: str, folder: Path
) -> None:
    """Write `weights`, with adapters merged, to a folder atomically, in one process.

    An existing folder is replaced once the new one is complete. With adapters, `weights` is empty afterwards.
    """
    remove_leftovers(folder.parent, folder.name)
    merged = merge_adapters(weights, lora) if (lora := recipe.model.train.adapters) else weights
    with replacing(folder) as partial:
        training_of(recipe).save(recipe, model, merged, source, partial)
        note_sizes(partial, cast(int, model.dimension), recipe.objective.sizes, recipe.objective.rounding)


def write_adapters(model: torch.nn.Module, recipe: Recipe, source: str, folder: Path) -> None:
    """Write a model's adapters, unmerged, to a folder in peft's format atomically, in one process.

    It has the tokenizer and all else of an export, but weights and config.json, which are those of the base model.
    Raises PipelineError if the recipe trains no adapters, or more than adapters, or a model that needs more than them.
    """
    lora, family = recipe.model.train.adapters, training_of(recipe)
    if lora is None:
        raise PipelineError("--adapters: this run trained no adapters: export without --adapters")
    prefix = family.adapter_prefix(recipe, source)
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if more := next((name for name in weights if not is_adapter(name)), None):
        raise PipelineError(
            f"--adapters: this run also trained {more}, of the base model: export without --adapters, or train with "
            "all but model.train.language_model set to false"
        )
    base = recipe.model.path or source
    if family.converts(base):
        logger.warning(
            "the adapters' base model is the converted copy of %s in the run, %s: keep it there. To publish adapters, "
            "convert the original with tools/convert_weights.py first, and train on that folder",
            base,
            source,
        )
        base = source
    remove_leftovers(folder.parent, folder.name)
    with replacing(folder) as partial:
        family.save(recipe, model, {}, source, partial)
        note_sizes(partial, cast(int, model.dimension), recipe.objective.sizes, recipe.objective.rounding)
        (partial / "config.json").unlink()  # transformers would take the folder for a whole model
        named = {name.removeprefix(prefix): weight.data for name, weight in weights.items()}
        save_adapters(named, lora, str(Path(base).resolve()) if Path(base).is_dir() else base, partial)


def _gathered(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Return the module's parameters on rank 0's CPU, gathered one at a time; empty on the other ranks."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        # Does nothing for a parameter that is not partitioned.
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights
