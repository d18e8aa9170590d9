"""`python -m pipeline.train` of which a rank hangs in a step: `python hanging.py RANK STEP sleep|stop ARGUMENTS`.

It hangs before the optimizer's step, in Python or as a stopped process. From then on the others wait a few seconds for
it: the recipe's time limit must be long enough for all that comes before, also on a slow machine. They clean up for
longer than from one note to the next.
"""

import os
import signal
import sys
import time
from datetime import timedelta

import deepspeed
import torch.distributed as dist

from pipeline import train
from pipeline.training import watchdog
from pipeline.training.saving import Saver

_LIMIT = 6  # seconds


def sleep_in_the_step() -> None:
    time.sleep(1000)


def main() -> None:
    rank, last, how = int(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1)
    finish, steps = deepspeed.DeepSpeedEngine.step, 0
    watchdog._SECONDS, watchdog._STACKS_AFTER, watchdog._REPORT_AFTER = 0.2, 0.002, 0.005  # 1.2 and 3 s of ten minutes

    def step(engine: deepspeed.DeepSpeedEngine) -> None:
        nonlocal steps
        steps += 1
        if steps == last:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=_LIMIT))
            if dist.get_rank() == rank and how == "sleep":
                sleep_in_the_step()
            elif dist.get_rank() == rank:
                os.kill(os.getpid(), signal.SIGSTOP)
        finish(engine)

    def clean_up(self: Saver, *failure: object) -> None:
        time.sleep(5 * watchdog._SECONDS)
        leave(self, *failure)

    deepspeed.DeepSpeedEngine.step = step
    leave, Saver.__exit__ = Saver.__exit__, clean_up  # type: ignore[method-assign]
    train.main()


if __name__ == "__main__":
    main()
