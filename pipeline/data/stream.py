"""A run's batches: the order says which samples, threads bring their blocks, worker processes decode them."""

import ctypes
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.data import objects
from pipeline.data.batch import Batch, RawSample, Share, encode_rows
from pipeline.data.collate import Encoded
from pipeline.data.order import Order, Stream
from pipeline.data.sample import Item, Pair
from pipeline.data.source import Source
from pipeline.errors import PipelineError

_THREADS = 4  # of a worker, that read


@dataclass
class Reading:
    """A window on its way to memory.

    first: the first take it serves.  pieces: (shard, start, stop) by number, of those that this worker reads.
    rows: resolves to (T, share, 3): for each take, (piece, shard, sample) as they are consumed.
    samples: of a piece; resolve to its samples' bytes by their numbers in the shard.  held: bytes asked for, not taken.
    """

    first: int
    pieces: dict[int, tuple[int, int, int]]
    rows: Future
    samples: dict[int, Future] = field(default_factory=dict)
    held: int = 0


@dataclass
class Lane:
    """Reads one lane of one stream: the window being consumed, and as much of the next one as `limit` bytes allow.

    Of each window, this worker (number `worker` of `workers`) reads and decodes every `workers`-th piece.
    last: (epoch, window) after which the run needs none.
    """

    source: Source
    stream: Stream
    lane: int
    last: tuple[int, int]
    worker: int
    workers: int
    limit: int
    pool: ThreadPoolExecutor
    windows: dict[tuple[int, int], Reading] = field(default_factory=dict)

    def begin(self, epoch: int, take: int) -> tuple[int, int]:
        """Have the window of a take worked out, for which its sidecars' records are read. Returns (epoch, window)."""
        return self._begin(epoch, self.stream.window_at(epoch, self.lane, take))

    def require(self, epoch: int, take: int) -> None:
        """Ask for all that a take needs, whatever memory is left."""
        self._read(self.windows[self.begin(epoch, take)], unlimited=True)

    def take(self, epoch: int, take: int) -> Iterator[tuple[int, int, int, bytes]]:
        """(place in the lane's share, shard, sample, bytes) of this worker's samples of a take, the next of the run."""
        here = epoch, self.stream.window_at(epoch, self.lane, take)
        self.windows = {key: window for key, window in self.windows.items() if key >= here}
        window = self.windows[here]
        for place, (piece, shard, sample) in enumerate(window.rows.result()[take - window.first].tolist()):
            if piece in window.samples:
                data = window.samples[piece].result().pop(sample)
                window.held -= len(data)
                yield place, shard, sample, data

    def read_ahead(self) -> None:
        """Ask for what comes after the window being consumed, as far as memory is left."""
        epoch, index = min(self.windows)
        index += 1
        if index == self.stream.windows(epoch, self.lane):
            epoch, index = epoch + 1, 0
        if (epoch, index) <= self.last:
            window = self.windows[self._begin(epoch, index)]
            if window.rows.done():
                self._read(window, unlimited=False)

    def _begin(self, epoch: int, index: int) -> tuple[int, int]:
        if (epoch, index) not in self.windows:
            window = self.stream.window(epoch, self.lane, index)
            mine = range((self.worker - self.lane - index) % self.workers, len(window.pieces), self.workers)
            pieces = {number: tuple(window.pieces[number].tolist()) for number in mine}
            rows = self.pool.submit(self.stream.deal, epoch, self.lane, index)
            self.windows[epoch, index] = Reading(window.first, pieces, rows)
        return epoch, index

    def _read(self, window: Reading, unlimited: bool) -> None:
        window.rows.result()  # from here on the records are at hand
        for number, piece in window.pieces.items():
            if number not in window.samples:
                size = int(self.source.records(*piece)["length"].sum())
                if not unlimited and sum(each.held for each in self.windows.values()) + size > self.limit:
                    return
                window.held += size
                window.samples[number] = self.pool.submit(self._samples, *piece)

    def _samples(self, shard: int, start: int, stop: int) -> dict[int, bytes]:
        return dict(enumerate(self.source.read(shard, start, stop), start))


