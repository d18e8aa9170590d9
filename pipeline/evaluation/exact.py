"""Similarities that do not depend on kernels, tiles, threads or devices."""

from torch import Tensor

STEP = 2.0**-26


def fixed(vectors: Tensor) -> Tensor:
    """Round unit vectors in place to multiples of 2^-26, so that their dot products in float64 are exact.

    Each product is a multiple of 2^-52. By Cauchy-Schwarz no partial sum exceeds 1, or 2 for vectors within the
    tolerance. So float64 represents all partial sums, and the order of additions does not matter. Without rounding, the
    last digits would depend on kernel, tile and threads, and a candidate identical to the right one could count as
    strictly more similar. A similarity changes by about 1e-8, less than the resolution of float32 near 1.

    vectors: float64, or float32, which represents the result, too: numbers of 1/4 and more are such multiples already.
    """
    return vectors.mul_(1 / STEP).round_().mul_(STEP)
