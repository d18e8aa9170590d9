"""Items as tokens and tiles; many of them packed into one row without padding, and brought to a device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from pipeline.data.digest import digest


@dataclass(frozen=True)
class Image:
    """An image as its tiles (n, 3, size, size) uint8, with the (height, width) it had; or a video, a tile a frame."""

    tiles: np.ndarray
    height: int
    width: int
    video: bool = False


@dataclass(frozen=True)
class Encoded:
    """One item ready for the model: token ids (T,) int32, a placeholder for each image token, and the images.

    skipped: tokens of an instruction at its beginning, which a mean over the text leaves out.
    vector: (width,) of the text, by a frozen language model, where it was computed beforehand.
    text: in bytes what that model reads, where the vector stands for it: one text's vectors differ in their last bits.
    positions: (T,), or (3, T) of rotary embeddings with three axes; None counts the tokens from 0.
    """

    input_ids: np.ndarray
    images: tuple[Image, ...] = ()
    skipped: int = 0
    vector: np.ndarray | None = None
    text: bytes = b""
    positions: np.ndarray | None = None

    @cached_property
    def key(self) -> int:
        """64 bits that two items share when, and in practice only when, they are the same to the model."""
        shapes = [self.skipped]
        for image in self.images:
            # Of what is one tile, or a video, the model does not see what size it had.
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
    """Items end to end in one row of T tokens.

    input_ids: (T,) int64.  host_ids: input_ids, on the host.  position_ids: (T,) int64, or (3, T) where an item has
        three axes; they restart with each item.
    lengths: tokens of each item, sum T.  images: in the order of their placeholders.
    tiles_of: of each item, how many tiles its images have.  skipped, vectors: of each item, see `Encoded`.
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
        """(n, 3, size, size) uint8, all images': a copy, made at each use and kept nowhere."""
        if not self.images:
            return torch.empty(0, 3, 0, 0, dtype=torch.uint8)
        return torch.from_numpy(np.concatenate([image.tiles for image in self.images]))

    def to(self, device: torch.device) -> "Packed":
        """With the tokens on a device; the tiles, which the vision tower may have seen already, stay where they are."""
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
    """Each item's, all of one shape but for T."""
    given = [np.arange(len(item.input_ids)) if item.positions is None else item.positions for item in items]
    axes = max(positions.ndim for positions in given)
    return [each if each.ndim == axes else np.broadcast_to(each, (3, len(each))) for each in given]


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On a device; to a GPU from page-locked memory, from which alone it is copied while the host goes on."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
