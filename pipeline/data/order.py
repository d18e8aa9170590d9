"""The order of samples: the samples that each step reads on each rank, a pure function of shards, seed and step.

    block    up to `block_samples` consecutive samples of one shard: one ranged read
    pass     all blocks of a dataset, shuffled; passes follow each other without end
    epoch    the next `quota` samples of every dataset's passes; blocks at both ends are cut
    stream   the datasets that share one sequence of samples: all of them (mixed batches), those of a group, or each on
             its own
    window   up to `window_blocks` blocks of a stream. Samples are shuffled within a window, so a reader holds only
             one or two windows per lane in memory
    lane     one of L equally long sequences of windows; samples are moved from longer to shorter lanes
    slice    the next B/(K L) samples of every lane: one of the K parts of a batch
    step     K slices, drawn from the epoch's slices of all streams; rank r of W reads L/W lanes

The world size only decides which rank reads a lane. So a run resumes from one integer, on any number of GPUs, with the
same batches. Arrays are as long as the number of blocks; only those of batches of neighbours as that of the samples.

With batches of neighbours, a cluster takes the place of a block: `cluster` samples that are alike. A step is the next
B/C clusters of all datasets, spread over the lanes; see `ClusterStream`.

A step takes as long as the rank with the most tokens. So blocks are assigned to windows, and a window's samples to its
slices, with about the same number of tokens in each: they are sorted by length, and each group of similar length is
spread evenly. Samples of equal length are in plain shuffled order.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from pipeline.data.blocks import Blocks, BlockStream
from pipeline.data.clusters import ClusterStream
from pipeline.data.dataset import Dataset
from pipeline.data.shuffle import Use, random_raw, shuffled
from pipeline.errors import PipelineError

# Increase this with every change to the samples of a step. Otherwise, a resumed run would repeat and omit samples.
VERSION = 1


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _equal_lengths(shard: int, start: int, stop: int) -> np.ndarray:
    return np.ones(stop - start, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Order:
    """The order of a run over its datasets. Shards are numbered consecutively over all datasets.

    global_batch: samples per step over all ranks (B). lanes: independent readers (L), a divisor of B.
    block_samples, window_blocks: the most samples per block, and blocks per window.
    seed: 0 to 2**32 - 1.
    parts: None: batches are mixed from all datasets. K, a divisor of B/L: a batch has K parts of B/K samples, each
        from one dataset or group of datasets (1: homogeneous batches), drawn in proportion to its samples in an epoch.
    lengths: (shard, start, stop) -> int64, the tokens of each of these samples; by default all are equal.
    cluster: None: samples are used in blocks. C, a divisor of B: batches of neighbours, of whole clusters of C samples;
        every dataset has `clusters`, and there are no parts.

    Raises PipelineError, which names numbers that work, if these numbers are inconsistent.
    """

    datasets: tuple[Dataset, ...]
    global_batch: int
    lanes: int
    block_samples: int
    window_blocks: int
    seed: int
    parts: int | None = None
    lengths: Callable[[int, int, int], np.ndarray] = _equal_lengths
    cluster: int | None = None

    def __post_init__(self) -> None:
        for name in ("global_batch", "lanes", "block_samples", "window_blocks", "parts", "cluster"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise PipelineError(f"{name} is {getattr(self, name)}: it must be 1 or more")
        if not 0 <= self.seed < 2**32:
            raise PipelineError(f"seed {self.seed} is not between 0 and {2**32 - 1}")
        lane_batch, rest = divmod(self.global_batch, self.lanes)
        if rest:
            raise PipelineError(
                f"lanes {self.lanes} does not divide global batch {self.global_batch}: "
                f"lanes could be {_listed(_divisors(self.global_batch))}"
            )
        if lane_batch % self.slices_per_step:
            raise PipelineError(
                f"parts {self.parts} does not divide {lane_batch}, the samples of a lane in a batch: "
                f"parts could be {_listed(_divisors(lane_batch))}"
            )
        if self.cluster is not None:
            self._check_clusters(self.cluster)
        if not self._fills_a_step(self.slices_per_step, self.slice_samples):
            raise PipelineError(self._too_few_samples())

    def _check_clusters(self, size: int) -> None:
        if self.parts is not None:
            raise PipelineError("batches of neighbours have no parts")
        if self.global_batch % size:
            below = self.global_batch // size * size
            raise PipelineError(
                f"clusters of {size} samples do not divide global batch {self.global_batch}: global_batch could be "
                f"{_listed(filter(None, (below, below + size)))}, or clusters could have "
                f"{_listed(_divisors(self.global_batch)[1:])} samples"
            )
        for dataset in self.datasets:
            if dataset.clusters is None:
                raise PipelineError(f"dataset {dataset.name} has no clusters, which batches of neighbours need")
            if (samples := min(dataset.samples, dataset.quota)) < size:
                raise PipelineError(
                    f"dataset {dataset.name} has {samples} samples in an epoch, less than a cluster of {size}: remove "
                    "it from data.datasets, raise its weight or cap, or make smaller clusters"
                )

    def _fills_a_step(self, parts: int, slice_samples: int) -> bool:
        """Return whether an epoch has a slice of every stream, and enough slices for one step of whole clusters."""
        if self.cluster and slice_samples * self.lanes % self.cluster:
            return False
        slices = [stream.samples // (slice_samples * self.lanes) for stream in self.streams]
        return min(slices) > 0 and sum(slices) >= parts

    def _too_few_samples(self) -> str:
        smallest = min(self.streams, key=lambda stream: stream.samples)
        size = self.slice_samples * self.lanes
        if self.parts is None:
            problem = f"global batch {self.global_batch} is more than the {smallest.samples} samples of an epoch"
        elif smallest.slices == 0:
            names = ", ".join(self.datasets[number].name for number in smallest.datasets)
            problem = f"a part of {size} samples is more than the {smallest.samples} of dataset {names} in an epoch"
        else:
            slices = sum(stream.slices for stream in self.streams)
            problem = f"a batch of {self.parts} parts is more than the {slices} of {size} samples in an epoch"

        lane_batch = self.global_batch // self.lanes
        parts = [k for k in _divisors(lane_batch) if self.parts and self._fills_a_step(k, lane_batch // k)]
        smaller = (n for n in range(self.slice_samples - 1, 0, -1) if self._fills_a_step(self.slices_per_step, n))
        largest = next(smaller, 0) * self.slices_per_step * self.lanes
        remedies = [f"parts could be {_listed(parts)}"] if parts else []
        remedies += [f"global_batch could be at most {largest} with {self.lanes} lanes"] if largest else []
        return f"{problem}: {', or '.join(remedies) or 'global_batch and lanes must be smaller'}, or weights larger"

    @property
    def slices_per_step(self) -> int:
        """K; 1 for mixed batches."""
        return self.parts or 1

    @property
    def slice_samples(self) -> int:
        """B/(K L), the number of samples of a slice in each lane."""
        return self.global_batch // (self.slices_per_step * self.lanes)

    @cached_property
    def streams(self) -> tuple[BlockStream | ClusterStream, ...]:
        """One stream over all datasets for mixed batches, otherwise one per group and per dataset without a group."""
        if self.cluster:
            return (ClusterStream(self.datasets, self.cluster, self.global_batch, self.lanes, self.seed, self.lengths),)
        members: dict[tuple[int | None, ...], list[int]] = {}
        for number, dataset in enumerate(self.datasets):
            own = (None, number) if dataset.group is None else (dataset.group,)
            members.setdefault(own if self.parts else (), []).append(number)
        return Blocks(
            datasets=self.datasets,
            members=tuple(map(tuple, members.values())),
            slice_samples=self.slice_samples,
            lanes=self.lanes,
            block_samples=self.block_samples,
            window_blocks=self.window_blocks,
            seed=self.seed,
            lengths=self.lengths,
        ).streams

    @cached_property
    def samples(self) -> int:
        """The number of samples in an epoch."""
        return sum(stream.samples for stream in self.streams)

    @cached_property
    def steps_per_epoch(self) -> int:
        """The number of steps. Incomplete slices and steps are left out: different samples in each epoch."""
        return sum(stream.slices for stream in self.streams) // self.slices_per_step

    def check_world(self, world: int) -> None:
        """Raise PipelineError, which names the sizes that work, unless `world` ranks can share the lanes equally."""
        if world < 1 or self.lanes % world:
            raise PipelineError(
                f"{world} processes cannot share {self.lanes} lanes equally: the number of processes could be "
                f"{_listed(_divisors(self.lanes))}, or set data.lanes to a multiple of {world}"
            )

    def lanes_of(self, rank: int, world: int) -> range:
        """Return the lanes that `rank` of `world` reads."""
        self.check_world(world)
        count = self.lanes // world
        return range(rank * count, (rank + 1) * count)

    def locate(self, step: int) -> tuple[int, int]:
        """Return (epoch, step in the epoch) of a run's step, both counted from 0."""
        return divmod(step, self.steps_per_epoch)

    def slices(self, step: int) -> list[tuple[int, int, int]]:
        """Return the K slices of `step`: (number of the stream, epoch, number of the slice in the stream's epoch)."""
        epoch, step = self.locate(step)
        first = step * self.slices_per_step
        chosen = _schedule(self, epoch)[first : first + self.slices_per_step]
        return [(stream, epoch, number) for stream, number in chosen.tolist()]

    def batch(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """Return the samples of `rank` in `step`: int64 (B/W, 2) rows of (shard, sample in the shard), lane by lane."""
        return np.concatenate([self.lane_batch(step, lane) for lane in self.lanes_of(rank, world)])

    def lane_batch(self, step: int, lane: int) -> np.ndarray:
        """Return the samples of `step` in `lane`: int64 (B/L, 2) rows of (shard, sample in it), slice by slice."""
        rows = []
        for stream_number, epoch, number in self.slices(step):
            stream = self.streams[stream_number]
            index = stream.window_at(epoch, lane, number)
            first = stream.window(epoch, lane, index).first
            rows.append(stream.samples_of(epoch, lane, index)[number - first, :, 1:])
        return np.concatenate(rows)

    def draw(self, step: int, shard: int, sample: int, count: int) -> int:
        """Draw which alternative (for example, caption) of a sample `step` uses, uniformly from 0 to count - 1."""
        return int(random_raw(1, self.seed, step, shard, sample, 0, Use.ALTERNATIVE)[0]) % count

    def draw_of_step(self, step: int, content: int, count: int) -> np.ndarray:
        """Draw `count` numbers, uniformly from [0, 1), with which `step` augments an image or video.

        content: its 64-bit hash. Equal images of a step get equal numbers, whichever sample, lane or rank has them.
        """
        high, low = divmod(content, 1 << 32)
        raw = random_raw(count, self.seed, step, high, low, 0, Use.AUGMENTATION)
        return (raw >> np.uint64(11)) * 2.0**-53


@lru_cache(maxsize=2)  # readers are in at most two epochs at a time
def _schedule(order: Order, epoch: int) -> np.ndarray:
    """Shuffle the epoch's slices of all streams. Returns int64 rows of (number of the stream, number of its slice)."""
    counts = [stream.slices for stream in order.streams]
    streams = np.repeat(np.arange(len(counts)), counts)
    streams = streams[shuffled(len(streams), order.seed, epoch, 0, 0, 0, Use.SCHEDULE)]
    slices = np.empty_like(streams)
    slices[np.argsort(streams, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
    return np.stack([streams, slices], axis=1)
