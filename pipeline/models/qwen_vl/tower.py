"""Qwen-VL's vision towers on the patches of many images in one row, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from pipeline.data.batch import Image
from pipeline.models.attention import Segments, pads
from pipeline.models.chunks import sent
from pipeline.models.lean import fuse_gelu, keep_less, rotated


def pack_tower(tower: Any) -> None:
    """Give a tower's blocks the attention that `tower_states` needs, and fewer kernels.

    Weights, their names and hooks stay the same.
    """
    tower._input_embed_layer = "patch_embed"  # or transformers warns of Qwen3-VL's, if activations are checkpointed
    keep_less(tower)
    fuse_gelu(tower)
    for block in tower.blocks:
        block.attn.__class__ = PackedVisionAttention


@dataclass(frozen=True)
class Pieces(Segments):
    """Runs of patches that attend to each other; as for SDPA, those of equal length in one batch, without padding."""

    @cached_property
    def batches(self) -> list[Tensor]:
        """For each length, (pieces, length) int64: the indices of the patches of all pieces of this length."""
        lengths = torch.tensor(self.lengths)
        starts = lengths.cumsum(0) - lengths
        found = [starts[lengths == each, None] + torch.arange(each) for each in sorted(set(self.lengths))]
        return [sent(each, self.device) for each in found]

    @cached_property
    def places(self) -> Tensor:
        """(n,) int64: where each patch is among those of all batches, laid end to end."""
        return torch.cat([each.flatten() for each in self.batches]).argsort()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attend with SDPA: (1, heads, n, d) to (1, n, heads, d)."""

        def cut(x: Tensor, batch: Tensor) -> Tensor:
            return x[0].index_select(1, batch.flatten()).unflatten(1, batch.shape).transpose(0, 1)

        parts = []
        for batch in self.batches:
            q, k, v = (cut(x, batch) for x in (query, key, value))
            attended = F.scaled_dot_product_attention(q, k, v, scale=scaling)
            parts.append(attended.transpose(1, 2).flatten(0, 1))
        return torch.cat(parts).index_select(0, self.places)[None]


class PackedVisionAttention(nn.Module):
    """Attention of a tower's block within pieces of a row of patches."""

    qkv: nn.Module
    proj: nn.Module
    num_heads: int
    scaling: float
    config: Any

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        pieces: Pieces,
        **others: object,
    ) -> Tensor:
        """Map (n, width) to (n, width)."""
        assert position_embeddings
        cos, sin = (angles[None] for angles in position_embeddings)  # float32
        query, key, value = self.qkv(hidden_states).unflatten(1, (3, self.num_heads, -1)).permute(1, 2, 0, 3)[:, None]
        query, key = (rotated(x, cos, sin).to(x.dtype) for x in (query, key))
        if pads(self.config):
            attended = pieces.attend(query, key, value, self.scaling)
        else:
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            attended, _ = attend(self, query, key, value, None, segments=pieces, scaling=self.scaling)
        return self.proj(attended[0].flatten(1))


@dataclass(frozen=True)
class Layout:
    """What a tower needs to know of n patches besides their pixels.

    positions: (n, 2) rows and columns.  whole: each image, or each two frames, is a piece.
    windows: each window is one, in the order of `by_window`; None without windows.
    by_window: (n,) the patches in the order of windows.
    taps, weights: (n, 4) entries of the table of learned positions that a patch interpolates, if the tower has one.
    """

    positions: Tensor
    whole: Pieces
    windows: Pieces | None = None
    by_window: Tensor | None = None
    taps: Tensor | None = None
    weights: Tensor | None = None

    @classmethod
    def of(cls, images: Sequence[Image], config: Any, device: torch.device) -> "Layout":
        """Compute the layout on the CPU, because it depends on numbers that the device would have to be asked for."""
        side, merge = config.patch_size, config.spatial_merge_size
        grids = torch.tensor([grid_of(image, side) for image in images])
        lengths = get_vision_cu_seqlens(grids).diff().tolist()
        layout: dict[str, Any] = {"positions": sent(get_vision_position_ids(grids, merge), device)}
        layout["whole"] = Pieces(tuple(lengths), device, causal=False)
        if hasattr(config, "fullatt_block_indexes"):
            units, bounds = get_vision_window_index(grids, merge, config.window_size, side)
            layout["windows"] = Pieces(tuple(bounds.diff().tolist()), device, causal=False)
            layout["by_window"] = sent((units[:, None] * merge**2 + torch.arange(merge**2)).flatten(), device)
        if hasattr(config, "num_position_embeddings"):
            per_side = int(config.num_position_embeddings**0.5)
            taps = get_vision_interpolation_indices_and_weights(grids, per_side, "bilinear", True, merge)
            layout["taps"], layout["weights"] = (sent(each, device) for each in taps)
        return cls(**layout)


def grid_of(image: Image, side: int) -> tuple[int, int, int]:
    """Return how many frames the tower sees of an image or video, and their rows and columns of patches."""
    rows, columns = image.height // side, image.width // side
    return len(image.tiles) // (rows * columns) // (1 + image.video), rows, columns


def normalised(
    patches: Tensor,
    images: Sequence[Image],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Normalise the images' patches (n, 3, side, side) uint8 for the tower: (n', 3, 2, side, side).

    A tower's patch has two frames: of an image twice the same. It computes in float32: bf16 has only eight bits.
    """
    of = [sent(torch.tensor(values)[:, None, None], device) for values in (mean, std)]
    pixels = sent(patches, device).float().div_(255).sub_(of[0]).div_(of[1]).to(dtype)
    if any(image.video for image in images):
        times = torch.tensor([1 if image.video else 2 for image in images])
        counts = torch.tensor([len(image.tiles) for image in images])
        twice = torch.arange(len(patches)).repeat_interleave(times.repeat_interleave(counts))
        return pixels.index_select(0, sent(twice, device)).unflatten(0, (-1, 2)).transpose(1, 2)
    return pixels[:, :, None].expand(-1, -1, 2, -1, -1)


def tower_states(tower: Any, pixels: Tensor, layout: Layout) -> Tensor:
    """Map (n, 3, 2, side, side) normalised pixels to (1 + deepstack, n, width), the inputs of the mergers.

    They are the last block's output, and those of the blocks that `deepstack_visual_indexes` names.
    """
    hidden = tower.patch_embed(pixels)
    if layout.taps is not None and layout.weights is not None:
        hidden = hidden + (tower.pos_embed(layout.taps) * layout.weights[:, :, None]).sum(1).to(hidden.dtype)
    angles = tower.rotary_pos_emb(hidden, layout.positions)
    if layout.by_window is not None:
        hidden, *angles = (x.index_select(0, layout.by_window) for x in (hidden, *angles))
    full, deep = getattr(tower, "fullatt_block_indexes", ()), getattr(tower, "deepstack_visual_indexes", ())
    states = {}
    for number, block in enumerate(tower.blocks):
        pieces = layout.windows if layout.windows and number not in full else layout.whole
        hidden = block(hidden, cu_seqlens=None, position_embeddings=tuple(angles), pieces=pieces)
        if number in deep:
            states[number] = hidden
    if layout.by_window is not None:
        hidden = hidden.index_select(0, layout.by_window.argsort())
    return torch.stack([hidden, *(states[number] for number in deep)])


def blank_image(config: Any) -> Image:
    """Return the smallest image that a tower takes: one token."""
    side, merge = config.patch_size, config.spatial_merge_size
    return Image(np.zeros((merge**2, 3, side, side), np.uint8), merge * side, merge * side)
