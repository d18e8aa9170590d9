"""Cut images and video frames into the uint8 tiles of LLaVA-OneVision's vision tower, and count their tokens.

Resize, tiles and token counts equal those of transformers' LlavaOnevisionImageProcessor and -VideoProcessor. Tiles stay
uint8 until the device normalizes them.
"""

import io
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.data.sample import IMAGE_SUFFIXES, BadSample

Needed = Callable[[int, int], tuple[float, float]]  # height and width of an image -> those to which it is resized

MAX_PIXELS = 89_478_485  # Pillow's default limit: more may be a decompression bomb


@dataclass(frozen=True)
class Tiling:
    """How images become tiles: LLaVA's "anyres_max_N" with `spatial_unpad`.

    size: pixels of a tile's side.
    patches: patches along a tile's side; a tile has patches² tokens.
    pinpoints: the (height, width) to which images may be resized and padded, multiples of `size`.
    max_tiles: N; the tokens of more than N tiles are reduced by interpolation.
    newline: the newline tokens of a video: "one_token" at its end, or "grid": after each row of every frame.
    """

    size: int
    patches: int
    pinpoints: tuple[tuple[int, int], ...]
    max_tiles: int = 9
    newline: Literal["one_token", "grid"] = "one_token"

    @property
    def patch(self) -> float:
        """The side of a patch, in pixels."""
        return self.size / self.patches

    @property
    def frame_patches(self) -> int:
        return self.patches**2

    def tokens(self, height: int, width: int, *, anyres: bool, rounded: bool = True) -> int:
        """Count the tokens of an image of this size: the base tile, then the unpadded grid with a newline per row.

        anyres: False for an item with several images; each image then has one tile and one newline.
        rounded: see `unpadded`.
        """
        base = self.patches**2
        if not anyres:
            return base + 1
        rows, columns = self.reduced(*self.unpadded(height, width, rounded=rounded))
        return base + rows * (columns + 1)

    def unpadded(self, height: int, width: int, *, rounded: bool = True) -> tuple[int, int]:
        """Return the rows and columns of patches that remain of an image's grid without its padding.

        rounded: round quotients to seven digits, as transformers does. LLaVE's code does not: of three in 100,000
        sizes it then drops a further row or column at both sides (`unpad_image` of llava/model/llava_arch.py).
        """
        rows, columns = (self.patches * side // self.size for side in self.grid(height, width))
        if width / height > columns / rows:
            kept = height * (columns / width)
            rows -= (rows - int(round(kept, 7) if rounded else kept)) // 2 * 2
        else:
            kept = width * (rows / height)
            columns -= (columns - int(round(kept, 7) if rounded else kept)) // 2 * 2
        return rows, columns

    def reduced(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the rows and columns to which interpolation reduces a grid of patches."""
        ratio = math.sqrt(rows * columns / (self.max_tiles * self.patches**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    def video_tokens(self, frames: int) -> int:
        """Count the tokens of a video: each frame's patches, pooled 2x2, and the newlines."""
        side = math.ceil(self.patches / 2)
        return frames * side * (side + 1) if self.newline == "grid" else frames * side**2 + 1

    def cut(self, image: Image.Image, *, anyres: bool) -> np.ndarray:
        """Cut an RGB image into (tiles, 3, size, size) uint8: the whole image first, then its grid row by row."""
        if not anyres:
            return self._tile(_pad_to_square(image))[None]
        from transformers.image_processing_utils import get_patch_output_size

        target = self.grid(image.height, image.width)
        channels_first = np.empty((3, image.height, image.width), np.uint8)  # only its shape matters
        height, width = get_patch_output_size(channels_first, target, input_data_format="channels_first")
        grid = np.zeros((3, *target), np.uint8)
        top, left = (target[0] - height) // 2, (target[1] - width) // 2
        grid[:, top : top + height, left : left + width] = resized(image, height, width)
        rows, columns = target[0] // self.size, target[1] // self.size
        tiles = np.empty((1 + rows * columns, 3, self.size, self.size), np.uint8)
        tiles[0] = self._tile(image)
        cells = grid.reshape(3, rows, self.size, columns, self.size).transpose(1, 3, 0, 2, 4)
        tiles[1:].reshape(cells.shape)[:] = cells  # one copy
        return tiles

    def needed(self, height: int, width: int) -> tuple[float, float]:
        """Return the largest height and width to which `cut` resizes an image of this size with anyres."""
        rows, columns = self.grid(height, width)
        scale = min(rows / height, columns / width)
        return max(height * scale, self.size), max(width * scale, self.size)

    def cut_frames(self, frames: Iterable[Image.Image]) -> np.ndarray:
        """Resize RGB frames of a video to (frames, 3, size, size) uint8: one tile each, for every aspect ratio."""
        return np.stack([self._tile(frame) for frame in frames])

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the best pinpoint for an image."""
        # Imported here because it takes two seconds.
        from transformers.image_processing_utils import select_best_resolution

        return select_best_resolution((height, width), list(self.pinpoints))

    def _tile(self, image: Image.Image) -> np.ndarray:
        return resized(image, self.size, self.size)


def resized(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Resize an RGB image with Pillow's bicubic filter, as the papers' code does, to (3, height, width) uint8."""
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # with other strides, convolutions may round differently


def decode_image(data: bytes, as_stored: bool = False, needed: Needed | None = None) -> Image.Image:
    """Decode an image to RGB with `rgb`. Raises BadSample if that fails, or if it exceeds Pillow's pixel limit.

    needed: decode a JPEG at a half, a fourth or an eighth of its size, if that is at least twice what is needed in both
    directions. None: at full size.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=tuple(IMAGE_SUFFIXES))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels, {MAX_PIXELS} at most")
        if needed:
            _scale_down(image, as_stored, needed)
        return rgb(image, as_stored)
    except UnidentifiedImageError:  # its message shows a buffer's address
        raise BadSample(f"undecodable image: not a {' or '.join(IMAGE_SUFFIXES)}, or damaged") from None
    except Exception as error:  # Pillow's decoders raise many types on damaged input
        raise BadSample(f"undecodable image: {type(error).__name__}: {error}") from None


def _scale_down(image: Image.Image, as_stored: bool, needed: Needed) -> None:
    """Make an opened JPEG decode smaller: libjpeg leaves out the higher frequencies of each block of 8 x 8 pixels.

    Twice the needed size keeps the difference to a full decoding below that between two filters of a resize. Sides are
    divided without remainder: otherwise the picture would be shifted by a part of a pixel, which differs more, and the
    aspect ratio would change. A power of two changes no quotient of the sides, so grids and token counts stay the same.
    """
    width, height = image.size
    turned = not as_stored and orientation(image) >= 5
    rows, columns = reversed(needed(width, height)) if turned else needed(height, width)
    for divisor in (8, 4, 2):
        if width % divisor == height % divisor == 0 and width >= 2 * divisor * columns and height >= 2 * divisor * rows:
            image.draft(image.mode, (width // divisor, height // divisor))  # other formats ignore it
            break


def rgb(image: Image.Image, as_stored: bool = False) -> Image.Image:
    """Convert an opened image to RGB as viewers do: rotated by its EXIF orientation, 16-bit greys scaled to 8 bits.

    Transparency is dropped, as in transformers' `load_image`. Only the first frame of an animation is used.
    as_stored: only call Pillow's `convert("RGB")`, as the code of the papers does: no rotation, and 16-bit greys above
    255 become white. Raises ValueError for an image of floats, because their range is unknown.
    """
    image.load()
    if as_stored:
        return image.convert("RGB")
    turned = _TURNED.get(orientation(image))
    if image.mode == "F":
        raise ValueError("its pixels are floats of an unknown range: convert it to 8 bits")
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if image.mode != "I" or levels.max() > 255:  # "I" has 32 bits, but may come from fewer
            levels = np.clip(levels, 0, 65535) >> 8  # as Pillow does for 16-bit colours
        image = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
    image = image.convert("RGB")
    return image if turned is None else image.transpose(turned)


def orientation(image: Image.Image) -> int:
    """Return an opened image's EXIF orientation, 1 to 8; 1 (upright) if it cannot be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
        return found if found in _TURNED else 1
    except Exception:  # damaged tags
        return 1


# EXIF orientation -> how to turn the image upright.
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_PNG_TAGS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")


def image_format(data: bytes) -> tuple[str, int, int]:
    """Return (suffix, width, height when upright) of a PNG, JPEG, WebP or GIF; ("bin", 0, 0) for anything else."""
    with suppress(Exception):  # Pillow raises many types on malformed input
        image = Image.open(io.BytesIO(data), formats=tuple(IMAGE_SUFFIXES))
        suffix, size = IMAGE_SUFFIXES.get(image.format or "", "jpg"), image.size  # MPO is several JPEGs
        # A PNG's tags may follow its pixels, which Pillow then decodes: avoid this if it has no tags.
        tagged = image.format != "PNG" or any(chunk in data for chunk in _PNG_TAGS)
        if tagged and orientation(image) >= 5:
            size = size[::-1]
        fits = max(size) <= np.iinfo(np.uint16).max  # the range of the sidecar's field
        return suffix, *(size if fits else (0, 0))
    return "bin", 0, 0


def _pad_to_square(image: Image.Image) -> Image.Image:
    side = max(image.size)
    if side**2 > MAX_PIXELS:
        raise BadSample(f"{image.width}x{image.height} pixels are too many when padded to a square")
    square = Image.new("RGB", (side, side), (127, 127, 127))  # SigLIP's mean, truncated as in transformers
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
