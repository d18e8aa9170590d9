"""Train a recipe: `python -m pipeline.train RECIPE [key=value ...]`, on as many processes as the launcher starts.

    python -m pipeline.train pipeline/recipes/demo.yaml
    torchrun --nproc-per-node 8 -m pipeline.train pipeline/recipes/demo.yaml optimizer.lr=2e-5

Started again, a run continues from its newest checkpoint, on any number of processes that divides data.lanes.
"""

import argparse
import os
import platform
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch.distributed as dist

from pipeline import status
from pipeline.config import Recipe, Train, dump_recipe, is_offloaded, load_ds_config, load_recipe
from pipeline.data.batch import Batch
from pipeline.data.lengths import Lengths
from pipeline.data.sample import BadSample
from pipeline.data.source import Source
from pipeline.data.stream import batches
from pipeline.errors import PipelineError, command_line
from pipeline.evaluation import sets
from pipeline.evaluation.encode import embed_collection
from pipeline.evaluation.encoders import LlaveEncoder
from pipeline.evaluation.measure import measure
from pipeline.evaluation.report import Report
from pipeline.evaluation.store import Memory
from pipeline.models import llave, weights
from pipeline.models.tower import KeptFeatures
from pipeline.training import checkpoint
from pipeline.training.distributed import end_distributed, on_first_rank, start_distributed
from pipeline.training.engine import PARTS, build_engine, load_tower
from pipeline.training.export import export
from pipeline.training.loop import Run, train
from pipeline.training.monitor import StepLog
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
    if int(os.environ.get("RANK", 0)) == 0:
        status.begin(folder)
    with status.failures_noted(folder):
        _train(recipe, preemption, resume=not arguments.no_resume)
    end_distributed()


def _train(recipe: Recipe, preemption: Preemption, *, resume: bool) -> None:
    # What is wrong is found here, on every rank, before processes meet and a model is loaded.
    folder, world = Path(recipe.run), int(os.environ.get("WORLD_SIZE", 1))
    if recipe.model.architecture:
        llave.check_architecture(recipe.model.architecture)
    source = Source.open(recipe.data)
    lengths = Lengths(llave.tiling(weights.config_of(recipe.model)), recipe.video.frames)
    order = source.order(recipe.batch.global_batch, recipe.seed, lengths)
    order.check_world(world)
    ds_config = load_ds_config(recipe, world)
    source.check_memory(order, world)
    steps = recipe.steps or round(recipe.epochs * order.steps_per_epoch)
    if steps < 1:
        raise PipelineError(f"epochs={recipe.epochs} of {order.steps_per_epoch} steps is less than a step")
    conditions = conditions_of_run(recipe, source, ds_config["zero_optimization"])
    if start := checkpoint.latest(folder / "checkpoints"):
        if not resume:
            raise PipelineError(f"{folder} has a checkpoint already; set run= to another directory, or resume")
        checkpoint.check(start, conditions)
    collection = sets.load(recipe.evaluation.urls) if recipe.evaluation else None

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it does not survive the loader's forks
    device = start_distributed(recipe.timeout_minutes)
    rank = dist.get_rank()
    # One rank's word counts: on a shared file system another may not yet see the newest checkpoint.
    decision = [start]
    dist.broadcast_object_list(decision)
    (start,) = decision
    if rank == 0:
        _write_recipe(recipe, folder, world)
    model_path = on_first_rank(lambda: _model(recipe, source, folder, anew=start is None))
    if start:
        if rank == 0:
            _shorten_ledgers(folder / "ledger", world, checkpoint.step_of(start))
        start, as_saved = for_this_world(start, recipe.timeout_minutes), start
        if start != as_saved:
            ds_config.setdefault("checkpoint", {})["load_universal"] = True
    model = recipe.model
    processor = llave.Processor.load(
        model_path, model.max_tokens, recipe.video.frames, pinpoints=model.image_grid_pinpoints
    )
    tower = load_tower(recipe, model_path, device)  # before the engine: under ZeRO-3 it must not be partitioned
    engine = build_engine(recipe, ds_config, model_path)

    def features() -> KeptFeatures | None:
        limit = recipe.batch.features_mb << 20
        return KeptFeatures(tower, recipe.batch.tower_tiles, limit) if tower else None

    def evaluate(chunk_tokens: int) -> Report | None:
        seen = partial(tower.features_of, tiles_at_once=recipe.batch.tower_tiles) if tower else None
        dimension = engine.module.config.text_config.hidden_size
        encoder = LlaveEncoder(recipe.run, "", dimension, lambda: engine, processor, chunk_tokens, device, seen)
        store = Memory(len(collection.items), encoder.dimension) if rank == 0 else None
        if not embed_collection(encoder, collection, store, device, interrupted=lambda: preemption.asked() > 0):
            return None
        report = on_first_rank(lambda: measure(recipe.run, collection, store.take, device=device))
        return report if rank == 0 else None

    def batches_of(steps: range) -> Iterator[Batch]:
        timeout = 60 * recipe.timeout_minutes
        return batches(source, order, processor.encode, steps, rank=rank, world=world, timeout=timeout)

    if not train(engine, Run(recipe, order, steps, start, conditions, batches_of, evaluate, features, preemption)):
        return
    export(engine, tower, recipe.train.lora, model_path, recipe.model.path, folder / "export")
    if rank == 0:
        status.note(folder, "finished", reason="")
        print(f"the model: {folder}/export    the curves: tensorboard --logdir {folder}/tensorboard")


def conditions_of_run(recipe: Recipe, source: Source, zero: dict) -> dict:
    """What must be the same for a checkpoint to be continued, with the same batches.

    zero: the DeepSpeed config's "zero_optimization".
    """
    names = ("lanes", "block_samples", "window_blocks", "batches", "cap")
    return {f"data.{name}": getattr(recipe.data, name) for name in names} | {
        "data.datasets": [part.model_dump() for part in recipe.data.datasets],
        "the data's fingerprint": source.fingerprint,
        "video.frames": recipe.video.frames,
        "the ZeRO stage": zero["stage"],
        "the optimizer is offloaded": is_offloaded(zero),
        "seed": recipe.seed,
        "precision": recipe.precision,
        "batch.global_batch": recipe.batch.global_batch,
        "batch.sub_batch": recipe.batch.sub_batch,
        "the loss": recipe.loss.model_dump(),
        "model": recipe.model.model_dump(mode="json", exclude={"max_tokens", "attention"}),
        "the model's fingerprint": weights.fingerprint(recipe.model.path),
        "what is trained": _trained(recipe.train),
    }


def _trained(train: Train) -> dict:
    """What has optimizer state; learning rates may change under way."""
    parts = {name: bool(getattr(train, name)) for name in PARTS}
    return parts | {"lora": train.lora.model_dump() if train.lora else None}


def _model(recipe: Recipe, source: Source, folder: Path, anew: bool) -> str:
    """The model to begin with, in transformers' format; what is not there yet is made.

    An original checkpoint is converted. Without a path: random weights and a tokenizer of the data's texts, written
    where a run begins anew.
    """
    made = folder / "init"
    if recipe.model.path:
        return weights.resolve(recipe.model.path, made)
    if anew or not made.exists():
        unfinished = folder / "init.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        llave.build(recipe.model.architecture, _texts(source), recipe.seed, unfinished)
        shutil.rmtree(made, ignore_errors=True)
        unfinished.rename(made)
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
        if int(path.stem.removeprefix("rank")) >= world:
            StepLog(path, step)


def _write_recipe(recipe: Recipe, folder: Path, world: int) -> None:
    """Keep the resolved recipe with the run, and what ran it."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    header = f"# {world} processes; Python {platform.python_version()}, {versions}\n"
    unfinished = folder / "recipe.unfinished"
    unfinished.write_text(header + dump_recipe(recipe))
    unfinished.rename(folder / "recipe.yaml")


if __name__ == "__main__":
    main()
