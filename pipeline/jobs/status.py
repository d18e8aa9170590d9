"""RUN/status.json: a run's state, its step, and why it last stopped; and what moves it from one state to another."""

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import PipelineError, is_of_lost_peer, printable
from pipeline.jobs import launch
from pipeline.storage.atomic import write_file
from pipeline.storage.documents import DocumentError, parse_json

_FROM_ONE_CHECKPOINT = 4  # failures, after which the job gives up


class State(StrEnum):
    """The state in RUN/status.json."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPED = "stopped"  # by a signal, after it wrote a checkpoint
    FINISHED = "finished"
    REFUSED = "refused"  # by preflight
    FAILED = "failed"


class Event(StrEnum):
    """The start of a run, or how its job ended. In between, the run reports its state (`note`)."""

    START = "start"
    JOB_SUCCEEDED = "job succeeded"  # srun exited with 0
    JOB_INTERRUPTED = "job interrupted"  # with 130: Ctrl-C
    JOB_FAILED = "job failed"  # with any other status
    JOB_TERMINATED = "job terminated"  # by Slurm, which itself decides whether the job starts again


class Verdict(IntEnum):
    """What becomes of the job: the exit status of `python -m pipeline.jobs.requeue`."""

    DONE = 0
    FAIL = 1
    REQUEUE = 75  # EX_TEMPFAIL of sysexits.h


class Transition(NamedTuple):
    """verdict: None until the job has ended.  failure: the run's list of failures gets one more."""

    state: State
    verdict: Verdict | None = None
    failure: bool = False


def transition(state: State, event: Event, *, first_start: bool = True) -> Transition:
    """What follows from an event.

    first_start: the job has not been requeued before. If preflight refuses a later start, the cause may be temporary,
        because preflight accepted an earlier one: this counts as a failure.

    The caller turns REQUEUE into FAIL if the job has failed too often (`Status.give_up_reason`).
    """
    match state, event:
        case _, Event.START:
            # The earlier start ended and reported nothing: it was killed, or its node failed.
            return Transition(State.STARTING, failure=state in (State.STARTING, State.RUNNING))
        case State.FINISHED, Event.JOB_SUCCEEDED | Event.JOB_TERMINATED:
            return Transition(state, Verdict.DONE)
        case _, Event.JOB_TERMINATED:
            return Transition(State.STOPPED, Verdict.DONE)
        case State.STOPPED, Event.JOB_SUCCEEDED:
            return Transition(state, Verdict.REQUEUE)
        case State.STOPPED, Event.JOB_INTERRUPTED:  # the user ended it
            return Transition(state, Verdict.FAIL)
        case State.REFUSED, _ if first_start:
            return Transition(state, Verdict.FAIL)
    return Transition(State.FAILED, Verdict.REQUEUE, failure=True)


@dataclass(frozen=True)
class Failure:
    """One failed start of a job: the last step, and the step of the checkpoint that the next start continues from.

    told: the failure was reported. It is not if, for example, the node lost power.
    trained: the start reached its first step.
    """

    step: int
    checkpoint: int
    told: bool = True
    trained: bool = True


