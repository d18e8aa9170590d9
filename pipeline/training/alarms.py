"""What is wrong with a run, by its curves: sentences that say what to look at. They change nothing."""

import shutil
import statistics
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_STEPS = 20  # whose medians are compared
_WARM_UP = 10  # first steps of a start, which compile, allocate and fill caches
_PAUSE = 100  # steps before the same alarm is raised again
_SLOWER = 0.5  # of the best throughput: other programs on a shared machine cost less
_WAITING = 0.3  # of a step, for data
_UNEVEN = 0.3  # of a step, by which the slowest rank is slower than the mean
_RETRIES = 2.0  # repeated requests per step
_SPIKE = 10.0  # standard deviations of the loss, by the median absolute deviation, whose factor is for a normal one
_MAD = 1.4826
_QUERIES = 200  # of a dataset in a block, whose precision has a standard error of at most 3.6 %
_BLOCKS = 3
_FALLEN = 0.15  # of in-batch precision


class Alarms:
    """Reads the lines of metrics.jsonl and speed.jsonl of one start, step by step, on the first rank."""

    def __init__(self, global_batch: int) -> None:
        self._batch, self._count = global_batch, 0
        self._losses: deque[float] = deque(maxlen=2 * _STEPS)
        self._speeds: deque[Mapping[str, float]] = deque(maxlen=_STEPS)
        self._best: dict[str, float] = {}
        self._datasets: dict[str, _Precision] = {}
        self._raised: dict[str, int] = {}

    def of_step(self, metrics: Mapping[str, Any], speed: Mapping[str, float]) -> list[str]:
        """Return the alarms of a step, each once in a hundred steps."""
        self._count += 1
        found = self._of_loss(metrics["loss"]) | self._of_datasets(metrics)
        if self._count > _WARM_UP:
            self._speeds.append(speed)
            if len(self._speeds) == _STEPS:
                found |= self._of_speed()
        new = [name for name in found if self._count - self._raised.get(name, -_PAUSE) >= _PAUSE]
        self._raised |= dict.fromkeys(new, self._count)
        return [f"step {metrics['step']}: {found[name]}" for name in new]

    def _of_loss(self, loss: float) -> dict[str, str]:
        if not np.isfinite(loss):
            return {}  # the run skips the step, and says so
        before = np.array(self._losses)
        self._losses.append(loss)
        if len(before) < _STEPS:
            return {}
        median = float(np.median(before))
        deviation = _MAD * float(np.median(np.abs(before - median)))
        if loss <= median + max(_SPIKE * deviation, 0.5 * abs(median)):
            return {}
        return {
            "loss": f"loss {loss:.3g} after a median of {median:.3g}: look at learning/grad_norm and the pictures of "
            "the next steps; if it stays high, start again from an earlier checkpoint with a lower optimizer.lr"
        }

    def _of_datasets(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        names = [name for name in metrics if name.startswith("precision/")] or ["precision"]
        found = {}
        for name in names:
            if (precision := metrics.get(name)) is None:
                continue
            dataset = name.partition("/")[2]
            share = metrics.get(f"share/{dataset}", 1.0)
            state = self._datasets.setdefault(name, _Precision())
            if fallen := state.fallen(precision, share * self._batch):
                which = f"dataset {dataset}" if dataset else "the model"
                found[name] = (
                    f"{which} stops learning: its in-batch Precision@1 fell from {fallen[0]:.0%} to {fallen[1]:.0%}; "
                    f"look at learning/precision_at_1{'/' * bool(dataset)}{dataset}, and at its samples in the pictures"
                )
        return found

    def _of_speed(self) -> dict[str, str]:
        now, found = _medians(self._speeds), {}
        seconds, waiting = now["seconds"], now["waiting_for_data"]
        retries = float(np.mean([each["read_retries"] for each in self._speeds]))
        slow_data = waiting > _WAITING * seconds
        if slow_data:
            found["data"] = (
                f"the source of the data is slow: a rank waits {waiting / seconds:.0%} of a step for data, at "
                f"{now['read_mb_per_second']:.1f} MB/s and {retries:.1f} repeated requests per step; raise "
                "data.workers up to the node's cores, or look at the object store and the network"
            )
        if retries > _RETRIES:
            found["retries"] = (
                f"{retries:.1f} requests per step to the object store are repeated: is it overloaded? Its errors are "
                "in data/read_retries"
            )
        rank, times = Counter(each["slowest_rank"] for each in self._speeds).most_common(1)[0]
        uneven = times > 0.8 * _STEPS and now["slowest_rank_seconds"] > _UNEVEN * seconds
        if uneven and not slow_data:
            found["rank"] = (
                f"rank {rank:.0f} is slower than the others by {now['slowest_rank_seconds']:.2g} s in a step of "
                f"{seconds:.2g} s: look at its node (clock, temperature, other processes)"
            )
        if now["tokens_per_second"] > self._best.get("tokens_per_second", 0.0):
            self._best = now
        if now["tokens_per_second"] < _SLOWER * self._best["tokens_per_second"]:
            phases = [name for name in now if name.startswith("seconds/")]
            grown = max(phases, key=lambda name: now[name] - self._best.get(name, 0.0), default="seconds")
            found["throughput"] = (
                f"throughput fell from {self._best['tokens_per_second']:,.0f} to {now['tokens_per_second']:,.0f} "
                f"tokens/s; {grown.partition('/')[2] or grown} grew most, from {self._best.get(grown, 0.0):.2g} to "
                f"{now[grown]:.2g} s a step: look at speed/seconds, speed/slowest_rank, and other programs on the nodes"
            )
        return found


@dataclass
class _Precision:
    """A dataset's in-batch precision in blocks of at least `_QUERIES` queries.

    right, count: of the current block.  best: of the means of `_BLOCKS` blocks.
    """

    right: float = 0.0
    count: float = 0.0
    blocks: deque[float] = field(default_factory=lambda: deque(maxlen=_BLOCKS))
    best: float = 0.0

    def fallen(self, precision: float, count: float) -> tuple[float, float] | None:
        """Add a step's; return the best mean and the present one if that is much lower."""
        self.right, self.count = self.right + precision * count, self.count + count
        if self.count < _QUERIES:
            return None
        self.blocks.append(self.right / self.count)
        self.right = self.count = 0.0
        mean = float(np.mean(self.blocks))
        if len(self.blocks) < _BLOCKS:
            return None
        self.best = max(self.best, mean)
        return (self.best, mean) if mean < self.best - _FALLEN else None


def _medians(speeds: "deque[Mapping[str, float]]") -> dict[str, float]:
    """Return the median of each value over the steps; one that a step lacks, as a phase, is 0 there."""
    names = dict.fromkeys(name for each in speeds for name in each)
    # NumPy's median is slow for so few values.
    return {name: statistics.median(each.get(name, 0.0) for each in speeds) for name in names}


def nearly_full(folder: Path, size: int) -> str:
    """Return an alarm if the disk of `folder` has no room for another checkpoint of `size` bytes; else ""."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # saving reports what matters
        return ""
    if free >= size:
        return ""
    return (
        f"the disk of {folder} has {free / 1e9:.3g} GB left, and a checkpoint takes {size / 1e9:.3g} GB: there is no "
        "room for another one; remove files, or lower checkpoint.keep"
    )
