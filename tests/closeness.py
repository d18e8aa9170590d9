"""Whether a result equals its reference but for rounding, on whatever processor: nothing here is a measured number."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

# A result went through so many operations in a row at most, forth and back through the few layers of a test's model.
# Each rounds by at most half a unit in the last place; rounding errors have no preferred sign, so they add up to the
# root of their number, and conditioning (norms, softmax) takes a few of them. In bf16 sums are in float32: the
# roundings that count are those between the operations.
OPERATIONS = 4096
OPERATIONS_BF16 = 64

Values = torch.Tensor | np.ndarray | float | Sequence | Mapping


def rounding(precision: torch.dtype, operations: int | None = None) -> float:
    """By how much of a tensor's largest value rounding may change any of it, after so many operations in a row."""
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
    """Of the same shape, and no value further off than rounding allows by the largest value of the tensor.

    Lists and dicts are compared tensor by tensor, each by its own largest value.
    precision: what was computed with; by default what `actual` is in.
    scale: the largest value on the way to the result, where that is larger than the result's.
    operations: how many follow each other, where they are not a model's.
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
    off = torch.where(mine == right, 0, (mine - right).abs())  # infinities are equal, too
    largest = float(right.masked_fill(~right.isfinite(), 0).abs().max()) if scale is None else scale
    allowed = rounding(precision, operations) * largest
    place = int(off.argmax())
    where = tuple(int(index) for index in np.unravel_index(place, expected.shape)) if expected.ndim else ()
    assert (off <= allowed).all(), (
        f"{int((~(off <= allowed)).sum())} of {off.numel()} values are further off than {allowed:.2g}, which rounding "
        f"in {precision} allows for a largest value of {largest:.3g}; the furthest at {where}: "
        f"{float(actual.flatten()[place])} for {float(expected.flatten()[place])}, off by {float(off.max()):.2g}"
    )
