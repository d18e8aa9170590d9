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
same batches. Arrays are as long as the number of blocks, never as the number of samples.

A step takes as long as the rank with the most tokens. So blocks are assigned to windows, and a window's samples to its
slices, with about the same number of tokens in each: they are sorted by length, and each group of similar length is
spread evenly. Samples of equal length are in plain shuffled order.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isfinite

import numpy as np

from pipeline.errors import PipelineError

# Increase this with every change to the samples of a step. Otherwise, a resumed run would repeat and omit samples.
VERSION = 1

# Runs resume from these random numbers, so they must never change. They sort the raw output of PCG64 with SeedSequence,
# which numpy guarantees to stay the same (NEP 19), unlike Generator.permutation. The last word of a key is the purpose.
_PASS, _BLOCKS, _POSITIONS, _LANES, _SAMPLES, _SLICES, _PLACES, _SCHEDULE, _ALTERNATIVE, _AUGMENTATION = range(10)


def _shuffled(shape: int | tuple[int, ...], *key: int) -> np.ndarray:
    """Return int64 permutations of the indices along the last axis, determined by `key` (always six words)."""
    raw = np.random.PCG64(key).random_raw(np.prod(shape)).reshape(shape)
    return np.argsort(raw, axis=-1, kind="stable")


def _balance(values: np.ndarray) -> np.ndarray:
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


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def first_samples(shard_samples: np.ndarray, count: int) -> np.ndarray:
    """Return (S,) int64, how many of each shard's samples are among the first `count` of all shards in their order."""
    sizes = np.asarray(shard_samples, dtype=np.int64)
    return np.clip(count - (np.cumsum(sizes) - sizes), 0, sizes)


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: comparing long arrays is slow
class Dataset:
    """A dataset's shards, and how many of its samples an epoch contains.

    shard_samples: (S,) number of samples of each shard, stored as a read-only int64 array.
    shard_lengths: (S,) mean tokens per sample of each shard, stored likewise; None: all equal.
    weight: how often an epoch contains each sample.
    cap: the maximum number of its samples in an epoch (MMEB's `num_sample_per_subset`). The next epochs continue with
        other samples until all have been used. For the same ones in every epoch, see `first_samples`.
    group: without mixed batches, datasets of the same group share a stream; None: the dataset has a stream of its own.

    Raises PipelineError if an epoch would contain no sample.
    """

    name: str
    shard_samples: np.ndarray
    shard_lengths: np.ndarray | None = None
    weight: float = 1.0
    cap: int | None = None
    group: int | None = None

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

    @cached_property
    def samples(self) -> int:
        """The number of samples in all shards."""
        return int(self.shard_samples.sum())

    @cached_property
    def quota(self) -> int:
        """The number of samples in an epoch."""
        weighted = round(self.weight * self.samples)
        return weighted if self.cap is None else min(weighted, self.cap)


@dataclass(frozen=True, eq=False)
class Window:
    """A part of a lane's epoch in which samples are shuffled. It consists of whole slices.

    first: the number of its first slice in the lane's epoch.
    pieces: int64 (P, 3) rows of (shard, start, stop), one ranged read each; `stop` is excluded.
    """

    first: int
    pieces: np.ndarray


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

    def __post_init__(self) -> None:
        for name in ("global_batch", "lanes", "block_samples", "window_blocks", "parts"):
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
        if not self._fills_a_step(self.slices_per_step, self.slice_samples):
            raise PipelineError(self._too_few_samples())

    def _fills_a_step(self, parts: int, slice_samples: int) -> bool:
        """Return whether an epoch has a slice of every stream, and enough slices for one step."""
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
    def streams(self) -> tuple["Stream", ...]:
        """One stream over all datasets for mixed batches, otherwise one per group and per dataset without a group."""
        members: dict[tuple[int | None, ...], list[int]] = {}
        for number, dataset in enumerate(self.datasets):
            own = (None, number) if dataset.group is None else (dataset.group,)
            members.setdefault(own if self.parts else (), []).append(number)
        return tuple(Stream(self, number, tuple(datasets)) for number, datasets in enumerate(members.values()))

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
        return int(np.random.PCG64((self.seed, step, shard, sample, 0, _ALTERNATIVE)).random_raw() % count)

    def draw_of_step(self, step: int, content: int, count: int) -> np.ndarray:
        """Draw `count` numbers, uniformly from [0, 1), with which `step` augments an image or video.

        content: its 64-bit hash. Equal images of a step get equal numbers, whichever sample, lane or rank has them.
        """
        high, low = divmod(content, 1 << 32)
        raw = np.random.PCG64((self.seed, step, high, low, 0, _AUGMENTATION)).random_raw(count)
        return (raw >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True, eq=False)
