"""Items as tokens and tiles; many of them packed into one row without padding."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True)
class Image:
    """An image as its tiles (n, 3, size, size) uint8, with the (height, width) it had; or a video, a tile a frame."""

    tiles: np.ndarray
    height: int
    width: int
    video: bool = False


@dataclass(frozen=True)
class Encoded:
    """One item ready for the model: token ids (T,) int32, a placeholder for each image token, and the images."""

    input_ids: np.ndarray
    images: tuple[Image, ...] = ()


@dataclass(frozen=True)
class Packed:
    """Items end to end in one row of T tokens.

    input_ids, position_ids: (T,) int64; positions restart at 0 with each item.
    lengths: tokens of each item, sum T.
    tiles: (n, 3, size, size) uint8.  image_sizes: (height, width) of each image; image_tiles: how many tiles it has;
    image_videos: whether it is a video.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: tuple[int, ...]
    tiles: torch.Tensor
    image_sizes: tuple[tuple[int, int], ...]
    image_tiles: tuple[int, ...]
    image_videos: tuple[bool, ...]

    def to(self, device: torch.device) -> "Packed":
        """With the tokens on a device; the tiles, which the vision tower may have seen already, stay where they are."""
        ids, positions = (t.to(device, non_blocking=True) for t in (self.input_ids, self.position_ids))
        return replace(self, input_ids=ids, position_ids=positions)


def pack(items: Sequence[Encoded]) -> Packed:
    images = [image for item in items for image in item.images]
    return Packed(
        input_ids=torch.from_numpy(np.concatenate([item.input_ids for item in items]).astype(np.int64)),
        position_ids=torch.from_numpy(np.concatenate([np.arange(len(item.input_ids)) for item in items])),
        lengths=tuple(len(item.input_ids) for item in items),
        tiles=torch.from_numpy(np.concatenate([image.tiles for image in images]))
        if images
        else torch.empty(0, 3, 0, 0, dtype=torch.uint8),
        image_sizes=tuple((image.height, image.width) for image in images),
        image_tiles=tuple(len(image.tiles) for image in images),
        image_videos=tuple(image.video for image in images),
    )
