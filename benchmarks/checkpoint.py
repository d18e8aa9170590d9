"""How long does a checkpoint stop training, when it is written in the background and when it is not?

    python benchmarks/checkpoint.py --work runs/checkpoint [--megabytes 400] [--rounds 5] [--stage 1]

One process trains an MLP in fp32 on the CPU with DeepSpeed and AdamW. It saves in two ways, in turn:

    at once            the step waits until all files are written, synced to disk and named. This is what
                       pipeline/training/saving.py does if there is no memory for a copy
    in the background  a thread copies the states and does the rest while steps continue; the first step's optimizer
                       waits for the copy. The first copy also allocates its memory; later ones use it again

Seconds are medians over the rounds, with their range. `stopped` is how long training waits, in the call that begins the
checkpoint and in the optimizer. `whole after` is the time from the step's end until `latest` names the checkpoint.
`next step` is the step during which the states are copied, with the optimizer's wait, and `a step` is the mean duration
of the steps while the checkpoint is written: the thread shares the cores and the memory's bandwidth with training.
--work is on the disk to be measured. One thread computes; leave at least one more core free.
"""

import argparse
import math
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.distributed import start_distributed
from pipeline.jobs import limits
from pipeline.jobs.program import command_line
from pipeline.training.saving import Saver

LAYERS, ROWS = 8, 16
STATES = {0: 12, 1: 16, 2: 16, 3: 12}  # bytes in a checkpoint for each parameter: in fp32, by ZeRO stage


def an_engine(megabytes: float, stage: int) -> deepspeed.DeepSpeedEngine:
    """Return an engine whose checkpoint has about this size."""
    width = int((megabytes * 1e6 / STATES[stage] / LAYERS) ** 0.5)
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.ReLU())))
    config = {"train_batch_size": ROWS, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)[0]


def step(engine: deepspeed.DeepSpeedEngine) -> float:
    """Take a step and return its seconds."""
    began = time.perf_counter()
    width = engine.module[0].in_features
    engine.backward(engine(torch.ones(ROWS, width)).square().mean())
    engine.step()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Save:
    """stopped: seconds that training waits.  whole: seconds until the checkpoint is whole.
    next, step: seconds of the first step meanwhile, and the mean of all; NaN without one."""

    stopped: float
    whole: float
    next: float
    step: float


class Waits:
    """Measures how long optimizers wait: `begin` before the hooks of savers that are created inside, `end` after."""

    def __init__(self) -> None:
        self.seconds = self._began = 0.0

    def begin(self, *_: object) -> None:
        self._began = time.perf_counter()

    def end(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began


def save(engine: deepspeed.DeepSpeedEngine, saver: Saver, number: int, waits: Waits, *, at_once: bool) -> Save:
    began, waits.seconds = time.perf_counter(), 0.0
    saver.begin(number, {})
    if at_once:
        saver.finish()
    stopped, steps = time.perf_counter() - began, []
    while saver._part and not saver._part.done():
        steps.append(step(engine))
    saver.finish()
    whole = time.perf_counter() - began
    return Save(stopped + waits.seconds, whole, *((steps[0], statistics.fmean(steps)) if steps else (math.nan,) * 2))


def shown(seconds: list[float]) -> str:
    low, high = min(seconds), max(seconds)
    return f"{statistics.median(seconds):.3f} ({low:.3f} to {high:.3f})" if len(seconds) > 1 else f"{low:.3f}"


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for checkpoints; it is deleted")
    parser.add_argument("--megabytes", type=float, default=400, metavar="MB", help="of a checkpoint (400)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="saves of each kind (5)")
    parser.add_argument("--stage", type=int, default=1, choices=STATES, help="ZeRO stage (1)")
    arguments = parser.parse_args()
    start_distributed(timeout_minutes=10)
    engine = an_engine(arguments.megabytes, arguments.stage)
    available = limits.available_memory
    alone = [step(engine) for _ in range(2 + arguments.rounds)][2:]
    rows: dict[str, list[Save]] = {"at once": [], "first in the background": [], "in the background": []}
    at_once, first, later = rows.values()
    waits = Waits()
    register_optimizer_step_pre_hook(waits.begin)
    with Saver(engine, arguments.work, {}, keep=1) as waiting, Saver(engine, arguments.work, {}, keep=1) as beside:
        register_optimizer_step_pre_hook(waits.end)
        for number in range(arguments.rounds + 1):
            limits.available_memory = lambda: 0  # for a copy
            at_once.append(save(engine, waiting, 2 * number + 1, waits, at_once=True))
            limits.available_memory = available
            (later if number else first).append(save(engine, beside, 2 * number + 2, waits, at_once=False))
            alone.append(step(engine))
    size = sum(file.stat().st_size for file in arguments.work.glob("step-*/*"))
    shutil.rmtree(arguments.work)
    title = f"seconds, {size / 1e6:,.0f} MB, ZeRO {arguments.stage}, load {os.getloadavg()[0]:.0f}"
    table = Table("", "stopped", "whole after", "next step", "a step", title=title)
    for name, saves in rows.items():
        figures = [shown([getattr(each, field.name) for each in saves]) for field in fields(Save)]
        table.add_row(name, *figures[: 2 if saves is at_once else 4])
    table.add_row("no checkpoint", "", "", "", shown(alone))
    Console(width=140).print(table)
    medians = [statistics.median(each.stopped for each in saves) for saves in (at_once, later)]
    print(f"in the background training stops for {medians[1] / medians[0]:.1%} of the time")


if __name__ == "__main__":
    main()
