"""The stream of a run's batches: the rank plans the samples, threads read them, worker processes decode them.

plan     the rank computes the order of the samples, window by window as the steps need them. It reads the sidecars'
         records once, regardless of the number of workers
read     every worker reads its pieces of these windows in the same order, as far ahead as its memory allows
decode   every worker decodes its share of every step, and the rank combines the shares into a batch
"""

import atexit
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.queues import Queue as ProcessQueue
from types import FrameType
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.data.batch import Batch, Encoded, RawSample, Share, encode_rows
from pipeline.data.order import Order
from pipeline.data.plan import Plan, Planner, Stop, plan_ahead
from pipeline.data.reader import Reader, ReadSample
from pipeline.data.sample import ContentDraw, Draw, Item, Pair
from pipeline.data.source import Source
from pipeline.errors import PipelineError, of_failed_worker
from pipeline.storage import objects

_PARENT_SECONDS = 0.3  # interval of a worker's checks that its rank is alive
_STOP_SECONDS = 1  # interval of a waiting rank's checks whether to stop
_PLANNED_AHEAD = 64  # planned windows and steps that a worker's queue holds


@dataclass
class Shares(IterableDataset):
    """Each worker's share of every step: the samples of the pieces that it reads.

    The loader takes shares from the workers in turn, so consecutive shares, one per worker, make up one step.
    trained_on: selects the pair that a step trains on.  augmented: encodes in place of `encode`, with a step's draws.
    plans: one per worker.  stop: set when the run ends.
    """

    source: Source
    order: Order
    steps: range
    encode: Callable[[Item], Encoded]
    trained_on: Callable[[Pair, Draw], Pair]
    augmented: Callable[[ContentDraw], Callable[[Item], Encoded]] | None
    plans: Sequence[Plan]
    stop: Stop

    def __iter__(self) -> Iterator[Share | PipelineError]:
        info = get_worker_info()
        worker = info.id if info else 0
        reader = Reader(self.source, self.plans[worker], self.stop, worker, len(self.plans))
        received, retries = objects.bytes_received(), objects.retries()
        width = self.source.teacher_metadata.width if self.source.teacher_metadata else None
        try:
            for _ in self.steps:
                step, samples = reader.next_step()
                encode = self.augmented(partial(self.order.draw_of_step, step)) if self.augmented else self.encode
                share = encode_rows([self._raw(step, *sample) for sample in samples], encode, width)
                share.received, share.retries = objects.bytes_received() - received, objects.retries() - retries
                received, retries = received + share.received, retries + share.retries
                if info:
                    share.to_shared_memory()
                yield share
        except PipelineError as error:
            # Yielded, because the loader would raise it wrapped in its own traceback.
            yield error
        finally:
            for pool in (reader.pool, reader.referred):
                pool.shutdown(wait=False, cancel_futures=True)

    def _raw(self, step: int, place: int, shard: int, sample: int, record: np.void, read: ReadSample) -> RawSample:
        def parse() -> Pair:
            pair = self.source.parse(shard, record, *read.data, mined=read.mined)
            return self.trained_on(pair, partial(self.order.draw, step, shard, sample))

        return RawSample(place, self.source.origin(shard, sample), read.data[0], parse)


def _live_with_parent(stop: Stop, parent: int, worker: int) -> None:
    """Make the worker end only when its rank, the process `parent`, stops it or dies.

    Slurm's signals and Ctrl-C also reach the workers, whose rank first finishes its step. So workers ignore them, and
    ignore SIGTERM until `stop` is set. If the rank is killed, the worker ends itself; otherwise it would wait forever
    to send its share. PR_SET_PDEATHSIG does not help: it watches the thread that forked the worker, not the rank.
    """

    def end_if_stopped(number: int, frame: FrameType | None) -> None:
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


