"""Ctrl-C in real processes: one line and exit status 130, at every stage of a program."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from limits import HANG_SECONDS

ROOT = Path(__file__).parents[1]
LINE = "interrupted; start the same command to continue\n"
PROGRAM = """
import ctypes, os, signal, sys, threading, time
from pipeline import interrupt
from pipeline.errors import PipelineError
from pipeline.jobs.program import command_line

def noted(number, frame):
    print("noted", flush=True)

def hang():  # as in a library that hides the signal from Python
    while True:
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            pass

@command_line
def main():
    how = sys.argv[1]
    if how == "own":
        signal.signal(signal.SIGINT, noted)
        print("in", flush=True)
        time.sleep(interrupt._LEAVE_SECONDS + 1)
        sys.exit(7)
    if how == "steps":
        signal.signal(signal.SIGTERM, noted)
        with interrupt.postponed(noted):
            print("in", flush=True)
            while True:
                time.sleep(0.1)
    if how == "callback":
        ctypes.CFUNCTYPE(None)(lambda: print("in", flush=True) or time.sleep(600))()
    print("in", flush=True)
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        if how == "hangs":
            hang()
        if how == "error":
            raise PipelineError("a data worker failed") from None
        if how == "traceback":
            raise ValueError("a consequence") from None
        raise

main()
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    started = []

    def start(*arguments: str, **environment: str) -> subprocess.Popen:
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs ignore SIGINT
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)} | environment
        started.append(
            subprocess.Popen([sys.executable, *arguments], **pipes, env=environment, cwd=ROOT, preexec_fn=heed)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until(condition: Callable[[], object], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["at once", "hangs", "error", "traceback", "callback"])
def test_interrupted_program_ends_with_one_line_and_status_130(start, how):
    process = start("-c", PROGRAM, how)
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=HANG_SECONDS)[1] == LINE
    assert process.returncode == 130


@pytest.mark.parametrize(
    "in_slurm", [False, True]
)  # torchrun forwards its second signal as SIGTERM, which Slurm also sends
def test_second_interrupt_ends_a_program_that_postpones_the_first(start, in_slurm):
    process = start("-c", PROGRAM, "steps", TORCHELASTIC_RUN_ID="x", **({"SLURM_JOB_ID": "1"} if in_slurm else {}))
    assert process.stdout.readline() == "in\n"
    for _ in range(2):  # a launcher forwarded one of them
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "noted\n"
    assert "press Ctrl-C once more to end at once" in process.stderr.readline()
    time.sleep(1.1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    if in_slurm:
        assert process.stdout.readline() == "noted\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
        process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=HANG_SECONDS)[1] == LINE
    assert process.returncode == 130


def test_own_sigint_handler_is_preserved(start):
    process = start("-c", PROGRAM.replace("@command_line", "interrupt._LEAVE_SECONDS = 0.2\n@command_line"), "own")
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=HANG_SECONDS) == ("noted\n", "")
    assert process.returncode == 7


def test_background_program_ignores_sigint(start):
    process = start("-c", f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{PROGRAM}", "at once")
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGINT)
    process.terminate()
    assert process.wait(timeout=HANG_SECONDS) == -signal.SIGTERM


@pytest.mark.parametrize("program", [["-m", "pipeline.train"], ["tools/preflight.py"], ["tools/make_shards.py"]])
def test_interrupt_during_import_ends_with_one_line(start, program):
    process = start(*program, "pipeline/recipes/demo.yaml")
    maps = Path(f"/proc/{process.pid}/maps")
    until(lambda: "numpy" in maps.read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=HANG_SECONDS)[1] == LINE
    assert process.returncode == 130


def test_interrupt_during_rendezvous_ends_without_traceback(start):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = free.getsockname()
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": place[0], "MASTER_PORT": str(place[1])}
    process = start("-m", "pipeline.evaluate", "model", "tasks", **ranks)

    def listens() -> bool:
        with socket.socket() as client:
            return client.connect_ex(place) == 0

    until(listens, process)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=HANG_SECONDS)[1]
    assert error.endswith(LINE)
    assert "Traceback" not in error
    assert process.returncode == 130
