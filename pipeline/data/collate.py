"""Encoded items (token ids and image tiles), packed into one row without padding."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from pipeline.data.digest import digest


@dataclass(frozen=True)
class Image:
    """An image or a video as tiles (n, 3, size, size) uint8, and its original size; a video has one tile per frame."""

    tiles: np.ndarray
    height: int
    width: int
    video: bool = False


@dataclass(frozen=True)
class Encoded:
    """The input of a model for one item.

    input_ids: (T,) int32, with one placeholder per image token.
    skipped: number of instruction tokens at the beginning, which mean pooling excludes.
    vector: (width,), the text's precomputed embedding by a frozen language model, or None.
    text: the token ids of that language model as bytes. `key` hashes them instead of `vector`, because vectors of the
        same text can differ in their last bits.
    positions: (T,), or (3, T) for rotary embeddings with three axes; None: 0 to T - 1.
    """

    input_ids: np.ndarray
    images: tuple[Image, ...] = ()
    skipped: int = 0
    vector: np.ndarray | None = None
    text: bytes = b""
    positions: np.ndarray | None = None

    @cached_property
    def key(self) -> int:
        """A 64-bit hash of the model's input: equal inputs share it and, in practice, no others."""
        shapes = [self.skipped]
        for image in self.images:
            # The original size affects the model's input only for images of several tiles.
            sized = not image.video and len(image.tiles) > 1
            size = (image.height, image.width) if sized else (0, 0)
            shapes += [*image.tiles.shape, *size, image.video]
        ids = np.ascontiguousarray(self.input_ids, np.int32).tobytes()
        places = b"" if self.positions is None else np.ascontiguousarray(self.positions, np.int64).tobytes()
        return digest(
            [ids, self.text + places, np.array(shapes, np.int64).tobytes(), *(image.tiles for image in self.images)]
        )


@dataclass(frozen=True)
class Packed:
    """Items concatenated into one row of T tokens.

    input_ids: (T,) int64.  host_ids: input_ids in CPU memory.
    position_ids: (T,) int64, or (3, T) if any item has three axes; they restart at each item.
    lengths: tokens of each item, T in total.  images: in the order of their placeholders.
    tiles_of: number of tiles of each item.  skipped, vectors: per item, see `Encoded`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    host_ids: torch.Tensor
    lengths: tuple[int, ...]
    images: tuple[Image, ...]
    tiles_of: tuple[int, ...]
    skipped: tuple[int, ...]
    vectors: tuple[np.ndarray | None, ...]

    @property
    def positions(self) -> torch.Tensor:
        """`position_ids` for a batch of one row: (1, T) or (3, 1, T)."""
        return self.position_ids.unsqueeze(-2)

    @property
    def tiles(self) -> torch.Tensor:
        """The tiles of all images: (n, 3, size, size) uint8. Each access makes a new copy."""
        if not self.images:
            return torch.empty(0, 3, 0, 0, dtype=torch.uint8)
        return torch.from_numpy(np.concatenate([image.tiles for image in self.images]))

    def to(self, device: torch.device) -> "Packed":
        """Copy token and position ids to a device. Tiles stay in CPU memory: they may be encoded already."""
        return replace(self, input_ids=sent(self.input_ids, device), position_ids=sent(self.position_ids, device))


def pack(items: Sequence[Encoded]) -> Packed:
    ids = torch.from_numpy(np.concatenate([item.input_ids for item in items]).astype(np.int64))
    return Packed(
        input_ids=ids,
        position_ids=torch.from_numpy(np.concatenate(_positions(items), axis=-1)),
        host_ids=ids,
        lengths=tuple(len(item.input_ids) for item in items),
        images=tuple(image for item in items for image in item.images),
        tiles_of=tuple(sum(len(image.tiles) for image in item.images) for item in items),
        skipped=tuple(item.skipped for item in items),
        vectors=tuple(item.vector for item in items),
    )


def _positions(items: Sequence[Encoded]) -> list[np.ndarray]:
    """Return the positions of each item, all with the same number of axes."""
    given = [np.arange(len(item.input_ids)) if item.positions is None else item.positions for item in items]
    axes = max(positions.ndim for positions in given)
    return [each if each.ndim == axes else np.broadcast_to(each, (3, len(each))) for each in given]


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device. Pinned memory makes the copy to a GPU asynchronous."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