@dataclass(frozen=True)
class Status:
    """step: how many of `steps` are done.
    reason: why the run stopped, was refused or failed; while it runs, why the start before ended.
    job, start: the Slurm job's id, and how often that job was requeued before this start.
    failures: of this job.
    trained: this start reached its first step.
    launch: the id of this start; "" once it has ended.
    """

    state: State
    step: int = 0
    steps: int | None = None
    reason: str = ""
    job: str = ""
    start: int = 0
    failures: list[Failure] = field(default_factory=list)
    time: str = ""
    trained: bool = True
    launch: str = ""

    @classmethod
    def read(cls, run: Path) -> "Status":
        """The run's status. Without a readable status.json the state is FAILED."""
        status = cls._read_file(run)
        if status.launch and status.state != State.FAILED:
            with suppress(OSError, ValueError):
                reason = _failure_file(run, status.launch).read_text()
                status = replace(status, state=State.FAILED, reason=reason)
        return status

    @classmethod
    def _read_file(cls, run: Path) -> "Status":
        """status.json alone, without the failure that another rank may have written beside it."""
        try:
            return parse_json((run / "status.json").read_bytes(), "status.json", cls, remedy="it is written anew")
        except (OSError, DocumentError):
            return cls(State.FAILED)

    def write(self, run: Path) -> None:
        """Errors are ignored: if the folder cannot be written, the run fails elsewhere with a better message."""
        now = replace(self, time=datetime.now(UTC).isoformat(timespec="seconds"))
        with suppress(OSError, ValueError):
            write_file(run / "status.json", (json.dumps(asdict(now), indent=1) + "\n").encode(), durable=False)

    def failed(self, run: Path, reason: str, reported: bool = True) -> "Status":
        """The status after one more failure."""
        steps = [path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*")]
        newest = max((int(step) for step in steps if step.isdecimal()), default=0)
        failure = Failure(self.step, newest, reported, self.trained)
        return replace(self, state=State.FAILED, reason=reason, failures=[*self.failures, failure], launch="")

    @property
    def give_up_reason(self) -> str:
        """Why the job must not start again after its last failure; empty if it may.

        Two reported failures at one step have the same cause. A lost node reports nothing, and may be lost twice.
        A failure before a start's first step, as when ranks do not meet, has another cause than a failure in a step.
        """
        if not self.failures:
            return ""
        last = self.failures[-1]
        if [(each.step, each.trained) for each in self.failures if each.told].count((last.step, last.trained)) > 1:
            return f"failed twice {'' if last.trained else 'before its first step, '}after {last.step} steps"
        if (times := [each.checkpoint for each in self.failures].count(last.checkpoint)) >= _FROM_ONE_CHECKPOINT:
            return f"failed {times} times from the checkpoint after {last.checkpoint} steps"
        return ""


def begin(run: Path) -> None:
    """Record that a run starts. In a job the first program that calls this records it: preflight, or training.

    A new job begins with no failures. If an earlier start of the same job reported no end, that counts as a failure.
    A failure that another rank of this start has already recorded is kept.
    """
    job, start = os.environ.get("SLURM_JOB_ID", ""), launch.restarts()
    recorded = Status._read_file(run)
    if job and (recorded.job, recorded.start, recorded.state) == (job, start, State.STARTING):
        return
    before = Status.read(run)
    follows = transition(before.state, Event.START)
    if follows.failure:
        before = before.failed(run, "it ended without a report: killed, or its node failed", reported=False)
    failures = before.failures if job and job == before.job else []
    for left in run.glob("failed-*.txt"):
        # That of this start is kept. An earlier start may have had the same id.
        if left != _failure_file(run, start_id()) or _is_older_than_this_process(left):
            left.unlink(missing_ok=True)
    changes: dict[str, Any] = {"job": job, "start": start, "failures": failures, "launch": start_id()}
    replace(before, state=follows.state, trained=False, **changes).write(run)


def note(run: Path, state: str, **changes: Any) -> None:
    """Record a state, and these fields. Only the first rank calls it, and programs before and after training.

    Other ranks write their failure to a file of its own (`failures_noted`), which this cannot overwrite.
    """
    before, trained = Status._read_file(run), state == State.RUNNING
    if not (trained and before.state == State.FAILED):  # another rank has failed meanwhile
        replace(before, state=State(state), trained=before.trained or trained, **changes).write(run)


def other_job(run: Path) -> str:
    """The id of another Slurm job that uses this run directory and has not ended; empty if there is none."""
    job = Status.read(run).job
    if not job or job == os.environ.get("SLURM_JOB_ID"):
        return ""
    command = ["squeue", "--noheader", f"--jobs={job}"]
    with suppress(OSError, subprocess.SubprocessError):  # no Slurm, or the job is no longer known to it
        return job if subprocess.run(command, capture_output=True, timeout=30, check=True).stdout.strip() else ""
    return ""


@contextmanager
def failures_noted(run: Path) -> Iterator[None]:
    """If this process fails, record why, unless it only lost the connection to another rank. The first failure counts.

    Rank 0 writes status.json. Another rank writes a file beside it, if there is none yet.
    """
    beside, is_first = _failure_file(run, start_id()), int(os.environ.get("RANK", 0)) == 0
    try:
        yield
    except KeyboardInterrupt:
        if is_first:
            note(run, "stopped", reason="SIGINT (Ctrl-C)")
        raise
    except BaseException as error:
        reason = str(error) if isinstance(error, PipelineError) else repr(error)
        with suppress(OSError, ValueError):
            if not is_of_lost_peer(error) and not beside.exists():  # otherwise another rank failed first
                if is_first:
                    note(run, "failed", reason=reason)
                else:
                    write_file(beside, printable(reason, keep="\n").encode(), durable=False)
        raise


def start_id() -> str:
    """The id of this start. All ranks compute the same one before they meet; two starts at one time differ."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"{job}.{launch.restarts()}"
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return "alone"
    return re.sub(r"[^\w.-]+", "-", f"{os.environ.get('MASTER_ADDR')}-{os.environ.get('MASTER_PORT')}")


def _failure_file(run: Path, launch: str) -> Path:
    return run / f"failed-{launch}.txt"


def _is_older_than_this_process(file: Path) -> bool:
    """By the file system's clock; true if that cannot be read."""
    probe = file.with_name(f".clock.{socket.gethostname()}-{os.getpid()}")
    with suppress(OSError):
        probe.touch()
        now, then = probe.stat().st_mtime, file.stat().st_mtime
        probe.unlink()
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return now - then > time.clock_gettime(time.CLOCK_BOOTTIME) - began
    return True
