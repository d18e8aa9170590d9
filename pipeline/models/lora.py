"""Low-rank adapters in the language model (LoRA, arXiv 2106.09685), by peft."""

import torch
from peft import LoraConfig, inject_adapter_in_model

from pipeline.config import Lora
from pipeline.errors import PipelineError

_BASE, _A, _B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def add_adapters(model: torch.nn.Module, lora: Lora, seed: int) -> None:
    """Add adapters to the targeted linear layers and freeze the rest of `model`. A seed makes them equal on all ranks.

    Raises PipelineError for a target that names no linear layer.
    """
    linear = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    if wrong := [target for target in lora.targets if target not in linear]:
        raise PipelineError(
            f"model.train.lora.targets has {wrong[0]}; its linear layers are {', '.join(sorted(linear))}"
        )
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets)  # type: ignore[arg-type]  # alpha can be a float
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def merge_adapters(weights: dict[str, torch.Tensor], lora: Lora) -> dict[str, torch.Tensor]:
    """Return the weights of an equivalent model without adapters, up to rounding to the weights' dtype.

    Entries are removed from `weights` as they are merged, so that memory never holds two copies of the model.
    """
    merged = {}
    for name in [name for name in weights if not name.endswith((_A, _B))]:
        weight = weights.pop(name)
        layer, base, leaf = name.partition(_BASE)
        if base and leaf == "weight":
            low, high = (weights.pop(layer + adapter).double() for adapter in (_A, _B))
            weight = (weight.double() + lora.alpha / lora.rank * (high @ low)).to(weight.dtype)
        merged[f"{layer}.{leaf}" if base else name] = weight
    return merged
