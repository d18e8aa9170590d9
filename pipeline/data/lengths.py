"""Estimate the token lengths of samples from the index and the sidecars, without reading the samples."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from pipeline.data.index import Shard

# The order of samples depends on the token counts: increase this with every change to them.
VERSION = 1

_PROMPT = 21  # tokens around an item's text
_TEXT_BYTES = 4  # approximate UTF-8 bytes per token: 4 English letters, or 1 to 2 Chinese characters


class ImageTokens(Protocol):
    """Token counts of images and videos, which depend on the model family.

    patch: the side in pixels of the square that one token covers: a patch, or several that are merged.
    frame_patches: these squares in a frame of a video, the most if frames differ.
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
    """Each image and each video frame has `image_tokens` tokens. 0: the model does not accept images."""

    image_tokens: int = 0
    patch: float = 16  # approximate

    @property
    def frame_patches(self) -> int:
        return self.image_tokens

    def tokens(self, height: int, width: int, *, anyres: bool) -> int:
        return self.image_tokens

    def video_tokens(self, frames: int) -> int:
        return frames * self.image_tokens


@dataclass(frozen=True)
class Lengths:
    """Token lengths of samples for a model that samples `video_frames` frames of a video.

    Image tokens are exact, but for rows of MMEB whose mark and image do not match, if LLaVE reads them as published.
    Text tokens are approximate, and truncation is ignored.
    """

    tiling: ImageTokens
    video_frames: int

    def of_records(self, records: np.ndarray) -> np.ndarray:
        """Return (n,) int64 from (n,) records of a sidecar: the tokens of all items of each sample."""
        counts = {name: records[name].astype(np.int64) for name in records.dtype.names or () if name != "image_sizes"}
        texts = counts["query_text"] + counts["target_text"] + counts["negative_text"]
        lengths = (2 + counts["negatives"]) * _PROMPT + texts // _TEXT_BYTES
        lengths += counts["videos"] * self.tiling.video_tokens(self.video_frames)
        queries, targets = counts["query_images"][:, None], counts["target_images"][:, None]
        place = np.arange(records["image_sizes"].shape[1])[None]
        present = place < queries + targets + counts["negative_images"][:, None]
        # Each image of an item with several images is one tile. Negatives are assumed to have one image each.
        alone = np.where(place < queries, queries == 1, (place >= queries + targets) | (targets == 1))
        sizes = np.concatenate([records["image_sizes"], alone[:, :, None].astype(np.uint16)], axis=2)
        kinds, which = np.unique(sizes.reshape(-1, 3), axis=0, return_inverse=True)
        tokens = np.array([_image_tokens(self.tiling, *map(int, kind)) for kind in kinds], np.int64)
        if len(tokens):
            lengths += (tokens[which.reshape(present.shape)] * present).sum(axis=1)
        return lengths

    def of_shard(self, shard: Shard) -> int:
        """Return the mean number of tokens per sample of the shard."""
        sizes = [_image_tokens(self.tiling, width, height, True) for width, height in shard.image_sizes]
        images = shard.images * sum(sizes) // max(len(sizes), 1)
        videos = shard.videos * self.tiling.video_tokens(self.video_frames)
        return 2 * _PROMPT + (shard.text_bytes // _TEXT_BYTES + images + videos) // max(shard.samples, 1)


@lru_cache(maxsize=1 << 16)
def _image_tokens(tiling: ImageTokens, width: int, height: int, alone: bool) -> int:
    if not width or not height:  # the image is unreadable, so its sample becomes an invalid row
        return 0
    return tiling.tokens(height, width, anyres=bool(alone))
