"""SwiGLU, rotary embedding, and RMSNorm with the addition before it, in one kernel each, for bf16 on a GPU.

They need Triton, which comes with torch's CUDA builds, and what Triton needs: a C compiler, Python's headers and a
folder to write to. Without one of these, callers compute the same with torch's operators (see `usable`).
"""

import logging
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.distributed import gathered, rank_and_world
from pipeline.models.attention import HALF

logger = logging.getLogger(__name__)

# Programs that share the rows of a norm's backward pass, each with a part of the weight's gradient: two for each of an
# H100's multiprocessors.
_PARTS = 264


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


@torch.library.custom_op("pipeline::rms_norm", mutates_args=())
def rms_norm(x: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return RMSNorm(x + branch) (arXiv 1910.07467), the sum, and each row's scale in float32.

    x, branch: (..., D).  weight: (D,).  branch: None: the norm is that of x, and the sum is an empty tensor.
    """
    from pipeline.models import triton_kernels

    out, total, scale = _like(x), _sum_like(x, branch), _scales(x)
    branch = None if branch is None else branch.contiguous()
    triton_kernels.rms_norm(x.contiguous(), branch, weight, epsilon, total, out, scale)
    return out, total, scale


@torch.library.custom_op("pipeline::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    gradient: Tensor, of_total: Tensor | None, total: Tensor, weight: Tensor, scale: Tensor, of_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of `rms_norm` with respect to x, which is also that of branch, and parts of the weight's.

    gradient, of_total: gradients of the norm and of the sum, if it has one.  total: the sum; x if there is no branch.
    of_weight: whether the weight needs a gradient: the sum of the parts' rows (n, D), in float32.
    """
    from pipeline.models import triton_kernels

    out, parts = _like(total), _parts(total, of_weight)
    triton_kernels.rms_norm_backward(
        gradient.contiguous(),
        None if of_total is None else of_total.contiguous(),
        *(total.contiguous(), weight, scale, out, parts if of_weight else None),
    )
    return out, parts


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return GELU (arXiv 1606.08415, by tanh) of a linear layer, without gradient: a matmul of cuBLAS applies both."""
    return torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True).unflatten(0, x.shape[:-1])


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _sum_like(x: Tensor, branch: Tensor | None) -> Tensor:
    return x.new_empty(0) if branch is None else _like(x)


def _scales(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def _parts(x: Tensor, of_weight: bool) -> Tensor:
    return x.new_empty(_PARTS if of_weight else 0, x.shape[-1], dtype=torch.float32)


# Shapes without data, for torch's tracing tools.
swiglu.register_fake(lambda gate, up: _like(gate))
swiglu_backward.register_fake(lambda gradient, gate, up: (_like(gate), _like(up)))
rotate.register_fake(lambda x, cos, sin, backward: _like(x))
rms_norm.register_fake(lambda x, branch, weight, epsilon: (_like(x), _sum_like(x, branch), _scales(x)))
rms_norm_backward.register_fake(
    lambda gradient, of_total, total, weight, scale, of_weight: (_like(total), _parts(total, of_weight))
)


_all_can: bool | None = None  # whether all ranks of this job can run the kernels; None: they have not said it


def agree() -> None:
    """Compile and try the kernels; make all ranks use them if each can, and otherwise none. Collective.

    A rank without them would round differently, and the others would wait for it in each step.
    """
    global _all_can
    reasons = gathered(_why_not())
    _all_can = not any(reasons)
    if not (_all_can or reasons[0]) and rank_and_world()[0] == 0:
        rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
        logger.warning(
            "no rank uses Triton's kernels, because %d of %d cannot: rank %d, %s",
            *(sum(map(bool, reasons)), len(reasons), rank, reason),
        )


def usable(x: Tensor) -> bool:
    """Whether the kernels run on this tensor. Unless ranks `agree` before, the first call on a GPU tries them."""
    return x.is_cuda and x.dtype in HALF and (not _why_not() if _all_can is None else _all_can)


@cache
def _why_not() -> str:
    """Return why the kernels do not run on this machine, or "" if they do; log the reason."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        # In a thread of its own: in this one autograd may be off, or may recompute the layer that asks.
        with ThreadPoolExecutor(1) as pool:
            difference = pool.submit(_largest_difference, device).result()
    except Exception as error:  # Triton and compilers raise anything
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    else:
        # Results are below 4, of which bf16 has 8 bits.
        reason = "" if difference <= 4 * 2**-8 else f"they are wrong here by {difference:.1g}"
    if reason and os.environ.get("LOCAL_RANK", "0") == "0":  # nodes may differ
        logger.warning(
            "RMSNorm, SwiGLU and rotary embedding run as many kernels on %s, which makes steps slower: Triton's cannot "
            "be used (%s). They need triton, a C compiler (CC), Python's headers, and a folder to write to "
            "(TRITON_CACHE_DIR).",
            socket.gethostname(),
            reason,
        )
    return reason


def _largest_difference(device: torch.device) -> float:
    """Return the largest difference of the kernels from torch's operators in float32, for small bf16 tensors."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a new thread has the first device
    gate, up, gradient = torch.linspace(-2, 2, 3 * 67 * 3 * 48, device=device).bfloat16().view(3, 1, 67, 3, 48)
    angle = torch.linspace(-9, 9, 67 * 48, device=device).view(1, 67, 48)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    weight = torch.linspace(-1, 1, 48, device=device).bfloat16()
    x, branch, of_norm = (each.reshape(48, -1).t().contiguous() for each in (gate, up, gradient))
    total = x + branch
    with torch.enable_grad():
        wide = [x.float().requires_grad_() for x in (gate, up, gate, total, weight)]
        product = F.silu(wide[0]) * wide[1]
        a, b = wide[2].chunk(2, dim=-1)
        rotated = wide[2] * cos[:, :, None].float() + torch.cat([-b, a], dim=-1) * sin[:, :, None].float()
        norm = F.rms_norm(wide[3], (48,), wide[4], 1e-6)
        # A vision tower's angles are in float32, its heads of other sizes.
        towers = gate.view(1, 67, -1, 72).float().requires_grad_()
        wide_angle = torch.linspace(-9, 9, 67 * 72, device=device).view(1, 67, 72)
        wide_cos, wide_sin = wide_angle.cos(), wide_angle.sin()
        a, b = towers.chunk(2, dim=-1)
        turned = towers * wide_cos[:, :, None] + torch.cat([-b, a], dim=-1) * wide_sin[:, :, None]
        (of_towers,) = torch.autograd.grad(turned, towers, gradient.view(towers.shape).float())
        results = product, rotated, norm, wide[3]
        expected = torch.autograd.grad(results, wide, [each.float() for each in (gradient, gradient, of_norm, of_norm)])
    normalised, summed, scale = rms_norm(x, branch, weight, 1e-6)
    of_total, parts = rms_norm_backward(of_norm, of_norm, summed, weight, scale, True)
    expected[-1].div_(len(x))  # a mean over rows: a sum would be large
    found = (*swiglu_backward(gradient, gate, up), rotate(gradient, cos, sin, True), of_total, parts.sum(0) / len(x))
    # Results of the matmul are as large as a row of `x`.
    matrix, bias = torch.eye(48, device=device, dtype=x.dtype), weight
    found += swiglu(gate, up), rotate(gate, cos, sin, False), normalised, summed, linear_gelu(x, matrix, bias)
    found += (rotate(gradient.view(towers.shape), wide_cos, wide_sin, True),)
    found += (rotate(gate.view(towers.shape), wide_cos, wide_sin, False),)
    gelu = F.gelu(x.float() + bias.float(), approximate="tanh")
    pairs = zip(found, (*expected, product, rotated, norm, total, gelu, of_towers, turned), strict=True)
    # NaN if any of them is: Python's `max` would pass over it.
    return float(torch.stack([(mine.float() - right.detach()).abs().max() for mine, right in pairs]).max())
