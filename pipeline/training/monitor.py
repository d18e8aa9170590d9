"""What a run shows of itself: metrics.jsonl, TensorBoard, the progress bar, and each rank's ledger."""

import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline import status
from pipeline.data.batch import Bad, Origin
from pipeline.errors import printable
from pipeline.evaluation.report import Report
from pipeline.progress import progress_bar

_WHY = {
    signal.SIGUSR1: "(the time limit is near)",
    signal.SIGTERM: "(preempted, requeued or cancelled)",
    signal.SIGINT: "(Ctrl-C)",
}


def evaluation_file(run: Path, step: int) -> Path:
    """The report of the evaluation after `step` steps."""
    return run / "evaluation" / f"step-{step:08d}.json"


class StepLog:
    """A file of one JSON object a line, each with its "step"; continued from `start`, later lines are dropped.

    A run killed between two checkpoints takes the steps after the first one again, and logs them again.
    """

    def __init__(self, path: Path, start: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= start]
        rewritten = path.with_suffix(".unfinished")
        rewritten.write_text("".join(kept))
        rewritten.rename(path)
        self.file = path.open("a", buffering=1)

    def write(self, record: dict) -> None:
        self.file.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        os.fsync(self.file.fileno())


def _lines(path: Path) -> list[str]:
    """The file's whole lines: a process may have been killed while it wrote the last."""
    text = path.read_text() if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


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
            self.bad_samples = StepLog(folder / "bad_samples.jsonl", start)
            self.logs += [self.metrics, self.speed, self.bad_samples]
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
            tqdm.write(printable(f"bad sample {bad.origin}, key {bad.key}: {bad.reason}"), file=sys.stderr)

    def step(self, metrics: dict, speed: dict, histograms: dict[str, np.ndarray]) -> None:
        """Show a step's figures; a metric that is None has no value in this step."""
        if not self.leads:
            return
        self.metrics.write(metrics)
        self.speed.write({"step": metrics["step"]} | speed)
        for group, values in (("train", metrics), ("speed", speed)):
            for name, value in values.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(f"{group}/{name}", value, metrics["step"])
        for name, values in histograms.items():
            if len(values):
                self.board.add_histogram(f"similarity/{name}", values, metrics["step"])
        status.note(self.folder, "running", step=metrics["step"], steps=self.steps)
        self.bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
        self.bar.update()

    def evaluation(self, step: int, report: Report) -> None:
        """Show and keep an evaluation after `step` steps."""
        report.save(evaluation_file(self.folder, step))
        averages = report.averages()
        for name, value in averages.items():
            self.board.add_scalar(f"evaluation/{name}", value, step)
        for name, result in report.results.items():
            for metric, value in result.metrics.items():
                self.board.add_scalar(f"evaluation_datasets/{name}/{metric}", value, step)
        shown = ", ".join(f"{name} {value:.1%}" for name, value in averages.items())
        tqdm.write(f"step {step}: score {report.score:.1%}{', ' if shown else ''}{shown}", file=sys.stderr)

    def stopped(self, number: int) -> None:
        """Note that a signal ended the run for now, with a checkpoint."""
        if self.leads:
            reason = f"{signal.Signals(number).name} {_WHY[number]}"
            status.note(self.folder, "stopped", reason=reason)
            tqdm.write(f"stopped: {reason}; the same command goes on from here", file=sys.stderr)

    def flush(self) -> None:
        """Bring the logs to the disk, as a checkpoint does with itself: the two must not part in a crash."""
        for log in self.logs:
            log.flush()
