"""Low-rank adapters in the language model (LoRA, arXiv 2106.09685), by peft."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from safetensors.torch import save_file
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.config import Lora
from pipeline.errors import PipelineError
from pipeline.models.files import ADAPTERS
from pipeline.models.lean import SharingLinear, shared

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
    for module in model.modules():
        if isinstance(module, Linear):
            module.__class__, module.lora_B["default"].__class__ = AdaptedLinear, AddingLinear
            module.lora_A["default"].__class__ = SharingLinear


class AdaptedLinear(Linear):
    """Adds the adapter's product to the layer's output in place; peft's has three more tensors of the output's width.

    The matmuls scale the product. It also returns its input if the layer does; see `shared`.
    """

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        low, x = self.lora_A["default"](x)
        result, same = shared(self.base_layer, x)
        result = self.lora_B["default"](low, result, self.scaling["default"])
        return (result, same) if isinstance(self.base_layer, SharingLinear) else result


class AddingLinear(torch.nn.Linear):
    """Adds its scaled product to a tensor that nobody else reads.

    It is called as a module so that ZeRO-3's hooks run.
    """

    def forward(  # type: ignore[override]  # only AdaptedLinear calls it
        self, low: Tensor, result: Tensor, scaling: float
    ) -> Tensor:
        return _AddProduct.apply(result, low, self.weight, scaling)


class _AddProduct(torch.autograd.Function):
    """result (..., out) + scaling * low (..., r) @ weight (out, r)^T, in the memory of `result`."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, low: Tensor, weight: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(low, weight)
        ctx.scaling = scaling
        # Detached: a linear layer's result can be a view, and for changed views autograd copies gradients.
        total = result.detach()
        total.view(-1, total.shape[-1]).addmm_(low.flatten(0, -2), weight.t(), alpha=scaling)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        low, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        of_low = _scaled_product(rows, weight, ctx.scaling).view_as(low)
        return gradient, of_low, _scaled_product(rows.t(), low.flatten(0, -2), ctx.scaling), None


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)  # with beta 0 the first is not read


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


def save_adapters(weights: dict[str, torch.Tensor], lora: Lora, base: str, folder: Path) -> None:
    """Write adapters in peft's format.

    weights: of the adapters, by their names in transformers' model.  base: folder or hub name of the model that they
    were trained on.
    """
    layers = sorted(name.removesuffix(_A) for name in weights if name.endswith(_A))
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # it can be a float
        target_modules=layers,  # whole names, because a vision tower can have layers of the same last names
        base_model_name_or_path=base,
        task_type="FEATURE_EXTRACTION",
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    # Names in the file lack the adapter's own name.
    tensors = {f"base_model.model.{name.replace('.default.', '.')}": weight for name, weight in weights.items()}
    save_file({name: weight.detach().cpu().contiguous() for name, weight in tensors.items()}, folder / ADAPTERS)


def is_adapter(name: str) -> bool:
    """Whether it is the name of an adapter's parameter."""
    return name.endswith((_A, _B))
