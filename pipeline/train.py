"""Train a recipe: `python -m pipeline.train RECIPE [key=value ...]`, on as many processes as the launcher starts.

    python tools/make_shards.py demo 0 demo
    python -m pipeline.train demo.yaml data.url=demo/train 'evaluation.urls=[demo/eval]'
    torchrun --nproc-per-node 8 -m pipeline.train llave_7b.yaml data.url=s3://bucket/mmeb-train optimizer.lr=2e-5

If the same command is started again, the run continues from its newest checkpoint. The number of processes may change
if it divides data.lanes.
"""

import argparse
import os
import signal
from pathlib import Path

from pipeline.config import Recipe, load_recipe
from pipeline.distributed import end_distributed
from pipeline.interrupt import INTERRUPTED
from pipeline.jobs import status
from pipeline.jobs.program import command_line
from pipeline.storage import lock
from pipeline.training.monitor import check_writable
from pipeline.training.preemption import Preemption
from pipeline.training.trainer import Trainer


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="a recipe's fields with their defaults (* must not change when a run resumes):\n" + Recipe.describe(),
    )
    parser.add_argument("recipe", help="a YAML file; pipeline/recipes/ has the project's own")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a recipe's field by its dotted name")
    parser.add_argument(
        "--no-resume",
        action="store_true",
        help="stop if the run directory has a checkpoint, instead of resuming",
    )
    arguments = parser.parse_args()
    preemption = Preemption()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    folder = Path(recipe.run)
    leads = int(os.environ.get("RANK", 0)) == 0
    if leads:
        check_writable(folder)
    with lock.held([str(folder)] if leads else []):
        if leads:
            status.begin(folder)
        with status.failures_noted(folder):
            trainer = Trainer(recipe, preemption)
            trainer.check(resumes=not arguments.no_resume)
            trainer.build()
            if trainer.train():
                trainer.finish()
    end_distributed(INTERRUPTED if preemption.answer == signal.SIGINT else 0)


if __name__ == "__main__":
    main()
