"""Decide whether a Slurm job is requeued after its training ended.

    python -m pipeline.jobs.requeue RECIPE [key=value ...] --exit-code N [--terminated]

Reads RUN/status.json and srun's exit code, prints one line that says what happened and what follows, and exits with

     0    nothing is left to do
    75    requeue the job: it continues from the newest checkpoint
     1    the job failed permanently: preflight refused its first start, it failed twice at one step or before a
          first step, or four starts failed from the same checkpoint

slurm/launch.sh calls it. pipeline/jobs/status.py has the rules.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from pipeline.config import load_recipe
from pipeline.errors import printable
from pipeline.interrupt import INTERRUPTED
from pipeline.jobs.program import command_line
from pipeline.jobs.status import Event, State, Status, Verdict, transition
from pipeline.storage import lock

_WHAT_FOLLOWS = {
    Verdict.DONE: "Slurm decides whether the job starts again",
    Verdict.REQUEUE: "the job is requeued",
    Verdict.FAIL: "the same command continues from there",
}


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--exit-code", type=int, required=True, metavar="N", help="srun's exit code")
    parser.add_argument(
        "--terminated", action="store_true", help="Slurm ended the job, and decides whether it starts again"
    )
    arguments = parser.parse_intermixed_args()
    run = Path(load_recipe(arguments.recipe, arguments.overrides).run)
    message, verdict = decide(run, arguments.exit_code, arguments.terminated)
    print(printable(message, keep="\n"), file=sys.stderr, flush=True)
    sys.exit(verdict)


def decide(run: Path, exit_code: int, terminated: bool = False) -> tuple[str, Verdict]:
    """The line to print, and the verdict. Records a failure, or that Slurm ended the job, in status.json."""
    job, status = os.environ.get("SLURM_JOB_ID", ""), Status.read(run)
    if status.job != job:  # another job wrote it: this one ended before it recorded its start
        if why := lock.in_use(str(run)):
            return f"error: {why}", Verdict.FAIL
        status = Status(State.STARTING, status.step, status.steps, job=job, trained=False)
    before = status.state
    event = {0: Event.JOB_SUCCEEDED, INTERRUPTED: Event.JOB_INTERRUPTED}.get(exit_code, Event.JOB_FAILED)
    follows = transition(before, Event.JOB_TERMINATED if terminated else event, first_start=not status.start)
    if follows.failure:
        reason = status.reason
        if before not in (State.FAILED, State.REFUSED):
            reason = f"srun exited with status {exit_code}" + (", a rank was killed" if exit_code == 137 else "")
        status = status.failed(run, reason)
        status.write(run)
        if why := status.give_up_reason:
            return f"error: {run}: {why} and is not requeued: {reason}", Verdict.FAIL
        return f"error: {run}: failed after {status.step} steps, is requeued: {reason}", Verdict.REQUEUE
    if follows.state != before:
        status = replace(status, state=follows.state, reason="Slurm ended the job before it could stop", launch="")
        status.write(run)
    if status.state == State.REFUSED:
        return f"error: {status.reason}", Verdict.FAIL
    if status.state == State.FINISHED:
        return f"{run}: finished", Verdict.DONE
    assert follows.verdict is not None  # the job has ended
    done = f"{run}: {status.step} of {status.steps or '?'} steps are done; {status.reason}"
    return f"{done}; {_WHAT_FOLLOWS[follows.verdict]}", follows.verdict


if __name__ == "__main__":
    main()
