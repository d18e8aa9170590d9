"""The processes that do a conversion's jobs, and how they end."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, MutableSequence
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

Report = Callable[[int], None]  # what a job calls to say how much more of it is done, in the unit of its size
Run = Callable[[Any, Path, Report], object]  # (job, as its name, folder to write in, report) -> its result


@contextmanager
def job_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Each sees one job at a time through. The processes that they start leave Ctrl-C and SIGTERM to this one."""
    block = signal.pthread_sigmask, (signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    threads = ThreadPoolExecutor(count, "job", *block)
    try:
        yield threads
    finally:
        # Whoever interrupts does not want to wait for uploads.
        threads.shutdown(wait=not isinstance(sys.exception(), KeyboardInterrupt), cancel_futures=True)


@contextmanager
def workers(processes: int, runs: list[Run], jobs: int) -> Iterator[tuple[Executor, np.ndarray]]:
    """What `run_job` is to be submitted to, and (jobs,) int64: how much is done of each, as reported.

    One process is this one. Several are not forked: this one has threads, of which some may hold locks.
    """
    if processes == 1:
        progress, stop = np.zeros(jobs, np.int64), threading.Event()
        pool: Executor = ThreadPoolExecutor(1, "work", _begin, (runs, progress, stop))
        end = stop.set
    else:
        context = multiprocessing.get_context("spawn")
        progress = context.RawArray("q", jobs)
        parent, held_open = context.Pipe(duplex=False)
        pool = ProcessPoolExecutor(processes, context, _begin_process, (runs, progress, parent))
        end = held_open.close
    try:
        yield pool, np.frombuffer(progress, np.int64)
    except BaseException:
        end()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def run_job(dataset: int, job: Any, number: int, folder: Path) -> object:
    """In a worker: do a dataset's job, which is the one of this number among all, and return its result."""

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
    """End this process at once when the other end of the pipe is closed, be it by the death of its process."""
    parent.poll(None)
    os._exit(1)
