"""Cut images into the uint8 patches of Qwen-VL's vision towers, and count their tokens.

Sizes and patches equal those of transformers' Qwen2VLImageProcessor. Patches stay uint8 until the device normalises
them.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.data.sample import BadSample
from pipeline.data.tiles import resized

_LONGEST = 200  # the largest aspect ratio, as in transformers


@dataclass(frozen=True)
class Patches:
    """How images become patches: near their own size and aspect ratio.

    side: pixels of a patch's side.  merge: merge² patches are one token of the language model.
    min_pixels, max_pixels: limits of the resized image.
    """

    side: int
    merge: int
    min_pixels: int
    max_pixels: int

    @property
    def patch(self) -> float:
        """The side of a token in pixels: what the data's estimates call a patch."""
        return self.side * self.merge

    @property
    def frame_patches(self) -> int:
        return 0  # videos are refused

    def tokens(self, height: int, width: int, *, anyres: bool) -> int:
        """Count the tokens of an image of this size, with the marks before and after it; 0 if it cannot be resized.

        anyres: has no effect: an image of several is resized like one alone.
        """
        if not self._possible(height, width):
            return 0
        rows, columns = self.grid(height, width)
        return rows * columns // self.merge**2 + 2

    def video_tokens(self, frames: int) -> int:
        return 0  # videos are refused

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of patches of an image of this size; BadSample if it is too long."""
        if not self._possible(height, width):
            raise BadSample(f"{width}x{height} pixels: one side is more than {_LONGEST} times the other")
        # Imported here because it takes seconds.
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        pixels = smart_resize(height, width, self.side * self.merge, self.min_pixels, self.max_pixels)
        return pixels[0] // self.side, pixels[1] // self.side

    def cut(self, image: Image.Image) -> tuple[np.ndarray, int, int]:
        """Resize an RGB image and cut it: (patches, 3, side, side) uint8, and the resized height and width.

        The merge² patches of a token follow each other; tokens are in the order of rows.
        """
        rows, columns = self.grid(image.height, image.width)
        pixels = resized(image, rows * self.side, columns * self.side)
        cells = pixels.reshape(
            3, rows // self.merge, self.merge, self.side, columns // self.merge, self.merge, self.side
        )
        cut = np.ascontiguousarray(cells.transpose(1, 4, 2, 5, 0, 3, 6)).reshape(-1, 3, self.side, self.side)
        return cut, rows * self.side, columns * self.side

    @staticmethod
    def _possible(height: int, width: int) -> bool:
        return max(height, width) <= _LONGEST * min(height, width)


def positions(tokens: list[int | tuple[int, int]]) -> np.ndarray:
    """Return an item's (3, T) int64 positions of time, row and column (M-RoPE, arXiv 2409.12191, section 2.1).

    tokens: in their order, the number of consecutive text tokens, or the rows and columns of an image's tokens. A text
    token has one position on all axes, after the largest before it. An image's rows and columns count from there.
    """
    parts, start = [], 0
    for each in tokens:
        if isinstance(each, tuple):
            time, row, column = np.zeros(each, np.int64), *np.indices(each)
            parts.append(np.stack([time, row, column]).reshape(3, -1) + start)
            start += max(each)
        else:
            parts.append(np.broadcast_to(np.arange(start, start + each), (3, each)))
            start += each
    return np.concatenate(parts, axis=1)
