"""Check a run before it uses GPU hours. Prints one table of checks, and what to do about each that fails.

    python tools/preflight.py pipeline/recipes/demo.yaml run=runs/mine             # on this machine
    srun --ntasks=$SLURM_NNODES --ntasks-per-node=1 \\
        python tools/preflight.py RECIPE key=value ... --slurm --world $SLURM_NTASKS    # on the nodes of a job

From an installed package the command is pipeline-preflight. It checks the packages, the GPUs, attention, the network
between the nodes, the run directory and its free space, S3, the model's files, the batch and the number of processes,
memory, and whether the run can resume from its newest checkpoint. Each check has a time limit. Files that the
checks write are deleted; with --slurm the start is recorded in RUN/status.json. The exit status is 2 if a check says
FAIL, else 0.
"""

import argparse
import os
import sys
import time

from pipeline.errors import PipelineError
from pipeline.jobs.program import command_line


@command_line
def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file, or the name of one of the project's own, as demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a recipe's field by its dotted name")
    parser.add_argument("--slurm", action="store_true", help="this process is a task of srun, one for each node")
    parser.add_argument("--world", type=int, metavar="N", help="processes of the run (one a GPU; on the CPU 2)")
    arguments = parser.parse_intermixed_args()
    if arguments.world is not None and arguments.world < 1:
        raise PipelineError("--world must be a positive number")
    # The packages are checked first: what follows imports them.
    try:
        from pipeline.jobs.preflight.packages import packages

        installed = packages()
        from pipeline.config import load_recipe
        from pipeline.jobs.preflight.nodes import Place, slurm_place
        from pipeline.jobs.preflight.run import preflight
    except (ImportError, OSError) as error:
        if (getattr(error, "name", None) or "").startswith("pipeline"):
            raise
        advice = "activate .venv, or pip install -c constraints.txt -r requirements.txt"
        raise PipelineError(f"preflight: packages: {error} - {advice}") from None
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    place = slurm_place(os.environ) if arguments.slurm else Place()
    status = preflight(recipe, place, installed, world=arguments.world, slurm=arguments.slurm, began=began)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # even if a check still hangs


if __name__ == "__main__":
    main()
