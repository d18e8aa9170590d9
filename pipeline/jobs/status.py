"""RUN/status.json: what state a run is in, at which step, and why it last stopped."""

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
from pathlib import Path

from pipeline.errors import PipelineError, is_of_lost_peer, printable
from pipeline.jobs import launch
from pipeline.storage.documents import DocumentError, parse_json

_FROM_ONE_CHECKPOINT = 4  # failures, after which there is no hope


@dataclass(frozen=True)
class Failure:
    """A job's end that nobody asked for: after how many steps, and from which one the next start goes on.

    told: false where it ended without a word, as of a node that lost its power.
    trained: false where that start had not come to its first step.
    """

    step: int
    checkpoint: int
    told: bool = True
    trained: bool = True


@dataclass(frozen=True)
class Status:
    """state: "starting", "running", "stopped" (by a signal, with a checkpoint), "finished", "refused" (by preflight) or
    "failed".

    step: how many of `steps` are done. reason: why it is stopped, refused or has failed; while it goes, why it last
    did. job, start: Slurm's id, where it is a job, and how often that was started before. failures: of that job.
    trained: whether this start has come to its first step. launch: names this start; "" once it is over.
    """

    state: str
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
        """What the files say; of a run that has none, or none that can be read, that it has failed."""
        status = cls._noted(run)
        if status.launch and status.state != "failed":
            with suppress(OSError, ValueError):
                status = replace(status, state="failed", reason=_failure_file(run, status.launch).read_text())
        return status

    @classmethod
    def _noted(cls, run: Path) -> "Status":
        """What status.json says, without what ranks have noted beside it."""
        try:
            return parse_json((run / "status.json").read_bytes(), "status.json", cls, remedy="it is written anew")
        except (OSError, DocumentError):
            return cls("failed")

    def write(self, run: Path) -> None:
        """Nothing happens where it cannot be written: what else goes on there fails with a better message."""
        now = replace(self, time=datetime.now(UTC).isoformat(timespec="seconds"))
        unfinished = _unfinished(run)
        with suppress(OSError, ValueError):
            run.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(asdict(now), indent=1) + "\n")
            unfinished.replace(run / "status.json")

    def failed(self, run: Path, reason: str, told: bool = True) -> "Status":
        """With one failure more, and over."""
        failure = Failure(self.step, _newest_checkpoint(run), told, self.trained)
        return replace(self, state="failed", reason=reason, failures=[*self.failures, failure], launch="")

    @property
    def hopeless(self) -> str:
        """Why the job should not be started again after its last failure; empty where it may.

        Two at one step have one cause, unless the nodes were lost: that takes more. What fails before the first step of
        a start, as where ranks do not meet, has another cause than what fails in one.
        """
        if not self.failures:
            return ""
        last = self.failures[-1]
        if [(each.step, each.trained) for each in self.failures if each.told].count((last.step, last.trained)) > 1:
            return f"failed twice {'' if last.trained else 'before its first step, to go on '}after {last.step} steps"
        if (times := [each.checkpoint for each in self.failures].count(last.checkpoint)) >= _FROM_ONE_CHECKPOINT:
            return f"failed {times} times on its way from the checkpoint after {last.checkpoint} steps"
        return ""


def begin(run: Path) -> None:
    """Note that a run starts, or starts again; of a job the first program that comes says it.

    A job's failures are forgotten where another job takes over. An end without a word is one: of a node, say. What a
    rank of this very start has noted already, which failed before the first one came here, stays.
    """
    job, start = os.environ.get("SLURM_JOB_ID", ""), launch.restarts()
    noted = Status._noted(run)
    if job and (noted.job, noted.start, noted.state) == (job, start, "starting"):
        return
    before = Status.read(run)
    if before.state in ("starting", "running"):
        before = before.failed(run, "it ended without a word: killed, or its node failed", told=False)
    failures = before.failures if job and job == before.job else []
    for left in run.glob("failed-*.txt"):
        if left != _failure_file(run, _launch()) or _is_older_than_this_process(left):
            left.unlink(missing_ok=True)
    begun = replace(before, state="starting", job=job, start=start, failures=failures, trained=False, launch=_launch())
    begun.write(run)


def note(run: Path, state: str, **changes: object) -> None:
    """Write the status anew, with these changes: only the first rank does, or a program of the job before or after it.

    The others write beside it that they have failed (see `failures_noted`), which this cannot take back.
    """
    before = Status._noted(run)
    if state != "running" or before.state != "failed":
        replace(before, state=state, trained=before.trained or state == "running", **changes).write(run)


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
    """Note why this process failed, if it does, and not because another did; the first rank that fails is heard.

    Whatever rank it is: the first writes status.json, the others a file that no two can write.
    """
    beside, leads = _failure_file(run, _launch()), int(os.environ.get("RANK", 0)) == 0
    try:
        yield
    except KeyboardInterrupt:
        if leads:
            note(run, "stopped", reason="SIGINT (Ctrl-C)")
        raise
    except BaseException as error:
        reason = str(error) if isinstance(error, PipelineError) else repr(error)
        if leads and not is_of_lost_peer(error) and not beside.exists():
            note(run, "failed", reason=reason)
        elif not leads and not is_of_lost_peer(error):
            unfinished = _unfinished(run)
            with suppress(OSError, ValueError):
                run.mkdir(parents=True, exist_ok=True)
                unfinished.write_text(printable(reason, keep="\n"))
                try:
                    os.link(unfinished, beside)
                    unfinished.unlink()
                except FileExistsError:
                    unfinished.unlink()
                except OSError:  # a file system without links
                    unfinished.replace(beside)
        raise


def _launch() -> str:
    """What all ranks of a start call it, before they have met; two starts at once should differ in it."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"{job}.{launch.restarts()}"
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return "alone"
    return re.sub(r"[^\w.-]+", "-", f"{os.environ.get('MASTER_ADDR')}-{os.environ.get('MASTER_PORT')}")


def _failure_file(run: Path, launch: str) -> Path:
    return run / f"failed-{launch}.txt"


def _is_older_than_this_process(file: Path) -> bool:
    """By the clock that files have there; true where nobody knows."""
    probe = _unfinished(file.parent)
    with suppress(OSError):
        probe.touch()
        now, then = probe.stat().st_mtime, file.stat().st_mtime
        probe.unlink()
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return now - then > time.clock_gettime(time.CLOCK_BOOTTIME) - began
    return True


def _unfinished(run: Path) -> Path:
    return run / f"status.{socket.gethostname()}-{os.getpid()}.unfinished"


def _newest_checkpoint(run: Path) -> int:
    names = [path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)
