"""Qwen2 for LLaVE: the same outputs from the same weights, with less computation and fewer saved activations.

The modules are transformers' own with a changed class, so weights, their names and hooks stay the same.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import Qwen2Model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2MLP,
    Qwen2RMSNorm,
    rotate_half,
)

from pipeline.models.attention import Segments


def keep_less(model: Qwen2Model) -> None:
    """Make norms and MLPs save less for the backward pass and recompute what is cheap."""
    for module in model.modules():
        if isinstance(module, Qwen2RMSNorm):
            module.__class__ = LeanRMSNorm
        elif isinstance(module, Qwen2MLP) and module.config.hidden_act == "silu":
            module.__class__ = LeanMLP


def pool_in_last_layer(model: Qwen2Model) -> None:
    """Make the model return (1, N, hidden) for N packed items: the hidden states of their last tokens.

    The last layer computes keys and values for all tokens, but queries, attention and MLP only for the last tokens.
    This removes nearly all of the layer's computation.
    """
    layer = model.layers[-1]
    layer.__class__, layer.self_attn.__class__ = PoolingLayer, PoolingAttention


class LeanRMSNorm(Qwen2RMSNorm):
    """Saves its input only; transformers' also saves the float32 copy and the normalised one."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class LeanMLP(Qwen2MLP):
    """Keeps gate, up and their product for the backward pass; transformers' also keeps the activated gate."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)  # frees the gate before it computes the product
        return self.down_proj(_SiluProduct.apply(self.gate_proj(x), self.up_proj(x)))


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
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate)


class PoolingLayer(Qwen2DecoderLayer):
    """Maps (1, T, hidden) of N packed items to (1, N, hidden), their last tokens."""

    def forward(  # type: ignore[override]  # the model passes segments
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        segments: Segments,
        **others: object,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), position_embeddings, segments)
        hidden_states = hidden_states[:, segments.last] + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class PoolingAttention(Qwen2Attention):
    def forward(  # type: ignore[override]  # only PoolingLayer calls it
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], segments: Segments
    ) -> Tensor:
        """Map (1, T, hidden) of N packed items to (1, N, hidden): each item's last token attends to the whole item."""
        last = segments.last

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        cos, sin = (each[:, None] for each in position_embeddings)
        query, key = heads(self.q_proj(hidden_states[:, last])), heads(self.k_proj(hidden_states))
        query = query * cos[:, :, last] + rotate_half(query) * sin[:, :, last]
        key = key * cos + rotate_half(key) * sin
        attended, _ = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](
            self,
            query,
            key,
            heads(self.v_proj(hidden_states)),
            None,
            segments=segments.asked_by_last(),
            scaling=self.scaling,
            sliding_window=self.sliding_window,
        )
        return self.o_proj(attended.flatten(2))
