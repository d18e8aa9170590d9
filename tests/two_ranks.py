"""Run a function of a test module in two gloo processes, with a time limit."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from limits import HANG_SECONDS
from torch.multiprocessing.spawn import ProcessRaisedException

# The fork server imports these modules once for all tests of a session.
multiprocessing.set_forkserver_preload(["two_ranks", "pipeline.training.engine", "pipeline.models.llave"])


def _process(rank: int, folder: str, function: Callable, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ |= environment
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=HANG_SECONDS),
    )
    torch.save(function(rank), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def on_two_ranks(function: Callable) -> list:
    """Return [function(0), function(1)], each computed in its own process of one process group."""
    try:
        return _on_two_ranks(function)
    except ProcessRaisedException as error:
        # Rarely, gloo takes another program's connection to a port for the other rank's.
        if "connectFullMesh failed" not in str(error):
            raise
        return _on_two_ranks(function)


def _on_two_ranks(function: Callable) -> list:
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, function, dict(os.environ))
        ranks = mp.start_processes(_process, arguments, nprocs=2, join=False, start_method="forkserver")
        end = time.monotonic() + HANG_SECONDS
        try:
            while not ranks.join(timeout=1):
                assert time.monotonic() < end, f"two processes took more than {HANG_SECONDS} s"
        finally:
            for process in ranks.processes:
                process.kill()
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(2)]
