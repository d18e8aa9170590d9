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
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.jobs.preflight.check import Check, check, green, red
from pipeline.jobs.program import command_line

_NAMED = ("torch", "deepspeed", "transformers", "webdataset")
_INSTALL = "activate .venv, or pip install -c constraints.txt -r requirements.txt"


@check("packages", if_late="is the file system of the Python environment slow?")
def packages() -> Check:
    """Whether the packages are installed in the versions that the project requires. None of them is imported."""
    import tomllib  # imported here: an old Python, or a bare environment, lacks them

    from packaging.requirements import Requirement

    file = Path(__file__).resolve().parents[1] / "pyproject.toml"  # of a checkout; an installed package has metadata
    wanted = tomllib.loads(file.read_text())["project"]["dependencies"] if file.exists() else requires("pipeline")
    wrong, installed = [], {}
    for requirement in map(Requirement, wanted or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue  # it belongs to an extra, as dev
        try:
            found = installed[requirement.name] = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
        else:
            if not requirement.specifier.contains(found, prereleases=True):
                wrong.append(f"{requirement.name} {found} is not {requirement.specifier}")
    if wrong:
        return red(", ".join(wrong), _INSTALL)
    return green(f"Python {platform.python_version()}, " + ", ".join(f"{name} {installed[name]}" for name in _NAMED))


@command_line
def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file, or the name of one of the project's own, such as demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a recipe's field by its dotted name")
    parser.add_argument("--slurm", action="store_true", help="this process is a task of srun, one for each node")
    parser.add_argument(
        "--world", type=int, metavar="N", help="number of processes (default: one per GPU, or 2 on the CPU)"
    )
    arguments = parser.parse_intermixed_args()
    if arguments.world is not None and arguments.world < 1:
        raise PipelineError("--world must be a positive number")
    # The packages are checked first: what follows imports them.
    try:
        installed = packages()
        from pipeline.config import load_recipe
        from pipeline.jobs.preflight.nodes import Nodes
        from pipeline.jobs.preflight.run import preflight
    except (ImportError, OSError) as error:
        if (getattr(error, "name", None) or "").startswith("pipeline"):
            raise
        raise PipelineError(f"preflight: packages: {error} - {_INSTALL}") from None
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    nodes = Nodes.of_slurm(os.environ) if arguments.slurm else Nodes()
    status = preflight(recipe, nodes, installed, world=arguments.world, slurm=arguments.slurm, began=began)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # even if a check still hangs


if __name__ == "__main__":
    main()
