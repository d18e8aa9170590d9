"""After a job's training ended: shall Slurm start the job again?

    python -m pipeline.jobs.requeue RECIPE [key=value ...] --exit-code N [--terminated]

Reads RUN/status.json and srun's exit code, prints a line on what happened and what comes of it, and ends with status
0 where there is nothing left to do, 75 where the job goes on after a requeue, 1 where it failed for good: in preflight
at its first start, at a step where it had failed before, or too often from the same checkpoint. slurm/launch.sh calls
it.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from pipeline.config import load_recipe
from pipeline.errors import command_line, printable
from pipeline.interrupt import INTERRUPTED
from pipeline.jobs.status import Status
from pipeline.storage import lock

DONE, FAILED, REQUEUE = 0, 1, 75  # 75: EX_TEMPFAIL of sysexits.h


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--exit-code", type=int, required=True, metavar="N", help="srun's")
    parser.add_argument("--terminated", action="store_true", help="Slurm ended the job, and knows what comes next")
    arguments = parser.parse_intermixed_args()
    run = Path(load_recipe(arguments.recipe, arguments.overrides).run)
    message, status = decide(run, arguments.exit_code, arguments.terminated)
    print(printable(message, keep="\n"), file=sys.stderr, flush=True)
    sys.exit(status)


def decide(run: Path, exit_code: int, terminated: bool = False) -> tuple[str, int]:
    """What to say, and this program's exit status."""
    job, status = os.environ.get("SLURM_JOB_ID", ""), Status.read(run)
    if status.job != job:  # another's: this job did not even begin
        if why := lock.in_use(str(run)):  # by what may be running
            return f"error: {why}", FAILED
        status = Status("starting", status.step, status.steps, job=job, trained=False)
    done = f"{status.step} of {status.steps or '?'} steps are done"
    if status.state == "finished" and exit_code == 0:
        return f"{run}: finished", DONE
    if terminated:
        if status.state != "stopped":
            why = "Slurm ended the job before it could stop by itself"
            status = replace(status, state="stopped", reason=why, launch="")
            status.write(run)
        return f"{run}: {done}; {status.reason}; Slurm knows whether the job starts again", DONE
    if status.state == "stopped" and exit_code == 0:
        return f"{run}: {done}; {status.reason}; the job goes on after a requeue", REQUEUE
    if status.state == "stopped" and exit_code == INTERRUPTED:
        return f"{run}: {done}; {status.reason}; the same command goes on from there", FAILED
    if status.state == "refused" and status.start == 0:
        return f"error: {status.reason}", FAILED

    reason = status.reason
    if status.state not in ("failed", "refused"):
        reason = f"srun ended with status {exit_code}" + (", a rank was killed" if exit_code == 137 else "")
    status = status.failed(run, reason)
    status.write(run)
    if status.hopeless:
        return f"error: {run}: {status.hopeless} and is not started again: {reason}", FAILED
    return f"error: {run}: failed after {status.step} steps, goes on after a requeue: {reason}", REQUEUE


if __name__ == "__main__":
    main()
