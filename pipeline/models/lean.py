"""Layers, norms, MLPs and rotary embedding: less memory for the backward pass, and fused kernels.

Modules are transformers' own with a changed class, so weights, their names and hooks stay the same. On the CPU and in
fp32, outputs are transformers' bit for bit. In bf16 on a GPU, a fused kernel computes in float32 and rounds its result
once, where transformers rounds after each operation; kernels.py says when they run. A frozen tower's linear layer with
GELU is one kernel also in fp32 on the CPU, oneDNN's, which may round the last bits differently.
"""

import inspect
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2MLP,
    Qwen2Model,
    Qwen2RMSNorm,
    rotate_half,
)

from pipeline.models import kernels
from pipeline.models.attention import HALF

# A hidden state: one tensor, or two whose sum it is. The norm that reads it adds them: one kernel for both.
State = Tensor | tuple[Tensor, Tensor]


def keep_less(model: nn.Module) -> None:
    """Make norms, MLPs and layers like Llama's and Qwen2's save less for the backward pass and run fewer kernels."""
    for module in model.modules():
        if _runs(module, Qwen2RMSNorm):
            module.__class__ = LeanRMSNorm
        elif _runs(module, Qwen2MLP) and type(module.act_fn) is type(ACT2FN["silu"]):
            module.__class__ = LeanMLP
            if type(module.gate_proj) is nn.Linear:
                module.gate_proj.__class__ = SharingLinear
    for module in model.modules():
        # Other models may do more with a layer's result than give it to the next layer or the norm.
        if any(_runs(module, kind) for kind in (Qwen2Model, LlamaModel)) and isinstance(module.norm, LeanRMSNorm):
            add_in_norms(layer for layer in cast(nn.ModuleList, module.layers) if _runs(layer, Qwen2DecoderLayer))


def add_in_norms(layers: Iterable[nn.Module]) -> None:
    """Make layers like Qwen2's leave their additions to the next norm, if `keep_less` has changed their norms.

    What gets their results must be able to add; see State.
    """
    for layer in layers:
        norms = layer.input_layernorm, layer.post_attention_layernorm
        if all(type(norm) is LeanRMSNorm for norm in norms):
            layer.__class__ = LeanDecoderLayer
            for norm in norms:
                norm.__class__ = AddingRMSNorm


def fuse_gelu(tower: nn.Module) -> None:
    """Make the MLPs of a tower compute GELU in the kernel of the linear layer before it, where that is possible.

    These are SigLIP's, and Qwen3-VL's. Weights, their names and hooks stay the same.
    """
    for module in tower.modules():
        for linear, activation in (("fc1", "activation_fn"), ("linear_fc1", "act_fn")):
            if type(getattr(module, activation, None)) is type(ACT2FN["gelu_pytorch_tanh"]):
                getattr(module, linear).__class__ = GeluLinear
                setattr(module, activation, nn.Identity())


def _runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module's forward has the code of another class's. transformers copies such modules between families."""

    def essence(forward: Callable) -> object:
        code: CodeType | None = getattr(inspect.unwrap(forward), "__code__", None)
        return code and (code.co_code, code.co_names, [each for each in code.co_consts if not isinstance(each, str)])

    return essence(type(module).forward) == essence(kind.forward)


class LeanRMSNorm(nn.Module):
    """Saves its input and each row's scale; transformers' also saves a float32 copy and the normalised input."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: State) -> Tensor:
        return self.added(hidden_states)[0]

    def added(self, hidden_states: State) -> tuple[Tensor, Tensor]:
        """Return the normalised state, and the state as one tensor."""
        x, branch = hidden_states if isinstance(hidden_states, tuple) else (hidden_states, None)
        if kernels.usable(x) and x.dtype == self.weight.dtype:
            normalised, *total = _FusedRMSNorm.apply(x, branch, self.weight, self.variance_epsilon)
            return normalised, total[0] if total else x
        if branch is not None:
            x = x + branch
        if x.is_cuda and x.dtype == self.weight.dtype in HALF:  # without Triton
            return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon), x
        return _RMSNorm.apply(x, self.weight, self.variance_epsilon), x


