"""Embeddings on disk: every counted embedding is complete, whenever the writing process was killed."""

import os
import signal

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.evaluation import store
from pipeline.evaluation.store import DiskStore

KEYS = [bytes([number]) * 16 for number in range(12)]
VECTORS = np.random.default_rng(0).standard_normal((12, 6)).astype(np.float32)


def rows(*numbers: int) -> np.ndarray:
    return np.array(numbers)


def write(folder) -> None:
    disk = DiskStore(folder, KEYS, 6)
    for dataset, numbers in (("a", rows(3, 1)), ("b c/d", rows(0)), ("a", rows(5, 4, 2))):
        disk.append(dataset, numbers, VECTORS[numbers])


def test_appended_embeddings_are_readable_with_other_keys_and_by_numpy(tmp_path):
    write(tmp_path)
    disk = DiskStore(tmp_path, KEYS, 6)
    assert disk.missing(np.arange(12)).tolist() == [6, 7, 8, 9, 10, 11]
    np.testing.assert_array_equal(disk.take(rows(2, 0, 3, 3)), VECTORS[[2, 0, 3, 3]])
    disk.append("b c/d", rows(7), VECTORS[[7]])
    np.testing.assert_array_equal(disk.take(rows(7, 0, 4)), VECTORS[[7, 0, 4]])
    other = DiskStore(tmp_path, [KEYS[4], b"not embedded yet", KEYS[7]], 6)
    assert other.missing(np.arange(3)).tolist() == [1]
    np.testing.assert_array_equal(other.take(rows(0, 2)), VECTORS[[4, 7]])
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), VECTORS[[3, 1, 5, 4, 2]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.keys", "a.npy", "b_c_d.keys", "b_c_d.npy"]


def test_kill_during_append_preserves_all_counted_embeddings(tmp_path, monkeypatch):
    counts = set()
    for moment in range(20):
        folder = tmp_path / str(moment)
        if (process := os.fork()) == 0:
            _write_and_die(folder, moment, monkeypatch)
        if os.waitpid(process, 0)[1] != signal.SIGKILL:
            break
        disk = DiskStore(folder, KEYS, 6)
        there = np.setdiff1d(np.arange(12), disk.missing(np.arange(12)))
        np.testing.assert_array_equal(disk.take(there), VECTORS[there])
        counts.add(len(there))
        disk.append("a", disk.missing(np.arange(12)), VECTORS[disk.missing(np.arange(12))])
        np.testing.assert_array_equal(DiskStore(folder, KEYS, 6).take(np.arange(12)), VECTORS)
    assert counts == {0, 1, 2, 3, 4}  # half of a write of keys may contain whole keys
    assert moment == 9  # three appends with three writes each


def _write_and_die(folder, moment: int, monkeypatch) -> None:
    """Write in this process, which is killed in the middle of a write."""
    left, original = iter(range(moment)), store._write

    def dying(file, data: bytes, offset: int) -> None:
        if next(left, None) is None:
            original(file, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        original(file, data, offset)

    monkeypatch.setattr(store, "_write", dying)
    write(folder)
    os._exit(0)


def test_only_one_evaluation_at_a_time_embeds_a_dataset(tmp_path):
    with store.held(tmp_path, ["a", "b c/d"]):
        with store.held(tmp_path, ["c"]):
            pass
        with pytest.raises(PipelineError, match="/b_c_d is in use by process"), store.held(tmp_path, ["c", "b c/d"]):
            pass
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b_c_d"]
    assert list(tmp_path.iterdir()) == []


def test_mismatched_files_and_concurrent_writers_are_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(PipelineError, match=r"a\.npy does not contain 5 vectors of 7 float32, .*: delete both"):
        DiskStore(tmp_path, KEYS, 7)
    first, second = DiskStore(tmp_path, KEYS, 6), DiskStore(tmp_path, KEYS, 6)
    first.append("a", rows(8, 9), VECTORS[[8, 9]])
    with pytest.raises(PipelineError, match="another evaluation has written to it; start this one again"):
        second.append("a", rows(8), VECTORS[[8]])
    np.testing.assert_array_equal(DiskStore(tmp_path, KEYS, 6).take(rows(8, 9)), VECTORS[[8, 9]])
    os.truncate(tmp_path / "a.npy", 128 + 5 * 6 * 4)
    with pytest.raises(PipelineError, match="does not contain 7 vectors"):
        DiskStore(tmp_path, KEYS, 6)
    np.save(tmp_path / "a.npy", VECTORS[:6])
    with pytest.raises(PipelineError, match="does not contain 7 vectors"):
        DiskStore(tmp_path, KEYS, 6)
