"""Which samples step t of a run consumes, on which rank: pure functions of (shard sizes and lengths, seed, step).

    block    up to `block_samples` consecutive samples of one shard: what one ranged read brings
    pass     all blocks of a dataset, shuffled; passes follow each other without end
    epoch    the next `quota` samples of every dataset's passes; blocks at the ends are cut
    stream   the datasets that share one sequence of samples: all of them (mixed batches), or each its own
    window   up to `window_blocks` blocks of a stream: samples are shuffled within it, so that a reader holds one or
             two windows per lane and no more
    lane     one of L equal sequences of windows; what makes one too long goes to the ends of those too short
    take     the next share of every lane, B/(K L) samples each: one of the K parts of a batch
    step     K takes, drawn from the epoch's takes of all streams; rank r of W owns L/W lanes

Nothing here depends on the world size but who reads a lane, so a run continues on any number of GPUs with
the same batches, from one integer. Only arrays over blocks are made, never one over samples.

A step lasts as long as the rank with the most tokens needs. So blocks are dealt to windows, and a window's samples
to its takes, like cards: ranked by length and handed out in rounds, so that every hand gets as much of the long as
of the short. Among equally long ones the order is a plain shuffle.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isfinite

import numpy as np

from pipeline.errors import PipelineError

# Of the order: raise it with every change of which samples a step gets, lest a run that is continued takes some of them
# twice and others never.
VERSION = 1

# The random streams are part of the format: runs resume by them. They are the raw output of PCG64 behind
# SeedSequence, which numpy keeps the same for ever (NEP 19), sorted; Generator.permutation may change.
# The last word of a stream's key says what is drawn.
_PASS, _BLOCKS, _TIMES, _LANES, _SAMPLES, _TAKES, _PLACES, _SCHEDULE, _ALTERNATIVE = range(9)


def _shuffled(shape: int | tuple[int, ...], *key: int) -> np.ndarray:
    """Permutations of the positions along the last axis, int64: functions of `key` alone (always six words)."""
    raw = np.random.PCG64(key).random_raw(np.prod(shape)).reshape(shape)
    return np.argsort(raw, axis=-1, kind="stable")


def _deal(values: np.ndarray) -> np.ndarray:
    """Give every hand one card of each round, so that the hands' sums are about equal.

    values: int64 (..., rounds, hands), what each card counts. Returns int64 of that shape: at [..., r, h] is the
    card of round r that hand h gets. Greedy: the largest card to the hand with the smallest sum, and so on. Rounds
    of the most unequal cards come first, since the others can make up for them.
    """
    *outer, rounds, hands = values.shape
    if hands == 1:
        return np.zeros(values.shape, dtype=np.int64)
    values = values.reshape(-1, rounds, hands)
    cards = np.argsort(values, axis=2, kind="stable")[..., ::-1]
    falling = np.take_along_axis(values, cards, axis=2)
    turns = np.argsort(falling[..., -1] - falling[..., 0], axis=1, kind="stable")[..., None]
    cards, falling = np.take_along_axis(cards, turns, axis=1), np.take_along_axis(falling, turns, axis=1)

    sums = np.zeros((len(values), hands), dtype=np.int64)
    hand = np.broadcast_to(np.arange(hands), sums.shape)  # whose the sums are
    given = np.empty_like(cards)
    for turn in range(rounds):
        rising = np.argsort(sums, axis=1, kind="stable") + np.arange(len(sums))[:, None] * hands
        sums, hand = sums.take(rising) + falling[:, turn], hand.take(rising)
        given[:, turn] = hand

    by_turn, dealt = np.empty_like(cards), np.empty_like(cards)
    np.put_along_axis(by_turn, given, cards, axis=2)
    np.put_along_axis(dealt, turns, by_turn, axis=1)
    return dealt.reshape(*outer, rounds, hands)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, as all here: arrays may be long
class Dataset:
    """One dataset's shards, and how much of it an epoch takes.

    shard_samples: (S,) samples of every shard; kept as a read-only int64 array.
    shard_lengths: (S,) mean length of each shard's samples, in whole tokens, kept likewise; None: all alike.
    weight: how often an epoch takes each sample.
    cap: at most this many samples are of an epoch (MMEB's `num_sample_per_subset`); the next epoch takes others,
        until all have been taken.

    Raises PipelineError where an epoch would take nothing.
    """

    name: str
    shard_samples: np.ndarray
    shard_lengths: np.ndarray | None = None
    weight: float = 1.0
    cap: int | None = None

    def __post_init__(self) -> None:
        sizes = np.array(self.shard_samples, dtype=np.int64).reshape(-1)
        lengths = np.ones_like(sizes) if self.shard_lengths is None else np.array(self.shard_lengths, dtype=np.int64)
        if lengths.shape != sizes.shape:
            raise PipelineError(f"dataset {self.name} has {sizes.size} shards, but mean lengths of {lengths.size}")
        for name, array, unit in (("shard_samples", sizes, "samples"), ("shard_lengths", lengths, "tokens a sample")):
            if (array < 0).any():
                shard = int((array < 0).argmax())
                raise PipelineError(f"dataset {self.name}: shard {shard} has {array[shard]} {unit}: 0 is the least")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if not self.samples:
            raise PipelineError(f"dataset {self.name} has 0 samples: are the shards empty?")
        if self.cap is not None and self.cap < 1:
            raise PipelineError(f"dataset {self.name}: cap is {self.cap}: it must be 1 or more")
        if not (isfinite(self.weight) and self.weight > 0 and self.quota):
            least = 0.5 / self.samples
            raise PipelineError(f"dataset {self.name}: weight is {self.weight}: it must be more than {least:g}")

    @cached_property
    def samples(self) -> int:
        """N, the samples of all shards."""
        return int(self.shard_samples.sum())

    @cached_property
    def quota(self) -> int:
        """The samples an epoch takes."""
        weighted = round(self.weight * self.samples)
        return weighted if self.cap is None else min(weighted, self.cap)


@dataclass(frozen=True, eq=False)
class Window:
    """What a lane reads at once.

    first: the take of the lane's epoch that the window begins with; it holds whole takes.
    pieces: int64 (P, 3) rows of (shard, start, stop), one ranged read each, without the sample `stop`.
    """

    first: int
    pieces: np.ndarray


def _alike(shard: int, start: int, stop: int) -> np.ndarray:
    return np.ones(stop - start, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Order:
    """The order of a run over its datasets, whose shards are numbered end to end.

    global_batch: samples per step over all ranks (B). lanes: independent readers (L), a divisor of B.
    block_samples, window_blocks: the most samples in a block; blocks in a window.
    seed: 0 to 2**32 - 1.
    parts: None: batches are mixed from all datasets. K, a divisor of B/L: a batch has K parts of B/K samples, each
        part from one dataset (1: homogeneous batches), which is drawn in proportion to what an epoch takes of it.
    lengths: (shard, start, stop) -> int64, the tokens of each of these samples; by default all are alike.

    Raises PipelineError, naming numbers that would work, if these do not fit together.
    """

    datasets: tuple[Dataset, ...]
    global_batch: int
    lanes: int
    block_samples: int
    window_blocks: int
    seed: int
    parts: int | None = None
    lengths: Callable[[int, int, int], np.ndarray] = _alike

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
        if lane_batch % self.takes_per_step:
            raise PipelineError(
                f"parts {self.parts} does not divide {lane_batch}, a lane's samples of a batch: "
                f"parts could be {_listed(_divisors(lane_batch))}"
            )
        if not self._fills_a_step(self.takes_per_step, self.share):
            raise PipelineError(self._too_few_samples())

    def _fills_a_step(self, parts: int, share: int) -> bool:
        """Whether an epoch has a take of every stream, and those of one step."""
        takes = [stream.samples // (share * self.lanes) for stream in self.streams]
        return min(takes) > 0 and sum(takes) >= parts

    def _too_few_samples(self) -> str:
        smallest = min(self.streams, key=lambda stream: stream.samples)
        size = self.share * self.lanes
        if self.parts is None:
            problem = f"global batch {self.global_batch} is more than the {smallest.samples} samples of an epoch"
        elif smallest.takes == 0:
            name = self.datasets[smallest.datasets[0]].name
            problem = f"a part of {size} samples is more than the {smallest.samples} of dataset {name} in an epoch"
        else:
            takes = sum(stream.takes for stream in self.streams)
            problem = f"a batch of {self.parts} parts is more than the {takes} of {size} samples in an epoch"

        lane_batch = self.global_batch // self.lanes
        parts = [k for k in _divisors(lane_batch) if self.parts and self._fills_a_step(k, lane_batch // k)]
        shares = (share for share in range(self.share - 1, 0, -1) if self._fills_a_step(self.takes_per_step, share))
        largest = next(shares, 0) * self.takes_per_step * self.lanes
        remedies = [f"parts could be {_listed(parts)}"] if parts else []
        remedies += [f"global_batch could be at most {largest} with {self.lanes} lanes"] if largest else []
        return f"{problem}: {', or '.join(remedies) or 'global_batch and lanes must be smaller'}, or weights larger"

    @property
    def takes_per_step(self) -> int:
        """K; 1 for mixed batches."""
        return self.parts or 1

    @property
    def share(self) -> int:
        """B/(K L), the samples that one take has of each lane."""
        return self.global_batch // (self.takes_per_step * self.lanes)

    @cached_property
    def streams(self) -> tuple["Stream", ...]:
        """One over all datasets if batches are mixed, else one for each."""
        numbers = range(len(self.datasets))
        groups = [tuple(numbers)] if self.parts is None else [(number,) for number in numbers]
        return tuple(Stream(self, number, datasets) for number, datasets in enumerate(groups))

    @cached_property
    def samples(self) -> int:
        """The samples of an epoch."""
        return sum(stream.samples for stream in self.streams)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Samples that do not fill a take, and takes that do not fill a step, are left over: others each epoch."""
        return sum(stream.takes for stream in self.streams) // self.takes_per_step

    def check_world(self, world: int) -> None:
        """Raise PipelineError, naming the sizes that work, unless `world` ranks can share the lanes."""
        if world < 1 or self.lanes % world:
            raise PipelineError(
                f"{world} processes cannot share {self.lanes} lanes equally: the number of processes could be "
                f"{_listed(_divisors(self.lanes))}, or set data.lanes to a multiple of {world}"
            )

    def lanes_of(self, rank: int, world: int) -> range:
        """The lanes that `rank` of `world` reads."""
        self.check_world(world)
        count = self.lanes // world
        return range(rank * count, (rank + 1) * count)

    def locate(self, step: int) -> tuple[int, int]:
        """Of a run's step, counted from 0: (epoch, step in the epoch)."""
        return divmod(step, self.steps_per_epoch)

    def takes(self, step: int) -> list[tuple[int, int, int]]:
        """The K takes of `step`: (number of the stream, epoch, which of the stream's takes in that epoch)."""
        epoch, step = self.locate(step)
        chosen = slice(step * self.takes_per_step, (step + 1) * self.takes_per_step)
        return [(stream, epoch, take) for stream, take in _schedule(self, epoch)[chosen].tolist()]

    def batch(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """What `rank` consumes in `step`: int64 (B/W, 2) rows of (shard, sample), lane after lane."""
        return np.concatenate([self.lane_batch(step, lane) for lane in self.lanes_of(rank, world)])

    def lane_batch(self, step: int, lane: int) -> np.ndarray:
        """What `step` takes from `lane`: int64 (B/L, 2) rows of (shard, sample in the shard), take after take."""
        shares = []
        for number, epoch, take in self.takes(step):
            stream = self.streams[number]
            index = stream.window_at(epoch, lane, take)
            first = stream.window(epoch, lane, index).first
            shares.append(stream.deal(epoch, lane, index)[take - first, :, 1:])
        return np.concatenate(shares)

    def draw(self, step: int, shard: int, sample: int, count: int) -> int:
        """Which of a sample's `count` alternatives, say captions, `step` uses: 0 to count - 1, equally likely."""
        return int(np.random.PCG64((self.seed, step, shard, sample, 0, _ALTERNATIVE)).random_raw() % count)


@dataclass(frozen=True, eq=False)
class Stream:
    """A sequence of samples for every epoch and lane, over `datasets` (numbers) of `order`."""

    order: Order
    number: int
    datasets: tuple[int, ...]

    @cached_property
    def samples(self) -> int:
        """n, the samples of an epoch."""
        return sum(self.order.datasets[number].quota for number in self.datasets)

    @cached_property
    def takes(self) -> int:
        """floor(n / (B/K)), the takes of an epoch."""
        return self.samples // (self.order.share * self.order.lanes)

    def windows(self, epoch: int, lane: int) -> int:
        """How many windows the lane has."""
        return len(self._lane(epoch, lane).firsts) - 1

    def window_at(self, epoch: int, lane: int, take: int) -> int:
        """The index of the lane's window that holds `take`."""
        return int(np.searchsorted(self._lane(epoch, lane).firsts, take, side="right")) - 1

    def window(self, epoch: int, lane: int, index: int) -> Window:
        """Window `index` of a lane; IndexError where it has none. `lengths` is not called.

        Windows of a lane follow each other without gaps, from take 0 to the last; and the pieces of all windows of
        all lanes hold every sample as often as the epoch takes it, less those left over.
        """
        layout = self._lane(epoch, lane)
        if not 0 <= index < len(layout.firsts) - 1:
            raise IndexError(f"lane {lane} of epoch {epoch} has no window {index}")
        first, after = layout.firsts[index : index + 2].tolist()
        pieces = layout.sequence.between(first * self.order.share, after * self.order.share)
        return Window(first, pieces.astype(np.int64))

    def deal(self, epoch: int, lane: int, index: int) -> np.ndarray:
        """The samples of a window in the order they are consumed; calls `lengths` for each piece.

        Returns int64 (T, B/(K L), 2): for each of the window's T takes its rows of (shard, sample in the shard).
        All takes have about as many tokens, and a sample's place says nothing about its length.
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
        ranked = ranked[np.argsort(lengths[ranked], kind="stable")].reshape(self.order.share, -1)
        takes = np.take_along_axis(ranked, _deal(lengths[ranked]), axis=1).T
        takes = takes[shuffled(len(takes), _TAKES)]
        return samples[np.take_along_axis(takes, shuffled(takes.shape, _PLACES), axis=1)]

    def pieces(self, epoch: int) -> np.ndarray:
        """All that the epoch takes, dataset after dataset: int32 (P, 3) rows of (shard, start, stop)."""
        return np.concatenate([_taken(self.order, number, epoch) for number in self.datasets])

    def _lane(self, epoch: int, lane: int) -> "_Lane":
        if not 0 <= lane < self.order.lanes:
            raise IndexError(f"lane {lane} of {self.order.lanes}")
        return _lanes(self.order, epoch)[self.number][lane]


@dataclass(frozen=True, eq=False)
class _Sequence:
    """Pieces laid end to end: int32 (P, 3) rows of (shard, start, stop)."""

    pieces: np.ndarray

    @cached_property
    def ends(self) -> np.ndarray:
        """Where each piece ends, int64 (P,)."""
        return np.cumsum(self.pieces[:, 2] - self.pieces[:, 1], dtype=np.int64)

    @property
    def samples(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def between(self, start: int, stop: int) -> np.ndarray:
        """The pieces of samples start..stop, cut at both; none unless start < stop."""
        if start >= stop:
            return self.pieces[:0]
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        pieces = self.pieces[first : last + 1].copy()
        pieces[-1, 2] -= self.ends[last] - stop
        pieces[0, 1] = self.pieces[first, 2] - (self.ends[first] - start)
        return pieces


@dataclass(frozen=True, eq=False)
class _Lane:
    """A lane of a stream's epoch. firsts: int64, the first take of each window and, at the end, how many there are."""

    sequence: _Sequence
    firsts: np.ndarray


def _taken(order: Order, number: int, epoch: int) -> np.ndarray:
    """What the epoch takes of a dataset: the next `quota` samples of its passes, as int32 pieces."""
    dataset = order.datasets[number]
    counts = -(-dataset.shard_samples // order.block_samples)
    shard = np.repeat(np.arange(len(counts)), counts)
    start = (np.arange(len(shard)) - np.repeat(np.cumsum(counts) - counts, counts)) * order.block_samples
    stop = np.minimum(start + order.block_samples, dataset.shard_samples[shard])
    shard += sum(len(before.shard_samples) for before in order.datasets[:number])
    blocks = np.stack([shard, start, stop], axis=1, dtype=np.int32)

    begin, end = epoch * dataset.quota, (epoch + 1) * dataset.quota
    taken = []
    for turn in range(begin // dataset.samples, -(-end // dataset.samples)):
        first = max(begin - turn * dataset.samples, 0)
        last = min(end - turn * dataset.samples, dataset.samples)
        if last - first == dataset.samples:
            taken.append(blocks)  # the epoch shuffles them
        else:
            shuffled = blocks[_shuffled(len(blocks), order.seed, turn, number, 0, 0, _PASS)]
            taken.append(_Sequence(shuffled).between(first, last))
    return np.concatenate(taken)


@lru_cache(maxsize=2)  # a reader is in one epoch, or at the border of two
def _schedule(order: Order, epoch: int) -> np.ndarray:
    """The epoch's takes of all streams, shuffled: int64 rows of (number of the stream, which of its takes)."""
    counts = [stream.takes for stream in order.streams]
    streams = np.repeat(np.arange(len(counts)), counts)
    streams = streams[_shuffled(len(streams), order.seed, epoch, 0, 0, 0, _SCHEDULE)]
    takes = np.empty_like(streams)
    takes[np.argsort(streams, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
    return np.stack([streams, takes], axis=1)


@lru_cache(maxsize=2)
def _lanes(order: Order, epoch: int) -> tuple[tuple[_Lane, ...], ...]:
    """The lanes of every stream."""
    return tuple(_lanes_of_stream(stream, epoch) for stream in order.streams)


def _lanes_of_stream(stream: Stream, epoch: int) -> tuple[_Lane, ...]:
    """Deal all that the epoch takes to windows, and the windows to lanes of equal length."""
    order = stream.order

    def shuffled(shape: int | tuple[int, ...], use: int) -> np.ndarray:
        return _shuffled(shape, order.seed, epoch, stream.number, 0, 0, use)

    pieces = stream.pieces(epoch)
    pieces = pieces[shuffled(len(pieces), _BLOCKS)]
    sizes = pieces[:, 2] - pieces[:, 1]
    lengths = np.concatenate([dataset.shard_lengths for dataset in order.datasets])[pieces[:, 0]]
    none = len(pieces)  # stands for a piece, of no samples, where there are too few
    excess = np.append(lengths - sizes @ lengths // stream.samples, 0)  # of a sample, over the mean
    sizes = np.append(sizes, 0)

    # The epoch has as many times as a lane has windows. Of `times` pieces next to each other in length each time gets
    # one, any of them: batches come out alike.
    times = -(-none // (order.lanes * order.window_blocks))
    ranked = np.argsort(lengths.astype(np.min_scalar_type(lengths.max())), kind="stable")  # 16 bits: in linear time
    cards = np.pad(ranked, (0, -none % times), constant_values=none).reshape(-1, times)
    cards = np.take_along_axis(cards, shuffled(cards.shape, _TIMES), axis=1).T

    # A time's pieces are dealt to its windows, one a lane: the ranks of a step come out alike.
    cards = np.pad(cards, ((0, 0), (0, -cards.shape[1] % order.lanes)), constant_values=none)
    cards = cards.reshape(times, -1, order.lanes)
    windows = np.take_along_axis(cards, _deal((sizes * excess)[cards]), axis=2).swapaxes(1, 2)  # (times, lanes, pieces)

    # Takes do not end where windows do, so that a window gives or gets a part of its first and last pieces: these are
    # the ones nearest to the mean.
    nearest = np.argsort(np.abs(excess)[windows], axis=2, kind="stable")
    inwards = np.concatenate([nearest[..., ::2], nearest[..., 1::2][..., ::-1]], axis=2)
    windows = np.take_along_axis(windows, inwards, axis=2)

    # A time's windows are dealt to the lanes: these come out about equally long.
    windows = np.take_along_axis(windows, shuffled((times, order.lanes), _LANES)[..., None], axis=1)
    windows = np.take_along_axis(windows, _deal(sizes[windows].sum(axis=2))[..., None], axis=1).swapaxes(0, 1)

    # What a lane has too many of fills up those that have too few.
    sequences = [_Sequence(pieces[window[window < none]]) for window in windows]
    samples = stream.takes * order.share
    spare = _Sequence(np.concatenate([sequence.between(samples, sequence.samples) for sequence in sequences]))
    used, lanes = 0, []
    for sequence, ends in zip(sequences, np.cumsum(sizes[windows].sum(axis=2), axis=1), strict=True):
        lacking = max(samples - sequence.samples, 0)
        filled = np.concatenate([sequence.pieces, spare.between(used, used + lacking)])
        used += lacking
        # A window ends with the take that is nearest; the last one with the lane.
        firsts = np.clip((ends[:-1] + order.share // 2) // order.share, 0, stream.takes)
        lanes.append(_Lane(_Sequence(filled), np.unique([0, *firsts, stream.takes])))
    return tuple(lanes)
