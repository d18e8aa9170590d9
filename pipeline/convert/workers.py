"""Start, supervise and stop the processes that run a conversion's jobs."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, MutableSequence
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.errors import PipelineError

Report = Callable[[int], None]  # a job calls it with the amount of work just done, in the unit of its size
Run = Callable[[Any, Path, Report], Any]  # (job, folder to write in, report) -> the job's result


@contextmanager
def job_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield threads, each supervising one job at a time. Processes that they start ignore Ctrl-C and SIGTERM."""
    block = signal.pthread_sigmask, (signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    threads = ThreadPoolExecutor(count, "job", *block)
    try:
        yield threads
    finally:
        # After Ctrl-C, do not wait for uploads.
        threads.shutdown(wait=not isinstance(sys.exception(), KeyboardInterrupt), cancel_futures=True)


@contextmanager
def workers(processes: int, runs: list[Run], jobs: int, bar: tqdm) -> Iterator[Callable[[int, Any, int, Path], Any]]:
    """Yield a function (dataset, job, number, folder) -> result that runs job `number` of `jobs`.

    It raises PipelineError if the job's process was killed. `bar` shows the progress that jobs report.
    processes: 1 means this process. Several are spawned, not forked, because threads of this process may hold locks.
    """
    context = multiprocessing.get_context("spawn")
    progress = context.RawArray("q", jobs)
    pool: Executor
    if processes == 1:
        stop = threading.Event()
        pool, end = ThreadPoolExecutor(1, "work", lambda: _begin(runs, progress, stop)), stop.set
    else:
        parent, held_open = context.Pipe(duplex=False)
        pool = ProcessPoolExecutor(processes, context, _begin_process, (runs, progress, parent))
        end = held_open.close

    def run(*job: Any) -> Any:
        try:
            return pool.submit(_run_job, *job).result()
        except BrokenProcessPool:
            raise PipelineError("a process was killed: if memory ran out, use fewer --processes") from None

    def show_progress() -> None:
        shown, ended = 0, False
        while not ended:
            ended = finished.wait(0.3)
            reached = int(np.frombuffer(progress, np.int64).sum())
            bar.update(reached - shown)
            shown = reached

    finished, shower = threading.Event(), threading.Thread(target=show_progress)
    shower.start()
    try:
        yield run
    except BaseException:
        end()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        finished.set()
        shower.join()


def _run_job(dataset: int, job: Any, number: int, folder: Path) -> Any:
    """Run a job of a dataset in a worker; `number` is the job's number among all jobs."""

    def report(done: int) -> None:
        if _stop.is_set():
            raise CancelledError
        _progress[number] += done

    report(0)
    return _runs[dataset](job, folder, report)


_runs: list[Run]
_progress: MutableSequence[int]
_stop: threading.Event


def _begin(runs: list[Run], progress: MutableSequence[int], stop: threading.Event) -> None:
    global _runs, _progress, _stop
    _runs, _progress, _stop = runs, progress, stop


def _begin_process(runs: list[Run], progress: MutableSequence[int], parent: Connection) -> None:
    _begin(runs, progress, threading.Event())
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    """End this process at once when the parent closes the other end of the pipe or is killed."""
    parent.poll(None)
    os._exit(1)
