"""A dataset as the order of samples sees it: the sizes of its shards, and its part of an epoch."""

from dataclasses import dataclass
from functools import cached_property
from math import isfinite

import numpy as np

from pipeline.errors import PipelineError


def first_samples(shard_samples: np.ndarray, count: int) -> np.ndarray:
    """Return (S,) int64, how many of each shard's samples are among the first `count` of all shards in their order."""
    sizes = np.asarray(shard_samples, dtype=np.int64)
    return np.clip(count - (np.cumsum(sizes) - sizes), 0, sizes)


def is_arrangement(numbers: np.ndarray, count: int) -> bool:
    """Return whether `numbers` are the integers from 0 to count - 1 in any order."""
    if numbers.shape != (count,) or numbers.dtype.kind not in "iu" or numbers.min() < 0 or numbers.max() >= count:
        return False
    seen = np.zeros(count, dtype=bool)
    seen[numbers] = True
    return bool(seen.all())


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: comparing long arrays is slow
class Dataset:
    """A dataset's shards, and how many of its samples an epoch contains.

    shard_samples: (S,) number of samples of each shard, stored as a read-only int64 array.
    shard_lengths: (S,) mean tokens per sample of each shard, stored likewise; None: all equal.
    weight: how often an epoch contains each sample.
    cap: the maximum number of its samples in an epoch (MMEB's `num_sample_per_subset`). The next epochs continue with
        other samples until all have been used. For the same ones in every epoch, see `first_samples`.
    group: without mixed batches, datasets of the same group share a stream; None: the dataset has a stream of its own.
    clusters: (N,) the numbers of its samples, over all shards, so that samples that are alike follow each other; None:
        unknown. They are kept as they are.

    Raises PipelineError if an epoch would contain no sample, or if `clusters` does not list each sample once.
    """

    name: str
    shard_samples: np.ndarray
    shard_lengths: np.ndarray | None = None
    weight: float = 1.0
    cap: int | None = None
    group: int | None = None
    clusters: np.ndarray | None = None

    def __post_init__(self) -> None:
        sizes = np.array(self.shard_samples, dtype=np.int64).reshape(-1)
        lengths = np.ones_like(sizes) if self.shard_lengths is None else np.array(self.shard_lengths, dtype=np.int64)
        if lengths.shape != sizes.shape:
            raise PipelineError(f"dataset {self.name} has {sizes.size} shards, but {lengths.size} mean lengths")
        for name, array, unit in (("shard_samples", sizes, "samples"), ("shard_lengths", lengths, "tokens a sample")):
            if (array < 0).any():
                shard = int((array < 0).argmax())
                raise PipelineError(
                    f"dataset {self.name}: shard {shard} has {array[shard]} {unit}, but needs at least 0"
                )
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if not self.samples:
            raise PipelineError(f"dataset {self.name} has 0 samples: convert it again, or remove it from data.datasets")
        if self.cap is not None and self.cap < 1:
            raise PipelineError(f"dataset {self.name}: cap is {self.cap}: it must be 1 or more")
        if not (isfinite(self.weight) and self.weight > 0 and self.quota):
            least = 0.5 / self.samples
            raise PipelineError(f"dataset {self.name}: weight is {self.weight}: it must be more than {least:g}")
        if self.clusters is not None and not is_arrangement(self.clusters, self.samples):
            raise PipelineError(f"dataset {self.name}: its clusters do not list each of {self.samples} samples once")

    @cached_property
    def samples(self) -> int:
        """The number of samples in all shards."""
        return int(self.shard_samples.sum())

    @cached_property
    def quota(self) -> int:
        """The number of samples in an epoch."""
        weighted = round(self.weight * self.samples)
        return weighted if self.cap is None else min(weighted, self.cap)
