"""The initial model of a run, in transformers' format."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from pipeline.config import Recipe
from pipeline.data.sample import BadSample
from pipeline.data.source import Source
from pipeline.errors import PipelineError
from pipeline.models.registry import saved, training_of
from pipeline.storage.atomic import remove_leftovers, replacing
from pipeline.training import checkpoint, manifest

_TOKENIZER_SAMPLES, _TOKENIZER_SHARDS = 4096, 64


def initial_model(recipe: Recipe, source: Source, folder: Path, *, anew: bool) -> str:
    """Return the initial model's folder or hub name. A converted or randomly initialised model is written to `folder`.

    A random model gets a tokenizer trained on the data's texts. It is written again if the run begins `anew`.
    Raises manifest.Damaged if the files in `folder` are not as they were written.
    """
    if recipe.model.path:
        return resolved(recipe, folder)
    family = training_of(recipe)
    if anew or not folder.exists():
        remove_leftovers(folder.parent, folder.name)
        with replacing(folder) as partial:
            family.build(recipe.model, _texts(source), recipe.seed, partial)
            manifest.seal(partial)
    else:
        manifest.check(folder)  # checkpoints lack frozen parameters
    return str(folder)


def resolved(recipe: Recipe, folder: Path) -> str:
    """Return the folder or hub name of model.path. A copy in `folder` is written and sealed once, or else checked.

    Raises manifest.Damaged as `initial_model` does.
    """
    assert recipe.model.path
    before = checkpoint.entries(folder)
    path = Path(training_of(recipe).resolve(recipe.model.path, folder))
    if path.parent != folder:
        return str(path)
    if path in before:
        manifest.check(path)
    else:
        manifest.seal(path)
    return str(path)


def check_sizes(recipe: Recipe, path: str) -> None:
    """Raise PipelineError unless objective.dimensions suit the model at `path`, of which no weights are read."""
    if not (sizes := recipe.objective.sizes):
        return
    model = recipe.model
    full = training_of(recipe).dimension(model, saved(model.family).dimension(path))
    if sizes[-1] > full:
        raise PipelineError(
            f"objective.dimensions={sizes}: the model's vectors have {full} numbers: the last size must be {full}"
        )
    if sizes[-1] < full:  # but evaluations and exports use the whole vectors
        raise PipelineError(
            f"objective.dimensions={sizes} must end with the model's {full} numbers: otherwise the rest is not trained"
        )


def _texts(source: Source) -> Iterator[str]:
    """Yield the texts of about _TOKENIZER_SAMPLES samples, from the start of shards across all datasets."""
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
                    pair = source.parse(number, record, data)
                    yield from (item.text for item in pair.items)
                    yield from pair.alternatives
