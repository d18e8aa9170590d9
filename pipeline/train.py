"""Train a recipe: `python -m pipeline.train RECIPE [key=value ...]`, on as many processes as the launcher starts.

    python -m pipeline.train pipeline/recipes/demo.yaml
    torchrun --nproc-per-node 8 -m pipeline.train pipeline/recipes/demo.yaml optimizer.lr=2e-5

Started again, a run continues from its newest checkpoint, on any number of processes that divides data.lanes.
"""

import argparse
import os
import platform
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch.distributed as dist

from pipeline.config import Recipe, dump_recipe, load_ds_config, load_recipe
from pipeline.data.batch import Batch
from pipeline.data.sample import BadSample
from pipeline.data.source import Source
from pipeline.data.stream import batches
from pipeline.distributed import end_distributed, on_first_rank, start_distributed
from pipeline.errors import PipelineError, command_line, disk_errors
from pipeline.evaluation import sets
from pipeline.evaluation.encode import embed_collection
from pipeline.evaluation.encoders import ModelEncoder
from pipeline.evaluation.measure import measure
from pipeline.evaluation.report import Report
from pipeline.evaluation.store import Memory
from pipeline.interrupt import INTERRUPTED
from pipeline.jobs import limits, status
from pipeline.models.chunks import Features
from pipeline.models.family import Processor
from pipeline.models.frozen import KeptFeatures
from pipeline.models.registry import saved, training_of
from pipeline.storage import lock
from pipeline.training import checkpoint, manifest, resume
from pipeline.training.conditions import check, conditions_of_run
from pipeline.training.engine import build_engine, load_frozen
from pipeline.training.export import export
from pipeline.training.loop import Run, train
from pipeline.training.monitor import StepLog, check_writable
from pipeline.training.preemption import Preemption
from pipeline.training.universal import for_this_world

_TOKENIZER_SAMPLES, _TOKENIZER_SHARDS = 4096, 64
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
            _train(recipe, preemption, resumes=not arguments.no_resume)
    end_distributed(INTERRUPTED if preemption.answer == signal.SIGINT else 0)


def _train(recipe: Recipe, preemption: Preemption, *, resumes: bool) -> None:
    # What is wrong is found here, on every rank, before processes meet and a model is loaded.
    folder, world = Path(recipe.run), int(os.environ.get("WORLD_SIZE", 1))
    family = training_of(recipe)
    family.check(recipe.model)
    source = Source.open(recipe.data)
    family.check_data(recipe, source)
    order = source.order(recipe.batch.global_batch, recipe.seed, family.lengths(recipe))
    order.check_world(world)
    ds_config = load_ds_config(recipe, world)
    family.check_stage(ds_config["zero_optimization"]["stage"])
    source.check_memory(order, world)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    limits.require_shared_memory(recipe, source, family.lengths(recipe), world, ranks)
    limits.raise_open_files()
    steps = recipe.steps or round(recipe.epochs * order.steps_per_epoch)
    if steps < 1:
        raise PipelineError(f"epochs={recipe.epochs} of {order.steps_per_epoch} steps is less than a step")
    conditions = conditions_of_run(recipe, source, ds_config["zero_optimization"])
    if start := resume.whole(folder / "checkpoints", quiet=True):
        if not resumes:
            raise PipelineError(f"{folder} has a checkpoint already; set run= to another directory, or resume")
        check(start, conditions)
    collection = (
        sets.load(recipe.evaluation.urls, instructed=saved(recipe.model.family).instructed)
        if recipe.evaluation
        else None
    )

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it does not survive the loader's forks
    device = start_distributed(recipe.timeout_minutes)
    rank = dist.get_rank()
    start = resume.choose(folder / "checkpoints", conditions)
    if rank == 0:
        _write_recipe(recipe, folder, world)
    model_path = on_first_rank(lambda: _model(recipe, source, folder, anew=start is None), "the model to begin with")
    if start:
        if rank == 0:
            _shorten_ledgers(folder / "ledger", world, checkpoint.step_of(start))
        start, as_saved = for_this_world(start, recipe.timeout_minutes), start
        if start != as_saved:
            ds_config.setdefault("checkpoint", {})["load_universal"] = True
    processor = family.processor(recipe, model_path)
    frozen = load_frozen(recipe, model_path, device)
    engine = build_engine(recipe, ds_config, model_path)

    def features() -> KeptFeatures | None:
        return KeptFeatures(frozen, recipe.batch.features_mb << 20) if frozen else None

    @cache
    def reader_and_features() -> tuple[Processor, Features | None]:
        return family.for_evaluation(recipe, processor, frozen, device)

    def evaluate(chunk_tokens: int) -> Report | None:
        reader, seen = reader_and_features()
        encoder = ModelEncoder(
            recipe.run, "", engine.module.dimension, lambda: (engine, seen), reader, chunk_tokens, device
        )
        store = Memory(len(collection.items), encoder.dimension) if rank == 0 else None
        if not embed_collection(encoder, collection, store, device, interrupted=lambda: preemption.asked() > 0):
            return None
        report = on_first_rank(lambda: measure(recipe.run, collection, store.take, device=device), "the scores")
        return report if rank == 0 else None

    def batches_of(steps: range) -> Iterator[Batch]:
        timeout = 60 * recipe.timeout_minutes
        return batches(
            source,
            order,
            processor.encode,
            steps,
            rank=rank,
            world=world,
            timeout=timeout,
            trained_on=family.trained_on,
        )

    if not train(engine, Run(recipe, order, steps, start, conditions, batches_of, evaluate, features, preemption)):
        return
    export(engine, frozen, recipe, model_path, folder / "export")
    if rank == 0:
        status.note(folder, "finished", reason="")
        print(f"the model: {folder}/export    the curves: tensorboard --logdir {folder}/tensorboard")


def _model(recipe: Recipe, source: Source, folder: Path, anew: bool) -> str:
    """The model to begin with, in transformers' format; what is not there yet is made.

    An original checkpoint is converted. Without a path: random weights and a tokenizer of the data's texts, written
    where a run begins anew.
    """
    made = folder / "init"
    family = training_of(recipe)
    if recipe.model.path:
        before = checkpoint.entries(made)
        path = Path(family.resolve(recipe.model.path, made))
        if path.parent != made:
            return str(path)
        if path in before:
            manifest.check(path)
        else:
            manifest.seal(path)
        return str(path)
    if anew or not made.exists():
        unfinished = folder / "init.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        family.build(recipe.model, _texts(source), recipe.seed, unfinished)
        manifest.seal(unfinished)
        shutil.rmtree(made, ignore_errors=True)
        unfinished.rename(made)
    else:
        manifest.check(made)  # a checkpoint has nothing of what is frozen
    return str(made)


def _texts(source: Source) -> Iterator[str]:
    """The texts of some thousand samples, from the start of shards spread over all datasets."""
    chosen = np.linspace(0, len(source.shards), min(len(source.shards), _TOKENIZER_SHARDS), endpoint=False, dtype=int)
    share = -(-_TOKENIZER_SAMPLES // len(chosen))

    def read(number: int) -> list[tuple[bytes, np.void]]:
        _, shard = source.shards[number]
        records = source.records(number, 0, min(share, shard.samples))
        return list(zip(source.read(number, records), records, strict=True))

    with ThreadPoolExecutor(8) as pool:
        for number, samples in zip(chosen.tolist(), pool.map(read, chosen.tolist()), strict=True):
            for data, record in samples:
                with suppress(BadSample):  # training counts it
                    pair = source.parse(number, data, record)
                    yield from (item.text for item in pair.items)
                    yield from pair.alternatives


def _shorten_ledgers(folder: Path, world: int, step: int) -> None:
    """Drop what ranks that are there no more noted of the steps after `step`, which others take again."""
    for path in folder.glob("rank*.jsonl"):
        number = path.stem.removeprefix("rank")
        if number.isdecimal() and int(number) >= world:
            StepLog(path, step)


def _write_recipe(recipe: Recipe, folder: Path, world: int) -> None:
    """Keep the resolved recipe with the run, and what ran it."""
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    header = f"# {world} processes; Python {platform.python_version()}, {versions}\n"
    unfinished = folder / "recipe.unfinished"
    with disk_errors(folder / "recipe.yaml"):
        unfinished.write_text(header + dump_recipe(recipe))
        unfinished.rename(folder / "recipe.yaml")


if __name__ == "__main__":
    main()
