"""SwiGLU and rotary embedding in one kernel each, for bf16 on a GPU.

They need Triton, which comes with torch's CUDA builds, and what Triton needs: a C compiler, Python's headers and a
folder to write to. Without one of these, callers compute the same with torch's operators (see `usable`).
"""

import logging
import os
import socket
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.attention import HALF

logger = logging.getLogger(__name__)


@torch.library.custom_op("pipeline::swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return SiLU(gate) * up of equal shapes (GLU variants, arXiv 2002.05202)."""
    from pipeline.models import triton_kernels

    out = _like(gate)
    triton_kernels.swiglu(gate.contiguous(), up.contiguous(), out)
    return out


@torch.library.custom_op("pipeline::swiglu_backward", mutates_args=())
def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `swiglu` with respect to gate and up, given that of its result."""
    from pipeline.models import triton_kernels

    of_gate, of_up = _like(gate), _like(up)
    triton_kernels.swiglu_backward(gradient.contiguous(), gate.contiguous(), up.contiguous(), of_gate, of_up)
    return of_gate, of_up


@torch.library.custom_op("pipeline::rotate", mutates_args=())
def rotate(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """Return x * cos + rotate_half(x) * sin (RoPE, arXiv 2104.09864; halves of a head as in transformers).

    x: (1, T, heads, d).  cos, sin: (1, T, d).  backward: x is the result's gradient; return that of x.
    """
    from pipeline.models import triton_kernels

    assert cos.shape == sin.shape == (*x.shape[:2], x.shape[3])
    out = _like(x)
    triton_kernels.rotate(x.contiguous(), cos.contiguous(), sin.contiguous(), out, backward)
    return out


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# Shapes without data, for torch's tracing tools.
swiglu.register_fake(lambda gate, up: _like(gate))
swiglu_backward.register_fake(lambda gradient, gate, up: (_like(gate), _like(up)))
rotate.register_fake(lambda x, cos, sin, backward: _like(x))


def usable(x: Tensor) -> bool:
    """Whether the kernels run on this tensor. The first call on a GPU compiles and tries them."""
    return x.is_cuda and x.dtype in HALF and not _why_not()


@cache
def _why_not() -> str:
    """Return why the kernels do not run on this machine, or "" if they do; log the reason."""
    try:
        difference = _largest_difference(torch.device("cuda"))
    except Exception as error:  # Triton and compilers raise anything
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    else:
        # Results are below 4, of which bf16 has 8 bits.
        reason = "" if difference <= 4 * 2**-8 else f"they are wrong here by {difference:.1g}"
    if reason and os.environ.get("LOCAL_RANK", "0") == "0":  # nodes may differ
        logger.warning(
            "SwiGLU and rotary embedding run as several kernels on %s, which makes steps slower: Triton's cannot be "
            "used (%s). They need triton, a C compiler (CC), Python's headers, and a folder to write to "
            "(TRITON_CACHE_DIR).",
            socket.gethostname(),
            reason,
        )
    return reason


def _largest_difference(device: torch.device) -> float:
    """Return the largest difference of the kernels from torch's operators in float32, for small bf16 tensors."""
    gate, up, gradient = torch.linspace(-2, 2, 3 * 67 * 3 * 48, device=device).bfloat16().view(3, 1, 67, 3, 48)
    angle = torch.linspace(-9, 9, 67 * 48, device=device).view(1, 67, 48)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    with torch.enable_grad():
        wide = [x.float().requires_grad_() for x in (gate, up, gate)]
        product = F.silu(wide[0]) * wide[1]
        a, b = wide[2].chunk(2, dim=-1)
        rotated = wide[2] * cos[:, :, None].float() + torch.cat([-b, a], dim=-1) * sin[:, :, None].float()
        expected = torch.autograd.grad([product, rotated], wide, [gradient.float()] * 2)
    found = (*swiglu_backward(gradient, gate, up), rotate(gradient, cos, sin, True))
    pairs = zip((*found, swiglu(gate, up), rotate(gate, cos, sin, False)), (*expected, product, rotated), strict=True)
    return max(float((mine.float() - right.detach()).abs().max()) for mine, right in pairs)