@dataclass
class Shares(IterableDataset):
    """Of every step, each worker's share of a rank's part: the samples of the pieces that it reads.

    Workers yield in turn, so that consecutive shares, as many as there are workers, make up one step.
    """

    source: Source
    order: Order
    lanes: range
    steps: range
    encode: Callable[[Item], Encoded]

    def __iter__(self) -> Iterator[Share | PipelineError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        pool = ThreadPoolExecutor(_THREADS)
        try:
            lanes = self._lanes(worker, workers, pool)
            received = objects.bytes_received()
            for step in self.steps:
                share = encode_rows(list(self._samples(step, lanes)), self.encode)
                before, received = received, objects.bytes_received()
                share.received = received - before
                yield share
        except PipelineError as error:
            # As a value: a loader would raise it wrapped in its own traceback.
            yield error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _lanes(self, worker: int, workers: int, pool: ThreadPoolExecutor) -> list[list[Lane]]:
        """The readers by lane and stream, of which the first windows are already asked for."""
        streams = self.order.streams
        limit = (self.source.data.memory_mb << 20) // (workers * len(streams) * len(self.lanes))
        last = [self.order.last_take(number, self.steps.stop) for number in range(len(streams))]
        lanes = [
            [
                Lane(
                    self.source,
                    stream,
                    lane,
                    (epoch, stream.window_at(epoch, lane, take)),
                    worker,
                    workers,
                    limit,
                    pool,
                )
                for stream, (epoch, take) in zip(streams, last, strict=True)
            ]
            for lane in self.lanes
        ]
        for number, epoch, take in self.order.takes(self.steps.start):
            for readers in lanes:
                readers[number].begin(epoch, take)
        return lanes

    def _samples(self, step: int, lanes: list[list[Lane]]) -> Iterator[RawSample]:
        takes = [(readers[number], epoch, take) for readers in lanes for number, epoch, take in self.order.takes(step)]
        for reader, epoch, take in takes:
            reader.require(epoch, take)
        for number, (reader, epoch, take) in enumerate(takes):
            for place, shard, sample, data in reader.take(epoch, take):
                origin = self.source.origin(shard, sample)
                place += number * self.order.share
                yield RawSample(place, origin, data, partial(self._pair, step, shard, sample))
            reader.read_ahead()

    def _pair(self, step: int, shard: int, sample: int, data: bytes) -> Pair:
        pair = self.source.parse(shard, data)
        return pair.drawn(self.order.draw(step, shard, sample, len(pair.texts))) if pair.alternatives else pair


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
    timeout: float,
) -> Iterator[Batch]:
    """What `rank` of `world` consumes in each of `steps`, ahead of time if there are workers.

    timeout: seconds that decoding may take besides reading, which has its own limit.
    Raises PipelineError for damaged, missing or unreachable objects, and for workers that die or hang.
    """
    source.check_memory(order, world)
    workers = source.data.workers
    loader = DataLoader(
        Shares(source, order, order.lanes_of(rank, world), steps, encode),
        batch_size=None,
        num_workers=workers,
        timeout=timeout + source.data.timeout_s if workers else 0,
        worker_init_fn=_end_with_parent,
        multiprocessing_context="fork" if workers else None,  # they begin with the source and the order as they are
    )
    waiting = []
    try:
        for share in loader:
            if isinstance(share, PipelineError):
                raise share
            waiting.append(share)
            if len(waiting) == max(workers, 1):
                yield Batch.of(waiting)
                waiting = []
    except RuntimeError as error:
        if not any(words in str(error) for words in ("exited unexpectedly", "killed by signal", "timed out")):
            raise
        # Out of memory, often; else it brought nothing for too long.
        raise PipelineError(f"a data worker failed: {str(error).splitlines()[0]}") from error
