"""`python -m pipeline.train` whose ranks are killed in the middle of a step: `python killed.py STEP ARGUMENTS`."""

import os
import signal
import sys

import deepspeed

from pipeline import train


def main() -> None:
    last = int(sys.argv.pop(1))
    finish, steps = deepspeed.DeepSpeedEngine.step, 0

    def step(engine: deepspeed.DeepSpeedEngine) -> None:
        """Kill the process after the backward pass, before the optimizer's step."""
        nonlocal steps
        steps += 1
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(engine)

    deepspeed.DeepSpeedEngine.step = step
    train.main()


if __name__ == "__main__":
    main()
