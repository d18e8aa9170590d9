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

from pipeline.config import Recipe, dump_recipe, is_offloaded, load_ds_config, load_recipe
from pipeline.data.batch import Batch
from pipeline.data.lengths import VERSION as LENGTHS_VERSION
from pipeline.data.order import VERSION as ORDER_VERSION
from pipeline.data.sample import BadSample
from pipeline.data.source import Source
from pipeline.data.stream import batches
from pipeline.distributed import end_distributed, on_first_rank, start_distributed
from pipeline.errors import PipelineError, disk_errors
from pipeline.evaluation import sets
from pipeline.evaluation.encode import embed_collection
from pipeline.evaluation.encoders import ModelEncoder
from pipeline.evaluation.measure import measure
from pipeline.evaluation.report import Report
from pipeline.evaluation.store import MemoryStore
from pipeline.interrupt import INTERRUPTED
from pipeline.jobs import limits, status
from pipeline.jobs.program import command_line
from pipeline.models import loading, weights
from pipeline.models.chunks import Features
from pipeline.models.files import fetched
from pipeline.models.frozen import KeptFeatures
from pipeline.models.kinds import KINDS, Processor
from pipeline.models.masked import VERSION as MASKS_VERSION
from pipeline.storage import lock
from pipeline.training import checkpoint, manifest, resume
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
    kind = KINDS[recipe.model.kind]
    kind.check(recipe.model)
    source = Source.open(recipe.data)
    kind.check_data(recipe, source)
    order = source.order(recipe.batch.global_batch, recipe.seed, kind.lengths(recipe))
    order.check_world(world)
    ds_config = load_ds_config(recipe, world)
    kind.check_stage(ds_config["zero_optimization"]["stage"])
    source.check_memory(order, world)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    limits.require_shared_memory(recipe, source, kind.lengths(recipe), world, ranks)
    limits.raise_open_files()
    steps = recipe.steps or round(recipe.epochs * order.steps_per_epoch)
    if steps < 1:
        raise PipelineError(f"epochs={recipe.epochs} of {order.steps_per_epoch} steps is less than a step")
    conditions = conditions_of_run(recipe, source, ds_config["zero_optimization"])
    if start := resume.whole(folder / "checkpoints", quiet=True):
        if not resumes:
            raise PipelineError(f"{folder} has a checkpoint already; set run= to another directory, or resume")
        checkpoint.check(start, conditions)
    collection = sets.load(recipe.evaluation.urls, instructed=kind.instructed) if recipe.evaluation else None

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
    processor = kind.processor(recipe, model_path)
    frozen = load_frozen(recipe, model_path, device)
    engine = build_engine(recipe, ds_config, model_path)

    def features() -> KeptFeatures | None:
        return KeptFeatures(frozen, recipe.batch.features_mb << 20) if frozen else None

    @cache
    def reader_and_features() -> tuple[Processor, Features | None]:
        return kind.for_evaluation(recipe, processor, frozen, device)

    def evaluate(chunk_tokens: int) -> Report | None:
        reader, seen = reader_and_features()
        encoder = ModelEncoder(
            recipe.run, "", engine.module.dimension, lambda: (engine, seen), reader, chunk_tokens, device
        )
        store = MemoryStore(len(collection.items), encoder.dimension) if rank == 0 else None
        if not embed_collection(encoder, collection, store, interrupted=lambda: preemption.asked() > 0):
            return None
        report = on_first_rank(lambda: measure(recipe.run, collection, store.take, device=device), "the scores")
        return report if rank == 0 else None

    def batches_of(steps: range) -> Iterator[Batch]:
        timeout = 60 * recipe.timeout_minutes
        return batches(
            source, order, processor.encode, steps, rank=rank, world=world, timeout=timeout, trained_on=kind.trained_on
        )

    if not train(engine, Run(recipe, order, steps, start, conditions, batches_of, evaluate, features, preemption)):
        return
    export(engine, frozen, recipe, model_path, folder / "export")
    if rank == 0:
        status.note(folder, "finished", reason="")
        print(f"the model: {folder}/export    the curves: tensorboard --logdir {folder}/tensorboard")


def conditions_of_run(recipe: Recipe, source: Source, zero: dict) -> dict:
    """What must be the same for a checkpoint to be continued, with the same batches.

    zero: the DeepSpeed config's "zero_optimization".
    """
    names = ("lanes", "block_samples", "window_blocks", "batches", "cap")
    model, loss, kind = recipe.model, recipe.loss, KINDS[recipe.model.kind]
    of_others = {"kind", "instruction", "text_encoder"} if model.kind == "llave" else set()
    masks = {name for name in type(loss).model_fields if name.startswith("mask_")}
    return (
        {f"data.{name}": getattr(recipe.data, name) for name in names}
        | {
            "data.datasets": [part.model_dump() for part in recipe.data.datasets],
            "the data's fingerprint": source.fingerprint,
            "the order's version": ORDER_VERSION,
            "the token lengths' version": LENGTHS_VERSION,
            "video.frames": recipe.video.frames,
            "the ZeRO stage": zero["stage"],
            "the optimizer is offloaded": is_offloaded(zero),
            "seed": recipe.seed,
            "precision": recipe.precision,
            "batch.global_batch": recipe.batch.global_batch,
            "batch.sub_batch": recipe.batch.sub_batch,
            "the loss": loss.model_dump(exclude=masks if kind.contrastive else set()),
            "model": model.model_dump(mode="json", exclude={"max_tokens", "attention", "images", *of_others}),
            "the model's fingerprint": weights.fingerprint(model.path),
            "what is trained": _trained(recipe),
        }
        | ({"the text encoder's fingerprint": weights.fingerprint(model.text_encoder)} if model.text_encoder else {})
        | ({"model.images": _images(recipe)} if kind.sees else {})
        | ({} if kind.contrastive else {"the masks' version": MASKS_VERSION})
    )


def _images(recipe: Recipe) -> str:
    """How they are read: as the recipe says, or the model that it begins with, or else upright."""
    path, images = recipe.model.path, recipe.model.images
    if path is None or weights.is_original(fetched(path, weights=False)):  # whose own config says nothing of it
        return images or "upright"
    return "as_stored" if loading.reads_as_stored(path, images) else "upright"


def _trained(recipe: Recipe) -> dict:
    """What has optimizer state; learning rates may change under way."""
    parts = {name: bool(getattr(recipe.train, name)) for name in KINDS[recipe.model.kind].parts}
    return parts | {"lora": recipe.train.lora.model_dump() if recipe.train.lora else None}


def _model(recipe: Recipe, source: Source, folder: Path, anew: bool) -> str:
    """The model to begin with, in transformers' format; what is not there yet is made.

    An original checkpoint is converted. Without a path: random weights and a tokenizer of the data's texts, written
    where a run begins anew.
    """
    made = folder / "init"
    kind = KINDS[recipe.model.kind]
    if recipe.model.path:
        before = checkpoint.entries(made)
        path = Path(kind.resolve(recipe.model.path, made))
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
        kind.build(recipe.model, _texts(source), recipe.seed, unfinished)
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