class Stream:
    """A sequence of samples for every epoch and lane, over some `datasets` (numbers) of `order`."""

    order: Order
    number: int
    datasets: tuple[int, ...]

    @cached_property
    def samples(self) -> int:
        """The number of samples in an epoch."""
        return sum(self.order.datasets[number].quota for number in self.datasets)

    @cached_property
    def slices(self) -> int:
        """floor(samples / (B/K)), the number of slices in an epoch."""
        return self.samples // (self.order.slice_samples * self.order.lanes)

    def windows(self, epoch: int, lane: int) -> int:
        """Return the number of windows in a lane."""
        return len(self._lane(epoch, lane).firsts) - 1

    def window_at(self, epoch: int, lane: int, number: int) -> int:
        """Return the index of the lane's window that contains slice `number`."""
        return int(np.searchsorted(self._lane(epoch, lane).firsts, number, side="right")) - 1

    def window(self, epoch: int, lane: int, index: int) -> Window:
        """Return window `index` of a lane. Raises IndexError if it does not exist. Does not call `lengths`.

        The windows of a lane cover all its slices without gaps. The pieces of all windows of all lanes contain every
        sample as often as the epoch does, except the samples left out at its end.
        """
        layout = self._lane(epoch, lane)
        if not 0 <= index < len(layout.firsts) - 1:
            raise IndexError(f"lane {lane} of epoch {epoch} has no window {index}")
        first, after = layout.firsts[index : index + 2].tolist()
        pieces = layout.sequence.between(first * self.order.slice_samples, after * self.order.slice_samples)
        return Window(first, pieces.astype(np.int64))

    def samples_of(self, epoch: int, lane: int, index: int) -> np.ndarray:
        """Return the samples of window `index` of a lane in the order of use. Calls `lengths` for each piece.

        Returns int64 (T, B/(K L), 3): for each of the window's T slices, rows of (piece, shard, sample in the shard).
        All slices have about the same number of tokens. A sample's position is independent of its length.
        """
        pieces = self.window(epoch, lane, index).pieces
        sizes = pieces[:, 2] - pieces[:, 1]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        piece = np.repeat(np.arange(len(pieces)), sizes)
        samples = np.stack([piece, pieces[piece, 0], pieces[piece, 1] + within], axis=1)
        lengths = np.concatenate([self.order.lengths(*piece) for piece in pieces.tolist()])

        def shuffled(shape: int | tuple[int, ...], use: int) -> np.ndarray:
            return _shuffled(shape, self.order.seed, epoch, self.number, lane, index, use)

        ranked = shuffled(len(samples), _SAMPLES)
        ranked = ranked[np.argsort(lengths[ranked], kind="stable")].reshape(self.order.slice_samples, -1)
        slices = np.take_along_axis(ranked, _balance(lengths[ranked]), axis=1).T
        slices = slices[shuffled(len(slices), _SLICES)]
        return samples[np.take_along_axis(slices, shuffled(slices.shape, _PLACES), axis=1)]

    def pieces(self, epoch: int) -> np.ndarray:
        """Return all samples of the epoch, dataset by dataset: int32 (P, 3) rows of (shard, start, stop)."""
        return np.concatenate([_epoch_pieces(self.order, number, epoch) for number in self.datasets])

    def _lane(self, epoch: int, lane: int) -> "_Lane":
        if not 0 <= lane < self.order.lanes:
            raise IndexError(f"lane {lane} of {self.order.lanes}")
        return _lanes(self.order, epoch)[self.number][lane]


