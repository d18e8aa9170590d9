"""Compare results up to rounding, on any processor. The tolerances are derived, not measured."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

# An upper bound on the number of consecutive operations, forward and backward through the few layers of a test model.
# Each rounds by at most half a unit in the last place. Rounding errors have no preferred sign, so they grow with the
# square root of their number; conditioning (norms, softmax) adds a small factor. bf16 kernels accumulate in float32, so
# only the roundings between operations count.
OPERATIONS = 4096
OPERATIONS_BF16 = 64

Values = torch.Tensor | np.ndarray | float | Sequence | Mapping


def rounding(precision: torch.dtype, operations: int | None = None) -> float:
    """Return the rounding error to allow after that many operations, relative to a tensor's largest value."""
    operations = operations or (OPERATIONS_BF16 if precision == torch.bfloat16 else OPERATIONS)
    return math.sqrt(operations) * torch.finfo(precision).eps / 2


def assert_close_in_norm(
    actual: Values,
    expected: Values,
    precision: torch.dtype | None = None,
    *,
    scale: float | None = None,
    operations: int | None = None,
) -> None:
    """Assert equal shapes, and differences within the rounding error relative to the tensor's largest value.

    Lists and dicts are compared tensor by tensor, each relative to its own largest value.
    precision: the dtype of the computation; by default the dtype of `actual`.
    scale: the largest intermediate value, if it is larger than the largest value of the result.
    operations: the number of consecutive operations, if the result is not that of a model.
    """
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys()
        for name in expected:
            assert_close_in_norm(actual[name], expected[name], precision, scale=scale, operations=operations)
        return
    if isinstance(expected, (tuple, list)) and any(isinstance(each, torch.Tensor) for each in expected):
        for mine, right in zip(actual, expected, strict=True):
            assert_close_in_norm(mine, right, precision, scale=scale, operations=operations)
        return
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not expected.numel():
        return
    precision = precision or actual.dtype
    mine, right = actual.detach().double().cpu(), expected.detach().double().cpu()
    off = torch.where(mine == right, 0, (mine - right).abs())  # inf - inf is nan
    largest = float(right.masked_fill(~right.isfinite(), 0).abs().max()) if scale is None else scale
    allowed = rounding(precision, operations) * largest
    place = int(off.argmax())
    where = tuple(int(index) for index in np.unravel_index(place, expected.shape)) if expected.ndim else ()
    assert (off <= allowed).all(), (
        f"{int((~(off <= allowed)).sum())} of {off.numel()} values are further off than {allowed:.2g}, which rounding "
        f"in {precision} allows for a largest value of {largest:.3g}; the furthest at {where}: "
        f"{float(actual.flatten()[place])} for {float(expected.flatten()[place])}, off by {float(off.max()):.2g}"
    )
