"""A recipe and a DeepSpeed config -> an engine whose parameters are where ZeRO wants them."""

import logging
import math
import os
import warnings
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

from pipeline.config import Optimizer, Recipe
from pipeline.errors import PipelineError
from pipeline.models.llave import Llave


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


def build_engine(recipe: Recipe, config: dict[str, Any], model_path: str) -> deepspeed.DeepSpeedEngine:
    """Load the model (under ZeRO-3 straight into its partitions) and give it an optimizer and its sharding.

    config: DeepSpeed's, as `load_ds_config` fills it.
    """
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    if config["zero_optimization"]["stage"] == 3:
        # While this object lives, from_pretrained partitions each weight as it reads it.
        partitioned = HfDeepSpeedConfig(config)
        model = Llave.load(model_path, dtype)
        del partitioned
        unset_hf_deepspeed_config()
    else:
        model = Llave.load(model_path, dtype)
    engine, *_ = deepspeed.initialize(model=model, optimizer=_adamw(model, recipe.optimizer), config=config)
    return engine


def set_hyperparameters(param_groups: list[dict], optimizer: Optimizer) -> None:
    """Give the recipe's to (matrices, vectors): a new optimizer's, or one's that a checkpoint brought its own."""
    matrices, vectors = param_groups
    # Vectors (norms, biases) are spared weight decay, as is the custom.
    for group, weight_decay in ((matrices, optimizer.weight_decay), (vectors, 0.0)):
        group.update(betas=optimizer.betas, eps=optimizer.eps, weight_decay=weight_decay)


def learning_rate(step: int, steps: int, optimizer: Optimizer) -> float:
    """Linear warm-up over the first `warmup_ratio` of the steps, then a cosine down to zero at the end."""
    warmup = math.ceil(optimizer.warmup_ratio * steps)
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    return optimizer.lr * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2


def _adamw(model: torch.nn.Module, optimizer: Optimizer) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [[p for p in trained if _is_matrix(p)], [p for p in trained if not _is_matrix(p)]]
    adamw = torch.optim.AdamW([{"params": group} for group in groups], lr=optimizer.lr)
    set_hyperparameters(adamw.param_groups, optimizer)
    return adamw


def _is_matrix(parameter: torch.nn.Parameter) -> bool:
    return len(getattr(parameter, "ds_shape", parameter.shape)) > 1  # a ZeRO-3 partition is always flat
