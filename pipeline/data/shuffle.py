"""Shuffles and balances that the order of samples is computed with."""

from enum import IntEnum

import numpy as np


class Use(IntEnum):
    """What random numbers are for: the last word of their key, so that no two uses have the same numbers."""

    PASS = 0
    BLOCKS = 1
    POSITIONS = 2
    LANES = 3
    SAMPLES = 4
    SLICES = 5
    PLACES = 6
    SCHEDULE = 7
    ALTERNATIVE = 8
    AUGMENTATION = 9
    REMAINDER = 10


def random_raw(count: int, *key: int) -> np.ndarray:
    """Return `count` uniform uint64, determined by `key`: always six words, the last one a `Use`.

    Runs resume from these numbers, so they must never change. They are the raw output of PCG64 with SeedSequence, which
    numpy guarantees to stay the same (NEP 19), unlike Generator.permutation.
    """
    return np.asarray(np.random.PCG64(key).random_raw(count))


def shuffled(shape: int | tuple[int, ...], *key: int) -> np.ndarray:
    """Return int64 permutations of the indices along the last axis, determined by the `key` of `random_raw`."""
    raw = random_raw(int(np.prod(shape)), *key).reshape(shape)
    return np.argsort(raw, axis=-1, kind="stable")


def balance(values: np.ndarray) -> np.ndarray:
    """Assign one item of each group to every bin, so that the sums of the bins are about equal.

    values: int64 (..., groups, bins), the value of each item. Returns int64 of that shape: [..., g, b] is the item of
    group g that is assigned to bin b. Greedy: the bin with the smallest sum gets the largest item of the group, and so
    on. Groups with the most unequal items come first, since later groups can compensate for them.
    """
    *outer, groups, bins = values.shape
    if bins == 1:
        return np.zeros(values.shape, dtype=np.int64)
    values = values.reshape(-1, groups, bins)
    items = np.argsort(values, axis=2, kind="stable")[..., ::-1]
    falling = np.take_along_axis(values, items, axis=2)
    order = np.argsort(falling[..., -1] - falling[..., 0], axis=1, kind="stable")[..., None]
    items, falling = np.take_along_axis(items, order, axis=1), np.take_along_axis(falling, order, axis=1)

    sums = np.zeros((len(values), bins), dtype=np.int64)
    bin_of_sum = np.broadcast_to(np.arange(bins), sums.shape)
    bin_of_item = np.empty_like(items)
    for group in range(groups):
        rising = np.argsort(sums, axis=1, kind="stable") + np.arange(len(sums))[:, None] * bins
        sums, bin_of_sum = sums.take(rising) + falling[:, group], bin_of_sum.take(rising)
        bin_of_item[:, group] = bin_of_sum

    in_order, assigned = np.empty_like(items), np.empty_like(items)
    np.put_along_axis(in_order, bin_of_item, items, axis=2)
    np.put_along_axis(assigned, order, in_order, axis=1)
    return assigned.reshape(*outer, groups, bins)