class AddingRMSNorm(LeanRMSNorm):
    def forward(self, hidden_states: State) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # only layers call it
        return self.added(hidden_states)


class LeanDecoderLayer(Qwen2DecoderLayer):
    """A layer whose additions are left to the next norm, where that saves a kernel."""

    def forward(self, hidden_states: State, **others: Any) -> State:  # type: ignore[override]
        normalised, residual = self.post_attention_layernorm(self.attend(hidden_states, **others))
        branch = self.mlp(normalised)
        # Activation checkpointing stores what a layer returns: one tensor is less than two.
        return (residual, branch) if kernels.usable(branch) and not self.gradient_checkpointing else residual + branch

    def attend(self, hidden_states: State, **others: Any) -> tuple[Tensor, Tensor]:
        """Return the state as one tensor, and what the attention adds to it. Other tensors are freed at its end."""
        normalised, residual = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normalised, **others)
        return residual, attended


class SharingLinear(nn.Linear):
    """Returns its result and its input, for the next layer with the same input.

    The next layer's gradient with respect to the input arrives here, and the matmul adds this layer's to it.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # see `shared`
        if x.requires_grad and kernels.usable(x):
            return _SharedLinear.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias), x


def shared(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return layer(x), and x for the next layer with the same input."""
    result = layer(x)
    return result if isinstance(result, tuple) else (result, x)


class LeanMLP(nn.Module):
    """Keeps gate, up and their product for the backward pass; transformers' also keeps the activated gate."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, x = shared(self.gate_proj, x)
        if torch.is_grad_enabled() or kernels.usable(x):
            return self.down_proj(_SiluProduct.apply(gate, self.up_proj(x)))
        return self.down_proj(F.silu(gate, inplace=True).mul_(self.up_proj(x)))  # no further memory


class GeluLinear(nn.Linear):
    """A linear layer followed by the tanh approximation of GELU.

    Without gradients one kernel computes both, on a CPU oneDNN's, which torch's compiler uses too: GELU alone takes
    half as long as the multiplication there. A trained layer uses torch's kernels in all passes, so that a step's two
    passes agree.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (x.requires_grad or self.weight.requires_grad):
            if kernels.usable(x):
                return kernels.linear_gelu(x, self.weight, self.bias)
            if _ONEDNN and x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32:
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


class _FusedRMSNorm(torch.autograd.Function):
    """RMSNorm(x + branch) and the sum; without a branch, only RMSNorm(x)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float
    ) -> tuple[Tensor] | tuple[Tensor, Tensor]:
        normalised, total, scale = kernels.rms_norm(x, branch, weight, epsilon)
        ctx.save_for_backward(x if branch is None else total, weight, scale)
        ctx.set_materialize_grads(False)
        return (normalised,) if branch is None else (normalised, total)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor, of_total: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        total, weight, scale = ctx.saved_tensors
        trained = ctx.needs_input_grad[2]
        of_x, parts = kernels.rms_norm_backward(gradient, of_total, total, weight, scale, trained)
        of_branch = of_x if ctx.needs_input_grad[1] else None
        return of_x, of_branch, parts.sum(0).to(weight.dtype) if trained else None, None


class _SharedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return F.linear(x, weight, bias), x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, of_x: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient, of_weight, of_bias = gradient.flatten(0, -2), None, None
        if of_x is None:
            of_x = (gradient @ weight).view_as(x)
        else:
            of_x.view(-1, x.shape[-1]).addmm_(gradient, weight)  # nobody else has it
        if ctx.needs_input_grad[1]:
            of_weight = gradient.t() @ x.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(0)
        return of_x, of_weight, of_bias


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
