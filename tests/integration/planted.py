"""`python -m pipeline.train` with planted faults: `python planted.py RANK STEP,STEP,... ARGUMENTS`.

The loss of a rank is NaN in some steps. Checkpoints leave a kilobyte of the disk. Alarms are raised after a few steps.
"""

import sys
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.distributed as dist

from pipeline import train
from pipeline.objectives.contrastive import step as step_module
from pipeline.training import alarms


def main() -> None:
    rank, planted = int(sys.argv.pop(1)), {int(step) for step in sys.argv.pop(1).split(",")}
    loss_of, steps = step_module.contrastive_loss, 0

    def loss(*arguments):
        nonlocal steps
        steps += 1
        output = loss_of(*arguments)
        return replace(output, loss=output.loss * torch.nan) if rank == dist.get_rank() and steps in planted else output

    step_module.contrastive_loss = loss
    alarms.shutil = SimpleNamespace(disk_usage=lambda folder: SimpleNamespace(free=1000))
    alarms._WARM_UP, alarms._STEPS = 1, 3
    train.main()


if __name__ == "__main__":
    main()
