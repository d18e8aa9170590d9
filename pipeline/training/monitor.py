"""What a run shows of itself: metrics.jsonl, TensorBoard, the progress bar, and each rank's ledger."""

import json
import sys
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


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


def _lines(path: Path) -> list[str]:
    """The file's whole lines: a process may have been killed while it wrote the last."""
    text = path.read_text() if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


class Monitor:
    """The first rank's view of a run, from step `start` of `steps`."""

    def __init__(self, run: Path, start: int, steps: int) -> None:
        # metrics.jsonl holds what the recipe, seed and world size decide, so two runs can be compared bit
        # for bit; how fast it went has a file of its own.
        self.metrics = StepLog(run / "metrics.jsonl", start)
        self.speed = StepLog(run / "speed.jsonl", start)
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        # In a log file a bar that redraws itself ten times a second would be all there is to read.
        pace = 0.1 if sys.stderr.isatty() else 10
        self.bar = tqdm(initial=start, total=steps, desc="training", unit="step", mininterval=pace, ncols=100)

    def step(self, metrics: dict, speed: dict, histograms: dict[str, np.ndarray]) -> None:
        self.metrics.write(metrics)
        self.speed.write({"step": metrics["step"]} | speed)
        for group, values in (("train", metrics), ("speed", speed)):
            for name, value in values.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(f"{group}/{name}", value, metrics["step"])
        for name, values in histograms.items():
            if len(values):
                self.board.add_histogram(f"similarity/{name}", values, metrics["step"])
        self.bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
        self.bar.update()

    def evaluation(self, step: int, averages: dict[str, float], datasets: dict[str, float]) -> None:
        """Precision@1 by meta-task and by dataset, after `step` steps."""
        for group, values in (("evaluation", averages), ("evaluation_datasets", datasets)):
            for name, value in values.items():
                self.board.add_scalar(f"{group}/{name}", value, step)
        self.board.flush()

    def close(self) -> None:
        self.bar.close()
        self.board.close()
