"""Reads what a worker's part of the plan names, in threads, ahead of its use."""

import queue
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from pipeline.data.mined import Referral
from pipeline.data.plan import THREADS, Plan, PlannedStep, PlannedWindow, Stop
from pipeline.data.source import Source
from pipeline.errors import PipelineError
from pipeline.storage import objects

_THREADS = 4  # readers in each process
_SAMPLE_THREADS = 16  # the same, if they read single samples: waiting for an answer takes longer than its bytes
# Readers of mined negatives in each process, one small read each. Without workers, one process has all these threads.
_REFERRED_THREADS = objects.CONNECTIONS - _SAMPLE_THREADS - THREADS
_STEPS_AHEAD = 64  # steps that a worker may read ahead


@dataclass(frozen=True)
class ReadSample:
    """What was read for a sample: its bytes in every tar, and its mined negatives.

    size: its part of `PlannedWindow.bytes_of`.
    """

    data: tuple[bytes, ...]
    mined: tuple[Referral, ...]
    size: int


@dataclass
class Reading:
    """The state of reading a window.

    samples: requested piece -> a future of its samples, by sample number.
    held: bytes that are requested but not yet used.
    """

    window: PlannedWindow
    samples: dict[int, Future[dict[int, ReadSample]]] = field(default_factory=dict)
    held: int = 0


class Reader:
    """Reads a worker's pieces in the order of use: all pieces of the current step, then more while memory is left."""

    def __init__(self, source: Source, plan: Plan, stop: Stop, worker: int, workers: int) -> None:
        self.source, self.plan, self.stop, self.worker, self.workers = source, plan, stop, worker, workers
        self.limit = (source.data.memory_mb << 20) // workers
        self.pool = ThreadPoolExecutor(_SAMPLE_THREADS if source.neighbours else _THREADS)
        self.referred = ThreadPoolExecutor(_REFERRED_THREADS)
        self.readings: dict[int, Reading] = {}
        self.steps: deque[PlannedStep] = deque()

    @property
    def held(self) -> int:
        """Bytes that are requested but not yet used."""
        return sum(reading.held for reading in self.readings.values())

    def next_step(self) -> tuple[int, list[tuple[int, int, int, np.void, ReadSample]]]:
        """Return the next step, and this worker's samples: (row, shard, sample, record, what was read)."""
        while not self.steps:
            self._receive(wait=True)
        step = self.steps.popleft()
        self.readings = {n: reading for n, reading in self.readings.items() if reading.window.epoch >= step.epoch}
        rows = [
            (number, place + i, *row)
            for number, slice_number, place in step.slices
            for i, row in enumerate(self.readings[number].window.rows[slice_number].tolist())
            if self._is_mine(number, row[0])
        ]
        for number, _, piece, _, _ in rows:
            self._request(self.readings[number], piece)
        samples = []
        for number, place, piece, shard, sample in rows:
            reading = self.readings[number]
            data = reading.samples[piece].result().pop(sample)
            reading.held -= data.size
            record = reading.window.records[piece][0][sample - reading.window.pieces[piece, 1]]
            samples.append((place, shard, sample, record, data))
        for number, slice_number, _ in step.slices:
            if slice_number + 1 == len(self.readings[number].window.rows):
                del self.readings[number]
        self._read_ahead()
        return step.step, samples

    def _is_mine(self, window: int, piece: int) -> bool:
        return (window + piece) % self.workers == self.worker

    def _receive(self, wait: bool) -> None:
        """Receive the next window or step of the plan. Without `wait`, raises queue.Empty if there is none."""
        while True:
            try:
                received = self.plan.get(block=wait, timeout=1)
                break
            except queue.Empty:
                if not wait:
                    raise
                if self.stop.is_set():
                    raise PipelineError("the batches are no longer wanted") from None
        if isinstance(received, PipelineError):
            raise received
        if isinstance(received, PlannedStep):
            self.steps.append(received)
        else:
            self.readings[received.number] = Reading(received)

    def _read_ahead(self) -> None:
        """Request the next pieces in the order of use, while memory is left."""
        for reading in self.readings.values():
            for piece in range(len(reading.window.pieces)):
                if self._is_mine(reading.window.number, piece) and not self._request(reading, piece, self.limit):
                    return
        with suppress(queue.Empty):
            while len(self.steps) < _STEPS_AHEAD:
                self._receive(wait=False)

    def _request(self, reading: Reading, piece: int, limit: int | None = None) -> bool:
        """Start reading a piece, unless it is already requested; False if this would exceed `limit` held bytes."""
        if piece not in reading.samples:
            window, (shard, start, _) = reading.window, reading.window.pieces[piece].tolist()
            size = window.bytes_of(piece)
            if limit is not None and self.held + size > limit:
                return False
            reading.held += size
            planned = window.records[piece], window.references[piece]
            reading.samples[piece] = self.pool.submit(_read, self.source, shard, start, *planned, self.referred)
        return True


def _read(
    source: Source,
    shard: int,
    start: int,
    records: list[np.ndarray],
    references: np.ndarray | None,
    pool: ThreadPoolExecutor,
) -> dict[int, ReadSample]:
    """Read consecutive samples of a shard, and in `pool` those that they refer to. Returns them by sample number."""
    mined: list[list[np.void]] = [[] for _ in records[0]]
    sizes = np.add.reduce([each["length"].astype(np.int64) for each in records])
    if references is not None:
        mined = [list(row[row["shard"] >= 0]) for row in references]
        sizes += source.referred_bytes(shard, references)
    distinct = {_key(each): each for row in mined for each in row}
    waiting = {key: pool.submit(source.read_referred, shard, each) for key, each in distinct.items()}
    tars = [tar.read(each) for tar, each in zip(source.tars(shard), records, strict=True)]
    referred = {key: future.result() for key, future in waiting.items()}
    return {
        number: ReadSample(data, tuple((each, referred[_key(each)]) for each in row), size)
        for number, (data, row, size) in enumerate(
            zip(zip(*tars, strict=True), mined, sizes.tolist(), strict=True), start
        )
    }


def _key(reference: np.void) -> tuple[int, int, int]:
    """Return what identifies the sample that is referred to."""
    return int(reference["dataset"]), int(reference["shard"]), int(reference["sample"])
