"""A trained engine -> a Hugging Face folder that transformers loads alone."""

import shutil
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from pipeline.config import Lora
from pipeline.models.llave import save_folder
from pipeline.models.lora import merge_adapters
from pipeline.models.tower import FrozenTower


def export(
    engine: deepspeed.DeepSpeedEngine, tower: FrozenTower | None, lora: Lora | None, source: str, folder: Path
) -> None:
    """Write the engine's weights, with the tokenizer and image processor of `source`, to `folder`; whole or not.

    tower: the vision tower, where it is not part of the engine.  lora: the adapters to be merged.
    """
    weights = _gathered(engine)
    if dist.get_rank() == 0:
        if lora:
            weights = merge_adapters(weights, lora)
        if tower is not None:
            weights |= {name: parameter.to("cpu") for name, parameter in tower.named_parameters()}
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        save_folder(engine.module, weights, source, unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    dist.barrier()


def _gathered(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The module's parameters on the CPU of rank 0, one whole at a time; empty on the other ranks."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        # Where it is not partitioned this does nothing.
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights
