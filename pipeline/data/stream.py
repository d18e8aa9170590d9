"""A run's batches: the rank's process plans which samples, threads bring their blocks, worker processes decode them.

plan     the rank works out, window after window as steps will need them, the order of the samples, for which
         it reads the sidecars' records: once a rank, however many workers there are
read     every worker reads its pieces of these windows in the same order, as far ahead as memory allows
decode   what it read; of every step each worker hands over its share, which the rank puts together
"""

import atexit
import mmap
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.data import digest
from pipeline.data.batch import Batch, RawSample, Share, encode_rows
from pipeline.data.collate import Encoded
from pipeline.data.order import Order
from pipeline.data.sample import Draw, Item, Pair
from pipeline.data.source import Source
from pipeline.errors import PipelineError, of_failed_worker
from pipeline.storage import objects

_THREADS = 4  # that read, in each process
_READ_BYTES = 16 << 20  # of one ranged read, at most, unless a sample is larger
_STEPS_AHEAD = 64  # that a worker knows, and may read for
_PARENT_SECONDS = 0.3  # between a worker's looks whether its rank lives
_PLANNED_AHEAD = 64  # windows and steps that wait for a worker to take them up


@dataclass(frozen=True)
class Window:
    """A lane's window, planned.

    pieces: (P, 3) rows of (shard, start, stop), one ranged read each, and one of its text embeddings if there are any.
    records: what the sidecars say of each.  vectors: likewise, of its text embeddings; [] without any.
    rows: (T, share, 3) of (piece, shard, sample), in the order they are consumed.
    """

    number: int
    epoch: int
    pieces: np.ndarray
    records: list[np.ndarray]
    vectors: list[np.ndarray]
    rows: np.ndarray


@dataclass(frozen=True)
class Step:
    """What a step takes: (number of the window, which of its takes, the place of the first sample in the batch)."""

    step: int
    epoch: int
    takes: list[tuple[int, int, int]]


