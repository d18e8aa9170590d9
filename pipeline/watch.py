"""Watch a run in a terminal, from its files: `python -m pipeline.watch RUN`, on any machine that sees the folder.

python -m pipeline.watch runs/demo
ssh you@login.cluster 'cd CHECKOUT && .venv/bin/python -m pipeline.watch runs/llave-7b --once'
"""

import argparse
import json
import math
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.errors import PipelineError, printable
from pipeline.jobs.program import command_line
from pipeline.jobs.status import State, Status

_SECONDS = 2.0  # between looks at the files
_TAIL = 1 << 20  # bytes of a log that are read
_STEPS = 50  # whose mean is the rate
_WARNINGS = 5
_STILL = 60.0  # seconds at least without a step, after which the ranks' notes are shown
_BARS = "▁▂▃▄▅▆▇█"
_COLOURS = {State.RUNNING: "green", State.FINISHED: "green", State.FAILED: "red", State.REFUSED: "red"}


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the last objects of a file of JSON lines; none if it cannot be read. An incomplete line is left out."""
    found = []
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(path.stat().st_size - _TAIL, 0))
        for line in file.read().splitlines():
            with suppress(ValueError):
                if isinstance(parsed := json.loads(line), dict):
                    found.append(parsed)
    return found


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Return values as `width` bars at most, each the mean of equally many; those that are missing have none."""
    finite = [float(value) for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return ""
    size = math.ceil(len(finite) / width)
    parts = [finite[start : start + size] for start in range(0, len(finite), size)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def view(run: Path, width: int, now: datetime) -> Group:
    """Return what there is to see of a run."""
    status = Status.read(run)
    metrics, speed = lines(run / "metrics.jsonl"), lines(run / "speed.jsonl")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()

    def add(name: str, content: str | Text) -> None:
        table.add_row(name, content if isinstance(content, Text) else Text(printable(content)))

    add("run", str(run))
    add("state", Text(status.state, style=_COLOURS.get(status.state, "yellow")))
    if status.reason:
        add("reason", status.reason)
    add("step", _progress(status, speed))
    for name, title in (("loss", "loss"), ("precision", "Precision@1")):
        values = [line.get(name) for line in metrics]
        if bars := sparkline(values, max(width - 30, 10)):
            last = next(value for value in reversed(values) if value is not None)
            add(title, f"{bars}  {last:.4g}" if name == "loss" else f"{bars}  {last:.1%}")
    if speed and metrics:
        add("learning", _shown(metrics[-1], {"lr": "{:.3g}", "grad_norm": "{:.3g}", "overlap": "{:.0%}"}))
        add("speed", _speed(speed))
    if checkpoints := sorted((run / "checkpoints").glob("step-*")):
        add("checkpoint", checkpoints[-1].name)
    for path in sorted((run / "evaluation").glob("step-*.json"))[-1:]:
        add("evaluation", _score(path))
    if (still := _still(status, speed, now)) and status.state == State.RUNNING:
        add("stuck?", Text(f"no step for {still:.0f} s. {_ranks(run, status)}", style="red"))
    for line in lines(run / "warnings.jsonl")[-_WARNINGS:]:
        add("warning", Text(printable(f"{line.get('time', '')[:19]} {line.get('text', '')}"), style="yellow"))
    return Group(table)


def _progress(status: Status, speed: Sequence[dict[str, Any]]) -> str:
    shown = f"{status.step:,}"
    if not status.steps:
        return shown
    shown += f" of {status.steps:,} ({status.step / status.steps:.0%})"
    if not speed or status.state != State.RUNNING:
        return shown
    # What lies between the steps counts, too.
    between = ("seconds", "seconds/checkpoint", "seconds/evaluation")
    seconds = [sum(line.get(name, 0.0) for name in between) for line in speed[-_STEPS:]]
    mean = sum(seconds) / len(seconds)
    left = timedelta(seconds=round(mean * (status.steps - status.step)))
    return f"{shown}, {mean:.3g} s a step, {left} left"


def _speed(speed: Sequence[dict[str, Any]]) -> str:
    last = speed[-_STEPS:]
    names = ("samples_per_second", "tokens_per_second", "waiting_for_data", "seconds", "mfu", "peak_memory")
    means = {name: sum(line.get(name, 0.0) for line in last) / len(last) for name in names if name in last[-1]}
    means["waiting"] = means.pop("waiting_for_data", 0.0) / max(means.pop("seconds", 0.0), 1e-9)
    forms = {"samples_per_second": "{:,.1f}", "tokens_per_second": "{:,.0f}", "mfu": "{:.1%}", "waiting": "{:.0%}"}
    return _shown(means, forms | {"peak_memory": "{:.0%}"})


def _shown(values: dict[str, Any], forms: dict[str, str]) -> str:
    given = {name: values.get(name) for name in forms}
    return "  ".join(
        f"{name.replace('_per_second', '/s').replace('_', ' ')} {forms[name].format(value)}"
        for name, value in given.items()
        if value is not None
    )


def _score(path: Path) -> str:
    from pipeline.evaluation.report import Report  # it imports torch, which takes seconds

    try:
        return f"{Report.read(path).score:.1%} after step {int(path.stem.removeprefix('step-')):,}"
    except PipelineError as error:
        return str(error)


def _still(status: Status, speed: Sequence[dict[str, Any]], now: datetime) -> float:
    """Return for how many seconds there was no step, if that is long; else 0."""
    if not status.time:
        return 0.0
    still = (now - datetime.fromisoformat(status.time)).total_seconds()
    usual = max((line.get("seconds", 0.0) for line in speed[-_STEPS:]), default=0.0)
    return still if still > max(_STILL, 10 * usual) else 0.0


def _ranks(run: Path, status: Status) -> str:
    """Say which ranks the others wait for, by their notes."""
    from pipeline.training.watchdog import FOLDER, Watchdog

    # Notes of ranks may be left from a start with more of them; the recipe's first line names this start's number.
    recipe = run / "recipe.yaml"
    named = re.match(r"# (\d+) processes;", recipe.read_text()) if recipe.is_file() else None
    world = int(named[1]) if named else len(list((run / FOLDER).glob("rank*.json")))
    return Watchdog(run, 0, world, 60, start=status.launch).report()


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--once", action="store_true", help="print it once and exit")
    arguments = parser.parse_args()
    if not (arguments.run / "status.json").exists():
        raise PipelineError(f"{arguments.run} is no run directory: it has no status.json")
    console = Console(highlight=False)

    def look() -> Group:
        return view(arguments.run, console.width, datetime.now(UTC))

    if arguments.once:
        console.print(look())
        return
    with Live(look(), console=console, screen=False, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            time.sleep(_SECONDS)
            live.update(look(), refresh=True)


if __name__ == "__main__":
    main()
