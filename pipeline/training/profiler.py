"""A trace of some steps by torch's profiler, one file for each rank."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as Trace

from pipeline.config.recipe import Profile
from pipeline.errors import PipelineError, disk_errors

logger = logging.getLogger(__name__)


def check(profile: Profile | None, steps: int) -> None:
    """Raise PipelineError if the run of this many steps does not have all steps to profile."""
    if profile and profile.last > steps:
        raise PipelineError(
            f"profile asks for steps {profile.step} to {profile.last}, but the run has {steps}: lower profile.step"
        )


class Profiler:
    """Writes RUN/profile/step-N/rankR.pt.trace.json.gz, which Perfetto and TensorBoard's profiler plugin open.

    The trace holds the operators, on a GPU also the kernels, and the phases of each step as named ranges. It ends
    before a checkpoint or an evaluation, which could have GBs of events. The rest of the steps to profile, also of a
    later start, has a trace of its own, in a folder named by its first step.
    """

    def __init__(self, profile: Profile | None, folder: Path, rank: int) -> None:
        self._profile, self._folder, self._rank = profile, folder, rank
        self._trace: Trace | None = None
        self._first = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile the step inside if it is asked for.  number: from 1."""
        if self._profile is None or not self._profile.step <= number <= self._profile.last:
            yield
            return
        if self._trace is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._trace, self._first = Trace(activities=activities), number
            self._trace.start()
        with record_function(f"ProfilerStep#{number}"):  # the plugin finds steps by this name
            yield
        if number == self._profile.last:
            self.end()

    def end(self) -> None:
        """End the trace, if one is recorded, and write it."""
        if self._trace is None:
            return
        self._trace.stop()
        path = self._folder / "profile" / f"step-{self._first:08d}" / f"rank{self._rank}.pt.trace.json.gz"
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._trace.export_chrome_trace(str(path))
        self._trace = None  # its events are some hundred MB
        if self._rank == 0:
            logger.info(
                "wrote %s: open it at ui.perfetto.dev, or in TensorBoard with the plugin torch-tb-profiler", path
            )
