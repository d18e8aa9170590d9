"""FLOPs that a training step needs of a model, the numerator of model FLOPs utilisation (arXiv 2204.02311, appendix B).

A multiplication with an addition counts as two. A matrix takes 2 N for each row that it is multiplied with, N being its
elements: 2 N forward, 2 N for the gradient of its input if anything before it is trained, and 2 N for its own gradient
if it is trained. Attention takes 4 width forward and 8 width backward for each pair of query and key, in each layer;
causal attention has half of the pairs. Nothing else counts: no norms, no loss, no padding, no dummies, and above all
nothing that is computed twice, as in the first pass of a gradient cache or by activation checkpointing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from pipeline.data.batch import Encoded

# (this rank's items of a step, rows of logits) -> FLOPs
StepFlops = Callable[[Sequence[Encoded], int], float]

_MATRICES = (nn.Linear, nn.Conv2d, nn.Conv3d)  # each row or patch is multiplied with all of the weight


def trains(*modules: nn.Module) -> bool:
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


def known(*modules: nn.Module) -> bool:
    """Whether all matrices are in layers that this file counts. Experts, of which a token uses a few, are not."""
    inside = {
        id(parameter)
        for module in modules
        for layer in module.modules()
        if isinstance(layer, (*_MATRICES, nn.Embedding))
        for parameter in layer.parameters(recurse=False)
    }
    shapes = {id(p): getattr(p, "ds_shape", p.shape) for module in modules for p in module.parameters()}
    # (1, ...) are positions and tokens that are added or inserted, not multiplied.
    return all(number in inside or len(shape) < 2 or shape[0] == 1 for number, shape in shapes.items())


def per_row(*modules: nn.Module, inputs: bool) -> int:
    """Return a step's FLOPs for each row that the modules' matrices process.  inputs: their gradient is needed."""
    layers = (layer for module in modules for layer in module.modules() if isinstance(layer, _MATRICES))
    return sum(2 * _elements(layer.weight) * (1 + int(inputs) + int(layer.weight.requires_grad)) for layer in layers)


def per_pair(width: int, layers: int, *, inputs: bool) -> int:
    """Return a step's FLOPs of attention for each (query, key).  width: of all heads.  inputs: as in `per_row`."""
    return 4 * width * layers * (3 if inputs else 1)


def _elements(weight: Tensor) -> int:
    return getattr(weight, "ds_numel", weight.numel())  # ZeRO-3's partitions are empty


def attention_width(config: PreTrainedConfig) -> int:
    heads: int = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


@dataclass(frozen=True)
class Tower:
    """FLOPs of a transformer in a step.

    token: for each token.  pair: for each (query, key).  patch: for each patch of an image.  item: for each item, by
    matrices outside the layers, such as a projection of the pooled state.
    """

    token: int
    pair: int
    patch: int
    item: int

    @classmethod
    def of(cls, module: nn.Module, width: int) -> "Tower":
        """Its layers are the first list of modules in it.  width: of all heads."""
        layers = next(each for each in module.modules() if isinstance(each, (nn.ModuleList, nn.Sequential)))
        inside = {id(each) for each in layers.modules()}
        rest = [each for each in module.modules() if id(each) not in inside and not list(each.children())]
        convolutions = [each for each in rest if isinstance(each, nn.Conv2d)]
        outside = [each for each in rest if isinstance(each, nn.Linear)]
        inputs = trains(layers, *(each for each in rest if each not in outside))
        return cls(
            per_row(layers, inputs=inputs),
            per_pair(width, len(layers), inputs=inputs),
            per_row(*convolutions, inputs=False),
            per_row(*outside, inputs=inputs),
        )

    def flops(self, tokens: int, *, patches: int = 0, causal: bool = False) -> float:
        """Return the FLOPs of one item."""
        return self.token * tokens + self.pair * tokens**2 / (1 + causal) + self.patch * patches + self.item


def pooled_decoder(model: Any, *, inputs: bool) -> Callable[[Sequence[Encoded]], float]:
    """Return what counts the FLOPs of a language model that pools in its last layer (see `PoolingAttention`).

    That layer has keys and values for all tokens, and one query for each item.  inputs: the gradient of the layers'
    inputs is needed.
    """
    *layers, last = model.layers
    attention, width = last.self_attn, attention_width(model.config)
    token = per_row(*layers, attention.k_proj, attention.v_proj, inputs=inputs)
    item = per_row(attention.q_proj, attention.o_proj, last.mlp, inputs=inputs)
    pair, last_pair = (per_pair(width, count, inputs=inputs) for count in (len(layers), 1))

    def flops(items: Sequence[Encoded]) -> float:
        tokens = [len(each.input_ids) for each in items]
        pairs = pair * sum(count**2 for count in tokens) / 2 + last_pair * sum(tokens)
        return token * sum(tokens) + pairs + item * len(items)

    return flops


def image_flops(module: nn.Module, size: int, extra: int = 0, projection: nn.Module | None = None) -> float:
    """Return a step's FLOPs of a vision transformer for one image of `size` pixels a side.

    extra: tokens besides the patches, such as a class token.  projection: of the pooled state, outside of `module`.
    """
    convolution = next(each for each in module.modules() if isinstance(each, nn.Conv2d))
    patches = (size // convolution.stride[0]) ** 2
    flops = Tower.of(module, convolution.out_channels).flops(patches + extra, patches=patches)
    return flops + (per_row(projection, inputs=trains(module)) if projection else 0)
