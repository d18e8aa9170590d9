"""Write a trained model as a Hugging Face folder that transformers loads without this package."""

from pathlib import Path
from typing import cast

import deepspeed
import torch
import torch.distributed as dist

from pipeline.config import Recipe
from pipeline.distributed import on_first_rank
from pipeline.errors import disk_errors
from pipeline.models.chunks import Frozen
from pipeline.models.folder import note_sizes
from pipeline.models.lora import merge_adapters
from pipeline.models.registry import training_of
from pipeline.storage.atomic import remove_leftovers, replacing


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


def _gathered(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Return the module's parameters on rank 0's CPU, gathered one at a time; empty on the other ranks."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        # Does nothing for a parameter that is not partitioned.
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights
