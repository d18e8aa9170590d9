"""How many tokens samples take, from what the index and the sidecars say of them: no sample is opened."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from pipeline.data.index import Shard

# Of how tokens are counted, on which the order of samples depends: raise it with every change of what comes out.
VERSION = 1

_PROMPT = 21  # tokens around an item's text
_TEXT_BYTES = 4  # of UTF-8 a token holds, about: English has 4 letters, Chinese 1 or 2 characters


class ImageTokens(Protocol):
    """How many tokens images and videos take. A family of models decides it.

    patch: the side, in pixels, of what a token stands for.  frame_patches: how many of these a video's frame has.
    """

    @property
    def patch(self) -> float: ...

    @property
    def frame_patches(self) -> int: ...

    def tokens(self, height: int, width: int, *, anyres: bool) -> int: ...

    def video_tokens(self, frames: int) -> int: ...

    def __hash__(self) -> int: ...  # counts are cached


@dataclass(frozen=True)
class Square:
    """Each image, and each frame of a video, is one square of as many tokens; 0: the model takes no images."""

    image_tokens: int = 0
    patch: float = 16  # about

    @property
    def frame_patches(self) -> int:
        return self.image_tokens

    def tokens(self, height: int, width: int, *, anyres: bool) -> int:
        return self.image_tokens

    def video_tokens(self, frames: int) -> int:
        return frames * self.image_tokens


@dataclass(frozen=True)
class Lengths:
    """Token lengths for a model that tiles images so and sees so many frames of a video.

    Images count exactly, texts about; a text that is cut to fit counts as a whole.
    """

    tiling: ImageTokens
    video_frames: int

    def of_records(self, records: np.ndarray) -> np.ndarray:
        """(n,) records of a sidecar -> (n,) int64 tokens of all items of each sample."""
        counts = {name: records[name].astype(np.int64) for name in records.dtype.names or () if name != "image_sizes"}
        texts = counts["query_text"] + counts["target_text"] + counts["negative_text"]
        lengths = (2 + counts["negatives"]) * _PROMPT + texts // _TEXT_BYTES
        lengths += counts["videos"] * self.tiling.video_tokens(self.video_frames)
        queries, targets = counts["query_images"][:, None], counts["target_images"][:, None]
        place = np.arange(records["image_sizes"].shape[1])[None]
        present = place < queries + targets + counts["negative_images"][:, None]
        # An item of several images has one tile of each; negatives are taken to have one image each.
        alone = np.where(place < queries, queries == 1, (place >= queries + targets) | (targets == 1))
        sizes = np.concatenate([records["image_sizes"], alone[:, :, None].astype(np.uint16)], axis=2)
        kinds, which = np.unique(sizes.reshape(-1, 3), axis=0, return_inverse=True)
        tokens = np.array([_image_tokens(self.tiling, *map(int, kind)) for kind in kinds], np.int64)
        if len(tokens):
            lengths += (tokens[which.reshape(present.shape)] * present).sum(axis=1)
        return lengths

    def of_shard(self, shard: Shard) -> int:
        """Tokens of the shard's average sample."""
        sizes = [_image_tokens(self.tiling, width, height, True) for width, height in shard.image_sizes]
        images = shard.images * sum(sizes) // max(len(sizes), 1)
        videos = shard.videos * self.tiling.video_tokens(self.video_frames)
        return 2 * _PROMPT + (shard.text_bytes // _TEXT_BYTES + images + videos) // max(shard.samples, 1)


@lru_cache(maxsize=1 << 16)
def _image_tokens(tiling: ImageTokens, width: int, height: int, alone: bool) -> int:
    if not width or not height:  # it cannot be read: its sample will be a bad one
        return 0
    return tiling.tokens(height, width, anyres=bool(alone))