@dataclass
class Planner:
    """The windows and steps of a rank, in the order in which they are needed."""

    source: Source
    order: Order
    lanes: range
    steps: range
    workers: int

    def __iter__(self) -> Iterator[Window | Step]:
        """Every step, after the windows that it is the first to need; several windows are planned at a time."""
        known: dict[tuple, tuple[int, int]] = {}  # stream, lane, epoch, index -> number, the first take that is needed
        waiting: deque[Future | Step] = deque()
        windows = 0
        with ThreadPoolExecutor(_THREADS) as pool:
            for step in self.steps:
                takes = []
                for lane in self.lanes:
                    for number, epoch, take in self.order.takes(step):
                        stream = self.order.streams[number]
                        index = stream.window_at(epoch, lane, take)
                        key = number, lane, epoch, index
                        if key not in known:
                            known = {old: value for old, value in known.items() if old[2] >= epoch - 1}
                            known[key] = windows, take
                            waiting.append(pool.submit(self._window, windows, number, lane, epoch, index, take))
                            windows += 1
                        window, first = known[key]
                        takes.append((window, take - first, len(takes) * self.order.share))
                waiting.append(Step(step, self.order.locate(step)[0], takes))
                while len(waiting) > 2 * _THREADS:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())

    def _window(self, number: int, stream: int, lane: int, epoch: int, index: int, first_take: int) -> Window:
        """Plan a window from its take number `first_take` on: a run that goes on may begin in its middle."""
        stream = self.order.streams[stream]
        window = stream.window(epoch, lane, index)
        rows = stream.deal(epoch, lane, index)[first_take - window.first :]
        pieces, records, vectors, cut_rows = [], [], [], np.empty_like(rows)
        cut_rows[..., 1:] = rows[..., 1:]
        for piece, (shard, start, stop) in enumerate(window.pieces.tolist()):
            mine = rows[..., 0] == piece
            samples = rows[mine][:, 2]
            if not len(samples):
                continue  # all of it was consumed before the run went on
            start, stop = int(samples.min()), int(samples.max()) + 1
            known = self.source.records(shard, start, stop)
            lengths = known["length"].astype(np.int64)
            if self.source.embeddings:
                embedded = self.source.vector_records(shard, start, stop)
                lengths += embedded["length"]
            cuts = self._cuts(lengths, len(window.pieces))
            cut_rows[mine, 0] = len(pieces) + np.searchsorted(cuts, samples - start, side="right") - 1
            for begin, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
                pieces.append((shard, start + begin, start + end))
                records.append(known[begin:end])
                if self.source.embeddings:
                    vectors.append(embedded[begin:end])
        return Window(number, epoch, np.array(pieces), records, vectors, cut_rows)

    def _cuts(self, lengths: np.ndarray, pieces: int) -> np.ndarray:
        """Where to cut a piece into ranged reads: not too large for memory, and enough for all workers."""
        by_bytes = np.cumsum(lengths) // _READ_BYTES
        by_count = np.arange(len(lengths)) * -(-2 * self.workers // pieces) // len(lengths)
        begins = np.diff(by_bytes, prepend=-1).astype(bool) | np.diff(by_count, prepend=-1).astype(bool)
        return np.append(np.flatnonzero(begins), len(lengths))


def _result(planned: Future | Step) -> Window | Step:
    return planned.result() if isinstance(planned, Future) else planned


@dataclass
class Reading:
    """A window on its way to memory.

    samples: of each piece asked for, resolves to the bytes by sample number.
    vectors: likewise, of its text embeddings.
    held: bytes asked for and not yet taken.
    """

    window: Window
    samples: dict[int, Future] = field(default_factory=dict)
    vectors: dict[int, Future] = field(default_factory=dict)
    held: int = 0


class Reader:
    """Reads a worker's pieces in the order of need: what a step needs, and ahead while few enough bytes are held."""

    def __init__(self, source: Source, plan: queue.Queue, stop: "Stop", worker: int, workers: int) -> None:
        self.source, self.plan, self.stop, self.worker, self.workers = source, plan, stop, worker, workers
        self.limit = (source.data.memory_mb << 20) // workers
        self.pool = ThreadPoolExecutor(_THREADS)
        self.readings: dict[int, Reading] = {}
        self.steps: deque[Step] = deque()

    @property
    def held(self) -> int:
        """Bytes of samples that were asked for and not yet taken."""
        return sum(reading.held for reading in self.readings.values())

    def take(self) -> tuple[int, list[tuple[int, int, int, bytes, np.void, bytes | None]]]:
        """The next step, and (place, shard, sample, bytes, record, text embeddings) of this worker's samples of it."""
        while not self.steps:
            self._hear(wait=True)
        step = self.steps.popleft()
        self.readings = {n: reading for n, reading in self.readings.items() if reading.window.epoch >= step.epoch}
        rows = [
            (number, place + i, *row)
            for number, take, place in step.takes
            for i, row in enumerate(self.readings[number].window.rows[take].tolist())
            if self._is_mine(number, row[0])
        ]
        for number, _, piece, _, _ in rows:
            self._ask(self.readings[number], piece)
        taken = []
        for number, place, piece, shard, sample in rows:
            reading = self.readings[number]
            data = reading.samples[piece].result().pop(sample)
            vectors = reading.vectors[piece].result().pop(sample) if reading.vectors else None
            reading.held -= len(data) + len(vectors or b"")
            record = reading.window.records[piece][sample - reading.window.pieces[piece, 1]]
            taken.append((place, shard, sample, data, record, vectors))
        for number, take, _ in step.takes:
            if take + 1 == len(self.readings[number].window.rows):
                del self.readings[number]
        self._read_ahead()
        return step.step, taken

    def _is_mine(self, window: int, piece: int) -> bool:
        return (window + piece) % self.workers == self.worker

    def _hear(self, wait: bool) -> None:
        """Take up the next of the plan. Raises queue.Empty if it has none and is not waited for."""
        while True:
            try:
                heard = self.plan.get(block=wait, timeout=1)
                break
            except queue.Empty:
                if not wait:
                    raise
                if self.stop.is_set():
                    raise PipelineError("the batches are no longer wanted") from None
        if isinstance(heard, PipelineError):
            raise heard
        if isinstance(heard, Step):
            self.steps.append(heard)
        else:
            self.readings[heard.number] = Reading(heard)

    def _read_ahead(self) -> None:
        """Ask for what comes next, in the order of need, as far as memory is left."""
        for reading in self.readings.values():
            for piece in range(len(reading.window.pieces)):
                if self._is_mine(reading.window.number, piece) and not self._ask(reading, piece, self.limit):
                    return
        with suppress(queue.Empty):
            while len(self.steps) < _STEPS_AHEAD:
                self._hear(wait=False)

    def _ask(self, reading: Reading, piece: int, limit: int | None = None) -> bool:
        """Have a piece read, unless it is already; False if that would be more than `limit` bytes held."""
        if piece not in reading.samples:
            records, place = reading.window.records[piece], reading.window.pieces[piece].tolist()
            vectors = reading.window.vectors[piece] if reading.window.vectors else None
            size = int(records["length"].sum()) + (0 if vectors is None else int(vectors["length"].sum()))
            if limit is not None and self.held + size > limit:
                return False
            reading.held += size
            reading.samples[piece] = self.pool.submit(_by_number, self.source.read, *place, records)
            if vectors is not None:
                reading.vectors[piece] = self.pool.submit(_by_number, self.source.read_vectors, *place, vectors)
        return True


def _by_number(
    read: Callable[[int, np.ndarray], list[bytes]], shard: int, start: int, stop: int, records: np.ndarray
) -> dict[int, bytes]:
    return dict(zip(range(start, stop), read(shard, records), strict=True))


@dataclass
class Shares(IterableDataset):
    """Of every step, each worker's share of a rank's part: the samples of the pieces that it reads.

    Workers yield in turn, so that consecutive shares, as many as there are workers, make up one step.
    trained_on: what a step takes of a sample.  plans: one for each worker.  stop: set when no more is wanted.
    """

    source: Source
    order: Order
    steps: range
    encode: Callable[[Item], Encoded]
    trained_on: Callable[[Pair, Draw], Pair]
    plans: list[queue.Queue]
    stop: "Stop"

    def __iter__(self) -> Iterator[Share | PipelineError]:
        info = get_worker_info()
        worker = info.id if info else 0
        reader = Reader(self.source, self.plans[worker], self.stop, worker, len(self.plans))
        received = objects.bytes_received()
        try:
            for _ in self.steps:
                step, samples = reader.take()
                share = encode_rows([self._raw(step, *sample) for sample in samples], self.encode)
                before, received = received, objects.bytes_received()
                share.received = received - before
                if info:
                    share.to_shared_memory()
                yield share
        except PipelineError as error:
            # As a value: a loader would raise it wrapped in its own traceback.
            yield error
        finally:
            reader.pool.shutdown(wait=False, cancel_futures=True)

    def _raw(
        self, step: int, place: int, shard: int, sample: int, data: bytes, record: np.void, vectors: bytes | None
    ) -> RawSample:
        parse = partial(self._pair, step, shard, sample, record, vectors)
        return RawSample(place, self.source.origin(shard, sample), data, parse)

    def _pair(self, step: int, shard: int, sample: int, record: np.void, vectors: bytes | None, data: bytes) -> Pair:
        pair = self.source.parse(shard, data, record, vectors)
        return self.trained_on(pair, partial(self.order.draw, step, shard, sample))


class Stop:
    """A flag that processes share after a fork, without a lock: one may end while it asks."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)

    def set(self) -> None:
        self._byte[0] = 1

    def is_set(self) -> bool:
        return self._byte[0] == 1


def _plan_ahead(planner: Planner, plans: list[queue.Queue], stop: "Stop") -> None:
    """Send the plan to all workers, as far as their queues have room; an error as its last part."""

    def send(message: Window | Step | PipelineError) -> None:
        for plan in plans:
            while not stop.is_set():
                with suppress(queue.Full):
                    plan.put(message, timeout=1)
                    break

    try:
        for message in planner:
            if stop.is_set():
                return
            send(message)
    except PipelineError as error:
        send(error)
    except Exception as error:
        send(PipelineError(f"the order could not be worked out: {error!r}"))


def _live_with_parent(stop: "Stop", parent: int, worker: int) -> None:
    """Leave it to its rank, process `parent`, when this worker ends.

    Slurm's signals and the terminal's Ctrl-C, on which a rank finishes its step, reach all its processes; only after
    `stop` does SIGTERM come from the rank, which then waits for the worker's end. Of a rank that was killed the worker
    ends itself: it would wait for ever to hand over its batch. Linux could do that (PR_SET_PDEATHSIG), but with the
    thread that began the worker, which need not live as long as the rank.
    """

    def end_if_stopped(number: int, frame: object) -> None:
        if stop.is_set():
            os._exit(0)

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_SECONDS)
        os._exit(1)

    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_if_stopped)
    threading.Thread(target=end_with_parent, daemon=True).start()


def batches(
    source: Source,
    order: Order,
    encode: Callable[[Item], Encoded],
    steps: range,
    *,
    rank: int,
    world: int,
    timeout: float,
    trained_on: Callable[[Pair, Draw], Pair] = Pair.one_text,
) -> Iterator[Batch]:
    """What `rank` of `world` consumes in each of `steps`, ahead of time if there are workers.

    timeout: seconds that decoding may take besides reading, which has its own limit.
    trained_on: what a step takes of a sample.
    Raises PipelineError for damaged, missing or unreachable objects, and for workers that die or hang.
    """
    source.check_memory(order, world)
    if any(shard.images or shard.videos for _, shard in source.shards):
        digest.compiled()  # once, not in every worker
    workers, forking = source.data.workers, multiprocessing.get_context("fork")
    stop, others = Stop(), multiprocessing.active_children()
    if workers:
        plans = [forking.Queue(_PLANNED_AHEAD) for _ in range(workers)]
        for plan in plans:
            plan.cancel_join_thread()  # nobody reads on when the rank ends
    else:
        plans = [queue.Queue(_PLANNED_AHEAD)]
    loader = iter(
        DataLoader(
            Shares(source, order, steps, encode, trained_on, plans, stop),
            batch_size=None,
            num_workers=workers,
            timeout=timeout + source.data.timeout_s if workers else 0,
            worker_init_fn=partial(_live_with_parent, stop, os.getpid()),
            multiprocessing_context=forking if workers else None,  # they begin with the source as it is
        )
    )
    forked = [child for child in multiprocessing.active_children() if child not in others]

    def end_workers() -> None:
        """Whatever they are at: a rank that exits waits for them for ever, and one that waits may miss SIGTERM."""
        stop.set()
        for worker in forked:
            with suppress(RuntimeError):  # torch's, on a worker that was killed
                worker.kill()
                worker.join()

    atexit.register(end_workers)  # for an error leaves this generator unfinished
    planner = Planner(source, order, order.lanes_of(rank, world), steps, len(plans))
    # After the workers were forked, which begin without this thread.
    threading.Thread(target=_plan_ahead, args=(planner, plans, stop), daemon=True).start()
    received, waiting = objects.bytes_received(), []
    try:
        for share in islice(loader, len(steps) * len(plans)):  # no further, lest they be asked to end before `stop`
            if isinstance(share, PipelineError):
                raise share
            waiting.append(share)
            if len(waiting) == len(plans):
                before, received = received, objects.bytes_received()
                by_workers = sum(share.received for share in waiting) if workers else 0
                yield Batch.of(waiting, by_workers + received - before)
                waiting = []
    except RuntimeError as error:
        if not (message := of_failed_worker(error)):
            raise
        raise PipelineError(message) from error
    finally:
        stop.set()
        loader = None  # it ends its workers in order, unless a traceback keeps it
        end_workers()
        atexit.unregister(end_workers)
