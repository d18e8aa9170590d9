"""A run's output: metrics.jsonl, speed.jsonl, TensorBoard, the progress bar, and each rank's ledger."""

import json
import logging
import math
import os
import re
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.config import Recipe
from pipeline.data.batch import Bad, Origin
from pipeline.errors import PipelineError, disk_errors
from pipeline.evaluation.report import Report
from pipeline.jobs import status
from pipeline.phases import place
from pipeline.progress import progress_bar
from pipeline.storage.atomic import write_file
from pipeline.training.dashboard import Dashboard, compared
from pipeline.training.pictures import Row, as_table, drawn
from pipeline.training.scalars import evaluation_scalar, scalar_of
from pipeline.training.trackers import Trackers

_BAD_SAMPLE = "bad sample %s, key %s: %s"
_PROBE = 64 << 10  # bytes: a disk without room for them is full
_WHY = {
    signal.SIGUSR1: "(the time limit is near)",
    signal.SIGTERM: "(preempted, requeued or cancelled)",
    signal.SIGINT: "(Ctrl-C)",
}

logger = logging.getLogger(__name__)


def evaluation_file(run: Path, step: int) -> Path:
    """Return the path of the report of the evaluation after `step` steps."""
    return run / "evaluation" / f"step-{step:08d}.json"


def evaluation_of(run: Path, step: int) -> Report | None:
    """Return the report of the evaluation after `step` steps, or None if it is missing or cannot be read."""
    try:
        return Report.read(evaluation_file(run, step))
    except PipelineError:
        return None


def check_writable(run: Path) -> None:
    """Raise PipelineError unless the run directory, which is created if missing, and its contents are writable."""
    for folder in (
        run,
        *(run / name for name in ("checkpoints", "evaluation", "ledger", "profile", "ranks", "tensorboard")),
    ):
        with disk_errors(folder):
            if folder == run:
                folder.mkdir(parents=True, exist_ok=True)
            if folder == run or os.path.lexists(folder):
                write_file(folder / ".probe", bytes(_PROBE))
                (folder / ".probe").unlink(missing_ok=True)  # two starts may write the same file
    for path in run.glob("*.jsonl"):
        with disk_errors(path):
            path.open("rb+").close()


class StepLog:
    """A file of JSON objects with a "step", one per line. Lines after step `start` are dropped when it is opened.

    A resumed run repeats the steps after its checkpoint and logs them again. Invalid content is
    moved to NAME.damaged with a warning: a damaged log must not stop a run.

    is_one_each: each step has one line; of several, the last is kept.
    """

    def __init__(self, path: Path, start: int, *, is_one_each: bool = True) -> None:
        self.path = path
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            before = path.read_bytes() if path.exists() else b""
            lines, damaged = _parsed(before, is_one_each)
            if path.exists():
                steps = {step for step, _ in lines}
                whole = range(min(steps, default=1), start + 1) if is_one_each else ()
                self._note(damaged, [step for step in whole if step not in steps])
            if (kept := b"".join(line for step, line in lines if step <= start)) != before:
                write_file(path, kept)
            self.file = path.open("a", buffering=1)

    def _note(self, damaged: list[bytes], missing: list[int]) -> None:
        notes = []
        if damaged:
            aside = self.path.with_name(self.path.name + ".damaged")
            with aside.open("ab") as file:
                file.writelines(damaged)
            notes.append(f"had {sum(map(len, damaged))} damaged bytes, which are now in {aside.name}")
        if missing:
            notes.append(f"has no line of {len(missing)} steps, the first of them {missing[0]}")
        if notes:
            logger.warning("%s %s", self.path, " and ".join(notes))

    def write(self, record: dict) -> None:
        with disk_errors(self.path):
            self.file.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        with disk_errors(self.path):
            os.fsync(self.file.fileno())