class Stream(Iterator[Batch]):
    """Iterates over the batches of `rank` of `world` for each of `steps`; workers prepare them ahead.

    Create and close it on the main thread, where torch raises that a worker died. Another thread may iterate.

    timeout: seconds that decoding may take. Reading has its own limit.
    trained_on: selects the pair that a step trains on.
    augmented: returns what encodes a step's items in place of `encode`, given the step's draws.
    stop: ends a wait for a batch within `_STOP_SECONDS`, with an error.
    Raises PipelineError for damaged, missing or unreachable objects, and for workers that die or hang.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        encode: Callable[[Item], Encoded],
        steps: range,
        *,
        rank: int,
        world: int,
        timeout: float,
        trained_on: Callable[[Pair, Draw], Pair] = Pair.one_text,
        augmented: Callable[[ContentDraw], Callable[[Item], Encoded]] | None = None,
        stop: Stop | None = None,
    ) -> None:
        source.check_memory(order, world)
        self.stop, self._left, self._seconds = stop or Stop(), len(steps), timeout + source.data.timeout_s
        workers, forking = source.data.workers, multiprocessing.get_context("fork")
        others = multiprocessing.active_children()
        plans: list[Plan] = [forking.Queue(_PLANNED_AHEAD) for _ in range(workers)] or [queue.Queue(_PLANNED_AHEAD)]
        for plan in plans:
            if isinstance(plan, ProcessQueue):
                plan.cancel_join_thread()  # do not wait at exit: no process reads the remaining items
        self._workers, self._shares = workers, len(plans)
        self._loader: Any = iter(
            DataLoader(
                Shares(source, order, steps, encode, trained_on, augmented, plans, self.stop),
                batch_size=None,
                num_workers=workers,
                timeout=_STOP_SECONDS if workers else 0,
                worker_init_fn=partial(_live_with_parent, self.stop, os.getpid()),
                multiprocessing_context=forking if workers else None,  # workers inherit the opened source
            )
        )
        self._forked = [child for child in multiprocessing.active_children() if child not in others]
        atexit.register(self._end_workers)  # an error elsewhere leaves this unclosed
        planner = Planner(source, order, order.lanes_of(rank, world), steps, len(plans))
        # Started after the fork, so that the workers do not inherit this thread.
        threading.Thread(target=plan_ahead, args=(planner, plans, self.stop), daemon=True).start()
        self._received, self._retries = objects.bytes_received(), objects.retries()

    def __next__(self) -> Batch:
        if not self._left:  # the loader is never exhausted: it would end the workers before `stop` is set
            raise StopIteration
        shares = [self._share() for _ in range(self._shares)]
        self._left -= 1
        received, retries = objects.bytes_received() - self._received, objects.retries() - self._retries
        self._received, self._retries = self._received + received, self._retries + retries
        for share in shares if self._workers else ():  # read by other processes
            received, retries = received + share.received, retries + share.retries
        return Batch.of(shares, received, retries)

    def _share(self) -> Share:
        until = time.monotonic() + self._seconds
        while True:
            try:
                share = next(self._loader)
                break
            except RuntimeError as error:
                if not (message := of_failed_worker(error)):
                    raise
                if "timed out" in message:
                    if time.monotonic() < until and not self.stop.is_set():
                        continue
                    message = f"the data workers sent nothing for {self._seconds:.0f} seconds: do they hang?"
                raise PipelineError(message) from error
        if isinstance(share, PipelineError):
            raise share
        return share

    def close(self) -> None:
        """End the workers."""
        self.stop.set()
        self._loader = None  # this ends the workers cleanly, unless a traceback still refers to it
        self._end_workers()
        atexit.unregister(self._end_workers)

    def _end_workers(self) -> None:
        """Kill the workers: an exiting rank would wait for them forever, and a waiting worker may miss SIGTERM."""
        self.stop.set()
        for worker in self._forked:
            with suppress(RuntimeError):  # torch raises it for a killed worker
                worker.kill()
                worker.join()


def batches(*arguments: Any, **options: Any) -> Iterator[Batch]:
    """Yield the batches of a `Stream`, which is closed afterwards."""
    with closing(Stream(*arguments, **options)) as stream:
        yield from stream
