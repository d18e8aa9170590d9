"""Starts the ranks of a distributed program as plain processes, with a time limit for all of them."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """Exit status of each rank (None: it had to be killed at the time limit) and what they printed."""

    status: list[int | None]
    output: str


def launch(arguments: list[str], world: int, seconds: float) -> Ended:
    """Run `python ARGUMENTS` on `world` ranks. As under a launcher, a rank that fails ends the others."""
    return wait(start(arguments, world), seconds)


def start(arguments: list[str], world: int) -> list[subprocess.Popen]:
    """Start the ranks; their output goes to files, so that nobody has to read it while they run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(world),
        "PYTHONPATH": str(ROOT),
    }
    ranks = []
    for rank in range(world):
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process's object)
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
        process.output = output
        ranks.append(process)
    return ranks


def wait(ranks: list[subprocess.Popen], seconds: float) -> Ended:
    """Wait for the ranks to end; kill what is left 10 seconds after a failure, or at the time limit."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and None in (status := [rank.poll() for rank in ranks]):
        if any(status):
            deadline = min(deadline, time.monotonic() + 10)
        time.sleep(0.05)
    status = [rank.poll() for rank in ranks]
    texts = []
    for number, rank in enumerate(ranks):
        rank.kill()
        rank.wait()
        rank.output.seek(0)
        texts.append(f"--- rank {number}\n{rank.output.read()}")
        rank.output.close()
    return Ended(status, "\n".join(texts))
