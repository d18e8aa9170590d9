"""Images and video frames -> the uint8 tiles that LLaVA-OneVision's vision tower sees, and how many tokens they become.

The same resize, tiles and token counts as transformers' LlavaOnevisionImageProcessor and -VideoProcessor, less
their float work: tiles stay uint8 until the device normalises them.
"""

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from pipeline.data.resize import Pixels
from pipeline.data.sample import IMAGE_SUFFIXES, BadSample


@dataclass(frozen=True)
class Tiling:
    """How images become tiles: LLaVA's "anyres_max_N" with `spatial_unpad`.

    size: pixels of a tile's side.
    patches: patches along a tile's side, hence patches² tokens a tile.
    pinpoints: the (height, width) an image may be resized and padded to, multiples of `size`.
    max_tiles: N; more tokens than N tiles hold are reduced by interpolation.
    newline: where a video has newlines: "one_token" at its end, or "grid", after each row of every frame.
    """

    size: int
    patches: int
    pinpoints: tuple[tuple[int, int], ...]
    max_tiles: int = 9
    newline: Literal["one_token", "grid"] = "one_token"

    def tokens(self, height: int, width: int, *, anyres: bool) -> int:
        """Tokens an image of this size takes: the base tile, then the unpadded grid with a newline per row.

        `anyres` is false where a sample has several images: then each is one tile and one newline.
        """
        base = self.patches**2
        if not anyres:
            return base + 1
        grid_height, grid_width = self._grid(height, width)
        rows, columns = self.patches * grid_height // self.size, self.patches * grid_width // self.size
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        ratio = math.sqrt(rows * columns / (self.max_tiles * base))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return base + rows * (columns + 1)

    def video_tokens(self, frames: int) -> int:
        """Tokens of a video: each frame's patches, pooled 2x2, and its newlines."""
        side = math.ceil(self.patches / 2)
        return frames * side * (side + 1) if self.newline == "grid" else frames * side**2 + 1

    def cut(self, image: Image.Image, *, anyres: bool) -> np.ndarray:
        """RGB image -> (tiles, 3, size, size) uint8: the whole image first, then its grid row by row."""
        if not anyres:
            return self._tile(Pixels(_pad_to_square(image)))[None]
        from transformers.image_processing_utils import get_patch_output_size

        target = self._grid(image.height, image.width)
        channels_first = np.empty((3, image.height, image.width), np.uint8)  # only its shape is looked at
        height, width = get_patch_output_size(channels_first, target, input_data_format="channels_first")
        pixels, grid = Pixels(image), np.zeros((3, *target), np.uint8)
        top, left = (target[0] - height) // 2, (target[1] - width) // 2
        grid[:, top : top + height, left : left + width] = pixels.resized(height, width)
        rows, columns = target[0] // self.size, target[1] // self.size
        tiles = np.empty((1 + rows * columns, 3, self.size, self.size), np.uint8)
        tiles[0] = self._tile(pixels)
        cells = grid.reshape(3, rows, self.size, columns, self.size).transpose(1, 3, 0, 2, 4)
        tiles[1:].reshape(cells.shape)[:] = cells  # one copy
        return tiles

    def cut_frames(self, frames: Iterable[Image.Image]) -> np.ndarray:
        """RGB frames of a video -> (frames, 3, size, size) uint8: each is one tile, without regard to its shape."""
        return np.stack([self._tile(Pixels(frame)) for frame in frames])

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """The pinpoint that suits an image."""
        # It takes two seconds to import, which programs that cut no images need not wait for.
        from transformers.image_processing_utils import select_best_resolution

        return select_best_resolution((height, width), self.pinpoints)

    def _tile(self, pixels: Pixels) -> np.ndarray:
        return pixels.resized(self.size, self.size)


def decode_image(data: bytes) -> Image.Image:
    """Encoded bytes -> RGB image; `BadSample` if it cannot be decoded or has more pixels than Pillow finds safe."""
    try:
        image = Image.open(io.BytesIO(data), formats=tuple(IMAGE_SUFFIXES))
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels, {Image.MAX_IMAGE_PIXELS} at most")
        return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds on damaged input
        raise BadSample(f"undecodable image: {type(error).__name__}: {error}") from None


def _pad_to_square(image: Image.Image) -> Image.Image:
    side = max(image.size)
    if side**2 > Image.MAX_IMAGE_PIXELS:
        raise BadSample(f"{image.width}x{image.height} pixels, too long to be padded to a square")
    square = Image.new("RGB", (side, side), (127, 127, 127))  # SigLIP's mean, as transformers truncates it
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
