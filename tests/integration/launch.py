"""Run the ranks of a distributed program, with one time limit for all of them.

They are forked from one process that has imported everything, since DeepSpeed and transformers take seconds to import.
"""

import faulthandler
import gc
import multiprocessing
import os
import runpy
import signal
import socket
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
# What programs import, also later: DeepSpeed and transformers import much only when an engine or a model is built.
_PRELOADED = [
    *("launch", "consume", "pipeline.train", "pipeline.evaluate", "pipeline.embed", "pipeline.mine"),
    *("pipeline.export", "pipeline.training.universal", "tools.make_shards"),
    *(f"pipeline.models.{family}.family" for family in ("llave", "clip", "llm2clip", "text_encoder")),
    *(f"pipeline.objectives.{name}.step" for name in ("contrastive", "masked_tokens")),
    *("peft", "peft.utils.transformers_weight_conversion", "transformers.models.audioflamingo3"),
    *("deepspeed.ops.op_builder.all_ops", "deepspeed.module_inject.auto_ep_layer"),
    *("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.superoffload.superoffload_stage3"),
]


@dataclass(frozen=True)
class Ended:
    """Exit status of each rank (None: killed at the time limit), and what they printed."""

    status: list[int | None]
    output: str


@dataclass(frozen=True)
class Rank:
    """A process, and the file that receives its output, so that no reader is needed while it runs."""

    process: ForkServerProcess
    output: IO[str]

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        """Return the exit status, or None while the process runs."""
        return self.process.exitcode

    def kill(self) -> None:
        """Kill the process if it still runs, and wait for its end."""
        self.process.kill()
        self.process.join()


def launch(arguments: list[str], world: int, seconds: float = HANG_SECONDS) -> Ended:
    """Run `python ARGUMENTS` on `world` ranks and wait. As under a launcher, a failed rank ends the others."""
    return wait(fork(arguments, world), seconds)


def fork(arguments: list[str], world: int) -> list[Rank]:
    """Start the ranks that `launch` waits for."""
    ranks = []
    for environment in _environments(world):
        output = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115 (closed by `wait`)
        process = fork_server().Process(target=_run, args=(arguments, os.environ | environment, output.name))
        process.start()
        ranks.append(Rank(process, output))
    return ranks


def wait(ranks: Sequence[Rank], seconds: float = HANG_SECONDS, after_failure: float = SECONDS_AFTER_A_FAILURE) -> Ended:
    """Wait for the ranks to end. Kill the rest at the time limit, or some time after a failure."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and None in (status := [rank.poll() for rank in ranks]):
        if any(status):
            deadline = min(deadline, time.monotonic() + after_failure)
        time.sleep(0.05)
    status = [rank.poll() for rank in ranks]
    say_where([rank.pid for rank in ranks if rank.poll() is None])
    texts = []
    for number, rank in enumerate(ranks):
        rank.kill()
        rank.output.seek(0)
        texts.append(f"--- rank {number}\n{rank.output.read()}")
        rank.output.close()
    return Ended(status, "\n".join(texts))


@cache
def fork_server() -> ForkServerContext:
    """Return a context that forks processes from a single-threaded one with all imports that ranks need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _environments(1)[0].items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def _environments(world: int) -> list[dict[str, str]]:
    """Return the variables that a launcher sets for each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(world),
        "PYTHONPATH": f"{ROOT}:{ROOT}/tests/integration:{ROOT}/tests",  # the fork server finds modules only by this
    }
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def begin(environment: dict[str, str], output: str | Path) -> None:
    """Initialize a process of the fork server: set its environment and append its output to a file.

    On SIGUSR2 it prints the stack of each thread, as do the processes that it forks.
    """
    os.environ.clear()
    os.environ |= environment
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    os.close(file)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    gc.freeze()  # DeepSpeed runs the garbage collector for every engine; skip imported objects


def say_where(pids: Sequence[int]) -> None:
    """Make these processes and their children print the stack of each thread. They must have called `begin`."""
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
                print(f"process {process.pid}: {process.status()}")
                process.send_signal(signal.SIGUSR2)
    if pids:
        time.sleep(1)  # time for them to print


def _run(arguments: list[str], environment: dict[str, str], output: str) -> None:
    begin(environment, output)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(sys.argv[0], run_name="__main__")
