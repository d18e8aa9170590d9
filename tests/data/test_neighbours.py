"""The files of clusters of neighbours: what is written is read, and damaged or other ones are refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from pipeline.data.index import Captions, Index
from pipeline.data.neighbours import ARRAY_FILE, NEIGHBOURS_FILE, Neighbours, write_neighbours
from pipeline.data.sample import Item, Pair
from pipeline.data.shards import write_shards
from pipeline.storage.objects import ObjectError

CLUSTERS = np.random.default_rng(0).permutation(30)
MADE = {"model": "teacher", "margin": 0.95, "absolute_margin": None, "neighbours": 30}


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    pairs = (Pair(str(i), "d", "t", Item(f"q {i}"), Item(f"t {i}")) for i in range(30))
    return write_shards(pairs, tmp_path_factory.mktemp("shards"), dataset="d", shard_bytes=20_000)


def test_written_clusters_are_read(index, tmp_path):
    written = write_neighbours(str(tmp_path), index, CLUSTERS, 4, MADE)
    read = Neighbours.load(str(tmp_path))
    assert read == written and read.size == 4 and read.made == MADE
    read.check(str(tmp_path), "d", index)
    numbers = read.clusters(str(tmp_path), 30)
    assert numbers.dtype == np.uint32
    np.testing.assert_array_equal(numbers, CLUSTERS)
    assert len(index.shards) > 1
    before = [(tmp_path / name).read_bytes() for name in (NEIGHBOURS_FILE, ARRAY_FILE)]
    write_neighbours(str(tmp_path), index, CLUSTERS, 4, MADE)
    assert [(tmp_path / name).read_bytes() for name in (NEIGHBOURS_FILE, ARRAY_FILE)] == before


def test_damaged_or_other_files_are_refused(index, tmp_path):
    neighbours = write_neighbours(str(tmp_path), index, CLUSTERS, 4, MADE)
    for other in (Index("d", index.shards[:1]), replace(index, captions=Captions("<image>", ("txt",), ""))):
        with pytest.raises(ObjectError, match="belongs to other shards or captions than those of d: mine the dataset"):
            neighbours.check(str(tmp_path), "d", other)
    with pytest.raises(ObjectError, match="does not list each of 29 samples once"):
        neighbours.clusters(str(tmp_path), 29)
    stored = (tmp_path / ARRAY_FILE).read_bytes()
    (tmp_path / ARRAY_FILE).write_bytes(stored[:-1] + b"\x01")
    with pytest.raises(ObjectError, match=r"neighbours.npy is damaged \(its sha256 differs"):
        neighbours.clusters(str(tmp_path), 30)
    text = (tmp_path / NEIGHBOURS_FILE).read_text()
    (tmp_path / NEIGHBOURS_FILE).write_text(text.replace('"size": 4', '"size": 5'))
    with pytest.raises(ObjectError, match=r"neighbours.json is damaged \(its checksum differs\): mine"):
        Neighbours.load(str(tmp_path))
    (tmp_path / NEIGHBOURS_FILE).write_text(json.dumps(json.loads(text) | {"format": 2}))
    with pytest.raises(ObjectError, match="has format 2, this version reads format 1: mine"):
        Neighbours.load(str(tmp_path))
    with pytest.raises(ObjectError, match="no such file"):
        Neighbours.load(str(tmp_path / "elsewhere"))


@pytest.mark.parametrize("clusters", [CLUSTERS[:29], np.append(CLUSTERS[:29], CLUSTERS[0]), CLUSTERS * 1.0])
def test_only_complete_arrangements_are_written(index, tmp_path, clusters):
    with pytest.raises(ObjectError, match="do not list each of 30 samples once"):
        write_neighbours(str(tmp_path), index, clusters, 4, MADE)
    assert not list(tmp_path.iterdir())
