"""Convert a checkpoint for another number of processes, to DeepSpeed's universal checkpoint.

ZeRO's files hold each rank's partition of the optimizer state, which another number of ranks cannot load. DeepSpeed
converts them to separate files for each parameter (https://www.deepspeed.ai/tutorials/universal-checkpointing/). The
copy is written beside the checkpoint, which does not change; `checkpoint.load` removes the copy.
"""

import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal

from pipeline.config import ROOT
from pipeline.distributed import on_first_rank
from pipeline.errors import PipelineError
from pipeline.progress import progress_bar
from pipeline.storage.atomic import sync
from pipeline.training import checkpoint
from pipeline.training.preemption import SIGNALS

_POLL = 5  # seconds

logger = logging.getLogger(__name__)


def for_this_world(source: Path, timeout_minutes: float) -> Path:
    """Return a checkpoint that this number of processes can load: `source`, or a converted copy of it. Collective.

    The first rank converts it; the others wait until all files are on disk.

    Raises PipelineError on the first rank if the conversion fails, or writes nothing for `timeout_minutes`.
    """
    leads = dist.get_rank() == 0
    world = dist.get_world_size()
    target = source.parent / "unfinished-universal" / source.name
    conditions = checkpoint.conditions_of(source) if leads else {}
    # Without ZeRO every rank has the full state, and the first rank saves it.
    needed = [leads and conditions["the ZeRO stage"] > 0 and conditions[checkpoint.PROCESSES] != world]
    dist.broadcast_object_list(needed)
    if not needed[0]:
        return source
    on_first_rank(lambda: convert(source, target, conditions[checkpoint.PROCESSES], world, timeout_minutes))
    return target


def convert(source: Path, target: Path, before: int, world: int, timeout_minutes: float) -> None:
    """Convert a checkpoint of `before` processes in a subprocess, which ends with this process.

    Raises PipelineError if there is not enough disk space, and as `for_this_world` does.
    """
    shutil.rmtree(target.parent, ignore_errors=True)  # from a killed conversion
    # The optimizer's state is written twice, as fragments and merged; the rest is copied.
    size = _size(source) + sum(file.stat().st_size for file in source.glob("*_optim_states.pt"))
    if (free := shutil.disk_usage(source.parent).free) < size:
        raise PipelineError(
            f"{source} is of {before} processes: converting it for {world} takes {size / 1e9:.1f} GB, and there are "
            f"{free / 1e9:.1f} GB free; make room, or continue on {before} processes"
        )
    logger.info("%s is of %d processes: converting it for %d writes %.1f GB", source, before, world, size / 1e9)
    command = [sys.executable, "-m", __name__, str(source.absolute()), str(target.absolute())]
    with (
        tempfile.TemporaryFile("w+") as output,
        progress_bar(total=size, desc="converting", unit="B", unit_scale=True) as bar,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=output, cwd=ROOT) as process,
    ):
        written, since, is_stalled = 0, time.monotonic(), False
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_POLL)
            if (now := _size(target.parent)) != written:
                bar.update(max(min(now, size) - bar.n, 0))
                written, since = now, time.monotonic()
            elif time.monotonic() - since > 60 * timeout_minutes:
                is_stalled = True
                process.kill()
        if process.returncode:
            output.seek(0)
            lines = output.read().strip().splitlines()
            stalled = f"nothing written for {timeout_minutes:g} minutes"
            reason = stalled if is_stalled else lines[-1] if lines else f"status {process.returncode}"
            raise PipelineError(
                f"{source} could not be converted for {world} processes: {reason}; continue on {before} processes"
            )


def _size(folder: Path) -> int:
    """Return the bytes of all files below a folder; files may disappear meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(parent, name).stat().st_size
    return total


def main() -> None:
    """`python -m pipeline.training.universal SOURCE TARGET`: convert a checkpoint's folder."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # Slurm sends them to all processes; the rank handles them afterwards
    gc.enable()  # pipeline/__init__.py disabled it for the imports
    threading.Thread(target=_end_with_rank, daemon=True).start()
    source, target = map(Path, sys.argv[1:])
    # DeepSpeed interprets paths as patterns, in which a `+` or `[` in a folder's name would have another meaning.
    os.chdir(source.parent)
    arguments = Namespace(
        input_folder=source.name,
        output_folder=str(target.relative_to(source.parent)),
        # No worker pools: they would survive if this process is killed.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # that there is no pipeline or tensor parallelism
    )
    with checkpoint.weights_only(), checkpoint.mapped():
        ds_to_universal.main(arguments)
    sync(target)


def _end_with_rank() -> NoReturn:
    """Exit when standard input ends: the rank that holds its other end has ended, perhaps killed."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    main()
