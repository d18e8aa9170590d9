"""A recipe and a DeepSpeed config -> an engine whose parameters are where ZeRO wants them."""

import logging
import math
import os
import sys
import time
import warnings
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
import torch.distributed as dist
import transformers
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import _get_build_directory

from pipeline.config import Optimizer, Recipe, Train
from pipeline.errors import PipelineError
from pipeline.models.attention import choose
from pipeline.models.llave import DTYPES, Llave, TowerlessLlave
from pipeline.models.lora import add_adapters
from pipeline.models.tower import FrozenTower
from pipeline.training.partitions import load_partitioned

_LONGEST_BUILD = 600  # seconds

# What can be trained or frozen: the beginnings of its parameters' names.
PARTS = {
    "projector": ("multi_modal_projector.", "image_newline"),
    "language_model": ("language_model.",),
    "vision_tower": ("vision_tower.",),
}


def start_distributed(timeout_minutes: float) -> torch.device:
    """Join the process group that the launcher's environment describes; alone, make one of one process.

    Returns this process's device. A collective that waits longer than the time limit ends the process.
    """
    transformers.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed still calls collectives by the names they had before torch 2.13, several a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        raise PipelineError("several tasks of srun, but no RANK: start torchrun as one task of each node")
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    _refuse_stale_lock()
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    backend = "gloo" if accelerator.device_name() == "cpu" else accelerator.communication_backend_name()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(
        dist_backend=backend,
        timeout=timedelta(minutes=timeout_minutes),
        verbose=False,
        auto_mpi_discovery=False,
    )
    return torch.device(accelerator.device_name(local_rank) if backend != "gloo" else "cpu")


def end_distributed() -> NoReturn:
    """End this process with success, when all ranks have come here.

    At once: gloo's threads now and then abort a Python that takes its time to end, after all was done.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _refuse_stale_lock() -> None:
    """PyTorch waits for ever for whoever builds DeepSpeed's kernels, also if that was killed meanwhile."""
    lock = Path(_get_build_directory("deepspeed_shm_comm_op", verbose=False), "lock")
    with suppress(FileNotFoundError):
        if time.time() - lock.stat().st_mtime > _LONGEST_BUILD:
            raise PipelineError(f"{lock} is left from a build that was killed: delete it and start again")


def build_engine(recipe: Recipe, config: dict[str, Any], model_path: str) -> deepspeed.DeepSpeedEngine:
    """Load the model (under ZeRO-3 straight into its partitions) and give it an optimizer and its sharding.

    A vision tower that is not trained is left out: see `load_tower`.
    config: DeepSpeed's, as `load_ds_config` fills it.
    """
    kind = Llave if recipe.train.vision_tower else TowerlessLlave
    dtype, pinpoints = DTYPES[recipe.precision], recipe.model.image_grid_pinpoints
    attention = choose(recipe.model.attention, get_accelerator().device_name(), dtype)
    if dist.get_rank() == 0:
        print(f"attention: {attention}")
    if config["zero_optimization"]["stage"] == 3:
        model = load_partitioned(kind, model_path, kind.config_for(model_path, pinpoints, attention), config)
    else:
        model = kind.load(model_path, dtype, pinpoints, attention)
    freeze(model, recipe.train)
    if recipe.train.lora:
        add_adapters(model.language_model, recipe.train.lora, seed=recipe.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.optimizer.lr)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def load_tower(recipe: Recipe, model_path: str, device: torch.device) -> FrozenTower | None:
    """The vision tower, where it is not trained and so not part of the engine."""
    return None if recipe.train.vision_tower else FrozenTower.load(model_path, DTYPES[recipe.precision], device)


def freeze(model: torch.nn.Module, train: Train) -> None:
    """Have only what the recipe trains take gradients."""
    if model.vision_tower is not None:
        # The embedding reads the tower before its final norm, which so has none.
        model.vision_tower.post_layernorm.requires_grad_(False)
    for part, prefixes in PARTS.items():
        if not getattr(train, part) or (part == "language_model" and train.lora):
            for name, parameter in model.named_parameters():
                if name.startswith(prefixes):
                    parameter.requires_grad_(False)


def parameter_groups(model: torch.nn.Module, recipe: Recipe) -> list[dict]:
    """AdamW's groups: of each trained part its matrices, and its vectors, which by custom are spared weight decay.

    lr_scale: the part's learning rate by `optimizer.lr`.
    """
    groups, optimizer = [], recipe.optimizer
    for part, prefixes in PARTS.items():
        trained = [p for name, p in model.named_parameters() if name.startswith(prefixes) and p.requires_grad]
        rate = getattr(recipe.train, part)
        scale = 1.0 if isinstance(rate, bool) else rate / optimizer.lr
        for matrices, weight_decay in ((True, optimizer.weight_decay), (False, 0.0)):
            if parameters := [p for p in trained if _is_matrix(p) == matrices]:
                options = {"betas": optimizer.betas, "eps": optimizer.eps, "weight_decay": weight_decay}
                groups.append({"params": parameters, "lr_scale": scale} | options)
    return groups


def set_hyperparameters(engine: deepspeed.DeepSpeedEngine, recipe: Recipe) -> None:
    """Give the recipe's to an optimizer to which a checkpoint brought its own."""
    for group, wanted in zip(engine.optimizer.param_groups, parameter_groups(engine.module, recipe), strict=True):
        group.update({name: value for name, value in wanted.items() if name != "params"})


def learning_rate(step: int, steps: int, optimizer: Optimizer) -> float:
    """Linear warm-up over the first `warmup_ratio` of the steps, then a cosine down to zero at the end."""
    warmup = math.ceil(optimizer.warmup_ratio * steps)
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    return optimizer.lr * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2


def _is_matrix(parameter: torch.nn.Parameter) -> bool:
    return len(getattr(parameter, "ds_shape", parameter.shape)) > 1  # a ZeRO-3 partition is always flat
