"""Attention over a packed row: each item attends to itself alone, and no mask of the whole row is made."""

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

PACKED = "packed_sdpa"


@dataclass(frozen=True)
class Segments:
    """Where the T tokens of a packed row stand among (items, longest item) slots.

    slots: (T,) int64 index into items * longest.
    """

    count: int
    longest: int
    slots: torch.Tensor

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> "Segments":
        longest = max(lengths)
        starts = accumulate(lengths, initial=0)
        # Token i of the row stands at i plus the slots left empty by the items before its own.
        shift = [item * longest - start for item, start in zip(range(len(lengths)), starts, strict=False)]
        shift = torch.tensor(shift).repeat_interleave(torch.tensor(lengths))
        slots = torch.arange(sum(lengths)) + shift
        return cls(len(lengths), longest, slots.to(device, non_blocking=True))


def packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    segments: Segments,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each segment, by torch's SDPA on rows of the longest item's length.

    query (1, heads, T, d), key and value (1, key-value heads, T, d) -> (1, T, heads, d). Chunks are cut so that
    little of the rows is empty (see chunks.py); what is empty comes last in its row, where no token of the item looks.
    """

    def spread(x: torch.Tensor) -> torch.Tensor:
        x = x.squeeze(0).transpose(0, 1)
        rows = x.new_zeros(segments.count * segments.longest, *x.shape[1:]).index_copy(0, segments.slots, x)
        return rows.view(segments.count, segments.longest, *x.shape[1:]).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        spread(query), spread(key), spread(value), is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(0, 1)[segments.slots][None], None


AttentionInterface.register(PACKED, packed_sdpa)