def _parsed(content: bytes, is_one_each: bool) -> tuple[list[tuple[int, bytes]], list[bytes]]:
    """Return a log's (step, line) pairs, sorted by step, and all other content."""
    found, damaged = [], []
    for raw in content.splitlines(keepends=True):
        if (step := _step(raw)) is not None and not raw.endswith(b"\r\n"):
            found.append((step, raw))
            continue
        # A complete line may be between zeros from a power loss, or follow a byte-order mark or an incomplete line.
        for part in re.split(rb'(?=\{"step": )', raw):
            line = part.strip(b"\0 \t\r\n") + b"\n"
            if (step := _step(line)) is not None:
                found.append((step, line))
            elif part:
                damaged.append(part)
    if is_one_each:
        latest = dict(found)
        damaged += [line for step, line in found if line != latest[step]]
        found = list(latest.items())
    return sorted(found, key=lambda each: each[0]), damaged


def _step(line: bytes) -> int | None:
    """Return the step of a complete line; None for anything else, for example the last line of a killed process."""
    try:
        step = json.loads(line.decode())["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if type(step) is int and step > 0 and line.endswith(b"\n") else None


def shorten_ledgers(run: Path, world: int, step: int) -> None:
    """Truncate the ledgers of ranks that no longer exist after `step`: other ranks repeat the later steps."""
    for path in (run / "ledger").glob("rank*.jsonl"):
        number = path.stem.removeprefix("rank")
        if number.isdecimal() and int(number) >= world:
            StepLog(path, step)


class _Warnings(logging.Handler):
    """Copies the package's warnings to RUN/warnings.jsonl, which keeps those of earlier starts, and to TensorBoard.

    Bad samples have a file of their own. Any thread may log; in a forked process there is no thread that writes.
    """

    def __init__(self, path: Path, board: Dashboard) -> None:
        super().__init__(logging.WARNING)
        self._process = os.getpid()
        with disk_errors(path):
            self._file, self._board = path.open("a", buffering=1), board

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg != _BAD_SAMPLE and os.getpid() == self._process:
            self.write(record.getMessage())

    def write(self, text: str) -> None:
        """Errors are ignored: a warning must not stop a run."""
        step, now = place().step, datetime.now(UTC).isoformat(timespec="seconds")
        with suppress(OSError, ValueError, PipelineError):
            self._file.write(json.dumps({"step": step, "time": now, "text": text}) + "\n")
            self._board.text("warnings", text, step)

    def close(self) -> None:
        self._file.close()
        super().close()


class Monitor:
    """Reports on a run in `folder` from step `start` of `steps`. Rank 0 writes everything but other ranks' ledgers."""

    def __init__(self, folder: Path, rank: int, start: int, steps: int, *, ledger: bool) -> None:
        self.folder, self.start, self.steps = folder, start, steps
        self._describe: Callable[[], None] | None = None
        self.logs = []
        self.ledger = None
        if ledger:
            self.ledger = StepLog(folder / "ledger" / f"rank{rank}.jsonl", start)
            self.logs.append(self.ledger)
        self.leads = rank == 0
        if self.leads:
            # metrics.jsonl holds only values determined by recipe, seed and world size, so that two runs can be
            # compared bit for bit. Speed has its own file.
            self.metrics = StepLog(folder / "metrics.jsonl", start)
            self.speed = StepLog(folder / "speed.jsonl", start)
            self.bad_samples = StepLog(folder / "bad_samples.jsonl", start, is_one_each=False)
            self.logs += [self.metrics, self.speed, self.bad_samples]
            self.board = Dashboard(folder, start)
            self.warnings = _Warnings(folder / "warnings.jsonl", self.board)
            logging.getLogger("pipeline").addHandler(self.warnings)
            self.bar = progress_bar(initial=start, total=steps, desc="training", unit="step")

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.leads:
            if error:
                self.warnings.write(f"the run failed: {error if isinstance(error, PipelineError) else repr(error)}")
            try:
                self.board.end_trackers(failed=error is not None)  # it may warn
            finally:  # also after Ctrl-C
                logging.getLogger("pipeline").removeHandler(self.warnings)
                self.warnings.close()
                self.bar.close()
                self.board.close()

    def describe(self, recipe: Recipe, processes: int, resolved: str) -> None:
        """Show the recipe and the software's versions, and from the first step on the run's row of hyperparameters.

        resolved: the content of recipe.yaml.
        """
        if self.leads:
            self.board.text("recipe", f"```yaml\n{resolved}```", self.start)
            self._describe = partial(self.board.hyperparameters, recipe, processes)
            if recipe.trackers:
                hyperparameters = compared(recipe, processes)
                self.board.track(Trackers(recipe.trackers, self.folder, hyperparameters, recipe.timeout_minutes))

    def consumed(self, step: int, origins: Iterable[Origin]) -> None:
        """Record the origins of the samples that this rank consumed in `step`."""
        if self.ledger:
            self.ledger.write({"step": step, "keys": list(map(str, origins))})

    def bad(self, step: int, samples: Iterable[Bad]) -> None:
        """Record, on the first rank, a step's unusable samples."""
        for bad in samples:
            record = {"step": step, "shard": bad.origin.shard, "sample": bad.origin.sample, "key": bad.key}
            self.bad_samples.write(record | {"reason": bad.reason})
            logger.warning(_BAD_SAMPLE, bad.origin, bad.key, bad.reason)

    def step(self, metrics: dict, speed: dict, histograms: dict[str, np.ndarray]) -> None:
        """Write and show a step's metrics. A metric that is None has no value in this step."""
        if not self.leads:
            return
        # JSON has no NaN.
        self.metrics.write({name: None if _is_infinite(value) else value for name, value in metrics.items()})
        self.speed.write({"step": metrics["step"]} | speed)
        named = [(scalar_of(name, "learning"), value) for name, value in metrics.items()]
        named += [(scalar_of(name, "speed"), value) for name, value in speed.items()]
        self.board.scalars(((each, value) for each, value in named if each and value is not None), metrics["step"])
        self.board.histograms(histograms, metrics["step"])
        if self._describe:
            self._describe()
            self._describe = None
        status.note(self.folder, "running", step=metrics["step"], steps=self.steps)
        self.bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
        self.bar.update()

    def pictures(self, step: int, rows: Sequence[Row]) -> None:
        """Show queries with their targets and hardest negatives."""
        self.board.picture("pictures/hardest_negatives", drawn(rows), step)
        self.board.text("hardest_negatives", as_table(rows), step)

    def evaluation(self, step: int, report: Report) -> None:
        """Save and show the evaluation after `step` steps."""
        with disk_errors(evaluation_file(self.folder, step)):
            report.save(evaluation_file(self.folder, step))
        averages = report.averages()
        self._scores(step, report, "")
        for variant in report.variants[1:]:  # the first is the full vectors
            form = variant.form
            kind = "" if form.kind == "float32" else f"-{form.kind}"
            self._scores(step, report.at(variant), f"@{form.dimensions}{kind}")
        shown = ", ".join(f"{name} {value:.1%}" for name, value in averages.items())
        logger.info("step %d: score %.1f%%%s%s", step, 100 * report.score, ", " if shown else "", shown)

    def _scores(self, step: int, report: Report, suffix: str) -> None:
        values = [(evaluation_scalar(f"evaluation/{name}{suffix}"), value) for name, value in report.averages().items()]
        for name, result in report.results.items():
            for metric, value in result.metrics.items():
                values.append((evaluation_scalar(f"evaluation_datasets/{name}/{metric}{suffix}", metric), value))
        self.board.scalars(values, step)

    def stopped(self, number: int) -> None:
        """Record that a signal stopped the run, which can be resumed."""
        if self.leads:
            received = signal.Signals(number)
            reason = f"{received.name} {_WHY[received]}"
            status.note(self.folder, "stopped", reason=reason)
            logger.info("stopped: %s; the same command continues from here", reason)

    def flush(self) -> None:
        """Sync the logs to disk, so that after a crash they have all steps of the checkpoint written next."""
        for log in self.logs:
            log.flush()


def _is_infinite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
