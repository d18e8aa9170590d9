"""What would stop this run, found before GPU hours are spent; in one table, with what to do about it.

    python tools/preflight.py pipeline/recipes/demo.yaml run=runs/mine             # here
    srun --ntasks=$SLURM_NNODES --ntasks-per-node=1 \\
        python tools/preflight.py RECIPE key=value ... --slurm --world $SLURM_NTASKS    # on the nodes of a job

Checks packages, GPUs, attention, the network between the nodes and their clocks, the run directory and the space
there, S3, the model's files, batch and processes, memory, and whether the newest checkpoint can be continued. Nothing
is left behind. Each check has a time limit. The exit status is 2 if one says FAIL, else 0.
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.errors import PipelineError
from pipeline.jobs.program import command_line


@command_line
def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file; pipeline/recipes/ has the project's own")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a recipe's field by its dotted name")
    parser.add_argument("--slurm", action="store_true", help="this is a task of srun, one of each node")
    parser.add_argument("--world", type=int, metavar="N", help="processes of the run (one a GPU; on the CPU 2)")
    arguments = parser.parse_intermixed_args()
    if arguments.world is not None and arguments.world < 1:
        raise PipelineError("--world is a positive number")
    logging.disable(logging.WARNING)  # of the libraries: the table says what matters
    # What may be missing is imported after it was looked for.
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
    os._exit(status)  # whatever may still hang


if __name__ == "__main__":
    main()
