"""Does bf16 with fp32 master weights train like fp32, at every ZeRO stage?

    python benchmarks/precision.py --work /tmp/precision [--steps 150]

Trains the demo's tiny model (pipeline/recipes/demo.yaml) on two CPU processes with the usual command:

    fp32         at ZeRO 0, 1, 2 and 3
    bf16         at ZeRO 1, 2 and 3 (the pipeline refuses ZeRO 0), from the same weights, rounded
    weights      fp32 from two other draws of initial weights, with the same batches
    seed         fp32 with the two seeds of these draws, which also change the order of the data

Prints the mean loss over windows of steps; the exported model's Precision@1 on the demo's evaluation sets, embedded in
the training precision and in fp32; and the differences between loss curves, each a moving average over 25 steps. The
runs with other weights and seeds show how large differences by chance are. The ledgers of runs that must see the same
batches are compared; a difference is an error.

If it is started again with the same folder and steps, finished runs are not repeated, and an unfinished one resumes
from its last checkpoint.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.errors import PipelineError
from pipeline.evaluation.report import Report
from pipeline.jobs.program import command_line

PROCESSES = 2
WINDOW = 25  # steps
SEEDS = (1, 2)  # in addition to the recipe's seed 0


@dataclass(frozen=True)
class Run:
    """One training run. seed: the seed of the batches and, by default, of the weights.

    weights: the seed of the run whose initial weights are used.
    """

    precision: str
    stage: int
    seed: int = 0
    weights: int | None = None

    @property
    def name(self) -> str:
        chance = f", weights {self.weights}" if self.weights is not None else f", seed {self.seed}" if self.seed else ""
        return f"{self.precision} ZeRO {self.stage}{chance}"

    def folder(self, work: Path) -> Path:
        return work / self.name.replace(",", "").replace(" ", "-")


FP32 = {stage: Run("fp32", stage) for stage in (0, 1, 2, 3)}
BF16 = {stage: Run("bf16", stage) for stage in (1, 2, 3)}
# A run with other weights reads the initial weights of the run with that seed, which must come first.
OTHER_SEEDS = [Run("fp32", 0, seed=seed) for seed in SEEDS]
OTHER_WEIGHTS = [Run("fp32", 0, weights=seed) for seed in SEEDS]
RUNS = (*FP32.values(), *BF16.values(), *OTHER_SEEDS, *OTHER_WEIGHTS)


def train(run: Run, work: Path, data: Path, steps: int) -> None:
    """Train and evaluate, unless that is already done."""
    folder = run.folder(work)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), "-m"]
    if not (folder / "export").is_dir():
        fields = [f"run={folder}", f"data.url={data}/train", "evaluation=null", f"steps={steps}", "ledger=true"]
        fields += [f"precision={run.precision}", f"deepspeed=ds_configs/zero{run.stage}.json", f"seed={run.seed}"]
        if run.weights is not None:
            fields.append(f"model.path={OTHER_SEEDS[SEEDS.index(run.weights)].folder(work)}/init")
        _python(run.name, *torchrun, "pipeline.train", "pipeline/recipes/demo.yaml", *fields)
    for precision in sorted({run.precision, "fp32"}):
        if not ((report := report_of(run, work, precision)) / "report.json").exists():
            options = [f"precision={precision}", f"out={report}"]
            _python(run.name, *torchrun, "pipeline.evaluate", f"{folder}/export", f"{data}/eval", *options)


def report_of(run: Run, work: Path, precision: str) -> Path:
    """Return the folder of the exported model's report, with embedding in this precision."""
    return run.folder(work) / f"evaluation/export-{precision}"


def _python(what: str, *arguments: str) -> None:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    if status := subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment).returncode:
        raise PipelineError(f"{what} ended with status {status}: what it printed says why; start again to go on")


def losses(run: Run, work: Path) -> np.ndarray:
    """Return the losses, (steps,)."""
    lines = (run.folder(work) / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])


def check_batches(runs: Sequence[Run], work: Path) -> None:
    """Raise PipelineError unless all runs used the same samples on the same ranks in the same steps."""
    ledgers = [
        [(run.folder(work) / f"ledger/rank{rank}.jsonl").read_text() for rank in range(PROCESSES)] for run in runs
    ]
    for run, ledger in zip(runs, ledgers, strict=True):
        if ledger != ledgers[0]:
            raise PipelineError(f"{run.name} saw other batches than {runs[0].name}: remove their folders in {work}")


def smoothed(loss: np.ndarray) -> np.ndarray:
    """Return moving averages, (steps,) -> (steps - WINDOW + 1,)."""
    return np.convolve(loss, np.full(WINDOW, 1 / WINDOW), "valid")


def curves_table(runs: Sequence[Run], work: Path, steps: int) -> Table:
    starts = range(0, steps, WINDOW)
    windows = [f"{start + 1}-{min(start + WINDOW, steps)}" for start in starts]
    table = Table(
        "", *windows, "P@1", "in fp32", title="mean loss over steps; Precision@1 of the exported model, percent"
    )
    for run in runs:
        loss = losses(run, work)
        means = [f"{loss[start : start + WINDOW].mean():.3f}" for start in starts]
        reports = [Report.read(report_of(run, work, precision)) for precision in (run.precision, "fp32")]
        table.add_row(run.name, *means, *(f"{100 * report.averages()['overall']:.1f}" for report in reports))
    return table


def differences_table(work: Path) -> Table:
    """Return each comparison's largest difference of smoothed curves, its step, the mean and the last difference."""
    table = Table("", "largest difference", "after step", "mean", "at the end", title="smoothed loss, first - second")
    chance = [FP32[0], *OTHER_WEIGHTS], [FP32[0], *OTHER_SEEDS]
    for pairs in (
        [(BF16[stage], FP32[stage]) for stage in BF16],
        [(FP32[stage], FP32[0]) for stage in BF16],
        *([(b, a) for i, a in enumerate(group) for b in group[i + 1 :]] for group in chance),
    ):
        for first, second in pairs:
            difference = smoothed(losses(first, work)) - smoothed(losses(second, work))
            place = np.abs(difference).argmax()
            figures = [f"{value:+.4f}" for value in (difference[place], difference.mean(), difference[-1])]
            table.add_row(f"{first.name} - {second.name}", figures[0], str(place + WINDOW), *figures[1:])
        table.add_section()
    return table


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for the shards and the runs")
    parser.add_argument("--steps", type=int, default=150, metavar="N", help="of each run (150)")
    arguments = parser.parse_args()
    if arguments.steps < WINDOW:
        raise PipelineError(f"--steps={arguments.steps} is less than a window of {WINDOW}")
    data, work = arguments.work.resolve() / "data", arguments.work.resolve() / f"{arguments.steps}-steps"
    if not data.is_dir():
        shutil.rmtree(unfinished := data.with_name("data.unfinished"), ignore_errors=True)
        _python("generating the demo data", "tools/make_shards.py", "demo", "0", str(unfinished))
        unfinished.rename(data)
    for number, run in enumerate(RUNS, 1):
        print(f"{run.name}, {number} of {len(RUNS)} runs", flush=True)
        train(run, work, data, arguments.steps)
    check_batches([*FP32.values(), *BF16.values(), *OTHER_WEIGHTS], work)
    Console(width=140).print(curves_table(RUNS, work, arguments.steps), differences_table(work))


if __name__ == "__main__":
    main()
