"""Disturb small runs at random, and find silent errors, hangs and lost data.

    python tests/chaos/run.py --minutes 30 --seed 7
    python tests/chaos/run.py --seed 7 --only 123      # repeat one trial

Small runs of train, evaluate, embed and make_shards read from a real S3 server behind a proxy. Each trial injects
faults that its number and the seed determine: signals to ranks, data workers, the launcher and the server; broken,
refused, stalled and damaged responses; full and read-only disks; damaged checkpoints, logs, indexes, sidecars, shards
and models; two starts in one directory. Then the same command runs again. Violations are a hang, a traceback, a failure
without a message, a leftover process, and a result that differs from the undisturbed run's.

Each violation is printed with the command that repeats its trial. The exit status is 1 if there was one.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/integration")]

import psutil
from rich.console import Console
from rich.table import Table
from sorts import SORTS, Trial, can_mount, disk, remove
from world import Violation, a_world

from pipeline.progress import progress_bar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no trial after so long (default: no limit)")
    parser.add_argument("--trials", type=int, metavar="N", help="so many trials (default: until --minutes)")
    parser.add_argument("--faults", type=int, metavar="N", help="until so many faults were injected")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all that is drawn (0)")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="only the trials with these numbers")
    parser.add_argument(
        "--sort", metavar="NAME", help=f"only trials of one sort: {', '.join(s.__name__ for s in SORTS)}"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="where everything lies meanwhile (the system's own)")
    arguments = parser.parse_args()
    if not (arguments.minutes or arguments.trials or arguments.faults or arguments.only):
        parser.error("say how long: --minutes, --trials, --faults or --only")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=arguments.work) as folder:
        sys.exit(1 if chaos(arguments, Path(folder)) else 0)


def chaos(arguments: argparse.Namespace, folder: Path) -> int:
    """Run the trials; return the number of violations."""
    weights = {sort: weight for sort, weight in SORTS.items() if arguments.sort in (None, sort.__name__)}
    if not can_mount():
        print("no disk can be mounted here: trials of disks are left out")
        weights.pop(disk, None)
    more = [sort for sort, weight in weights.items() for _ in range(weight - 1)]
    random.Random(0).shuffle(more)
    sorts = [*weights, *more]
    trials, faults, violated = Counter(), Counter(), Counter()
    injected: Counter[str] = Counter()
    began = time.monotonic()
    with a_world(folder) as world:
        numbers = arguments.only or (range(arguments.trials) if arguments.trials else count())
        bar = progress_bar(desc="trials", unit="trial", total=len(numbers) if hasattr(numbers, "__len__") else None)
        for number in numbers:
            if arguments.minutes and time.monotonic() - began > 60 * arguments.minutes:
                break
            if arguments.faults and faults.total() >= arguments.faults:
                break
            sort = sorts[number % len(sorts)]
            trial = Trial(world, random.Random(f"{arguments.seed} {number}"), folder / f"trial-{number}")
            trial.folder.mkdir()
            try:
                sort(trial)
            except Exception as error:
                violated[sort.__name__] += 1
                what = str(error) if isinstance(error, Violation) else repr(error)
                only = f" --sort {arguments.sort}" if arguments.sort else ""
                again = f"python tests/chaos/run.py --seed {arguments.seed} --only {number}{only}"
                bar.write(f"VIOLATION {sort.__name__}, {', '.join(trial.faults)}: {what}\nagain: {again}\n")
                _end_children()
            trials[sort.__name__] += 1
            faults[sort.__name__] += trial.faults.total()
            injected += trial.faults
            bar.set_postfix_str(f"{faults.total()} faults, {violated.total()} violations")
            bar.update()
            remove(trial.folder)
        bar.close()
    _print(trials, faults, violated, injected, time.monotonic() - began)
    return violated.total()


def _end_children() -> None:
    """Kill processes that a violated trial left; they are children of the fork server."""
    for server in psutil.Process().children():
        for child in server.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()


def _print(trials: Counter, faults: Counter, violated: Counter, injected: Counter, seconds: float) -> None:
    console = Console(width=110)
    by_fault = Table("fault", "times", title="faults injected")
    for fault, times in injected.most_common(60):
        by_fault.add_row(fault, str(times))
    console.print(by_fault)
    table = Table("sort", "trials", "faults", "violations", title=f"chaos, {seconds / 60:.1f} minutes")
    for name in trials:
        table.add_row(name, str(trials[name]), str(faults[name]), str(violated[name]))
    table.add_section()
    table.add_row("all", str(trials.total()), str(faults.total()), str(violated.total()))
    console.print(table)


if __name__ == "__main__":
    main()
