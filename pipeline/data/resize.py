"""Bicubic resizing with the same output as Pillow's, byte for byte, but several times as fast.

Like Pillow (src/libImaging/Resample.c), it resizes along one axis, then the other. A pixel is a weighted sum of its
neighbours in integers with 22 fractional bits, rounded to a byte after each axis. Here the weights vary along an outer
axis of the array, so whole runs of bytes share a weight, and the compiler vectorizes the loop.
"""

from collections.abc import Callable
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image

_FRACTION = 22  # bits
_SUPPORT = 2.0  # pixels on either side with a bicubic weight


class Pixels:
    """An RGB image's pixels, which can be resized to several sizes."""

    def __init__(self, image: Image.Image) -> None:
        self._rows = np.asarray(image)  # (height, width, 3)

    @cached_property
    def _columns(self) -> np.ndarray:
        return np.array(self._rows.transpose(1, 2, 0), order="C")  # (width, 3, height)

    def resized(self, height: int, width: int) -> np.ndarray:
        """Return (3, height, width) uint8, byte for byte the result of Pillow's `Image.resize` with BICUBIC."""
        old_height, old_width, bands = self._rows.shape
        down, across = _weights(old_height, height), _weights(old_width, width)
        if height < old_height and old_height - height > 2 * (old_width - width):  # Pillow's choice since version 13
            flat = compiled()(self._rows.reshape(1, old_height, -1), *down)
            columns = np.ascontiguousarray(flat.reshape(height, old_width, bands).transpose(1, 2, 0))
            resized = compiled()(columns.reshape(1, old_width, -1), *across)
            return np.ascontiguousarray(resized.reshape(width, bands, height).transpose(1, 2, 0))
        narrow = compiled()(self._columns.reshape(1, old_width, -1), *across)
        planes = np.ascontiguousarray(narrow.reshape(width, bands, old_height).transpose(1, 2, 0))
        return compiled()(planes, *down)


@lru_cache(maxsize=256)
def _weights(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute, for each of `new` pixels, the first contributing old pixel and the weights from there on.

    first: (new,).  weights: (new, taps) int32 in units of 2**-_FRACTION; zero past the last old pixel.
    """
    scale = old / new
    stretch = max(scale, 1.0)
    centre = (np.arange(new) + 0.5) * scale
    first = np.maximum(centre - _SUPPORT * stretch + 0.5, 0).astype(np.int64)
    stop = np.minimum(centre + _SUPPORT * stretch + 0.5, old).astype(np.int64)
    pixels = first + np.arange((stop - first).max())[:, None]  # taps first: NumPy sums in Pillow's order
    weights = np.where(pixels < stop, _bicubic((pixels - centre + 0.5) * (1 / stretch)), 0.0)
    scaled = weights / weights.sum(0) * (1 << _FRACTION)
    rounded = np.trunc(scaled + np.copysign(0.5, scaled))
    return first, np.ascontiguousarray(rounded.T.astype(np.int32))


def _bicubic(distance: np.ndarray) -> np.ndarray:
    a, x = -0.5, np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@lru_cache
def compiled() -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Compile the loops below. The first call takes half a second: call it before workers are forked."""
    import numba

    pixels = numba.types.Array(numba.uint8, 3, "C", readonly=True)
    signature = numba.uint8[:, :, ::1](pixels, numba.int64[::1], numba.int32[:, ::1])
    return numba.njit(signature, nogil=True, cache=True)(_resample)


def _resample(planes: np.ndarray, first: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Resize the middle axis, (P, old, run) -> (P, new, run). New pixel i is a sum of old pixels from first[i] on."""
    count, old, run = planes.shape
    resampled = np.empty((count, len(first), run), np.uint8)
    total = np.empty(run, np.int32)
    for plane in range(count):
        for i in range(len(first)):
            total[:] = 1 << (_FRACTION - 1)
            for tap in range(min(weights.shape[1], old - first[i])):
                weight, pixels = weights[i, tap], planes[plane, first[i] + tap]
                for x in range(run):
                    total[x] += np.int32(pixels[x]) * weight
            for x in range(run):
                resampled[plane, i, x] = min(max(total[x] >> _FRACTION, 0), 255)
    return resampled
