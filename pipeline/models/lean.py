"""Norms, MLPs and rotary embedding: less memory for the backward pass, and fused kernels.

Modules are transformers' own with a changed class, so weights, their names and hooks stay the same. On the CPU and in
fp32, outputs are transformers' bit for bit. In bf16 on a GPU, a fused kernel computes in float32 and rounds its result
once, where transformers rounds after each operation; kernels.py says when they run. A frozen tower's linear layer with
GELU is one kernel of oneDNN in fp32 on the CPU, which may round the last bits differently.
"""

from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm, rotate_half
from transformers.models.siglip.modeling_siglip import SiglipMLP

from pipeline.models import kernels
from pipeline.models.attention import HALF


def keep_less(model: nn.Module) -> None:
    """Make norms and MLPs like Llama's and Qwen2's save less for the backward pass and recompute what is cheap."""
    for module in model.modules():
        if _runs(module, Qwen2RMSNorm):
            module.__class__ = LeanRMSNorm
        elif _runs(module, Qwen2MLP) and type(module.act_fn) is type(ACT2FN["silu"]):
            module.__class__ = LeanMLP


def fuse_gelu(tower: nn.Module) -> None:
    """Make the MLPs of a SigLIP tower compute GELU in the kernel of the linear layer before it, where that is possible.

    Weights, their names and hooks stay the same.
    """
    for module in tower.modules():
        if isinstance(module, SiglipMLP) and type(module.activation_fn) is type(ACT2FN["gelu_pytorch_tanh"]):
            module.fc1.__class__, module.activation_fn = GeluLinear, nn.Identity()


def _runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module's forward has the code of another class's. transformers copies such modules between families."""

    def essence(code: CodeType | None) -> object:
        return code and (code.co_code, code.co_names, [each for each in code.co_consts if not isinstance(each, str)])

    return essence(getattr(type(module).forward, "__code__", None)) == essence(kind.forward.__code__)


class LeanRMSNorm(nn.Module):
    """Saves its input and each row's scale; transformers' also saves a float32 copy and the normalised input."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.is_cuda and hidden_states.dtype == self.weight.dtype in HALF:
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class LeanMLP(nn.Module):
    """Keeps gate, up and their product for the backward pass; transformers' also keeps the activated gate."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or kernels.usable(x):
            return self.down_proj(_SiluProduct.apply(self.gate_proj(x), self.up_proj(x)))
        return self.down_proj(F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x)))  # no further memory


class GeluLinear(nn.Linear):
    """A linear layer followed by the tanh approximation of GELU.

    oneDNN's kernel, which torch's compiler uses too, computes GELU on the result while that is in cache; torch's own
    kernel takes half as long as the multiplication. It has no gradients. A trained layer uses torch's in all passes,
    so that a step's two passes agree.
    """

    def forward(self, x: Tensor) -> Tensor:
        runs = _ONEDNN and x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
        if runs and not (x.requires_grad or self.weight.requires_grad):
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "tanh")
        return F.gelu(super().forward(x), approximate="tanh")


# Not in all of torch's builds for other processors than x86.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys (1, heads, T, d) by their positions' angles.  cos, sin: (1, T, d)."""
    if kernels.usable(x):
        return _Rotation.apply(x.transpose(1, 2), cos, sin).transpose(1, 2)
    return x * cos[:, None] + rotate_half(x) * sin[:, None]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        return weight * (x.float() * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normalised = x.float() * scale
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            inner = (gradient * weight).float()
            of_x = scale * (inner - normalised * (inner * normalised).mean(-1, keepdim=True))
            of_x = of_x.to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * normalised.to(x.dtype)).flatten(0, -2).sum(0)
        return of_x, of_weight, None


class _SiluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return kernels.swiglu(gate, up) if kernels.usable(gate) else F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if kernels.usable(gate):
            return kernels.swiglu_backward(gradient, gate, up)
        return torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate)


class _Rotation(torch.autograd.Function):
    """(1, T, heads, d) -> the same; angles have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return kernels.rotate(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return kernels.rotate(gradient, *ctx.saved_tensors, True), None, None
