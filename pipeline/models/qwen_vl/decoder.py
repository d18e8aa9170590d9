"""Qwen-VL's language models on packed items, with deepstack and a last layer that computes pooled tokens only.

The modules are transformers' own with a changed class, so weights, their names and hooks stay the same.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pipeline.models.attention import Segments
from pipeline.models.lean import State, add_in_norms, keep_less
from pipeline.models.packed_attention import pool_in_last_layer


def pack_decoder(model: Any) -> None:
    """Give a language model's layers the forward passes that `pooled_states` needs."""
    keep_less(model)
    add_in_norms(model.layers)
    pool_in_last_layer(model)


def pooled_states(
    model: Any, embeds: Tensor, positions: Tensor, segments: Segments, images: Tensor | None, deep: Sequence[Tensor]
) -> Tensor:
    """Return (N, hidden) for N packed items: the last hidden states of their last tokens.

    embeds: (T, hidden).  positions: (1, T), or (3, 1, T) with axes of time, row and column.
    images: (P,) int64 places of the images' tokens.  deep: for each of the first layers (P, hidden), which is added to
        its output there (DeepStack, arXiv 2406.04334).
    """
    hidden: State = embeds[None]
    angles = model.rotary_emb(embeds[None], positions.expand(3, 1, -1))
    for number, layer in enumerate(model.layers):
        hidden = layer(hidden, position_embeddings=angles, segments=segments)
        # The last layer's output has only the pooled tokens, which are text unless the prompt ends with the item.
        if images is not None and number < min(len(deep), len(model.layers) - 1):
            residual, branch = hidden if isinstance(hidden, tuple) else (None, hidden)
            branch = branch.index_add(1, images, deep[number][None])
            hidden = branch if residual is None else (residual, branch)
    return model.norm(hidden)[0]
