"""RUN/status.json: what state a run is in, at which step, and why it last stopped."""

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from pipeline.errors import PipelineError, is_of_lost_peer

_FROM_ONE_CHECKPOINT = 4  # failures, after which there is no hope


@dataclass(frozen=True)
class Failure:
    """A job's end that nobody asked for: after how many steps, and from which one the next start goes on.

    told: false where it ended without a word, as of a node that lost its power.
    """

    step: int
    checkpoint: int
    told: bool = True


@dataclass(frozen=True)
class Status:
    """state: "starting", "running", "stopped" (by a signal, with a checkpoint), "finished", "refused" (by preflight) or
    "failed".

    step: how many of `steps` are done. reason: why it is stopped, refused or has failed; while it goes, why it last
    did. job, start: Slurm's id, where it is a job, and how often that was started before. failures: of that job.
    """

    state: str
    step: int = 0
    steps: int | None = None
    reason: str = ""
    job: str = ""
    start: int = 0
    failures: list[Failure] = field(default_factory=list)
    time: str = ""

    @classmethod
    def read(cls, run: Path) -> "Status":
        """What the file says; of a run that has none, or none that can be read, that it has failed."""
        try:
            content = json.loads((run / "status.json").read_text())
            return cls(**content | {"failures": [Failure(**each) for each in content["failures"]]})
        except (OSError, ValueError, TypeError, KeyError):
            return cls("failed")

    def write(self, run: Path) -> None:
        """Nothing happens where it cannot be written: what else goes on there fails with a better message."""
        now = replace(self, time=datetime.now(UTC).isoformat(timespec="seconds"))
        unfinished = run / f"status.{socket.gethostname()}-{os.getpid()}.unfinished"
        with suppress(OSError):
            run.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(asdict(now), indent=1) + "\n")
            unfinished.replace(run / "status.json")

    def failed(self, run: Path, reason: str, told: bool = True) -> "Status":
        """With one failure more."""
        failure = Failure(self.step, _newest_checkpoint(run), told)
        return replace(self, state="failed", reason=reason, failures=[*self.failures, failure])

    @property
    def hopeless(self) -> str:
        """Why the job should not be started again after its last failure; empty where it may.

        Two at one step have one cause, unless the nodes were lost: that takes more.
        """
        if not self.failures:
            return ""
        last = self.failures[-1]
        if [each.step for each in self.failures if each.told].count(last.step) > 1:
            return f"failed twice after {last.step} steps"
        if (times := [each.checkpoint for each in self.failures].count(last.checkpoint)) >= _FROM_ONE_CHECKPOINT:
            return f"failed {times} times on its way from the checkpoint after {last.checkpoint} steps"
        return ""


def begin(run: Path) -> None:
    """Note that a run starts, or starts again; of a job the first program that comes says it.

    A job's failures are forgotten where another job takes over. An end without a word is one: of a node, say.
    """
    job, start = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    before = Status.read(run)
    if job and (before.job, before.start, before.state) == (job, start, "starting"):
        return
    if before.state in ("starting", "running"):
        before = before.failed(run, "it ended without a word: killed, or its node failed", told=False)
    failures = before.failures if job and job == before.job else []
    replace(before, state="starting", job=job, start=start, failures=failures).write(run)


def note(run: Path, state: str, **changes: object) -> None:
    """Write the status anew, with these changes. That a rank has failed is not taken back by one that goes on."""
    before = Status.read(run)
    if state != "running" or before.state != "failed":
        replace(before, state=state, **changes).write(run)


def other_job(run: Path) -> str:
    """The id of another job of Slurm's that has this run directory and has not ended; empty where there is none."""
    job = Status.read(run).job
    if not job or job == os.environ.get("SLURM_JOB_ID"):
        return ""
    command = ["squeue", "--noheader", f"--jobs={job}"]
    with suppress(OSError, subprocess.SubprocessError):  # no Slurm here, or it has forgotten the job
        return job if subprocess.run(command, capture_output=True, timeout=30, check=True).stdout.strip() else ""
    return ""


@contextmanager
def failures_noted(run: Path) -> Iterator[None]:
    """Note why this process failed, if it does, and not because another did."""
    try:
        yield
    except BaseException as error:
        if not is_of_lost_peer(error):
            note(run, "failed", reason=str(error) if isinstance(error, PipelineError) else repr(error))
        raise


def _newest_checkpoint(run: Path) -> int:
    names = [path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)
