"""Low-rank adapters in the language model (LoRA, arXiv 2106.09685), by peft."""

import torch
from peft import LoraConfig, inject_adapter_in_model

from pipeline.config import Lora
from pipeline.errors import PipelineError

_BASE, _A, _B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def add_adapters(model: torch.nn.Module, lora: Lora, seed: int) -> None:
    """Put adapters beside the targeted linear layers; they alone are then trained. Equal on all ranks, by the seed.

    Raises PipelineError for a target that names no linear layer.
    """
    linear = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    if wrong := [target for target in lora.targets if target not in linear]:
        raise PipelineError(
            f"model.train.lora.targets has {wrong[0]}; its linear layers are {', '.join(sorted(linear))}"
        )
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets)  # type: ignore[arg-type]  # it takes fractions
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def merge_adapters(weights: dict[str, torch.Tensor], lora: Lora) -> dict[str, torch.Tensor]:
    """Weights by name -> those of the model without adapters that computes the same, up to the weights' dtype.

    They are taken out of `weights` as they are merged, so that no two copies of a model need be there at once.
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
