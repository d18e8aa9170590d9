"""`python -m pipeline.train` with a NaN loss in some steps: `python planted_nan.py STEP,STEP,... ARGUMENTS`."""

import sys
from dataclasses import replace

import torch

from pipeline import train
from pipeline.objectives.contrastive import step as step_module


def main() -> None:
    planted = {int(step) for step in sys.argv.pop(1).split(",")}
    loss_of, steps = step_module.contrastive_loss, 0

    def loss(*arguments):
        nonlocal steps
        steps += 1
        output = loss_of(*arguments)
        return replace(output, loss=output.loss * torch.nan) if steps in planted else output

    step_module.contrastive_loss = loss
    train.main()


if __name__ == "__main__":
    main()
