"""Attention of packed items, also of their last tokens alone, for decoders like Qwen2's and Qwen3's.

Modules are transformers' own with a changed class, so weights, their names and hooks stay the same.
"""

from typing import Any, cast

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.models.attention import Segments
from pipeline.models.lean import LeanDecoderLayer, SharingLinear, State, rotated, shared

Angles = tuple[Tensor, Tensor]  # cosines and sines of the positions, (1, T, d)


def pool_in_last_layer(model: nn.Module) -> None:
    """Make the layers of a decoder return (1, N, hidden) for N packed items: the states of their last tokens.

    The last layer computes keys and values for all tokens, but queries, attention and MLP only for the last tokens.
    This removes nearly all of the layer's computation. The other layers' attention only runs fewer kernels. The layers
    are each a LeanDecoderLayer.
    """
    layers = cast(nn.ModuleList, model.layers)
    for layer in layers:
        attention = cast(Any, layer.self_attn)
        attention.__class__ = PackedAttention
        attention.q_proj.__class__ = attention.k_proj.__class__ = SharingLinear
    last = layers[-1]
    last.__class__, last.self_attn.__class__ = PoolingLayer, PoolingAttention


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

        query, same = shared(self.q_proj, queried)
        key, hidden_states = shared(self.k_proj, same if queried is hidden_states else hidden_states)
        attended, _ = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](
            self,
            rotated(heads(query, "q_norm"), *queried_angles),
            rotated(heads(key, "k_norm"), *angles),
            heads(self.v_proj(hidden_states)),
            None,
            segments=segments,
            scaling=self.scaling,
            sliding_window=getattr(self, "sliding_window", None),
        )
        return self.o_proj(attended.flatten(2))


class PoolingAttention(PackedAttention):
    def forward(  # type: ignore[override]  # only PoolingLayer calls it
        self, hidden_states: Tensor, position_embeddings: Angles, segments: Segments
    ) -> Tensor:
        """Map (1, T, hidden) of N packed items to (1, N, hidden): each item's last token attends to the whole item."""
        cos, sin = position_embeddings
        last = segments.last
        queried = hidden_states[:, last], hidden_states, (cos[:, last], sin[:, last]), (cos, sin)
        return self.attend(*queried, segments.asked_by_last())


class PoolingLayer(LeanDecoderLayer):
    """Maps (1, T, hidden) of N packed items to (1, N, hidden), their last tokens."""

    def attend(  # type: ignore[override]  # the model passes segments
        self, hidden_states: State, *, position_embeddings: Angles, segments: Segments, **others: object
    ) -> tuple[Tensor, Tensor]:
        normalised, residual = self.input_layernorm(hidden_states)
        return residual[:, segments.last], self.self_attn(normalised, position_embeddings, segments)
