"""Signals that ask a run to stop: each rank finishes its step, all write a checkpoint, and the run can go on later."""

import signal
from contextlib import AbstractContextManager
from types import FrameType

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pipeline import interrupt

# Slurm: SIGUSR1 some time before the time limit (`#SBATCH --signal`), SIGTERM where the job is preempted, requeued or
# cancelled, some seconds before SIGKILL.
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Preemption:
    """From its making on, signals are only noted; Ctrl-C, in `steps` alone: before and after there is nothing to save.

    answer: the signal that made all ranks stop, or 0.
    """

    def __init__(self) -> None:
        self._received = self.answer = 0
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number

    def steps(self) -> AbstractContextManager[None]:
        return interrupt.postponed(self._note)

    def asked(self) -> int:
        """The signal that asks some rank to stop, or 0. Every rank calls this, and all get the same."""
        asked = torch.tensor(self._received, device=get_accelerator().current_device_name())
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        self.answer = int(asked)
        return self.answer
