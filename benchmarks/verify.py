"""How long do a checkpoint's checksums take, beside writing and reading its tensors?

    python benchmarks/verify.py --work runs/verify [--gigabytes 2] [--rounds 3]

One process, the functions of pipeline/training/manifest.py, on one file of random numbers:

    save                  torch.save, and the file's checksums beside the flush to the disk
    start, from memory    checksums of a file that the system has in memory, then torch.load
    start, from the disk  checksums of a file that it does not, then torch.load; and torch.load alone

Seconds are medians over the rounds. --work is on the disk to be measured.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.jobs.program import command_line
from pipeline.training import manifest

NAME = "states.pt"


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def forget(file: Path) -> None:
    """Drop a file, which is on the disk, from the system's memory."""
    flush(file)
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one_round(folder: Path, states: torch.Tensor) -> dict[str, float]:
    file, found = folder / NAME, {}
    file.unlink(missing_ok=True)

    def load() -> None:
        torch.load(file, weights_only=True)

    def check() -> None:
        if faults := manifest.faults(folder, written, written.files):
            raise RuntimeError(f"{file} changed: {faults}")

    found["save: torch.save"] = seconds(lambda: torch.save(states, file))
    began = time.perf_counter()
    sums = manifest.sums(folder, [NAME], meanwhile=lambda: flush(file))
    found["save: flush and checksums"] = time.perf_counter() - began
    manifest.write(folder, 1, sums)
    written = manifest.read(folder, 1)
    assert written
    found["start, from memory: checksums"] = seconds(check)
    found["start, from memory: torch.load after it"] = seconds(load)
    forget(file)
    found["start, from the disk: checksums"] = seconds(check)
    found["start, from the disk: torch.load after it"] = seconds(load)
    forget(file)
    found["start, from the disk: torch.load alone"] = seconds(load)
    return found


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="on the disk to be measured")
    parser.add_argument("--gigabytes", type=float, default=2.0, metavar="GB", help="of the file (2)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(3)")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    states = torch.randn(int(arguments.gigabytes * 1e9 / 4), generator=torch.Generator().manual_seed(0))
    rounds = [one_round(arguments.work, states) for _ in range(arguments.rounds)]
    (arguments.work / NAME).unlink()
    table = Table("", "seconds", "GB/s", title=f"{arguments.gigabytes:g} GB, one process")
    for name in rounds[0]:
        median = statistics.median(each[name] for each in rounds)
        table.add_row(name, f"{median:.2f}", f"{arguments.gigabytes / median:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
