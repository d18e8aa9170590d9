"""Build a DeepSpeed engine from a recipe and a DeepSpeed config."""

import logging
import math
from typing import Any, Protocol, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam

from pipeline.config import Optimizer, Recipe, is_offloaded
from pipeline.errors import PipelineError
from pipeline.models import kernels
from pipeline.models.attention import HALF, choose
from pipeline.models.checkpointing import checkpoint_layers
from pipeline.models.chunks import Frozen
from pipeline.models.loading import DTYPES
from pipeline.models.lora import add_adapters
from pipeline.models.registry import training_of
from pipeline.training.partitions import load_partitioned

logger = logging.getLogger(__name__)


class _Trained(Protocol):
    """The members that a family's model adds to torch's Module."""

    always_with_images: bool


def build_engine(recipe: Recipe, config: dict[str, Any], model_path: str) -> deepspeed.DeepSpeedEngine:
    """Load the model (under ZeRO-3 directly into its partitions), and build its engine with the optimizer. Collective.

    A frozen part outside the engine is not included: see `load_frozen`.
    config: DeepSpeed's config, from `load_ds_config`.
    """
    family, device = training_of(recipe), get_accelerator().device_name()
    dtype = cast(torch.dtype, DTYPES[recipe.precision])
    attention = choose(recipe.model.attention, device, dtype, family.decoder(recipe))
    if device == "cuda" and dtype in HALF:
        kernels.agree()
    if dist.get_rank() == 0:
        logger.info("attention: %s", attention)
    if config["zero_optimization"]["stage"] == 3:
        model = load_partitioned(family, recipe, model_path, attention, config)
    else:
        model = family.load(recipe, model_path, attention)
    freeze(model, recipe)
    adapt(model, recipe)
    if recipe.batch.activation_checkpointing:
        checkpoint_layers(model)
    # DeepSpeed drops a parameter's offloaded gradient if the step's last backward pass computes none for it.
    cast(_Trained, model).always_with_images = is_offloaded(config["zero_optimization"])
    optimizer = adamw(parameter_groups(model, recipe), recipe.optimizer.lr, config["zero_optimization"])
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def load_frozen(recipe: Recipe, model_path: str, device: torch.device) -> Frozen | None:
    """Load the model's frozen part that stays outside the engine; None if it has none.

    Call this before `build_engine`: under ZeRO-3 the part must not be partitioned.
    """
    return training_of(recipe).frozen(recipe, model_path, device)


def freeze(model: torch.nn.Module, recipe: Recipe) -> None:
    """Freeze all parameters that the recipe does not train."""
    train, family = recipe.model.train, training_of(recipe)
    frozen = family.unused
    for part, prefixes in train.parts().items():
        if not getattr(train, part) or (part == family.adapted and train.adapters):
            frozen += prefixes
    for name, parameter in model.named_parameters():
        if name.startswith(frozen):
            parameter.requires_grad_(False)


def adapt(model: torch.nn.Module, recipe: Recipe) -> None:
    """Add adapters to the family's adapted part, if the recipe asks for them."""
    if lora := recipe.model.train.adapters:
        add_adapters(model.get_submodule(training_of(recipe).adapted), lora, recipe.seed)


def parameter_groups(model: torch.nn.Module, recipe: Recipe) -> list[dict]:
    """Return AdamW's groups: for each trained part and factor, one of matrices and one of vectors without weight decay.

    part: its name.
    lr_scale: the part's learning rate divided by `optimizer.lr`, times the family's factor (see `rate_factors`).
    """
    groups, optimizer, family = [], recipe.optimizer, training_of(recipe)
    factors = family.rate_factors(recipe.model, [name for name, _ in model.named_parameters()])
    for part, prefixes in recipe.model.train.parts().items():
        trained = [(n, p) for n, p in model.named_parameters() if n.startswith(prefixes) and p.requires_grad]
        rate = getattr(recipe.model.train, part)
        scale = 1.0 if isinstance(rate, bool) else rate / optimizer.lr
        kinds: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
        for name, parameter in trained:
            decays = _is_matrix(parameter) and not (factors and family.undecayed(name))
            kinds.setdefault((factors[name] if factors else 1.0, decays), []).append(parameter)
        for (factor, decays), parameters in sorted(kinds.items(), key=lambda kind: (kind[0][0], not kind[0][1])):
            decay = optimizer.weight_decay if decays else 0.0
            options = {"betas": optimizer.betas, "eps": optimizer.eps, "weight_decay": decay}
            groups.append({"params": parameters, "part": part, "lr_scale": scale * factor} | options)
    return groups


def adamw(groups: list[dict], lr: float, zero: dict[str, Any]) -> torch.optim.Optimizer:
    """Return torch's AdamW (fused on CUDA), or DeepSpeed's AdamW on the CPU if the optimizer is offloaded.

    zero: a DeepSpeed config's "zero_optimization".  Raises PipelineError if the CPU kernel cannot be compiled.
    """
    if not is_offloaded(zero):
        return torch.optim.AdamW(groups, lr=lr, fused=get_accelerator().device_name() == "cuda" or None)
    try:
        return DeepSpeedCPUAdam(groups, lr=lr)
    except RuntimeError as error:
        raise PipelineError(f"offload_optimizer needs a kernel that could not be compiled: {error.__cause__}") from None


def set_hyperparameters(engine: deepspeed.DeepSpeedEngine, recipe: Recipe) -> None:
    """Set the recipe's hyperparameters in the optimizer, after a checkpoint has restored older ones."""
    for group, wanted in zip(engine.optimizer.param_groups, parameter_groups(engine.module, recipe), strict=True):
        group.update({name: value for name, value in wanted.items() if name != "params"})


def learning_rate(step: int, steps: int, optimizer: Optimizer) -> float:
    """Return the learning rate: linear warm-up over the first `warmup_ratio` of steps, then cosine decay to zero."""
    warmup = math.ceil(optimizer.warmup_ratio * steps)
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    return optimizer.lr * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2


def part_rates(recipe: Recipe, lr: float) -> dict[str, float]:
    """Return the learning rates of the parts that have their own.  lr: that of the others."""
    rates = {part: getattr(recipe.model.train, part) for part in recipe.model.train.parts()}
    return {part: lr * rate / recipe.optimizer.lr for part, rate in rates.items() if not isinstance(rate, bool)}


def _is_matrix(parameter: torch.nn.Parameter) -> bool:
    return len(getattr(parameter, "ds_shape", parameter.shape)) > 1  # a ZeRO-3 partition is always flat
