"""Mining hard negatives: against brute force, on two processes, interrupted; what is never a negative."""

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from small_mining import NAMES, SAMPLES, WIDTH, Texts, files, mine, pair, references, unit, write_datasets
from two_ranks import on_two_ranks

from pipeline.config import MiningRun
from pipeline.data.index import Index
from pipeline.data.mined import MINED_FILE, MinedIndex
from pipeline.data.sample import Item
from pipeline.data.stored_vectors import ITEMS
from pipeline.embedding import mining, nearest, targets
from pipeline.embedding.dataset import open_datasets
from pipeline.embedding.embed_shards import embed_datasets
from pipeline.embedding.nearest import Candidates
from pipeline.embedding.ranks import Ranking, Ranks, chosen, limits
from pipeline.embedding.targets import FACTS, Targets
from pipeline.errors import PipelineError
from pipeline.storage import objects


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mining")
    write_datasets(folder)
    return folder


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
    mine(shards, tmp_path, **options)
    for name in NAMES:
        names = NAMES if run.among == "all" else (name,)
        found = references(tmp_path, name)
        expected = brute_force(names, name, run)
        assert as_listed(found, shards, names) == expected
        index = MinedIndex.load(str(tmp_path / name))
        index.check(str(tmp_path / name), name, Index.load(str(shards / name)))
        assert index.damaged(str(tmp_path / name)) == []
        assert index.total("mined") == sum(map(len, expected)) > 100
        assert index.mean_score == pytest.approx(np.mean([each[2] for row in expected for each in row]), rel=1e-6)
    assert not (tmp_path / "first" / ".mined").exists() or not list((tmp_path / "first" / ".mined").iterdir())


def test_two_processes_and_any_start_write_the_bytes_of_one(shards, tmp_path, monkeypatch):
    mine(shards, tmp_path / "alone", among="all", choose="sampled", seed=3)
    expected = files(tmp_path / "alone")
    monkeypatch.setenv("SHARDS", str(shards))
    monkeypatch.setenv("OUT", str(tmp_path / "two"))
    on_two_ranks(_mine_on_rank)
    assert files(tmp_path / "two") == expected
    assert not list(tmp_path.glob("mining-*"))


def _mine_on_rank(rank: int) -> int:
    """Mine while the folders of records are listed as empty, as a shared file system may for another node's files."""
    out, listed = Path(os.environ["OUT"]), objects.list_under
    objects.list_under = lambda url: [] if url.endswith(".mined") else listed(url)
    mine(Path(os.environ["SHARDS"]), out, among="all", choose="sampled", seed=3)
    objects.list_under = listed
    for record in out.glob("*/.mined/*") if rank == 0 else ():
        record.unlink()
    return rank


