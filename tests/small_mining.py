"""Two small datasets of texts, whose vectors are known, and their mining."""

from pathlib import Path

import numpy as np
import torch

from pipeline.config import MiningRun
from pipeline.data.arrays import array_of
from pipeline.data.index import Index
from pipeline.data.mined import MinedIndex
from pipeline.data.sample import BadSample, Item, Pair
from pipeline.data.shards import write_shards
from pipeline.data.stored_vectors import ITEMS
from pipeline.embedding import mining
from pipeline.embedding.dataset import open_datasets

WIDTH = 16
NAMES = ("first", "second")
SAMPLES = {"first": 90, "second": 70}
CPU = torch.device("cpu")


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


class Texts:
    """An encoder that gives every text a random vector; targets that begin alike are near each other."""

    name, identity, dimension, instructed = "texts", "texts 1", WIDTH, False

    def prepare(self, item: Item) -> np.ndarray:
        if item.text == "unreadable":
            raise BadSample("made so")
        group, _, own = item.text.rpartition("/")
        raw = [np.random.PCG64([*part.encode(), 7]).random_raw(WIDTH) for part in (group, own)]
        rows = [unit((each >> np.uint64(11)) * 2.0**-53 - 0.5) for each in raw]
        return unit(rows[0] + 0.5 * rows[1])

    def embed(self, prepared: list[np.ndarray]) -> torch.Tensor:
        return torch.tensor(np.array(prepared, np.float32).reshape(-1, WIDTH))


def pair(dataset: str, i: int) -> Pair:
    """Targets repeat, queries repeat, a few queries are targets, and a few samples cannot be read."""
    query = f"{i % 5}/{dataset} query {i // 2 if i % 10 < 2 else i}"
    number = i % 60 if dataset == "first" else (i + 30) % 90
    target = f"{number % 5}/target {number}"
    if i % 30 == 7:
        query = f"{(i + 5) % 5}/target {(i + 5) % 60}"
    return Pair(f"{i:04d}", dataset, "", Item("unreadable" if i % 40 == 11 else query), Item(target))


def write_datasets(folder: Path) -> None:
    for name in NAMES:
        write_shards((pair(name, i) for i in range(SAMPLES[name])), folder / name, dataset=name, shard_bytes=25_000)
    assert all(len(Index.load(str(folder / name)).shards) > 2 for name in NAMES)
    mine(folder)


def mine(shards: Path, out: Path | None = None, **options: object) -> None:
    """Mine the negatives of the datasets there: to `out` or a folder `mined`, with vectors in a folder `vectors`."""
    places = {"teacher": str(shards / "vectors"), "out": str(out or shards / "mined")}
    run = MiningRun(**places | {"count": 3, "depth": 20} | options)
    mining.mine_datasets(
        Texts(), open_datasets([str(shards)], run.teacher, ITEMS), str(shards), run, torch.device("cpu")
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def references(folder: Path, name: str) -> np.ndarray:
    parts = MinedIndex.load(str(folder / name)).parts
    return np.concatenate([array_of((folder / name / part.file).read_bytes())["negatives"] for part in parts])
