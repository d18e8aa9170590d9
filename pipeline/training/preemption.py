"""Signals that ask a run to stop: each rank finishes its step, all write a checkpoint, and the run can go on later."""

import signal
from types import FrameType

# Slurm: SIGUSR1 some time before the time limit (`#SBATCH --signal`), SIGTERM where the job is preempted, requeued or
# cancelled, some seconds before SIGKILL.
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Preemption:
    """From its making on, a signal only sets `received`; the loop asks all ranks whether one of them got any."""

    def __init__(self) -> None:
        self.received = 0
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = max(self.received, number)