def test_interrupted_mining_continues_to_the_same_bytes(shards, tmp_path, monkeypatch):
    kept = []

    def keep(dataset, shard, *arguments):
        if len(kept) == 3:
            raise KeyboardInterrupt
        kept.append(Path(dataset.place, shard.file.replace(".tar", ".mined.npy")))
        return original(dataset, shard, *arguments)

    original = mining.MinedDataset.keep
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mining.MinedDataset, "keep", keep)
        mine(shards, tmp_path)
    assert not (tmp_path / "first" / MINED_FILE).exists()
    times = [path.stat().st_mtime_ns for path in kept]
    content = kept[1].read_bytes()
    kept[1].write_bytes(content[:-1] + b"x")
    with pytest.raises(PipelineError, match=rf"the hash of {kept[1].name} is wrong; start again, and only these"):
        mine(shards, tmp_path)
    mine(shards, tmp_path)
    assert [path.stat().st_mtime_ns == time for path, time in zip(kept, times, strict=True)] == [True, False, True]
    expected = files(shards / "mined")
    assert files(tmp_path) == expected
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/*"))]
    mine(shards, tmp_path)  # nothing is left to do
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/*"))] == times
    with pytest.raises(
        PipelineError, match=r"/first has negatives that texts mined with other options, .* overwrite=true"
    ):
        mine(shards, tmp_path, count=2)
    monkeypatch.setattr(Texts, "identity", "texts 2")
    with pytest.raises(
        PipelineError, match=r"texts 1.* not of .*texts 2.*: add overwrite=true, or choose another teacher="
    ):
        mine(shards, tmp_path)
    monkeypatch.undo()
    kept[0].write_bytes(b"x" * len(kept[0].read_bytes()))
    (tmp_path / "second" / MINED_FILE).unlink()
    mine(shards, tmp_path, overwrite=True, count=2)
    mine(shards, tmp_path, overwrite=True)
    assert files(tmp_path) == expected


def _stopped_at(monkeypatch, stops, *arguments, **options) -> None:
    """Mine until an object is deleted whose URL `stops` is true of: a kill at this moment."""
    delete = objects.delete

    def deleting(url):
        if stops(url):
            raise KeyboardInterrupt
        delete(url)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(objects, "delete", deleting)
        mine(*arguments, **options)


@pytest.mark.parametrize("overwrite", [False, True])
def test_mining_killed_while_it_deletes_its_records_is_finished(shards, tmp_path, monkeypatch, overwrite):
    records = iter(range(100))
    _stopped_at(monkeypatch, lambda url: url.endswith(".npy.json") and next(records) > 0, shards, tmp_path)
    assert (tmp_path / "first" / MINED_FILE).exists() and list(tmp_path.glob("first/.mined/*.json"))
    mine(shards, tmp_path, overwrite=overwrite)
    assert files(tmp_path) == files(shards / "mined")


def test_mining_killed_before_it_deletes_the_old_index_leaves_the_old_negatives(shards, tmp_path, monkeypatch):
    mine(shards, tmp_path)
    _stopped_at(monkeypatch, lambda url: url.endswith(f"first/{MINED_FILE}"), shards, tmp_path, count=2, overwrite=True)
    assert list(tmp_path.glob("first/.mined/*"))
    mine(shards, tmp_path)
    assert files(tmp_path) == files(shards / "mined")
    _stopped_at(monkeypatch, lambda url: url.endswith(f"first/{MINED_FILE}"), shards, tmp_path, count=2, overwrite=True)
    mine(shards, tmp_path, count=2, overwrite=True)
    mine(shards, tmp_path / "two", count=2)
    assert files(tmp_path / "first") == files(tmp_path / "two" / "first")


def test_vectors_that_exist_are_used_in_their_format(tmp_path):
    write_datasets(tmp_path)
    embed_datasets(Texts(), open_datasets([str(tmp_path)], None, ITEMS), "bf16", torch.device("cpu"), overwrite=False)
    before = {name: data for name, data in files(tmp_path).items() if "item_embeddings" in name}
    mine(tmp_path, tmp_path, teacher=None)
    after = files(tmp_path)
    assert {name: after[name] for name in after if "item_embeddings" in name} == before
    assert MinedIndex.load(str(tmp_path / "first")).total("mined") > 200


def test_nearest_is_exact_for_any_tiles(monkeypatch):
    """Equal vectors, excluded candidates, rows that are none, and fewer candidates than ranks."""
    random = np.random.default_rng(0)
    vectors = unit(random.normal(size=(700, 24)))
    vectors[100:140] = vectors[5]
    vectors[600] = vectors[5]
    queries = unit(random.normal(size=(50, 24)))
    queries[0] = vectors[5]
    numbers = np.flatnonzero(random.random(700) < 0.9)
    excluded = np.repeat(np.arange(50), 3), random.integers(0, 700, 150)
    exact = (_multiples(queries) @ _multiples(vectors).T).astype(np.float32)
    exact[excluded] = -np.inf
    exact[:, np.setdiff1d(np.arange(700), numbers)] = -np.inf
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :40]
    assert expected[0, 1] == 100  # ties are in the order of the numbers
    for tile_bytes, block in ((1 << 10, 7), (1 << 14, 50), (1 << 28, 4096)):
        monkeypatch.setattr(nearest, "_QUERIES", block)
        found, scores = nearest.nearest(queries, Candidates(vectors, numbers), 40, excluded, tile_bytes=tile_bytes)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(scores, np.take_along_axis(exact, expected, axis=1))
    few, scores = nearest.nearest(queries[:2], Candidates(vectors, numbers[:3]), 5)
    assert (few[:, 3:] == -1).all() and (scores[:, 3:] == -np.inf).all()
    assert (np.sort(few[:, :3], axis=1) == numbers[:3]).all()


def _multiples(rows: np.ndarray) -> np.ndarray:
    return np.round(rows.astype(np.float64) * 2**26) / 2**26


def test_inexact_products_change_nothing(monkeypatch):
    """The float32 products only choose pairs: any error within their bound leaves the result."""
    random = np.random.default_rng(1)
    # Nearly equal candidates, with ties: every error that is not allowed for changes the order.
    vectors = unit(unit(random.normal(size=8)) + 3e-7 * random.normal(size=(400, 8)))
    queries = unit(random.normal(size=(30, 8)))
    plain = nearest.nearest(queries, Candidates(vectors, np.arange(400)), 21)
    applied = []

    def inexact(queries: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(len(queries), len(tile), generator=torch.Generator().manual_seed(2)) * 2 - 1
        applied.append(noise)
        return queries @ tile.T + noise * 7 * 2.0**-24  # of a bound of 8 x 2^-24

    monkeypatch.setattr(nearest, "_products", inexact)
    noisy = nearest.nearest(queries, Candidates(vectors, np.arange(400)), 21, tile_bytes=10_000)
    assert len(applied) > 3
    for one, other in zip(plain, noisy, strict=True):
        np.testing.assert_array_equal(one, other)


def test_near_copies_of_the_target_are_dropped_and_hard_candidates_mined():
    random = np.random.default_rng(0)
    queries = unit(random.normal(size=(40, 128)))
    answers = unit(queries + 0.5 * unit(random.normal(size=(40, 128))))
    copies = unit(answers + 0.02 * unit(random.normal(size=(40, 128))))  # false negatives
    hard = unit(answers + unit(random.normal(size=(40, 128))))
    vectors = np.concatenate([answers, copies, hard, unit(random.normal(size=(200, 128)))])
    facts = np.zeros(len(vectors), FACTS)
    facts["usable"], facts["target_hash"] = True, 1 + np.arange(len(vectors))
    facts["query_hash"] = 1000 + np.arange(len(vectors))
    every = Targets(np.array([0, len(vectors)]), np.array([[0, 0]]), vectors, facts)
    options = MiningRun(count=1)
    ranking = Ranking(every, 0, options, torch.device("cpu"))
    ranks = ranking.ranks(0, queries, np.ones(40, bool))
    mined = ranks.numbers[np.arange(40), chosen(ranks, options, (0, 0), 0)[:, 0]]
    assert (ranks.numbers[:, 0] == 40 + np.arange(40)).all()  # the copies are nearest
    assert (mined == 80 + np.arange(40)).all()
    for positive, limit in ((0.8, 0.76), (0.0, 0.0), (-0.2, -0.21)):  # never above the positive
        assert limits(np.array([positive], np.float32), 0.95)[0] == pytest.approx(limit, abs=1e-7)


def test_samples_are_drawn_uniformly_from_the_remaining_ranks():
    n, depth = 3000, 6
    above = np.zeros((n, depth), bool)
    above[:, 1] = True
    numbers = np.tile(np.arange(depth), (n, 1))
    numbers[:, 5] = -1
    none = np.zeros((n, depth), bool)
    ranks = Ranks(np.ones(n, bool), np.ones(n, np.float32), numbers, numbers.astype(np.float32), above, none, 0)
    options = MiningRun(count=2, depth=depth, choose="sampled", skip=1, seed=4)
    places = chosen(ranks, options, (1, 2), 0)
    assert (places[:, 0] < places[:, 1]).all()
    counts = np.bincount(places.ravel(), minlength=depth)
    assert counts[[0, 1, 5]].sum() == 0  # skipped, likely right, none
    assert (abs(counts[2:5] - 2000) < 5 * np.sqrt(n * 2 / 9)).all()  # five standard deviations
    np.testing.assert_array_equal(chosen(ranks, options, (1, 2), 0)[100:], places[100:])
    part = Ranks(*(each[100:] for each in (ranks.usable, ranks.positive, numbers, ranks.scores, above, none)), 0)
    np.testing.assert_array_equal(chosen(part, options, (1, 2), 100), places[100:])
    assert (chosen(part, options, (1, 3), 100) != places[100:]).any()
    assert (chosen(ranks, MiningRun(count=8, depth=depth, skip=1), (0, 0), 0)[0] == [2, 3, 4, -1, -1, -1, -1, -1]).all()


def test_full_scratch_folder_is_refused_before_work(shards, tmp_path, monkeypatch):
    with pytest.raises(PipelineError, match=r"scratch=.*none: No such file or directory: name a folder that exists"):
        mine(shards, tmp_path, scratch=str(tmp_path / "none"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(targets.os, "posix_fallocate", full)
    with pytest.raises(PipelineError, match=r"has no room for the targets' vectors, 0.0 GB \(No space left"):
        mine(shards, tmp_path / "out", scratch=str(tmp_path))
    assert not list(tmp_path.glob("mining-*"))
