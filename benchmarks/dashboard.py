"""What does the dashboard cost? One run, by turns with it and without.

    python benchmarks/dashboard.py --work runs/dashboard-cost [--blocks 60]

One process trains the demo's recipe (pipeline/recipes/demo.yaml) on 640 generated pairs in a folder. A block is an
epoch of ten steps, so all blocks have the same pairs. Without the dashboard, a step computes its loss and no other
metric, and writes it with its time to metrics.jsonl and speed.jsonl. With it, a step does what every run does:
statistics of similarities and weights, gradient norms of parts, times and counts of all ranks, warnings, and
TensorBoard, with histograms in every tenth step. Blocks are in the order without, with, with, without. The first two
and the last one are not counted.

    whole steps        the difference between neighbouring blocks: its median, and the middle half. Seconds of the
                       process's CPU time, with TensorBoard's thread; and of time, which other programs lengthen
    part by part       CPU time inside the functions that only the dashboard calls, and of TensorBoard's thread
    pictures           are not in the blocks: the last step's are drawn and written several times
    offload            the optimizer has its gradients in the host's memory, and their norms by part read them once
                       more: CPU time for --offloaded numbers, beside that of DeepSpeed's CPU Adam

The share of a step is the sum of the parts, with pictures in every 200th step. Most of it does not depend on the
model, so that its share of a longer step is smaller: the last line says what it would be of a step of ten seconds.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.config import load_recipe
from pipeline.convert.demo import TrainingPairs
from pipeline.convert.sharding import convert
from pipeline.data.batch import Batch
from pipeline.errors import PipelineError
from pipeline.evaluation.report import Similarities
from pipeline.jobs import status
from pipeline.jobs.program import command_line
from pipeline.objectives.contrastive import passes
from pipeline.objectives.contrastive.matrix import Matrix
from pipeline.objectives.contrastive.step import ContrastiveResult
from pipeline.phases import take_seconds
from pipeline.training import pictures
from pipeline.training.alarms import Alarms
from pipeline.training.dashboard import Dashboard
from pipeline.training.part_norms import PartNorms
from pipeline.training.preemption import Preemption
from pipeline.training.speed import Speed
from pipeline.training.step_report import StepReport
from pipeline.training.trainer import Trainer

DATASETS, PAIRS = ("Scene-CLS", "Scene-VQA", "Scene-T2I", "Scene-I2T", "Scene-Ground"), 128
BLOCK = 10  # steps of an epoch: the datasets' pairs are ten batches
PICTURES, PICTURES_EVERY = 5, 200
LONG_STEP = 10.0  # seconds

# Functions of the step that only the dashboard needs, and what stands for them without it.
IN_THE_STEP: list[tuple[str, Any, str, Callable[..., Any]]] = [
    ("gradient norms of parts", PartNorms, "_add", lambda *_: None),
    ("similarities and weights of negatives", Matrix, "of_negatives", lambda matrix, tile, largest, *_: (largest,) * 2),
    ("similarities and weights of negatives", passes, "effective_number", lambda weights, total: total),
    ("similarities and weights of negatives", passes, "hardest_share", lambda weights, total, count: total),
]
# Functions of the report, which as a whole has none without it.
IN_THE_REPORT: list[tuple[str, Any, str]] = [
    ("metrics of the batch", ContrastiveResult, "metrics"),
    ("overlap", Similarities, "of"),
    ("times and counts of all ranks", Speed, "of_step"),
    ("TensorBoard: scalars", Dashboard, "scalars"),
    ("TensorBoard: histograms", Dashboard, "histograms"),
    ("warnings", Alarms, "of_step"),
]
THREAD = "TensorBoard's thread"
REST = "the rest of the report: lines of JSON, the norms' shares"


class Clock:
    """CPU seconds by part of the dashboard, with it and without.  shown: whether it is on."""

    def __init__(self) -> None:
        self.shown = False
        self.seconds: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}

    def timed(self, part: str, function: Callable[..., Any], instead: Callable[..., Any] | None = None) -> Any:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.thread_time()
            found = (function if self.shown or not instead else instead)(*arguments, **options)
            self.seconds[self.shown][part] += time.thread_time() - began
            return found

        return call

    def install(self) -> None:
        for part, owner, name, instead in IN_THE_STEP:
            setattr(owner, name, self.timed(part, getattr(owner, name), instead))
        for part, owner, name in IN_THE_REPORT:
            setattr(owner, name, self.timed(part, getattr(owner, name)))
        StepReport.of_step = self.timed("report", StepReport.of_step, without)  # type: ignore[method-assign]


def without(
    report: StepReport, done: int, batch: Batch, result: ContrastiveResult, *_: object, began: float, **__: object
) -> None:
    """Stand for `StepReport.of_step`: write the step's loss and time."""
    monitor, loss = report._monitor, float(result.loss.loss.detach())
    if not math.isfinite(loss):
        raise PipelineError(f"step {done}: loss {loss}")
    take_seconds()
    monitor.metrics.write({"step": done, "loss": loss})
    monitor.speed.write({"step": done, "seconds": time.perf_counter() - began})
    status.note(monitor.folder, "running", step=done, steps=monitor.steps)
    monitor.bar.update()


