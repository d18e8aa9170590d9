"""Qwen-VL's language models on packed items, with deepstack and a last layer that computes pooled tokens only.

The modules are transformers' own with a changed class, so weights, their names and hooks stay the same.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.models.attention import Segments
from pipeline.models.lean import rotated

Angles = tuple[Tensor, Tensor]  # cosines and sines of the positions, (1, T, d)


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


class PackedAttention(nn.Module):
    """Attention without a cache or a mask; queries and keys may have norms."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int
    scaling: float
    config: Any

    def forward(
        self, hidden_states: Tensor, position_embeddings: Angles, *, segments: Segments, **others: object
    ) -> tuple[Tensor, None]:
        return self.attend(hidden_states, hidden_states, position_embeddings, position_embeddings, segments), None

    def attend(
        self, queried: Tensor, hidden_states: Tensor, queried_angles: Angles, angles: Angles, segments: Segments
    ) -> Tensor:
        """Map (1, Q, hidden), which attend to (1, T, hidden), to (1, Q, hidden).  segments: of the T tokens."""

        def heads(projected: Tensor, norm: str = "") -> Tensor:
            each = projected.unflatten(-1, (-1, self.head_dim))
            return (getattr(self, norm)(each) if hasattr(self, norm) else each).transpose(1, 2)

        attended, _ = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](
            self,
            rotated(heads(self.q_proj(queried), "q_norm"), *queried_angles),
            rotated(heads(self.k_proj(hidden_states), "k_norm"), *angles),
            heads(self.v_proj(hidden_states)),
            None,
            segments=segments,
            scaling=self.scaling,
            sliding_window=getattr(self, "sliding_window", None),
        )
        return self.o_proj(attended.flatten(2))


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


class PoolingAttention(PackedAttention):
    def forward(  # type: ignore[override]  # only PoolingLayer calls it
        self, hidden_states: Tensor, position_embeddings: Angles, segments: Segments
    ) -> Tensor:
        """Map (1, T, hidden) of N packed items to (1, N, hidden): each item's last token attends to the whole item."""
        cos, sin = position_embeddings
        last = segments.last
        queried = hidden_states[:, last], hidden_states, (cos[:, last], sin[:, last]), (cos, sin)
        return self.attend(*queried, segments.asked_by_last())
