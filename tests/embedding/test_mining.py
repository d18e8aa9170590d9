"""Mining hard negatives: against brute force, on two processes, interrupted; what is never a negative."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from two_ranks import on_two_ranks

from pipeline.config import MiningRun
from pipeline.data.mined import MINED_FILE, MinedIndex, mined_dtype
from pipeline.data.index import Index, array_of, load_sidecar
from pipeline.data.sample import BadSample, Item, Pair
from pipeline.data.shards import write_shards
from pipeline.data.stored_vectors import ITEMS
from pipeline.embedding import mining, nearest
from pipeline.embedding.dataset import open_datasets
from pipeline.embedding.nearest import Candidates
from pipeline.embedding.ranks import Ranks, chosen, limits
from pipeline.errors import PipelineError

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
    target = f"{i % 5}/target {i % 60}"
    if i % 30 == 7:
        query = f"{(i + 5) % 5}/target {(i + 5) % 60}"
    return Pair(f"{i:04d}", dataset, "", Item("unreadable" if i % 40 == 11 else query), Item(target))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mining")
    for name in NAMES:
        write_shards((pair(name, i) for i in range(SAMPLES[name])), folder / name, dataset=name, shard_bytes=25_000)
    assert all(len(Index.load(str(folder / name)).shards) > 2 for name in NAMES)
    mine(folder, folder / "vectors", folder / "unused")
    return folder


def mine(shards: Path, vectors: Path, out: Path, **options: object) -> None:
    run = MiningRun(**{"vectors": str(vectors), "out": str(out), "count": 3, "depth": 20} | options)
    embedded = open_datasets([str(shards)], str(vectors), ITEMS)
    mining.mine_datasets(Texts(), embedded, str(shards), run, CPU)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def references(folder: Path, name: str) -> np.ndarray:
    parts = MinedIndex.load(str(folder / name)).parts
    return np.concatenate([array_of((folder / name / part.file).read_bytes())["negatives"] for part in parts])


@cache
def stored(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The vectors of all queries and targets of a dataset as the store has them, and which are usable."""
    pairs = [pair(name, i) for i in range(SAMPLES[name])]
    usable = np.array([each.query.text != "unreadable" for each in pairs])
    texts = Texts()
    rows = [
        [texts.prepare(item) for item in (each.query, each.target)] if fine else np.ones((2, WIDTH))
        for each, fine in zip(pairs, usable, strict=True)
    ]
    rounded = np.array(rows, np.float32).astype(np.float16).astype(np.float64)
    found = (rounded / np.linalg.norm(rounded, axis=-1, keepdims=True)).astype(np.float32)
    return found[:, 0], found[:, 1], usable


def brute_force(names: tuple[str, ...], query_name: str, options: MiningRun) -> list[list[tuple]]:
    """Each query's references (dataset, sample in the dataset, score) by the definition, in float64."""
    pairs = [(number, i, pair(name, i)) for number, name in enumerate(names) for i in range(SAMPLES[name])]
    everything = [(name, i, pair(name, i)) for name in NAMES for i in range(SAMPLES[name])]
    vectors = [stored(name) for name in names]
    targets = np.concatenate([each[1] for each in vectors])
    usable = np.concatenate([each[2] for each in vectors])
    seen: dict[Item, int] = {}
    for row, (_, _, each) in enumerate(pairs):
        if usable[row]:
            seen.setdefault(each.target, row)
    candidates = sorted(seen.values())
    fixed = np.round(targets.astype(np.float64) * 2**26) / 2**26
    result = []
    queries, own, fine = stored(query_name)
    for i in range(SAMPLES[query_name]):
        if not fine[i]:
            result.append([])
            continue
        mine, q = pair(query_name, i), np.round(queries[i].astype(np.float64) * 2**26) / 2**26
        right = {each.target for _, _, each in everything if each.query == mine.query} | {mine.query}
        scores = (fixed @ q).astype(np.float32)
        positive = float((np.round(own[i].astype(np.float64) * 2**26) / 2**26 @ q).astype(np.float32))
        ranked = sorted((row for row in candidates if pairs[row][2].target not in right), key=lambda r: (-scores[r], r))
        limit = np.inf if options.margin is None else positive - (1 - options.margin) * abs(positive)
        if options.absolute_margin is not None:
            limit = min(limit, positive - options.absolute_margin)
        kept = [row for row in ranked[: options.depth] if scores[row] <= limit][options.skip :][: options.count]
        result.append([(pairs[row][0], pairs[row][1], scores[row]) for row in kept])
    return result


def as_listed(found: np.ndarray, shards: Path, names: tuple[str, ...]) -> list[list[tuple]]:
    firsts = [np.cumsum([0, *(shard.samples for shard in Index.load(str(shards / name)).shards)]) for name in names]
    return [
        [
            (int(each["dataset"]), int(firsts[each["dataset"]][each["shard"]] + each["sample"]), each["score"])
            for each in row
            if each["shard"] >= 0
        ]
        for row in found
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"among": "all", "count": 5, "margin": 1.0, "skip": 2},
        {"margin": None, "depth": 200, "count": 4},
        {"margin": 1.05, "absolute_margin": 0.1, "depth": 30},
    ],
)
def test_negatives_are_those_of_brute_force(shards, tmp_path, options):
    run = MiningRun(**{"count": 3, "depth": 20} | options)
    mine(shards, shards / "vectors", tmp_path, **options)
    for name in NAMES:
        names = NAMES if run.among == "all" else (name,)
        found = references(tmp_path, name)
        expected = brute_force(names, name, run)
        assert as_listed(found, shards, names) == expected
        index = MinedIndex.load(str(tmp_path / name))
        index.check(str(tmp_path / name), name, Index.load(str(shards / name)))
        assert index.faults(str(tmp_path / name)) == []
        assert index.total("mined") == sum(map(len, expected)) > 100
        assert index.mean_score == pytest.approx(np.mean([each[2] for row in expected for each in row]), rel=1e-6)
    assert not (tmp_path / "first" / ".mined").exists() or not list((tmp_path / "first" / ".mined").iterdir())
