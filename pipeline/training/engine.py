"""A recipe and a DeepSpeed config -> an engine whose parameters are where ZeRO wants them."""

import math
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam

from pipeline.config import Optimizer, Recipe, Train, is_offloaded
from pipeline.errors import PipelineError
from pipeline.models.attention import choose
from pipeline.models.llave import DTYPES, Llave, TowerlessLlave
from pipeline.models.lora import add_adapters
from pipeline.models.tower import FrozenTower
from pipeline.training.partitions import load_partitioned

# What can be trained or frozen: the beginnings of its parameters' names.
PARTS = {
    "projector": ("multi_modal_projector.", "image_newline"),
    "language_model": ("language_model.",),
    "vision_tower": ("vision_tower.",),
}


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
    if recipe.batch.activation_checkpointing:
        model.checkpoint_activations()
    # Offloaded gradients count where a step's last backward pass has one: what it leaves out would be lost.
    model.always_with_images = is_offloaded(config["zero_optimization"])
    optimizer = adamw(parameter_groups(model, recipe), recipe.optimizer.lr, config["zero_optimization"])
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


def adamw(groups: list[dict], lr: float, zero: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW of where its state is: torch's, one kernel a step on CUDA; on the host, if offloaded to it, DeepSpeed's.

    zero: a DeepSpeed config's "zero_optimization".
    """
    if not is_offloaded(zero):
        return torch.optim.AdamW(groups, lr=lr, fused=get_accelerator().device_name() == "cuda" or None)
    try:
        return DeepSpeedCPUAdam(groups, lr=lr)
    except RuntimeError as error:
        raise PipelineError(f"offload_optimizer needs a kernel that could not be compiled: {error.__cause__}") from None


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
