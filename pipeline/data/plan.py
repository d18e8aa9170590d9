"""The plan of a rank's reads: windows and steps in the order in which they are needed, with the samples' records."""

import mmap
import queue
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.queues import Queue as ProcessQueue

import numpy as np

from pipeline.data.order import Order
from pipeline.data.source import Source
from pipeline.errors import PipelineError

THREADS = 4  # windows that are planned at a time
_READ_BYTES = 16 << 20  # the most bytes of a ranged read, unless a sample is larger


@dataclass(frozen=True)
class PlannedWindow:
    """A lane's window, ready to be read.

    pieces: (P, 3) rows of (shard, start, stop), one ranged read each from every tar of the shard.
    records: the records of each piece for every tar of the shard: its samples and, if used, their stored vectors.
    references: the samples' mined negatives, (samples, K) for each piece; None without any.
    referred: about how many bytes these are, for each piece.
    rows: (T, slice samples, 3) of (piece, shard, sample), in the order of use.
    """

    number: int
    epoch: int
    pieces: np.ndarray
    records: list[list[np.ndarray]]
    references: list[np.ndarray | None]
    referred: list[int]
    rows: np.ndarray

    def bytes_of(self, piece: int) -> int:
        """The bytes of a piece's samples in all tars, and about those of the samples that they refer to."""
        return sum(int(each["length"].sum()) for each in self.records[piece]) + self.referred[piece]


@dataclass(frozen=True)
class PlannedStep:
    """A step's slices: (number of the window, slice in the window, row of its first sample in the batch)."""

    step: int
    epoch: int
    slices: list[tuple[int, int, int]]


@dataclass
class Planner:
    """Plans the windows and steps of a rank, in the order in which they are needed."""

    source: Source
    order: Order
    lanes: range
    steps: range
    workers: int

    def __iter__(self) -> Iterator[PlannedWindow | PlannedStep]:
        """Yield each step, preceded by the windows that it needs first. Several windows are planned concurrently."""
        # (stream, lane, epoch, index) -> (number of the window, the first slice that is needed)
        known: dict[tuple[int, int, int, int], tuple[int, int]] = {}
        waiting: deque[Future[PlannedWindow] | PlannedStep] = deque()
        windows = 0
        with ThreadPoolExecutor(THREADS) as pool:
            for step in self.steps:
                slices: list[tuple[int, int, int]] = []
                for lane in self.lanes:
                    for stream_number, epoch, number in self.order.slices(step):
                        index = self.order.streams[stream_number].window_at(epoch, lane, number)
                        key = stream_number, lane, epoch, index
                        if key not in known:
                            known = {old: value for old, value in known.items() if old[2] >= epoch - 1}
                            known[key] = windows, number
                            waiting.append(pool.submit(self._window, windows, *key, number))
                            windows += 1
                        window, first = known[key]
                        slices.append((window, number - first, len(slices) * self.order.slice_samples))
                waiting.append(PlannedStep(step, self.order.locate(step)[0], slices))
                while len(waiting) > 2 * THREADS:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())

    def _window(
        self, number: int, stream_number: int, lane: int, epoch: int, index: int, first_slice: int
    ) -> PlannedWindow:
        """Plan a window from slice `first_slice` on: a resumed run may begin in the middle of a window."""
        stream = self.order.streams[stream_number]
        window = stream.window(epoch, lane, index)
        rows = stream.samples_of(epoch, lane, index)[first_slice - window.first :]
        pieces: list[tuple[int, int, int]] = []
        records, references, referred = [], list[np.ndarray | None](), list[int]()
        cut_rows = np.empty_like(rows)
        cut_rows[..., 1:] = rows[..., 1:]
        for piece, (shard, start, stop) in enumerate(window.pieces.tolist()):
            mine = rows[..., 0] == piece
            samples = rows[mine][:, 2]
            if not len(samples):
                continue  # all its samples were used before the run resumed
            start, stop = int(samples.min()), int(samples.max()) + 1
            known = [tar.records(start, stop) for tar in self.source.tars(shard)]
            mined = self.source.references(shard, start, stop)
            cuts = self._cuts(np.add.reduce([each["length"].astype(np.int64) for each in known]), len(window.pieces))
            cut_rows[mine, 0] = len(pieces) + np.searchsorted(cuts, samples - start, side="right") - 1
            for begin, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
                pieces.append((shard, start + begin, start + end))
                records.append([each[begin:end] for each in known])
                piece_mined = None if mined is None else mined[begin:end]
                references.append(piece_mined)
                referred.append(0 if piece_mined is None else int(self.source.referred_bytes(shard, piece_mined).sum()))
        return PlannedWindow(number, epoch, np.array(pieces), records, references, referred, cut_rows)

    def _cuts(self, lengths: np.ndarray, pieces: int) -> np.ndarray:
        """Return where to cut a piece into ranged reads of limited size, with enough reads for all workers."""
        by_bytes = np.cumsum(lengths) // _READ_BYTES
        by_count = np.arange(len(lengths)) * -(-2 * self.workers // pieces) // len(lengths)
        begins = np.diff(by_bytes, prepend=-1).astype(bool) | np.diff(by_count, prepend=-1).astype(bool)
        return np.append(np.flatnonzero(begins), len(lengths))


def _result(planned: Future[PlannedWindow] | PlannedStep) -> PlannedWindow | PlannedStep:
    return planned.result() if isinstance(planned, Future) else planned


class Stop:
    """A flag shared by forked processes, without a lock: a process may be killed at any time."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)

    def set(self) -> None:
        self._byte[0] = 1

    def is_set(self) -> bool:
        return self._byte[0] == 1


Plan = queue.Queue | ProcessQueue  # of PlannedWindow, PlannedStep and, as its last item, PipelineError


def plan_ahead(planner: Planner, plans: Sequence[Plan], stop: Stop) -> None:
    """Send the plan to all workers, and wait while their queues are full. An error becomes the last item."""

    def send(message: PlannedWindow | PlannedStep | PipelineError) -> None:
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
        send(PipelineError(f"the order could not be computed: {error!r}"))
