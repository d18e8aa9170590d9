"""Start, supervise and stop the processes that run a conversion's jobs."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from pipeline.errors import PipelineError

Run = Callable[..., Any]  # (job, ...) -> the job's result


@contextmanager
def workers(processes: int, runs: list[Run]) -> Iterator[tuple[ThreadPoolExecutor, Run]]:
    """Yield threads, each of which supervises one job at a time, and a function (dataset, job, ...) that runs a job.

    The function calls runs[dataset](job, ...) in a worker, and returns the result. It raises PipelineError if the
    worker was killed.
    processes: 1 means this process. Several are spawned, not forked, because threads of this process may hold locks.
    They ignore Ctrl-C and SIGTERM, and end with this process. After an error, a job of this process ends at its next
    `check_stop`.
    """
    block = signal.pthread_sigmask, (signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # inherited by the processes
    threads = ThreadPoolExecutor(processes + 2, "job", *block)
    context = multiprocessing.get_context("spawn")
    parent, held_open = context.Pipe(duplex=False)
    pool: Executor
    if processes == 1:
        pool = ThreadPoolExecutor(1, "work", _begin, (runs,))
    else:
        pool = ProcessPoolExecutor(processes, context, _begin, (runs, parent))

    def run(*job: Any) -> Any:
        try:
            return pool.submit(_run_job, *job).result()
        except BrokenProcessPool:
            raise PipelineError("a process was killed: if memory ran out, use fewer --processes") from None

    try:
        yield threads, run
    except BaseException:
        _stop.set()
        held_open.close()
        raise
    finally:
        wait = not isinstance(sys.exception(), KeyboardInterrupt)  # for uploads, and for a job of this process
        threads.shutdown(wait=False, cancel_futures=True)
        pool.shutdown(wait or processes > 1, cancel_futures=True)
        threads.shutdown(wait)
        _stop.clear()


def check_stop() -> None:
    """Raise CancelledError if the command has failed. Jobs call this for each row or piece, to end soon."""
    if _stop.is_set():
        raise CancelledError


_runs: list[Run]
_stop = threading.Event()  # never set in processes that end with their parent


def _begin(runs: list[Run], parent: Connection | None = None) -> None:
    global _runs
    _runs = runs
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    """End this process at once when the parent closes the other end of the pipe or is killed."""
    parent.poll(None)
    os._exit(1)


def _run_job(dataset: int, *job: Any) -> Any:
    return _runs[dataset](*job)
