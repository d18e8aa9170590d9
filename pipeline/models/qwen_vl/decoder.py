"""Qwen-VL's language models on packed items, with deepstack and a last layer that computes pooled tokens only.

The modules are transformers' own with a changed class, so weights, their names and hooks stay the same.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.models.attention import Segments
from pipeline.models.packed_attention import Angles, PackedAttention, PoolingAttention


def pack_decoder(model: Any) -> None:
    """Give a language model's layers the forward passes that `pooled_states` needs."""
    *layers, last = model.layers
    for layer in layers:
        layer.self_attn.__class__ = PackedAttention
    last.__class__, last.self_attn.__class__ = PoolingLayer, PoolingAttention


def pooled_states(
    model: Any, embeds: Tensor, positions: Tensor, segments: Segments, images: Tensor | None, deep: Sequence[Tensor]
) -> Tensor:
    """Return (N, hidden) for N packed items: the last hidden states of their last tokens, which are text.

    embeds: (T, hidden).  positions: (1, T), or (3, 1, T) with axes of time, row and column.
    images: (P,) int64 places of the images' tokens.  deep: for each of the first layers (P, hidden), which is added to
        its output there (DeepStack, arXiv 2406.04334).
    """
    hidden = embeds[None]
    angles = model.rotary_emb(hidden, positions.expand(3, 1, -1))
    for number, layer in enumerate(model.layers):
        hidden = layer(hidden, position_embeddings=angles, segments=segments)
        # The last layer's output has only the pooled tokens.
        if images is not None and number < min(len(deep), len(model.layers) - 1):
            hidden = hidden.index_add(1, images, deep[number][None])
    return model.norm(hidden)[0]


class PoolingLayer(GradientCheckpointingLayer):
    """Maps (1, T, hidden) of N packed items to (1, N, hidden), their last tokens."""

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, *, position_embeddings: Angles, segments: Segments) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), position_embeddings, segments)
        hidden_states = hidden_states[:, segments.last] + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
