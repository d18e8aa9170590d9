"""Train a recipe: `python -m pipeline.train RECIPE [key=value ...]`, on as many processes as the launcher starts.

    python -m pipeline.train pipeline/recipes/demo.yaml
    torchrun --nproc-per-node 8 -m pipeline.train pipeline/recipes/demo.yaml optimizer.lr=2e-5

Started again on as many processes, a run continues from its newest checkpoint.
"""

import argparse
import os
import platform
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist

from pipeline.config import Recipe, dump_recipe, load_ds_config, load_recipe
from pipeline.data.shards import parse_sample
from pipeline.data.stream import Source, batches
from pipeline.errors import PipelineError, command_line
from pipeline.evaluation.encode import embed_collection
from pipeline.evaluation.report import Report
from pipeline.evaluation.tasks import Collection
from pipeline.models import llave
from pipeline.training import checkpoint
from pipeline.training.engine import build_engine, start_distributed
from pipeline.training.export import export
from pipeline.training.loop import Run, train

_TOKENIZER_SAMPLES = 4096
_PACKAGES = ("torch", "deepspeed", "transformers", "webdataset")


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="a recipe's fields, with their defaults:\n" + Recipe.describe(),
    )
    parser.add_argument("recipe", help="a YAML file; pipeline/recipes/ has the project's own")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a recipe's field by its dotted name")
    parser.add_argument(
        "--no-resume",
        action="store_true",
        help="stop if the run directory has a checkpoint, rather than continue it",
    )
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    folder = Path(recipe.run)
    if arguments.no_resume and checkpoint.latest(folder / "checkpoints"):
        raise PipelineError(f"{folder} has a checkpoint already; set run= to another directory or leave --no-resume")

    # All that can be wrong is found before a model is loaded.
    world = int(os.environ.get("WORLD_SIZE", 1))
    load_ds_config(recipe, world)
    source = Source.open(recipe.data)
    order = source.order(recipe.data, recipe.batch.global_batch, recipe.seed)
    order.check_world(world)
    collection = Collection.load(recipe.evaluation.urls) if recipe.evaluation else None

    device = start_distributed(recipe.timeout_minutes)
    if dist.get_rank() == 0:
        _write_recipe(recipe, folder, world)
    model_path = recipe.model.path or _initial_model(recipe, source, folder / "init")
    processor = llave.Processor.load(model_path, recipe.model.max_tokens)
    engine = build_engine(recipe, model_path)
    embed = partial(embed_collection, engine, processor.encode, chunk_tokens=recipe.batch.chunk_tokens, device=device)
    run = Run(
        recipe=recipe,
        order=order,
        steps=recipe.steps or round(recipe.epochs * order.steps_per_epoch),
        batches=partial(
            batches,
            source,
            order,
            processor.encode,
            rank=dist.get_rank(),
            world=world,
            workers=recipe.data.workers,
            timeout=60 * recipe.timeout_minutes,
        ),
        evaluate=lambda: Report.of(recipe.run, collection, embed(collection)) if collection else None,
    )
    train(engine, run)
    export(engine, model_path, folder / "export")
    dist.destroy_process_group()


def _initial_model(recipe: Recipe, source: Source, folder: Path) -> str:
    """Random weights and a tokenizer of the data's texts, written once by the first rank."""
    if dist.get_rank() == 0 and not folder.exists():
        unfinished = folder.with_name("init.unfinished")
        llave.build(recipe.model.architecture, _texts(source), recipe.seed, unfinished)
        unfinished.rename(folder)
    dist.barrier()
    return str(folder)


def _texts(source: Source) -> Iterator[str]:
    """The texts of some thousand samples, from the start of every shard."""
    share = -(-_TOKENIZER_SAMPLES // len(source.shards))
    for number, (_, shard) in enumerate(source.shards):
        for sample in source.read(number, 0, min(share, shard.samples)):
            yield from (item.text for item in parse_sample(sample).items)


def _write_recipe(recipe: Recipe, folder: Path, world: int) -> None:
    """Keep the resolved recipe with the run; refuse to continue one whose batches would be others."""
    path = folder / "recipe.yaml"
    if path.exists() and checkpoint.latest(folder / "checkpoints"):
        before, now = (_decisive(r) for r in (load_recipe(path, []), recipe))
        if changed := [name for name in now if now[name] != before[name]]:
            changes = ", ".join(f"{name}={now[name]} (was {before[name]})" for name in changed)
            raise PipelineError(f"{folder} was begun with another recipe: {changes}; set run= to another directory")
    folder.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    header = f"# {world} processes; Python {platform.python_version()}, {versions}\n"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(header + dump_recipe(recipe))
    unfinished.rename(path)


def _decisive(recipe: Recipe) -> dict[str, object]:
    """What decides the batches and the parameters' shapes."""
    data = {
        f"data.{name}": getattr(recipe.data, name) for name in ("datasets", "lanes", "block_samples", "window_blocks")
    }
    return data | {
        "seed": recipe.seed,
        "batch.global_batch": recipe.batch.global_batch,
        "model.path": recipe.model.path,
        "model.architecture": recipe.model.architecture,
    }


if __name__ == "__main__":
    main()