def has_dashboard(block: int) -> bool:
    return block % 4 in (1, 2)


@dataclass(frozen=True)
class Mark:
    """The end of a block.  cpu: CPU time of the process.  time: seconds.  thread: CPU time of TensorBoard's thread.
    parts: CPU time by part, with the dashboard and without."""

    cpu: float
    time: float
    thread: float
    parts: dict[bool, Counter[str]]


class Measured(Trainer):
    """A run that marks its blocks' ends.

    pictures: for each time that the last step's are drawn, CPU time of this thread and of TensorBoard's.
    """

    def __init__(self, clock: Clock, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.clock = clock
        self.marks: list[Mark] = []
        self.pictures: list[tuple[float, float]] = []

    def _restore(self) -> int:
        done = super()._restore()
        of_step, writer = self.report.of_step, self.monitor.board._board._get_file_writer().event_writer
        clock, thread = self.clock, time.pthread_getcpuclockid(writer._async_writer._worker.ident)

        def noting(done: int, batch: Batch, result: ContrastiveResult, *rest: Any, **options: Any) -> None:
            of_step(done, batch, result, *rest, **options)
            if done % BLOCK == 0:
                times = time.process_time(), time.perf_counter(), time.clock_gettime(thread)
                self.marks.append(Mark(*times, {shown: each.copy() for shown, each in clock.seconds.items()}))
                clock.shown = has_dashboard(done // BLOCK)
            for _ in range(PICTURES if done == self.steps else 0):
                writer.flush()
                began, idle = time.thread_time(), time.clock_gettime(thread)
                self.monitor.pictures(done, pictures.hardest(batch, result.embeddings, self.processor.shown))
                ended = time.thread_time()
                writer.flush()
                self.pictures.append((ended - began, time.clock_gettime(thread) - idle))

        self.report.of_step = noting  # type: ignore[method-assign]
        return done


def trained(work: Path, steps: int) -> Measured:
    """Train a run of so many steps; return it."""
    data = {str(work / "data" / name): TrainingPairs(name, number, PAIRS) for number, name in enumerate(DATASETS)}
    convert(data, options={}, shard_bytes=1 << 20)
    fields = [f"run={work / 'run'}", f"data.url={work / 'data'}", "evaluation=null", f"steps={steps}"]
    fields += [f"checkpoint.every={steps}", f"pictures_every={steps}"]
    recipe, clock = load_recipe("demo.yaml", fields), Clock()
    Path(recipe.run).mkdir()
    status.begin(Path(recipe.run))
    clock.install()
    trainer = Measured(clock, recipe, Preemption())
    trainer.check(resumes=False)
    trainer.build()
    trainer.train()
    return trainer


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def compared(run: Measured, count: int) -> tuple[Table, float]:
    """Compare blocks 2 to `count` - 1. Return a table, and the median CPU time of a step without the dashboard."""
    table, medians = Table("a step", "without, s", "with, s", "difference, ms", "difference, %"), []
    for title, name in (("CPU time", "cpu"), ("time", "time")):
        off, on = (
            [
                (getattr(run.marks[number], name) - getattr(run.marks[number - 1], name)) / BLOCK
                for number in range(2, count)
                if has_dashboard(number) == way
            ]
            for way in (False, True)
        )
        differences = [1e3 * (y - x) for x, y in zip(off, on, strict=True)]  # of neighbours
        shares = [100 * (y / x - 1) for x, y in zip(off, on, strict=True)]
        table.add_row(title, *map(spread, (off, on, differences, shares)))
        medians.append(statistics.median(off))
    return table, medians[0]


def parts_of(run: Measured, count: int) -> dict[str, float]:
    """Return the dashboard's CPU time in a step, by part, in the same blocks."""
    first, last = run.marks[1], run.marks[count - 1]
    steps = BLOCK * (count - 2) // 2  # with it, and as many without
    on, off = (
        Counter({part: last.parts[way][part] - first.parts[way][part] for part in last.parts[way]})
        for way in (True, False)
    )
    found = {part: (on[part] - off[part]) / steps for part in on}
    found[REST] = found.pop("report") - sum(found[part] for part, *_ in IN_THE_REPORT)
    threads = [run.marks[number].thread - run.marks[number - 1].thread for number in range(2, count)]
    found[THREAD] = sum(x if has_dashboard(number) else -x for number, x in enumerate(threads, 2)) / steps
    each = sum(statistics.median(column) for column in zip(*run.pictures, strict=True))
    return found | {f"pictures, {1e3 * each:.0f} ms in every {PICTURES_EVERY}th step": each / PICTURES_EVERY}


def of_offload(count: int) -> tuple[float, float]:
    """Return the CPU time of the norms of `count` gradients, and of an optimizer step with them; medians of five."""
    weights = torch.zeros(count, requires_grad=True)
    weights.grad = torch.ones(count)
    optimizer = DeepSpeedCPUAdam([{"params": [weights], "part": "all"}])
    norms, times = PartNorms(optimizer, ["all"]), []
    optimizer.register_step_pre_hook(lambda *_: times.append(time.process_time()))  # after that of the norms
    for _ in range(6):  # the first allocates
        times.append(time.process_time())
        optimizer.step()
        times.append(time.process_time())
    assert norms.take()["all"] > 0
    begins, middles, ends = (times[n + 3 :: 3] for n in range(3))
    return tuple(
        statistics.median(after - before for before, after in zip(*each, strict=True))
        for each in ((begins, middles), (middles, ends))
    )


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="a new folder for data and run")
    parser.add_argument("--blocks", type=int, default=60, metavar="N", help="of ten steps; at least 8 (60)")
    parser.add_argument("--offloaded", type=int, default=50_000_000, metavar="N", help="gradients (50,000,000)")
    arguments = parser.parse_args()
    if arguments.work.exists() or arguments.blocks < 8:
        raise PipelineError("--work must name a new folder, and --blocks be at least 8")
    arguments.work.mkdir(parents=True)
    count = 4 * (arguments.blocks // 4) + 2
    norms, adam = (1e9 * seconds / arguments.offloaded for seconds in of_offload(arguments.offloaded))
    run = trained(arguments.work.resolve(), BLOCK * (count + 1))
    whole_steps, step = compared(run, count)
    found = parts_of(run, count)
    whole = sum(found.values())
    by_part = Table("part by part, CPU time", "ms a step", "% of a step")
    for part, seconds in [*sorted(found.items(), key=lambda item: -item[1]), ("all", whole)]:
        by_part.add_row(part, f"{1e3 * seconds:.3f}", f"{100 * seconds / step:.3f}")
    Console(width=140).print(whole_steps, by_part)
    print(f"offload: the norms take {norms:.3f} ns a gradient, CPU Adam {adam:.3f} ns")
    print(f"{1e3 * whole:.2f} ms: {whole / step:.2%} of this step, {whole / LONG_STEP:.3%} of one of {LONG_STEP:g} s")


if __name__ == "__main__":
    main()
