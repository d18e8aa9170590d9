"""Clusters of neighbours by pipeline.mine: alike, on two processes, interrupted, and refused for other options."""

import os
from pathlib import Path

import numpy as np
import pytest
from small_mining import NAMES, SAMPLES, Texts, files, mine, pair, write_datasets
from two_ranks import on_two_ranks

from pipeline.data.index import Index
from pipeline.data.neighbours import ARRAY_FILE, NEIGHBOURS_FILE, Neighbours
from pipeline.embedding import clustering
from pipeline.errors import PipelineError

SIZE = 5


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clusters")
    write_datasets(folder)
    mine(folder, folder / "clustered", clusters=SIZE)
    return folder


def clusters_in(folder: Path, name: str) -> np.ndarray:
    numbers = Neighbours.load(str(folder / name)).clusters(str(folder / name), SAMPLES[name])
    return numbers[: len(numbers) // SIZE * SIZE].reshape(-1, SIZE).astype(int)


def clusters_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(folder).items() if "neighbours" in name}


@pytest.mark.parametrize("name", NAMES)
def test_clusters_are_alike_and_without_equal_items(shards, name):
    index = Index.load(str(shards / name))
    found = Neighbours.load(str(shards / "clustered" / name))
    found.check("", name, index)
    assert (found.size, found.made["model"], found.made["depth"]) == (SIZE, "texts", 20)
    assert not (shards / "clustered" / name / ".neighbours").exists() or not list(
        (shards / "clustered" / name / ".neighbours").iterdir()
    )
    clusters = clusters_in(shards / "clustered", name)
    pairs = [pair(name, i) for i in range(SAMPLES[name])]
    together = sum(
        pairs[a].target == pairs[b].target or pairs[a].query == pairs[b].query
        for cluster in clusters
        for a in cluster
        for b in cluster
        if a < b
    )
    assert together <= found.made["pairs_not_separated"] <= 3
    readable = [each.query.text != "unreadable" for each in pairs]
    assert found.made["samples_without_neighbours"] == readable.count(False)

    targets = np.array([Texts().prepare(each.target) for each in pairs])
    queries = np.array(
        [Texts().prepare(each.query) if fine else np.zeros(16) for each, fine in zip(pairs, readable, strict=True)]
    )

    def mean(clusters: np.ndarray) -> float:
        """The mean similarity of the queries and the other targets of their cluster."""
        similar = queries[clusters] @ targets[clusters].swapaxes(1, 2)
        return float(similar[:, ~np.eye(SIZE, dtype=bool)].mean())

    mixed = np.random.default_rng(0).permutation(SAMPLES[name])[: clusters.size].reshape(-1, SIZE)
    assert mean(clusters) > mean(mixed) + 0.15


def test_two_processes_write_the_bytes_of_one(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDS", str(shards))
    monkeypatch.setenv("OUT", str(tmp_path))
    on_two_ranks(_cluster_on_rank)
    assert files(tmp_path) == files(shards / "clustered")


def _cluster_on_rank(rank: int) -> int:
    mine(Path(os.environ["SHARDS"]), Path(os.environ["OUT"]), clusters=SIZE)
    return rank


@pytest.mark.parametrize("stopped", ["_note_nearest", "clusters_of"])
def test_interrupted_clustering_continues_to_the_same_bytes(shards, tmp_path, monkeypatch, stopped):
    original, calls = getattr(clustering, stopped), []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clustering, stopped, stopping)
        mine(shards, tmp_path, clusters=SIZE)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/.neighbours/*.npy")}
    assert kept
    ranked, note = [], clustering._note_nearest
    monkeypatch.setattr(clustering, "_note_nearest", lambda *args: ranked.append(args) or note(*args))
    mine(shards, tmp_path, clusters=SIZE)
    total = sum(len(Index.load(str(shards / name)).shards) for name in NAMES)
    assert len(ranked) == (total - 1 if stopped == "_note_nearest" else 0)
    assert clusters_of(tmp_path) == clusters_of(shards / "clustered")
    mine(shards, tmp_path, clusters=SIZE)  # nothing is left to do
    assert len(ranked) == (total - 1 if stopped == "_note_nearest" else 0)


def test_records_of_other_options_are_not_continued(shards, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clustering, "clusters_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        mine(shards, tmp_path, clusters=SIZE, margin=0.5)
    mine(shards, tmp_path, clusters=SIZE, overwrite=True)
    assert clusters_of(tmp_path) == clusters_of(shards / "clustered")


def test_other_clusters_are_replaced_only_with_overwrite(shards, tmp_path):
    mine(shards, tmp_path, clusters=SIZE)
    before = clusters_of(tmp_path)
    with pytest.raises(PipelineError, match=r"first has clusters of 5 that texts found with other options, "):
        mine(shards, tmp_path, clusters=SIZE + 1)
    assert clusters_of(tmp_path) == before
    (tmp_path / "first" / NEIGHBOURS_FILE).write_text("{}")
    with pytest.raises(PipelineError, match=r"neighbours.json has format None"):
        mine(shards, tmp_path, clusters=SIZE)
    (tmp_path / "second" / ARRAY_FILE).unlink()
    mine(shards, tmp_path, clusters=SIZE, overwrite=True)
    assert clusters_of(tmp_path) == before
    mine(shards, tmp_path, clusters=SIZE + 1, overwrite=True)
    assert Neighbours.load(str(tmp_path / "first")).size == SIZE + 1


def test_datasets_smaller_than_a_cluster_are_refused_first(shards, tmp_path):
    with pytest.raises(PipelineError, match="dataset second has 70 samples, less than a cluster of 80: set"):
        mine(shards, tmp_path, clusters=80)
    assert not list(tmp_path.iterdir())


def test_neighbours_with_equal_targets_are_spread_over_their_samples():
    """Classes A, A, B, B, B: the queries of A are near target B's first sample, and so on."""
    target = np.array([4, 4, 2, 2, 2])
    near = np.array([[0, 2], [1, 2], [2, 0], [3, 0], [4, 0]])
    found, scores = clustering._neighbours(near, np.arange(5, dtype=np.float32), target)
    assert found[:, 0].tolist() == [2, 3, 0, 1, 0] and (found[:, 1:] == -1).all()
    assert scores[:, 0].tolist() == [0, 1, 2, 3, 4]
