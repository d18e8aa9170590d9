"""An epoch in clusters: samples that a teacher finds alike, which one batch uses together."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from pipeline.data.blocks import Window
from pipeline.data.dataset import Dataset
from pipeline.data.shuffle import Use, balance, random_raw, shuffled

_THREADS = 16


@dataclass(frozen=True, eq=False)
class ClusterStream:
    """The sequence of samples of all datasets for every epoch and lane. A window is one step of a lane.

    Each run of `size` numbers in Dataset.clusters is a cluster; fewer than `size` remain. A pass of a dataset is all
    its clusters, shuffled. In one of them, another in each pass, the remaining samples replace others at random. An
    epoch is the next floor(quota / size) clusters of every dataset's passes. Each step has about the same number of
    each dataset's.

    size: samples of a cluster (C), a divisor of `step_samples` (B).  seed, lanes, lengths: as for `Order`.

    It keeps 8 bytes a sample: its number in a cluster, and its tokens. `lengths` is called once for every shard.
    """

    parts: tuple[Dataset, ...]
    size: int
    step_samples: int
    lanes: int
    seed: int
    lengths: Callable[[int, int, int], np.ndarray]

    number = 0

    @property
    def datasets(self) -> tuple[int, ...]:
        return tuple(range(len(self.parts)))

    @cached_property
    def samples(self) -> int:
        """The number of samples in an epoch."""
        return sum(dataset.quota // self.size for dataset in self.parts) * self.size

    @cached_property
    def slices(self) -> int:
        """floor(samples / B), the number of steps in an epoch."""
        return self.samples // self.step_samples

    @property
    def window_samples(self) -> int:
        """The samples of a window."""
        return self.step_samples // self.lanes

    def windows(self, epoch: int, lane: int) -> int:
        """Return the number of windows in a lane."""
        return self.slices

    def window_at(self, epoch: int, lane: int, number: int) -> int:
        """Return the index of the window of step `number`."""
        return number

    def window(self, epoch: int, lane: int, index: int) -> Window:
        """Return window `index` of a lane. Raises IndexError if it does not exist. Its pieces do not
        overlap each other, unless a weight repeats a sample in the step."""
        return Window(index, self._pieces(epoch, lane, index)[0])

    def samples_of(self, epoch: int, lane: int, index: int) -> np.ndarray:
        """Return the samples of window `index` of a lane in the order of use.

        Returns int64 (1, B/L, 3), rows of (piece, shard, sample in the shard). All lanes of a step have about the same
        number of tokens. A sample's position is independent of its length.
        """
        return self._pieces(epoch, lane, index)[1]

    def clusters(self, epoch: int, index: int) -> np.ndarray:
        """Return the clusters of step `index`: int64 (B/C, C), the samples' numbers over all datasets."""
        return np.stack([self._members(*each) for each in _epoch(self, epoch)[index].tolist()])

    def _members(self, dataset: int, pass_number: int, cluster: int) -> np.ndarray:
        """Return the samples of a dataset's cluster in a pass, int64 (C,)."""
        samples = self.parts[dataset].clusters
        assert samples is not None  # the order checks it
        count, rest = divmod(len(samples), self.size)
        members = samples[cluster * self.size : (cluster + 1) * self.size]
        if rest:
            drawn = random_raw(1 + self.size + rest, self.seed, pass_number, dataset, 0, 0, Use.REMAINDER)
            if cluster == int(drawn[0]) % count:
                members = np.concatenate([members, samples[count * self.size :]])
                members = members[np.argsort(drawn[1:], kind="stable")[: self.size]]
        return members.astype(np.int64) + self._first_samples[dataset]

    @cached_property
    def _first_samples(self) -> np.ndarray:
        return np.cumsum([0] + [dataset.samples for dataset in self.parts])

    @cached_property
    def _shard_ends(self) -> np.ndarray:
        """The number of the first sample after each shard."""
        return np.cumsum(np.concatenate([dataset.shard_samples for dataset in self.parts]))

    @cached_property
    def tokens(self) -> np.ndarray:
        """The tokens of every sample of all datasets, int32 (N,)."""
        sizes = np.diff(self._shard_ends, prepend=0).tolist()
        with ThreadPoolExecutor(_THREADS) as pool:  # they may be read from sidecars
            lengths = pool.map(lambda shard: self.lengths(shard, 0, sizes[shard]).astype(np.int32), range(len(sizes)))
            return np.concatenate(list(lengths))

    def _pieces(self, epoch: int, lane: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the pieces of a window, int64 (P, 3) as in `Window`, and the samples as `samples_of` returns them.

        A piece is a run of samples that follow each other in a shard.
        """
        if not (0 <= lane < self.lanes and 0 <= index < self.slices):
            raise IndexError(f"lane {lane} of epoch {epoch} has no window {index}")
        numbers = _step(self, epoch, index)[lane]
        shards = np.searchsorted(self._shard_ends, numbers, side="right")
        samples = numbers - np.append(0, self._shard_ends)[shards]
        rising = np.argsort(numbers, kind="stable")
        # A sample that a weight repeats in the step begins another piece.
        begins = (np.diff(numbers[rising], prepend=-2) != 1) | (np.diff(shards[rising], prepend=-1) != 0)
        first, last = np.flatnonzero(begins), np.append(np.flatnonzero(begins)[1:], len(rising)) - 1
        pieces = np.stack([shards[rising[first]], samples[rising[first]], samples[rising[last]] + 1], axis=1)
        piece = np.empty_like(rising)
        piece[rising] = np.cumsum(begins) - 1
        return pieces, np.stack([piece, shards, samples], axis=1)[None]


@lru_cache(maxsize=2)  # readers are in at most two epochs at a time
def _epoch(stream: ClusterStream, epoch: int) -> np.ndarray:
    """Return the clusters of the epoch's steps: int64 (steps, B/C, 3), rows of (dataset, pass, cluster)."""

    def drawn(shape: int | tuple[int, ...], use: Use) -> np.ndarray:
        return shuffled(shape, stream.seed, epoch, 0, 0, 0, use)

    clusters = np.concatenate([_epoch_clusters(stream, number, epoch) for number in stream.datasets])
    per_step = stream.step_samples // stream.size
    used = clusters[drawn(len(clusters), Use.BLOCKS)[: stream.slices * per_step]]
    # Each step gets one random cluster from every group of as many clusters as steps, from datasets of similar length.
    means = [dataset.shard_lengths @ dataset.shard_samples / dataset.samples for dataset in stream.parts]
    rank = np.argsort(np.argsort(means, kind="stable"), kind="stable")
    groups = np.argsort(rank[used[:, 0]], kind="stable").reshape(per_step, stream.slices)
    return used[np.take_along_axis(groups, drawn(groups.shape, Use.POSITIONS), axis=1).T]


def _epoch_clusters(stream: ClusterStream, number: int, epoch: int) -> np.ndarray:
    """Return a dataset's clusters in the epoch, the next ones of its passes: int64 rows of (dataset, pass, cluster)."""
    dataset = stream.parts[number]
    count, quota = dataset.samples // stream.size, dataset.quota // stream.size
    passes, places = np.divmod(np.arange(epoch * quota, (epoch + 1) * quota), count)
    for pass_number in np.unique(passes).tolist():
        of_pass = passes == pass_number
        places[of_pass] = shuffled(count, stream.seed, pass_number, number, 0, 0, Use.PASS)[places[of_pass]]
    return np.stack([np.full(quota, number), passes, places], axis=1)


@lru_cache(maxsize=16)  # a rank's lanes need the same step, and several steps are planned at a time
def _step(stream: ClusterStream, epoch: int, index: int) -> np.ndarray:
    """Balance the samples of a step over the lanes. Returns int64 (L, B/L), the samples' numbers over all datasets."""

    def drawn(shape: int | tuple[int, ...], use: Use) -> np.ndarray:
        return shuffled(shape, stream.seed, epoch, 0, 0, index, use)

    numbers = stream.clusters(epoch, index).reshape(-1)
    tokens = stream.tokens[numbers].astype(np.int64)
    ranked = drawn(len(numbers), Use.SAMPLES)
    ranked = ranked[np.argsort(tokens[ranked], kind="stable")].reshape(-1, stream.lanes)
    lanes = np.take_along_axis(ranked, balance(tokens[ranked]), axis=1).T
    lanes = lanes[drawn(len(lanes), Use.LANES)]
    return numbers[np.take_along_axis(lanes, drawn(lanes.shape, Use.PLACES), axis=1)]
