"""Starts the ranks of a distributed program as plain processes, with a time limit for all of them."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """Exit status of each rank (None: it had to be killed at the time limit) and what they printed."""

    status: list[int | None]
    output: str


def launch(arguments: list[str], world: int, seconds: float, environment: dict[str, str] | None = None) -> Ended:
    """Run `python ARGUMENTS` on `world` ranks. As under a launcher, a rank that fails ends the others."""
    ranks = start(arguments, world, environment)
    deadline = time.monotonic() + seconds
    status: list[int | None] = [None] * world
    while time.monotonic() < deadline and None in (status := [rank.poll() for rank in ranks]):
        if any(status):
            # Leave the others a moment: what they say of the failure is of interest.
            deadline = min(deadline, time.monotonic() + 5)
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()
    outputs = [rank.communicate()[0] for rank in ranks]
    return Ended(status, "\n".join(f"--- rank {i}\n{output}" for i, output in enumerate(outputs)))


def start(arguments: list[str], world: int, environment: dict[str, str] | None = None) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(world),
        "PYTHONPATH": str(ROOT),
    }
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
        )
        for rank in range(world)
    ]
