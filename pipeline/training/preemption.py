"""Signals that ask a run to stop: all ranks finish the step and write a checkpoint, so that the run can be resumed."""

import signal
from contextlib import AbstractContextManager
from types import FrameType

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pipeline import interrupt

# Slurm sends SIGUSR1 before the time limit (`#SBATCH --signal`); and SIGTERM, some seconds before SIGKILL, when a job
# is preempted, requeued or cancelled.
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Preemption:
    """Records SIGNALS, so that they do not end the process; Ctrl-C only inside `steps`: outside, nothing needs saving.

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
        """Return the signal that any rank has received, or 0; the same on all ranks. Collective."""
        asked = torch.tensor(self._received, device=get_accelerator().current_device_name())
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        self.answer = int(asked)
        return self.answer
