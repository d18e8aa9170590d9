"""Clusters of neighbours by pipeline.mine: alike, on two processes, interrupted, and refused for other options."""

import os
from pathlib import Path

import numpy as np
import pytest
from small_mining import NAMES, SAMPLES, files, mine, pair, write_datasets
from two_ranks import on_two_ranks

from pipeline.data.index import Index
from pipeline.data.neighbours import ARRAY_FILE, NEIGHBOURS_FILE, Neighbours
from pipeline.embedding import clustering
from pipeline.errors import PipelineError
from pipeline.storage import objects

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


def test_clusters_are_recorded_and_separate_equal_items(shards):
    for name in NAMES:
        place = shards / "clustered" / name
        found = Neighbours.load(str(place))
        found.check("", name, Index.load(str(shards / name)))
        assert (found.size, found.made["model"], found.made["depth"]) == (SIZE, "texts", 20)
        assert not list(place.glob(".neighbours/*"))
        pairs = [pair(name, i) for i in range(SAMPLES[name])]
        assert found.made["samples_without_neighbours"] == sum(each.query.text == "unreadable" for each in pairs)
        assert found.made["pairs_not_separated"] == 0
        for cluster in clusters_in(shards / "clustered", name):
            assert len({pairs[i].target for i in cluster}) == len({pairs[i].query for i in cluster}) == SIZE


def test_members_of_a_cluster_are_alike(shards, tmp_path):
    """Without a margin, a cluster's queries and targets are mostly of one of five topics."""
    mine(shards, tmp_path, clusters=SIZE, margin=None)
    for name in NAMES:
        topics = np.array([pair(name, i).target.text[0] for i in range(SAMPLES[name])])[clusters_in(tmp_path, name)]
        same = (topics[:, :, None] == topics[:, None]).sum(axis=(1, 2)) - SIZE
        assert same.mean() > 0.8 * SIZE * (SIZE - 1)


def test_likely_right_targets_are_separated(shards, tmp_path):
    """With a margin that drops a query's own topic, clusters mix the topics."""
    mine(shards, tmp_path, clusters=SIZE, margin=0.5, depth=40)
    for name in NAMES:
        topics = np.array([pair(name, i).target.text[0] for i in range(SAMPLES[name])])[clusters_in(tmp_path, name)]
        same = (topics[:, :, None] == topics[:, None]).sum(axis=(1, 2)) - SIZE
        assert same.mean() < 0.15 * SIZE * (SIZE - 1)  # 0.2 at random


@pytest.mark.slow
def test_two_processes_continue_to_the_bytes_of_one(shards, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clustering.ClusteredDataset, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        mine(shards, tmp_path, clusters=SIZE)
    record = sorted(tmp_path.glob("first/.neighbours/*.npy"))[0]
    record.unlink()
    monkeypatch.setenv("SHARDS", str(shards))
    monkeypatch.setenv("OUT", str(tmp_path))
    on_two_ranks(_cluster_on_rank)
    assert files(tmp_path) == files(shards / "clustered")


def _cluster_on_rank(rank: int) -> int:
    """Continue, while the second rank does not see what was there, as on a shared file system for a while."""
    exists = objects.exists
    if rank:
        objects.exists = lambda url: ".neighbours/" not in url and exists(url)
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


def test_damaged_record_is_ranked_again_and_a_kill_while_records_are_deleted_leaves_none(shards, tmp_path, monkeypatch):
    delete = objects.delete

    def killed(url):
        if ".neighbours/" in url and (tmp_path / "first" / NEIGHBOURS_FILE).exists():
            raise KeyboardInterrupt
        delete(url)

    with monkeypatch.context() as patch:
        patch.setattr(objects, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            mine(shards, tmp_path, clusters=SIZE)
    assert list(tmp_path.glob("first/.neighbours/*"))
    mine(shards, tmp_path, clusters=SIZE)
    assert clusters_of(tmp_path) == clusters_of(shards / "clustered")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clustering, "clusters_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        mine(shards, tmp_path, clusters=SIZE, overwrite=True, margin=0.5)
    record = sorted(tmp_path.glob("first/.neighbours/*.npy"))[0]
    record.write_bytes(record.read_bytes()[:-1])
    with pytest.raises(PipelineError, match=rf"{record.name}: it holds no array .*; start again, and only this shard"):
        mine(shards, tmp_path, clusters=SIZE, overwrite=True, margin=0.5)
    mine(shards, tmp_path, clusters=SIZE, overwrite=True, margin=0.5)


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
