"""What a run reports: metrics.jsonl, speed.jsonl, TensorBoard, the progress bar, and each rank's ledger."""

import json
import logging
import os
import re
import signal
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from pipeline.data.batch import Bad, Origin
from pipeline.errors import PipelineError, disk_errors
from pipeline.evaluation.report import Report
from pipeline.jobs import status
from pipeline.progress import progress_bar
from pipeline.storage.atomic import write_file

_PROBE = 64 << 10  # bytes: a disk that takes no more is full
_WHY = {
    signal.SIGUSR1: "(the time limit is near)",
    signal.SIGTERM: "(preempted, requeued or cancelled)",
    signal.SIGINT: "(Ctrl-C)",
}

logger = logging.getLogger(__name__)


def evaluation_file(run: Path, step: int) -> Path:
    """The report of the evaluation after `step` steps."""
    return run / "evaluation" / f"step-{step:08d}.json"


def evaluation_of(run: Path, step: int) -> Report | None:
    """That report, or None if there is none that can be read."""
    try:
        return Report.read(evaluation_file(run, step))
    except PipelineError:
        return None


def check_writable(run: Path) -> None:
    """Raise PipelineError unless the run directory is writable; checked before a model is loaded.

    A missing run directory is created.
    """
    for folder in (run, *(run / name for name in ("checkpoints", "evaluation", "ledger", "tensorboard"))):
        with disk_errors(folder):
            if folder == run:
                folder.mkdir(parents=True, exist_ok=True)
            if folder == run or os.path.lexists(folder):
                write_file(folder / ".probe", bytes(_PROBE))
                (folder / ".probe").unlink(missing_ok=True)  # two starts may write it
    for path in run.glob("*.jsonl"):
        with disk_errors(path):
            path.open("rb+").close()


class StepLog:
    """A file of one JSON object a line, each with its "step"; continued from `start`, later lines are dropped.

    A run killed between two checkpoints takes the steps after the first one again, and logs them again. What is no such
    line is cut with a note, and kept beside the file in NAME.damaged: a log must not keep a run from going on.

    is_one_each: a step has one line; of two, the later holds.
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
        said = []
        if damaged:
            aside = self.path.with_name(self.path.name + ".damaged")
            with aside.open("ab") as file:
                file.writelines(damaged)
            said.append(f"had {sum(map(len, damaged))} damaged bytes, which are now in {aside.name}")
        if missing:
            said.append(f"has no line of {len(missing)} steps, the first of them {missing[0]}")
        if said:
            logger.warning("%s %s", self.path, " and ".join(said))

    def write(self, record: dict) -> None:
        with disk_errors(self.path):
            self.file.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        with disk_errors(self.path):
            os.fsync(self.file.fileno())


def _parsed(content: bytes, is_one_each: bool) -> tuple[list[tuple[int, bytes]], list[bytes]]:
    """A log's steps with their lines, in the order of the steps, and what else is in it."""
    found, damaged = [], []
    for raw in content.splitlines(keepends=True):
        if (step := _step(raw)) is not None and not raw.endswith(b"\r\n"):
            found.append((step, raw))
            continue
        # A whole line may be left between zeros, of a power loss, after a byte-order mark, or after a torn line.
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
    """The step of a log's whole line, None of anything else: a process may have been killed while it wrote."""
    try:
        step = json.loads(line.decode())["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if type(step) is int and step > 0 and line.endswith(b"\n") else None


class Monitor:
    """One rank's view of a run in `folder`, from step `start` of `steps`; what concerns all ranks, rank 0 shows."""

    def __init__(self, folder: Path, rank: int, start: int, steps: int, *, ledger: bool) -> None:
        self.folder, self.steps = folder, steps
        self.logs = []
        self.ledger = None
        if ledger:
            self.ledger = StepLog(folder / "ledger" / f"rank{rank}.jsonl", start)
            self.logs.append(self.ledger)
        self.leads = rank == 0
        if self.leads:
            # metrics.jsonl holds what recipe, seed and world size decide, so that two runs can be compared bit
            # for bit; how fast it went has a file of its own.
            self.metrics = StepLog(folder / "metrics.jsonl", start)
            self.speed = StepLog(folder / "speed.jsonl", start)
            self.bad_samples = StepLog(folder / "bad_samples.jsonl", start, is_one_each=False)
            self.logs += [self.metrics, self.speed, self.bad_samples]
            with disk_errors(folder / "tensorboard"):
                self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1, flush_secs=10)
            self.bar = progress_bar(initial=start, total=steps, desc="training", unit="step")

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.leads:
            self.bar.close()
            self.board.close()

    def consumed(self, step: int, origins: Iterable[Origin]) -> None:
        """Note where the samples came from that this rank consumed in `step`."""
        if self.ledger:
            self.ledger.write({"step": step, "keys": list(map(str, origins))})

    def bad(self, step: int, samples: Iterable[Bad]) -> None:
        """Note, on the first rank, what of a step could not be used."""
        for bad in samples:
            record = {"step": step, "shard": bad.origin.shard, "sample": bad.origin.sample, "key": bad.key}
            self.bad_samples.write(record | {"reason": bad.reason})
            logger.warning("bad sample %s, key %s: %s", bad.origin, bad.key, bad.reason)

    def step(self, metrics: dict, speed: dict, histograms: dict[str, np.ndarray]) -> None:
        """Show a step's figures; a metric that is None has no value in this step."""
        if not self.leads:
            return
        self.metrics.write(metrics)
        self.speed.write({"step": metrics["step"]} | speed)
        with disk_errors(self.folder / "tensorboard"):
            for group, values in (("train", metrics), ("speed", speed)):
                for name, value in values.items():
                    if name != "step" and value is not None:
                        self.board.add_scalar(f"{group}/{name}", value, metrics["step"])
            for name, similarities in histograms.items():
                if len(similarities):
                    self.board.add_histogram(f"similarity/{name}", similarities, metrics["step"])
        status.note(self.folder, "running", step=metrics["step"], steps=self.steps)
        self.bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
        self.bar.update()

    def evaluation(self, step: int, report: Report) -> None:
        """Show and keep an evaluation after `step` steps."""
        with disk_errors(evaluation_file(self.folder, step)):
            report.save(evaluation_file(self.folder, step))
        averages = report.averages()
        for name, value in averages.items():
            self.board.add_scalar(f"evaluation/{name}", value, step)
        for name, result in report.results.items():
            for metric, value in result.metrics.items():
                self.board.add_scalar(f"evaluation_datasets/{name}/{metric}", value, step)
        shown = ", ".join(f"{name} {value:.1%}" for name, value in averages.items())
        logger.info("step %d: score %.1f%%%s%s", step, 100 * report.score, ", " if shown else "", shown)

    def stopped(self, number: int) -> None:
        """Note that a signal ended the run for now, with a checkpoint."""
        if self.leads:
            received = signal.Signals(number)
            reason = f"{received.name} {_WHY[received]}"
            status.note(self.folder, "stopped", reason=reason)
            logger.info("stopped: %s; the same command goes on from here", reason)

    def flush(self) -> None:
        """Bring the logs to the disk, as a checkpoint does with itself: the two must not part in a crash."""
        for log in self.logs:
            log.flush()
