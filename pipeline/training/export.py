"""A trained engine -> a Hugging Face folder that transformers loads alone."""

import shutil
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from pipeline.config import Lora
from pipeline.models.folder import save_folder
from pipeline.models.lora import merge_adapters
from pipeline.models.tower import FrozenTower


def export(
    engine: deepspeed.DeepSpeedEngine,
    tower: FrozenTower | None,
    lora: Lora | None,
    source: str,
    base: str | None,
    folder: Path,
) -> None:
    """Write the engine's weights, with the tokenizer and image processor of `source`, to `folder`; whole or not.

    tower: the vision tower, where it is not part of the engine.  lora: the adapters to be merged.
    base: the path or hub name that training began with.
    """
    weights = _gathered(engine)
    if dist.get_rank() == 0:
        if tower is not None:
            weights |= {name: parameter.to("cpu") for name, parameter in tower.named_parameters()}
        shutil.rmtree(folder, ignore_errors=True)
        write_folder(engine.module, weights, lora, source, base, folder)
    dist.barrier()


def write_folder(
    model: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    lora: Lora | None,
    source: str,
    base: str | None,
    folder: Path,
) -> None:
    """Write `weights` to a folder that is whole or not there; as `export`, in one process."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    save_folder(model, merge_adapters(weights, lora) if lora else weights, source, unfinished, base)
    unfinished.rename(folder)


def _gathered(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The module's parameters on the CPU of rank 0, one whole at a time; empty on the other ranks."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        # Where it is not partitioned this does nothing.
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights
