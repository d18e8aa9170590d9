"""Which samples step t of a run consumes, on which rank: pure functions of (shard sizes, seed, step).

    blocks   up to `block_samples` consecutive samples of one shard: what one ranged read brings
    epoch    all blocks, shuffled by (seed, epoch), end to end: a sequence of N samples
    lane     the l-th of L equal parts of that sequence; a block at a cut belongs to both sides in parts
    window   `window_blocks` consecutive blocks of a lane: samples are shuffled within it, so that a
             reader holds one or two windows per lane and no more
    step     the next B/L samples of every lane; rank r of W owns L/W lanes

Nothing here depends on the world size but who reads a lane, so a run continues on any number of GPUs
with the same batches, from one integer. Only arrays over blocks are made, never one over samples.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.errors import PipelineError

# The random streams are part of the format: runs resume by them. They are the raw output of PCG64 behind
# SeedSequence, which numpy keeps the same for ever (NEP 19), sorted; Generator.permutation may change.
_BLOCKS, _SAMPLES = 0, 1  # the last word of a stream's key: what is shuffled


def _shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count), as int64, that is a function of `key` alone (always five words)."""
    return np.argsort(np.random.PCG64(key).random_raw(count), kind="stable")


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


@dataclass(frozen=True, eq=False)
class Window:
    """The samples of one window of one lane.

    first: offset, within the lane, of the window's first sample.
    pieces: int64 (P, 3) rows of (shard, start, stop), one ranged read each, without the sample `stop`.
    samples: int64 (n, 2) rows of (shard, sample in the shard), in the order they are consumed.
    """

    first: int
    pieces: np.ndarray
    samples: np.ndarray


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: shard_samples may be long
class Order:
    """The order of a run over the shards of all its datasets, in one list.

    shard_samples: the number of samples of every shard; kept as a read-only int64 array.
    global_batch: samples per step over all ranks (B). lanes: independent readers (L), a divisor of B.
    block_samples, window_blocks: the most samples in a block; blocks in a window.
    seed: 0 to 2**32 - 1.

    Raises PipelineError, naming numbers that would work, if these do not fit together.
    """

    shard_samples: np.ndarray
    global_batch: int
    lanes: int
    block_samples: int
    window_blocks: int
    seed: int

    def __post_init__(self) -> None:
        sizes = np.array(self.shard_samples, dtype=np.int64).reshape(-1)
        sizes.flags.writeable = False
        object.__setattr__(self, "shard_samples", sizes)
        for name in ("global_batch", "lanes", "block_samples", "window_blocks"):
            if getattr(self, name) < 1:
                raise PipelineError(f"{name} is {getattr(self, name)}: it must be 1 or more")
        if not 0 <= self.seed < 2**32:
            raise PipelineError(f"seed {self.seed} is not between 0 and {2**32 - 1}")
        if (sizes < 0).any():
            shard = int((sizes < 0).argmax())
            raise PipelineError(f"shard {shard} has {sizes[shard]} samples: it must be 0 or more")
        if self.global_batch % self.lanes:
            raise PipelineError(
                f"lanes {self.lanes} does not divide global batch {self.global_batch}: "
                f"lanes could be {_divisors(self.global_batch)}"
            )
        if self.global_batch > self.samples:
            largest = self.samples // self.lanes * self.lanes
            remedy = f"at most {largest} with {self.lanes} lanes" if largest else "smaller, with fewer lanes"
            remedy = f"it could be {remedy}" if self.samples else "are the shards empty?"
            raise PipelineError(
                f"global batch {self.global_batch} is more than the dataset's {self.samples} samples: {remedy}"
            )

    @property
    def samples(self) -> int:
        """N, the samples of all shards."""
        return int(self.shard_samples.sum())

    @property
    def lane_batch_size(self) -> int:
        """B/L, the samples a step takes from each lane."""
        return self.global_batch // self.lanes

    @property
    def steps_per_epoch(self) -> int:
        """floor(N/B); the N mod B samples at the lanes' ends are left over, other ones each epoch."""
        return self.samples // self.global_batch

    def check_world(self, world: int) -> None:
        """Raise PipelineError, naming the sizes that work, unless `world` ranks can share the lanes."""
        if world < 1 or self.lanes % world:
            raise PipelineError(
                f"{world} processes cannot share {self.lanes} lanes equally: "
                f"the number of processes could be {_divisors(self.lanes)}, or set data.lanes to a multiple of {world}"
            )

    def lanes_of(self, rank: int, world: int) -> range:
        """The lanes that `rank` of `world` reads."""
        self.check_world(world)
        share = self.lanes // world
        return range(rank * share, (rank + 1) * share)

    def locate(self, step: int) -> tuple[int, int]:
        """Of a run's step, counted from 0: (epoch, step in the epoch)."""
        return divmod(step, self.steps_per_epoch)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """What `rank` consumes in `step`: int64 (B/W, 2) rows of (shard, sample), lane after lane."""
        return np.concatenate([self.lane_batch(step, lane) for lane in self.lanes_of(rank, world)])

    def lane_batch(self, step: int, lane: int) -> np.ndarray:
        """What `step` takes from `lane`: int64 (B/L, 2) rows of (shard, sample in the shard)."""
        epoch, step = self.locate(step)
        offset = step * self.lane_batch_size
        stop = offset + self.lane_batch_size
        parts = []
        while offset < stop:
            window = self.window(epoch, lane, self.window_at(epoch, lane, offset))
            parts.append(window.samples[offset - window.first : stop - window.first])
            offset += len(parts[-1])
        return np.concatenate(parts)

    def window_at(self, epoch: int, lane: int, offset: int) -> int:
        """The index of the lane's window that holds the lane's sample at `offset`."""
        _, ends = _epoch(self, epoch)
        start, _ = self._lane_bounds(lane)
        first, block = np.searchsorted(ends, [start, start + offset], side="right")
        return int(block - first) // self.window_blocks

    def window(self, epoch: int, lane: int, index: int) -> Window:
        """Window `index` of a lane; IndexError where the lane ends before it.

        Windows of a lane follow each other without gaps, and the pieces of all windows of all lanes
        hold every sample of every shard once.
        """
        blocks, ends = _epoch(self, epoch)
        start, stop = self._lane_bounds(lane)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        first += index * self.window_blocks
        if index < 0 or first > last:
            raise IndexError(f"lane {lane} of epoch {epoch} has no window {index}")
        chosen = slice(first, min(first + self.window_blocks, last + 1))
        pieces, ends = blocks[chosen].copy(), ends[chosen]
        begin = ends[0] - (pieces[0, 2] - pieces[0, 1])  # where the window begins in the epoch's sequence
        cut = max(start - begin, 0)
        pieces[0, 1] += cut
        pieces[-1, 2] -= max(ends[-1] - stop, 0)

        lengths = pieces[:, 2] - pieces[:, 1]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        samples = np.stack([np.repeat(pieces[:, 0], lengths), np.repeat(pieces[:, 1], lengths) + within], axis=1)
        shuffled = _shuffled(len(samples), self.seed, epoch, lane, index, _SAMPLES)
        return Window(first=int(begin + cut - start), pieces=pieces, samples=samples[shuffled])

    def _lane_bounds(self, lane: int) -> tuple[int, int]:
        """Where the lane starts and stops in the epoch's sequence of N samples."""
        if not 0 <= lane < self.lanes:
            raise IndexError(f"lane {lane} of {self.lanes}")
        return lane * self.samples // self.lanes, (lane + 1) * self.samples // self.lanes


@lru_cache(maxsize=4)  # a reader is in one epoch, or at the border of two
def _epoch(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The epoch's blocks: int64 (blocks, 3) of (shard, start, stop), and (blocks,) where each ends in it."""
    sizes = order.shard_samples
    counts = -(-sizes // order.block_samples)
    shard = np.repeat(np.arange(len(sizes)), counts)
    start = (np.arange(len(shard)) - np.repeat(np.cumsum(counts) - counts, counts)) * order.block_samples
    stop = np.minimum(start + order.block_samples, sizes[shard])
    blocks = np.stack([shard, start, stop], axis=1)[_shuffled(len(shard), order.seed, epoch, 0, 0, _BLOCKS)]
    ends = np.cumsum(blocks[:, 2] - blocks[:, 1])
    blocks.flags.writeable = ends.flags.writeable = False
    return blocks, ends