@dataclass(frozen=True, eq=False)
class _Sequence:
    """Consecutive pieces: int32 (P, 3) rows of (shard, start, stop)."""

    pieces: np.ndarray

    @cached_property
    def ends(self) -> np.ndarray:
        """The end of each piece in the sequence, int64 (P,)."""
        return np.cumsum(self.pieces[:, 2] - self.pieces[:, 1], dtype=np.int64)

    @property
    def samples(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def between(self, start: int, stop: int) -> np.ndarray:
        """Return the pieces of samples start..stop-1 of the sequence, cut at both ends; none unless start < stop."""
        if start >= stop:
            return self.pieces[:0]
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        pieces = self.pieces[first : last + 1].copy()
        pieces[-1, 2] -= self.ends[last] - stop
        pieces[0, 1] = self.pieces[first, 2] - (self.ends[first] - start)
        return pieces


@dataclass(frozen=True, eq=False)
class _Lane:
    """A lane of a stream's epoch. firsts: int64, the first slice of each window, then the number of slices."""

    sequence: _Sequence
    firsts: np.ndarray


def _epoch_pieces(order: Order, number: int, epoch: int) -> np.ndarray:
    """Return a dataset's samples in the epoch, the next `quota` samples of its passes, as int32 pieces."""
    dataset = order.datasets[number]
    counts = -(-dataset.shard_samples // order.block_samples)
    shard = np.repeat(np.arange(len(counts)), counts)
    start = (np.arange(len(shard)) - np.repeat(np.cumsum(counts) - counts, counts)) * order.block_samples
    stop = np.minimum(start + order.block_samples, dataset.shard_samples[shard])
    shard += sum(len(before.shard_samples) for before in order.datasets[:number])
    blocks = np.stack([shard, start, stop], axis=1, dtype=np.int32)

    begin, end = epoch * dataset.quota, (epoch + 1) * dataset.quota
    pieces = []
    for pass_number in range(begin // dataset.samples, -(-end // dataset.samples)):
        first = max(begin - pass_number * dataset.samples, 0)
        last = min(end - pass_number * dataset.samples, dataset.samples)
        if last - first == dataset.samples:
            pieces.append(blocks)  # the epoch shuffles them
        else:
            shuffled = blocks[_shuffled(len(blocks), order.seed, pass_number, number, 0, 0, _PASS)]
            pieces.append(_Sequence(shuffled).between(first, last))
    return np.concatenate(pieces)


@lru_cache(maxsize=2)  # readers are in at most two epochs at a time
def _schedule(order: Order, epoch: int) -> np.ndarray:
    """Shuffle the epoch's slices of all streams. Returns int64 rows of (number of the stream, number of its slice)."""
    counts = [stream.slices for stream in order.streams]
    streams = np.repeat(np.arange(len(counts)), counts)
    streams = streams[_shuffled(len(streams), order.seed, epoch, 0, 0, 0, _SCHEDULE)]
    slices = np.empty_like(streams)
    slices[np.argsort(streams, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
    return np.stack([streams, slices], axis=1)


@lru_cache(maxsize=2)
def _lanes(order: Order, epoch: int) -> tuple[tuple[_Lane, ...], ...]:
    return tuple(_lanes_of_stream(stream, epoch) for stream in order.streams)


def _lanes_of_stream(stream: Stream, epoch: int) -> tuple[_Lane, ...]:
    """Assign the epoch's pieces to windows, and the windows to lanes of equal length."""
    order = stream.order

    def shuffled(shape: int | tuple[int, ...], use: int) -> np.ndarray:
        return _shuffled(shape, order.seed, epoch, stream.number, 0, 0, use)

    pieces = stream.pieces(epoch)
    pieces = pieces[shuffled(len(pieces), _BLOCKS)]
    sizes = pieces[:, 2] - pieces[:, 1]
    lengths = np.concatenate([dataset.shard_lengths for dataset in order.datasets])[pieces[:, 0]]
    none = len(pieces)  # the index of an empty piece, which pads incomplete windows
    excess = np.append(lengths - sizes @ lengths // stream.samples, 0)  # tokens per sample above the mean
    sizes = np.append(sizes, 0)

    # A lane has one window at each of `positions`. Each position gets one random piece from every group of `positions`
    # pieces of similar length, so the batches of the epoch have similar lengths.
    positions = -(-none // (order.lanes * order.window_blocks))
    ranked = np.argsort(lengths.astype(np.min_scalar_type(lengths.max())), kind="stable")  # 16 bits sort in linear time
    groups = np.pad(ranked, (0, -none % positions), constant_values=none).reshape(-1, positions)
    chosen = np.take_along_axis(groups, shuffled(groups.shape, _POSITIONS), axis=1).T

    # A position's pieces are balanced over its windows, one per lane, so the ranks of a step have similar lengths.
    chosen = np.pad(chosen, ((0, 0), (0, -chosen.shape[1] % order.lanes)), constant_values=none)
    by_lane = chosen.reshape(positions, -1, order.lanes)
    by_lane = np.take_along_axis(by_lane, _balance((sizes * excess)[by_lane]), axis=2)
    windows = by_lane.swapaxes(1, 2)  # (positions, lanes, pieces)

    # Aligning windows to slices cuts their first and last pieces, so lengths nearest to the mean are put there.
    nearest = np.argsort(np.abs(excess)[windows], axis=2, kind="stable")
    inwards = np.concatenate([nearest[..., ::2], nearest[..., 1::2][..., ::-1]], axis=2)
    windows = np.take_along_axis(windows, inwards, axis=2)

    # A position's windows are balanced over the lanes, so all lanes have about the same number of samples.
    windows = np.take_along_axis(windows, shuffled((positions, order.lanes), _LANES)[..., None], axis=1)
    windows = np.take_along_axis(windows, _balance(sizes[windows].sum(axis=2))[..., None], axis=1).swapaxes(0, 1)

    # Samples are moved from longer to shorter lanes.
    sequences = [_Sequence(pieces[window[window < none]]) for window in windows]
    samples = stream.slices * order.slice_samples
    spare = _Sequence(np.concatenate([sequence.between(samples, sequence.samples) for sequence in sequences]))
    used, lanes = 0, []
    for sequence, ends in zip(sequences, np.cumsum(sizes[windows].sum(axis=2), axis=1), strict=True):
        missing = max(samples - sequence.samples, 0)
        filled = np.concatenate([sequence.pieces, spare.between(used, used + missing)])
        used += missing
        # A window ends at the nearest border of a slice, the last one at the end of the lane.
        firsts = np.clip((ends[:-1] + order.slice_samples // 2) // order.slice_samples, 0, stream.slices)
        lanes.append(_Lane(_Sequence(filled), np.unique([0, *firsts, stream.slices])))
    return tuple(lanes)
