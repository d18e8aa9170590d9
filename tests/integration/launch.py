"""Runs the ranks of a distributed program, with a time limit for all of them.

`launch` and `fork` make them copies of one process that has imported everything, since DeepSpeed and transformers take
seconds to import; `start` starts them as a launcher does.
"""

import faulthandler
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import IO

import psutil
import pytest
from limits import HANG_SECONDS, SECONDS_AFTER_A_FAILURE

ROOT = Path(__file__).parents[2]
_PRELOADED = [
    *("launch", "consume", "pipeline.train", "pipeline.evaluate", "pipeline.embed", "pipeline.embedding.embed_shards"),
    *("pipeline.training.universal", "tools.make_shards", "peft"),
]


@dataclass(frozen=True)
class Ended:
    """Exit status of each rank (None: it had to be killed at the time limit) and what they printed."""

    status: list[int | None]
    output: str


@dataclass(frozen=True)
class Rank:
    """A process, and the file that its output goes to, so that nobody has to read it while it runs."""

    process: subprocess.Popen | ForkServerProcess
    output: IO[str]

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def kill(self) -> None:
        """End it at once, if it has not ended, and wait until it has."""
        self.process.kill()
        (self.process.wait if isinstance(self.process, subprocess.Popen) else self.process.join)()


def launch(arguments: list[str], world: int, seconds: float = HANG_SECONDS) -> Ended:
    """Run `python ARGUMENTS` on `world` ranks. As under a launcher, a rank that fails ends the others."""
    return wait(fork(arguments, world), seconds)


def fork(arguments: list[str], world: int) -> list[Rank]:
    """Start what `launch` runs."""
    ranks = []
    for environment in _environments(world):
        output = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115 (closed by `wait`)
        process = fork_server().Process(target=_run, args=(arguments, os.environ | environment, output.name))
        process.start()
        ranks.append(Rank(process, output))
    return ranks


def start(arguments: list[str], world: int) -> list[Rank]:
    """Start `python ARGUMENTS` on `world` ranks, each a Python of its own."""
    ranks = []
    for environment in _environments(world):
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `wait`)
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
        ranks.append(Rank(process, output))
    return ranks


def wait(ranks: Sequence[Rank], seconds: float = HANG_SECONDS, after_failure: float = SECONDS_AFTER_A_FAILURE) -> Ended:
    """Wait for the ranks to end; kill what is left some time after a failure, or at the time limit."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and None in (status := [rank.poll() for rank in ranks]):
        if any(status):
            deadline = min(deadline, time.monotonic() + after_failure)
        time.sleep(0.05)
    status = [rank.poll() for rank in ranks]
    say_where([rank.pid for rank in ranks if rank.poll() is None and isinstance(rank.process, ForkServerProcess)])
    texts = []
    for number, rank in enumerate(ranks):
        rank.kill()
        rank.output.seek(0)
        texts.append(f"--- rank {number}\n{rank.output.read()}")
        rank.output.close()
    return Ended(status, "\n".join(texts))


@cache
def fork_server() -> ForkServerContext:
    """Processes of this context are forked from one that has imported what ranks need, with one thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _environments(1)[0].items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def _environments(world: int) -> list[dict[str, str]]:
    """What a launcher adds to each rank's environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(world),
        "PYTHONPATH": f"{ROOT}:{ROOT}/tests/integration:{ROOT}/tests",  # the fork server knows no other way there
    }
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def begin(environment: dict[str, str], output: str | Path) -> None:
    """In a process of the fork server: take over an environment, print to the end of a file, and at SIGUSR2 say where
    each thread is, as do the processes that this one forks.
    """
    os.environ.clear()
    os.environ |= environment
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    os.close(file)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    gc.freeze()  # DeepSpeed collects for every engine: what was imported need not be looked through


def say_where(pids: Sequence[int]) -> None:
    """Have these processes, which began so, and those that they forked print what each thread is at."""
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
                print(f"process {process.pid}: {process.status()}")
                process.send_signal(signal.SIGUSR2)
    if pids:
        time.sleep(1)  # they print it themselves


def _run(arguments: list[str], environment: dict[str, str], output: str) -> None:
    """`python ARGUMENTS` in this process."""
    begin(environment, output)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(sys.argv[0], run_name="__main__")
