"""After a job's training ended: shall Slurm start the job again?

    python -m pipeline.requeue RECIPE [key=value ...] --exit-code N [--terminated]

Reads RUN/status.json and srun's exit code, prints a line on what happened and what comes of it, and ends with status
0 where there is nothing left to do, 75 where the job goes on after a requeue, 1 where it failed for good: in preflight,
at a step where it had failed before, or for the third time from the same checkpoint. slurm/launch.sh calls it.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from pipeline.config import load_recipe
from pipeline.errors import command_line
from pipeline.status import Failure, Status

DONE, FAILED, REQUEUE = 0, 1, 75  # 75: EX_TEMPFAIL of sysexits.h
_FROM_ONE_CHECKPOINT = 3


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
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)


def decide(run: Path, exit_code: int, terminated: bool = False) -> tuple[str, int]:
    """What to say, and this program's exit status."""
    status = Status.read(run)
    done = f"{status.step} of {status.steps or '?'} steps are done"
    if status.state == "finished" and exit_code == 0:
        return f"{run}: finished", DONE
    if status.state == "stopped" and exit_code == 0:
        if status.reason.startswith("SIGUSR1"):
            return f"{run}: {done}; {status.reason}; the job goes on after a requeue", REQUEUE
        return f"{run}: {done}; {status.reason}; whoever stopped the job says whether it starts again", DONE
    if terminated:
        return f"{run}: {done}; Slurm ended the job before it could stop by itself", DONE
    if status.state == "failed" and status.reason.startswith("preflight: "):
        return f"error: {status.reason}", FAILED

    reason = status.reason
    if status.state != "failed":
        reason = f"srun ended with status {exit_code}" + (", a rank was killed" if exit_code == 137 else "")
    failure = Failure(status.step, _newest_checkpoint(run))
    failures = [*status.failures, failure]
    replace(status, state="failed", reason=reason, failures=failures).write(run)
    if failure.step in [earlier.step for earlier in status.failures]:
        return f"error: {run}: failed twice after {status.step} steps and is not started again: {reason}", FAILED
    if [earlier.checkpoint for earlier in failures].count(failure.checkpoint) == _FROM_ONE_CHECKPOINT:
        return (
            f"error: {run}: failed {_FROM_ONE_CHECKPOINT} times on its way from the checkpoint after "
            f"{failure.checkpoint} steps and is not started again: {reason}",
            FAILED,
        )
    return f"error: {run}: failed after {status.step} steps, goes on after a requeue: {reason}", REQUEUE


def _newest_checkpoint(run: Path) -> int:
    steps = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]
    return max(steps, default=0)


if __name__ == "__main__":
    main()
