"""Qwen2 for LLaVE: the same outputs from the same weights, with less computation and fewer saved activations.

The modules are transformers' own with a changed class, so weights, their names and hooks stay the same.
"""

from typing import Any, cast

from torch import Tensor
from transformers import Qwen2Model

from pipeline.models.attention import Segments
from pipeline.models.lean import LeanDecoderLayer, SharingLinear, State
from pipeline.models.packed_attention import Angles, PackedAttention, PoolingAttention


def pool_in_last_layer(model: Qwen2Model) -> None:
    """Make the model return (1, N, hidden) for N packed items: the hidden states of their last tokens.

    The last layer computes keys and values for all tokens, but queries, attention and MLP only for the last tokens.
    This removes nearly all of the layer's computation. The other layers' attention only runs fewer kernels. The model
    is one that `keep_less` has changed.
    """
    for layer in model.layers:
        attention = cast(Any, layer.self_attn)
        attention.__class__ = PackedAttention
        attention.q_proj.__class__ = attention.k_proj.__class__ = SharingLinear
    last = model.layers[-1]
    last.__class__, last.self_attn.__class__ = PoolingLayer, PoolingAttention


class PoolingLayer(LeanDecoderLayer):
    """Maps (1, T, hidden) of N packed items to (1, N, hidden), their last tokens."""

    def attend(  # type: ignore[override]  # the model passes segments
        self, hidden_states: State, *, position_embeddings: Angles, segments: Segments, **others: object
    ) -> tuple[Tensor, Tensor]:
        normalised, residual = self.input_layernorm(hidden_states)
        return residual[:, segments.last], self.self_attn(normalised, position_embeddings, segments)
