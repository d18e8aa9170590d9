"""RUN/status.json: what state a run is in, at which step, and why it last stopped."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from pipeline.errors import PipelineError, is_of_lost_peer


@dataclass(frozen=True)
class Failure:
    """A job's end that nobody asked for: after how many steps, and from which one the next job goes on."""

    step: int
    checkpoint: int


@dataclass(frozen=True)
class Status:
    """state: "starting", "running", "stopped" (by a signal, with a checkpoint), "finished" or "failed".

    step: how many of `steps` are done. reason: why it is stopped or has failed; while it goes, why it last did.
    job: Slurm's id, where it is a job. failures: of that job, which Slurm may have started several times.
    """

    state: str
    step: int = 0
    steps: int | None = None
    reason: str = ""
    job: str = ""
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


def begin(run: Path) -> None:
    """Note that a process starts on the run. A job's failures are forgotten where another job takes over."""
    job, before = os.environ.get("SLURM_JOB_ID", ""), Status.read(run)
    reason = before.reason
    if before.state in ("starting", "running"):
        reason = "it ended without a word: killed, or its node failed"
    failures = before.failures if job and job == before.job else []
    replace(before, state="starting", reason=reason, job=job, failures=failures).write(run)


def note(run: Path, state: str, **changes: object) -> None:
    """Write the status anew, with these changes."""
    replace(Status.read(run), state=state, **changes).write(run)


@contextmanager
def failures_noted(run: Path) -> Iterator[None]:
    """Note why this process failed, if it does, and not because another did."""
    try:
        yield
    except BaseException as error:
        if not is_of_lost_peer(error):
            note(run, "failed", reason=str(error) if isinstance(error, PipelineError) else repr(error))
        raise
