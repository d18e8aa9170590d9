"""A run's batches: the order says which samples, the object store brings their blocks, workers decode them."""

import ctypes
import hashlib
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.config import Data
from pipeline.data import objects
from pipeline.data.collate import Batch, Encoded, encode_pairs, merge
from pipeline.data.index import Index, Shard, load_sidecar, read_samples
from pipeline.data.order import Order
from pipeline.data.sample import Item
from pipeline.data.shards import parse_sample
from pipeline.errors import PipelineError


@dataclass(frozen=True)
class Source:
    """All shards of a run's datasets, in one list: (URL of the dataset, its shard)."""

    shards: tuple[tuple[str, Shard], ...]

    @classmethod
    def open(cls, data: Data) -> "Source":
        """Read the datasets' indexes; nothing else is touched until a sample is needed."""
        urls = [objects.join(data.url, name) for name in data.datasets] or [data.url]
        shards = tuple((url, shard) for url in urls for shard in Index.load(url).shards)
        return cls(shards)

    @property
    def fingerprint(self) -> str:
        """What tells these shards from any others, in content and order."""
        return hashlib.sha256("".join(shard.sha256 for _, shard in self.shards).encode()).hexdigest()

    def order(self, data: Data, global_batch: int, seed: int) -> Order:
        samples = [shard.samples for _, shard in self.shards]
        return Order(samples, global_batch, data.lanes, data.block_samples, data.window_blocks, seed)

    def read(self, shard: int, start: int, stop: int) -> list[bytes]:
        """Samples start..stop of a shard, by one ranged read."""
        url, info = self.shards[shard]
        return read_samples(url, info, _sidecar(url, info), start, stop)

    def key(self, shard: int, sample: int) -> str:
        url, info = self.shards[shard]
        return f"{objects.join(url, info.file)}#{sample}"


@lru_cache(maxsize=256)
def _sidecar(url: str, shard: Shard):
    return load_sidecar(url, shard)


class Lane:
    """Reads one lane's samples in order, one window ahead, in a thread of `pool`."""

    def __init__(self, source: Source, order: Order, lane: int, pool: ThreadPoolExecutor) -> None:
        self.source, self.order, self.lane, self.pool = source, order, lane, pool
        self.windows: dict[tuple[int, int], Future] = {}

    def take(self, step: int) -> list[tuple[str, bytes]]:
        """The key and bytes of each sample that `step` takes from the lane."""
        epoch, in_epoch = self.order.locate(step)
        count = self.order.lane_batch_size
        offset, taken = in_epoch * count, []
        while len(taken) < count:
            index = self.order.window_at(epoch, self.lane, offset + len(taken))
            first, samples = self._window(epoch, index)
            begin = offset + len(taken) - first
            taken += samples[begin : begin + count - len(taken)]
        return taken

    def _window(self, epoch: int, index: int) -> tuple[int, list[tuple[str, bytes]]]:
        here, ahead = (epoch, index), self._after(epoch, index)
        for wanted in (here, ahead):
            if wanted not in self.windows:
                self.windows[wanted] = self.pool.submit(self._read, *wanted)
        for old in [key for key in self.windows if key not in (here, ahead)]:
            del self.windows[old]
        return self.windows[here].result()

    def _after(self, epoch: int, index: int) -> tuple[int, int]:
        last = self.order.window_at(epoch, self.lane, self.order.steps_per_epoch * self.order.lane_batch_size - 1)
        return (epoch, index + 1) if index < last else (epoch + 1, 0)

    def _read(self, epoch: int, index: int) -> tuple[int, list[tuple[str, bytes]]]:
        window = self.order.window(epoch, self.lane, index)
        data = {}
        for shard, start, stop in window.pieces.tolist():
            samples = self.source.read(shard, start, stop)
            data |= {(shard, start + i): sample for i, sample in enumerate(samples)}
        keys = map(tuple, window.samples.tolist())
        return window.first, [(self.source.key(*key), data[key]) for key in keys]


class Shares(IterableDataset):
    """Each worker's share of every step: it owns a run of the rank's lanes.

    Workers yield in turn, so that consecutive shares, as many as there are workers, make up one step.
    """

    def __init__(self, source: Source, order: Order, lanes: range, steps: range, encode: Callable[[Item], Encoded]):
        self.source, self.order, self.lanes, self.steps, self.encode = source, order, lanes, steps, encode

    def __iter__(self) -> Iterator[Batch | PipelineError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        cut = [len(self.lanes) * w // workers for w in (worker, worker + 1)]
        with ThreadPoolExecutor(max_workers=4) as pool:
            lanes = [Lane(self.source, self.order, lane, pool) for lane in self.lanes[slice(*cut)]]
            try:
                for step in self.steps:
                    samples = [sample for lane in lanes for sample in lane.take(step)]
                    pairs = [(key, partial(parse_sample, data)) for key, data in samples]
                    yield encode_pairs(pairs, self.encode)
            except PipelineError as error:
                # As a value: a loader would raise it wrapped in its own traceback.
                yield error


def _end_with_parent(worker: int) -> None:
    """Have Linux end this worker with its rank: one that was killed leaves it waiting to hand over its batch."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def batches(
    source: Source,
    order: Order,
    encode: Callable[[Item], Encoded],
    steps: range,
    *,
    rank: int,
    world: int,
    workers: int,
    timeout: float,
) -> Iterator[Batch]:
    """What `rank` of `world` consumes in each of `steps`, ahead of time if there are workers.

    Raises PipelineError for damaged or missing objects, and where no batch comes for `timeout` seconds.
    """
    lanes = order.lanes_of(rank, world)
    workers = min(workers, len(lanes))
    shares = Shares(source, order, lanes, steps, encode)
    loader = DataLoader(
        shares,
        batch_size=None,
        num_workers=workers,
        timeout=timeout if workers else 0,
        worker_init_fn=_end_with_parent,
    )
    waiting = []
    try:
        for share in loader:
            if isinstance(share, PipelineError):
                raise share
            waiting.append(share)
            if len(waiting) == max(workers, 1):
                yield merge(waiting)
                waiting = []
    except RuntimeError as error:
        if not any(words in str(error) for words in ("exited unexpectedly", "killed by signal", "timed out")):
            raise
        # Out of memory, often; else it brought nothing for too long.
        raise PipelineError(f"a data worker failed: {str(error).splitlines()[0]}") from error
