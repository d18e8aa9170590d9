"""How long an H100 would take for an operator, at least: the limits of arithmetic, memory and launches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

PEAK = 989e12  # FLOP/s of dense bf16, by NVIDIA's data sheet of the H100 SXM
_MATMUL, _MEMORY = 0.70 * PEAK, 0.85 * 3.35e12  # of which kernels reach so much
_FP32 = 45e12  # FLOP/s, of 67
_LAUNCH = 2.5e-6  # seconds of the shortest kernels
# FLOP/s of FlashAttention 2 on an H100, forward and backward, for heads up to 64 and larger ones.
_ATTENTION = {(False, True): 370e12, (True, True): 290e12, (False, False): 430e12, (True, False): 330e12}


def flops(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """FLOPs of a matmul, a convolution or SDPA; 0 for any other operator. Causal attention computes a half."""
    packet = func._overloadpacket
    aten = torch.ops.aten
    counts = flop_registry.get(aten.addmm if packet in (aten.addmm_, aten._addmm_activation) else packet)
    if counts is None:
        return 0
    count = counts(*args, **kwargs, out_val=out)
    given = {x.name: value for x, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    return int(count) // (2 if given.get("is_causal") else 1)


def seconds(name: str, flops: int, moved: int, launches: int, inputs: Sequence[Tensor]) -> float:
    """moved: bytes.  launches: kernels."""
    if "varlen" in name or "scaled_dot" in name:
        speed = _ATTENTION["backward" in name, inputs[0].shape[-1] <= 64]
    else:
        speed = _FP32 if any(x.dtype == torch.float32 for x in inputs) else _MATMUL
    return max(flops / speed, moved / _MEMORY, launches * _LAUNCH)
