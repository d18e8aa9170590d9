"""An epoch in blocks: consecutive samples of a shard, which windows mix and lanes read by one ranged read each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from pipeline.data.dataset import Dataset
from pipeline.data.shuffle import Use, balance, shuffled


@dataclass(frozen=True, eq=False)
class Window:
    """A part of a lane's epoch in which samples are shuffled. It consists of whole slices.

    first: the number of its first slice in the lane's epoch.
    pieces: int64 (P, 3) rows of (shard, start, stop), one ranged read each; `stop` is excluded.
    """

    first: int
    pieces: np.ndarray


@dataclass(frozen=True, eq=False)
class Blocks:
    """Datasets in blocks, as `Order` describes them: its fields of the same names.

    members: the numbers of the datasets of each stream.  slice_samples: B/(K L).
    """

    datasets: tuple[Dataset, ...]
    members: tuple[tuple[int, ...], ...]
    slice_samples: int
    lanes: int
    block_samples: int
    window_blocks: int
    seed: int
    lengths: Callable[[int, int, int], np.ndarray]

    @cached_property
    def streams(self) -> tuple["BlockStream", ...]:
        return tuple(BlockStream(self, number, datasets) for number, datasets in enumerate(self.members))


@dataclass(frozen=True, eq=False)
class BlockStream:
    """A sequence of samples for every epoch and lane, over some `datasets` (numbers)."""

    blocks: Blocks
    number: int
    datasets: tuple[int, ...]

    @cached_property
    def samples(self) -> int:
        """The number of samples in an epoch."""
        return sum(self.blocks.datasets[number].quota for number in self.datasets)

    @cached_property
    def slices(self) -> int:
        """floor(samples / (B/K)), the number of slices in an epoch."""
        return self.samples // (self.blocks.slice_samples * self.blocks.lanes)

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
        pieces = layout.sequence.between(first * self.blocks.slice_samples, after * self.blocks.slice_samples)
        return Window(first, pieces.astype(np.int64))

    @property
    def window_samples(self) -> int:
        """About the most samples of a window."""
        return min(self.blocks.window_blocks * self.blocks.block_samples, self.samples // self.blocks.lanes)

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
        lengths = np.concatenate([self.blocks.lengths(*piece) for piece in pieces.tolist()])

        def drawn(shape: int | tuple[int, ...], use: Use) -> np.ndarray:
            return shuffled(shape, self.blocks.seed, epoch, self.number, lane, index, use)

        ranked = drawn(len(samples), Use.SAMPLES)
        ranked = ranked[np.argsort(lengths[ranked], kind="stable")].reshape(self.blocks.slice_samples, -1)
        slices = np.take_along_axis(ranked, balance(lengths[ranked]), axis=1).T
        slices = slices[drawn(len(slices), Use.SLICES)]
        return samples[np.take_along_axis(slices, drawn(slices.shape, Use.PLACES), axis=1)]

    def pieces(self, epoch: int) -> np.ndarray:
        """Return all samples of the epoch, dataset by dataset: int32 (P, 3) rows of (shard, start, stop)."""
        return np.concatenate([_epoch_pieces(self.blocks, number, epoch) for number in self.datasets])

    def _lane(self, epoch: int, lane: int) -> "_Lane":
        if not 0 <= lane < self.blocks.lanes:
            raise IndexError(f"lane {lane} of {self.blocks.lanes}")
        return _lanes(self.blocks, epoch)[self.number][lane]


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


def _epoch_pieces(blocks: Blocks, number: int, epoch: int) -> np.ndarray:
    """Return a dataset's samples in the epoch, the next `quota` samples of its passes, as int32 pieces."""
    dataset = blocks.datasets[number]
    counts = -(-dataset.shard_samples // blocks.block_samples)
    shard = np.repeat(np.arange(len(counts)), counts)
    start = (np.arange(len(shard)) - np.repeat(np.cumsum(counts) - counts, counts)) * blocks.block_samples
    stop = np.minimum(start + blocks.block_samples, dataset.shard_samples[shard])
    shard += sum(len(before.shard_samples) for before in blocks.datasets[:number])
    whole = np.stack([shard, start, stop], axis=1, dtype=np.int32)

    begin, end = epoch * dataset.quota, (epoch + 1) * dataset.quota
    pieces = []
    for pass_number in range(begin // dataset.samples, -(-end // dataset.samples)):
        first = max(begin - pass_number * dataset.samples, 0)
        last = min(end - pass_number * dataset.samples, dataset.samples)
        if last - first == dataset.samples:
            pieces.append(whole)  # the epoch shuffles them
        else:
            places = shuffled(len(whole), blocks.seed, pass_number, number, 0, 0, Use.PASS)
            pieces.append(_Sequence(whole[places]).between(first, last))
    return np.concatenate(pieces)


@lru_cache(maxsize=2)  # readers are in at most two epochs at a time
def _lanes(blocks: Blocks, epoch: int) -> tuple[tuple[_Lane, ...], ...]:
    return tuple(_lanes_of_stream(stream, epoch) for stream in blocks.streams)


def _lanes_of_stream(stream: BlockStream, epoch: int) -> tuple[_Lane, ...]:
    """Assign the epoch's pieces to windows, and the windows to lanes of equal length."""
    blocks = stream.blocks

    def drawn(shape: int | tuple[int, ...], use: Use) -> np.ndarray:
        return shuffled(shape, blocks.seed, epoch, stream.number, 0, 0, use)

    pieces = stream.pieces(epoch)
    pieces = pieces[drawn(len(pieces), Use.BLOCKS)]
    sizes = pieces[:, 2] - pieces[:, 1]
    lengths = np.concatenate([dataset.shard_lengths for dataset in blocks.datasets])[pieces[:, 0]]
    none = len(pieces)  # the index of an empty piece, which pads incomplete windows
    excess = np.append(lengths - sizes @ lengths // stream.samples, 0)  # tokens per sample above the mean
    sizes = np.append(sizes, 0)

    # A lane has one window at each of `positions`. Each position gets one random piece from every group of `positions`
    # pieces of similar length, so the batches of the epoch have similar lengths.
    positions = -(-none // (blocks.lanes * blocks.window_blocks))
    ranked = np.argsort(lengths.astype(np.min_scalar_type(lengths.max())), kind="stable")  # 16 bits sort in linear time
    groups = np.pad(ranked, (0, -none % positions), constant_values=none).reshape(-1, positions)
    chosen = np.take_along_axis(groups, drawn(groups.shape, Use.POSITIONS), axis=1).T

    # A position's pieces are balanced over its windows, one per lane, so the ranks of a step have similar lengths.
    chosen = np.pad(chosen, ((0, 0), (0, -chosen.shape[1] % blocks.lanes)), constant_values=none)
    by_lane = chosen.reshape(positions, -1, blocks.lanes)
    by_lane = np.take_along_axis(by_lane, balance((sizes * excess)[by_lane]), axis=2)
    windows = by_lane.swapaxes(1, 2)  # (positions, lanes, pieces)

    # Aligning windows to slices cuts their first and last pieces, so lengths nearest to the mean are put there.
    nearest = np.argsort(np.abs(excess)[windows], axis=2, kind="stable")
    inwards = np.concatenate([nearest[..., ::2], nearest[..., 1::2][..., ::-1]], axis=2)
    windows = np.take_along_axis(windows, inwards, axis=2)

    # A position's windows are balanced over the lanes, so all lanes have about the same number of samples.
    windows = np.take_along_axis(windows, drawn((positions, blocks.lanes), Use.LANES)[..., None], axis=1)
    windows = np.take_along_axis(windows, balance(sizes[windows].sum(axis=2))[..., None], axis=1).swapaxes(0, 1)

    # Samples are moved from longer to shorter lanes.
    sequences = [_Sequence(pieces[window[window < none]]) for window in windows]
    samples = stream.slices * blocks.slice_samples
    spare = _Sequence(np.concatenate([sequence.between(samples, sequence.samples) for sequence in sequences]))
    used, lanes = 0, []
    for sequence, ends in zip(sequences, np.cumsum(sizes[windows].sum(axis=2), axis=1), strict=True):
        missing = max(samples - sequence.samples, 0)
        filled = np.concatenate([sequence.pieces, spare.between(used, used + missing)])
        used += missing
        # A window ends at the nearest border of a slice, the last one at the end of the lane.
        firsts = np.clip((ends[:-1] + blocks.slice_samples // 2) // blocks.slice_samples, 0, stream.slices)
        lanes.append(_Lane(_Sequence(filled), np.unique([0, *firsts, stream.slices])))
    return tuple(lanes)
