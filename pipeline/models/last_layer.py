"""The last layer of a Qwen2 that is pooled at each item's last token: of other tokens it takes keys and values alone.

Nobody asks for their queries, attention and MLP, which are all but a few per cent of a layer.
"""

import torch
from transformers import Qwen2Model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, rotate_half

from pipeline.models.attention import Segments


def pool_in_last_layer(model: Qwen2Model) -> None:
    """From here on the model returns (1, N, hidden) for N packed items: the hidden states of their last tokens.

    Of its weights neither values nor names change.
    """
    layer = model.layers[-1]
    layer.__class__, layer.self_attn.__class__ = PoolingLayer, PoolingAttention


class PoolingLayer(Qwen2DecoderLayer):
    """(1, T, hidden) of packed items -> (1, N, hidden)."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        segments: Segments,
        **others: object,
    ) -> torch.Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), position_embeddings, segments)
        hidden_states = hidden_states[:, segments.last] + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class PoolingAttention(Qwen2Attention):
    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], segments: Segments
    ) -> torch.Tensor:
        """(1, T, hidden) of packed items -> (1, N, hidden): what each one's last token makes of all of it."""
        last = segments.last

        def heads(projected: torch.Tensor) -> torch.Tensor:
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
