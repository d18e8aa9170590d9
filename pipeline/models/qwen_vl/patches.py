"""Cut images and video frames into the uint8 patches of Qwen-VL's vision towers, and count their tokens.

Sizes and patches equal those of transformers' Qwen2VLImageProcessor. Patches stay uint8 until the device normalises
them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.data.batch import Image as EncodedImage
from pipeline.data.sample import BadSample
from pipeline.data.tiles import resized

_LONGEST = 200  # the largest aspect ratio, as in transformers
# Tokens of a pair of frames, and of all: the limits of Qwen3-VL-Embedding (FRAME_MAX_PIXELS, MAX_TOTAL_PIXELS) and of
# qwen-vl-utils (VIDEO_MIN_TOKEN_NUM).
# Those of a pair are also the limits of Qwen2-VL's and Qwen2.5-VL's video processor, which has none of all.
_LEAST, _MOST, _ALL = 128, 768, 7680
_STAMP = 11  # the tokens of a pair's timestamp, with the marks before and after its patches; about, of other tokenizers
MARKS = 2  # before and after the patches of an image, or of a video without timestamps
_PROMPT = 64  # tokens that a video leaves at least to the prompt


@dataclass(frozen=True)
class Patches:
    """How images become patches: near their own size and aspect ratio.

    side: pixels of a patch's side.  merge: merge² patches are one token of the language model.
    min_pixels, max_pixels: limits of the resized image.  max_video_tokens: of a video with its timestamps.
    stamped: whether each two frames of a video follow their time in the text, between marks of their own.
    """

    side: int
    merge: int
    min_pixels: int
    max_pixels: int
    max_video_tokens: int = 1 << 20
    stamped: bool = True

    @property
    def patch(self) -> float:
        """The side of a token in pixels: what the data's estimates call a patch."""
        return self.side * self.merge

    @property
    def frame_patches(self) -> int:
        """The most tokens of a frame; about, as in `video_tokens`."""
        return self._frame_limits(2)[1]

    def tokens(self, height: int, width: int, *, anyres: bool) -> int:
        """Count the tokens of an image of this size, with the marks before and after it; 0 if it cannot be resized.

        anyres: has no effect: an image of several is resized like one alone.
        """
        if not self._possible(*self.first(height, width)):
            return 0
        rows, columns = self.grid(height, width)
        return rows * columns // self.merge**2 + MARKS

    def video_tokens(self, frames: int) -> int:
        """Return about the most tokens of a video of so many frames. The index does not tell how large they are.

        A frame much longer than wide may have more: it has at least one token across, and keeps its aspect ratio.
        """
        pairs, most = math.ceil(frames / 2), self._frame_limits(frames)[1]
        return pairs * (most + _STAMP) if self.stamped else pairs * most + MARKS

    def fits(self, frames: int) -> bool:
        """Whether so many frames of a video have two tokens or more, the least that can be resized to."""
        return self._frame_limits(frames)[1] >= 2

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of patches of an image of this size; BadSample if it is too long."""
        return self._grid(*self.first(height, width), self.min_pixels, self.max_pixels)

    def first(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width to which an image is resized before; here its own."""
        return height, width

    def cut(self, image: Image.Image) -> tuple[np.ndarray, int, int]:
        """Resize an RGB image and cut it: (patches, 3, side, side) uint8, and the resized height and width.

        The merge² patches of a token follow each other; tokens are in the order of rows.
        """
        rows, columns = self.grid(image.height, image.width)
        if (first := self.first(image.height, image.width)[::-1]) != image.size:
            image = image.resize(first, Image.Resampling.BICUBIC)
        return self._cut(image, rows, columns), rows * self.side, columns * self.side

    def cut_frames(self, frames: Sequence[Image.Image]) -> tuple[np.ndarray, int, int]:
        """Resize and cut RGB frames of one size: (patches, 3, side, side) uint8, and the resized height and width.

        Each two frames are one to the tower: their patches alternate. An odd number of frames repeats the last.
        BadSample if there are so many that they would be smaller than two tokens.
        """
        first, area = frames[0], int(self.patch) ** 2
        least, most = self._frame_limits(len(frames))
        if not self.fits(len(frames)):
            raise BadSample(f"{len(frames)} frames are too many for a video's {self.max_video_tokens} tokens")
        rows, columns = self._grid(first.height, first.width, least * area, most * area)
        cut = [self._cut(frame, rows, columns) for frame in frames]
        cut += cut[-1:] * (len(cut) % 2)
        pairs = [
            np.stack(pair, axis=1).reshape(-1, *cut[0].shape[1:]) for pair in zip(cut[::2], cut[1::2], strict=True)
        ]
        return np.concatenate(pairs), rows * self.side, columns * self.side

    def _frame_limits(self, frames: int) -> tuple[int, int]:
        """Return the least and the most tokens of each two of a video's frames."""
        pairs = math.ceil(frames / 2)
        if self.stamped:
            most = min(_ALL // pairs, self.max_video_tokens // pairs - _STAMP)
        else:
            most = (self.max_video_tokens - MARKS) // pairs
        most = max(min(_MOST, most), 0)
        return min(_LEAST, most // 2), most

    def _grid(self, height: int, width: int, least: int, most: int) -> tuple[int, int]:
        if not self._possible(height, width):
            raise BadSample(f"{width}x{height} pixels: one side is more than {_LONGEST} times the other")
        # Imported here because it takes seconds.
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        pixels = smart_resize(height, width, self.side * self.merge, least, most)
        return pixels[0] // self.side, pixels[1] // self.side

    def _cut(self, image: Image.Image, rows: int, columns: int) -> np.ndarray:
        pixels, merge = resized(image, rows * self.side, columns * self.side), self.merge
        cells = pixels.reshape(3, rows // merge, merge, self.side, columns // merge, merge, self.side)
        return np.ascontiguousarray(cells.transpose(1, 4, 2, 5, 0, 3, 6)).reshape(-1, 3, self.side, self.side)

    def joined(self, image: EncodedImage) -> tuple[np.ndarray, float]:
        """Return an image, or a video's first frame, from its patches: (3, height, width), and width / height."""
        merge, side = self.merge, self.side
        rows, columns = image.height // side, image.width // side
        tiles = image.tiles[: 2 * rows * columns : 2] if image.video else image.tiles
        cells = tiles.reshape(rows // merge, columns // merge, merge, merge, 3, side, side)
        whole = cells.transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, image.height, image.width)
        return whole, image.width / image.height

    @staticmethod
    def _possible(height: int, width: int) -> bool:
        return max(height, width) <= _LONGEST * min(height, width)


def video_limit(max_tokens: int) -> int:
    """Return the most tokens of a video in an item of `max_tokens`: three quarters, and few enough for the prompt."""
    return max(min(max_tokens * 3 // 4, max_tokens - _PROMPT), 0)


@dataclass(frozen=True)
class Grid:
    """The tokens of an image, or of a video's pairs of frames, in the order of pairs, rows and columns.

    interval: the positions from a pair to the next.
    """

    rows: int
    columns: int
    pairs: int = 1
    interval: int = 1


def positions(tokens: Sequence[int | Grid]) -> np.ndarray:
    """Return an item's (3, T) int64 positions of time, row and column (M-RoPE, arXiv 2409.12191, section 2.1).

    tokens: in their order, the number of consecutive text tokens, or the grid of an image's or a video's. A text token
    has one position on all axes. Pairs, rows and columns count from the next one. The text after a grid follows its
    rows and columns, as in transformers 5.17; in 4.57 it followed the largest position of any axis.
    """
    parts, start = [], 0
    for each in tokens:
        if isinstance(each, Grid):
            axes = np.indices((each.pairs, each.rows, each.columns)).reshape(3, -1)
            parts.append(axes * [[each.interval], [1], [1]] + start)
            start += max(each.rows, each.columns)
        else:
            parts.append(np.broadcast_to(np.arange(start, start + each), (3, each)))
            start += each
    return np.concatenate(parts, axis=1)
