"""Limits of a machine are reported before or at the start of a run: no process waits for an impossible batch."""

import os
import resource
from dataclasses import replace
from pathlib import Path

import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as dist
from limits import HANG_SECONDS
from PIL import Image as Picture
from two_ranks import on_two_ranks

from pipeline.config import Data, load_recipe
from pipeline.convert.demo import TrainingPairs
from pipeline.convert.sharding import convert
from pipeline.data.batch import Encoded, Image
from pipeline.data.lengths import Lengths, Square
from pipeline.data.mined import REFERENCE
from pipeline.data.sample import Item
from pipeline.data.source import Source
from pipeline.data.stream import batches
from pipeline.data.tiles import Tiling
from pipeline.distributed import start_distributed
from pipeline.errors import PipelineError
from pipeline.jobs import limits
from pipeline.jobs.preflight.job import Job, machine

DEMO = Path(__file__).parents[2] / "pipeline/recipes/demo.yaml"
TILING = Tiling(size=24, patches=3, pinpoints=((24, 24), (24, 48), (48, 24), (48, 48)))
PAIRS, BATCH = 48, 16


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder = str(tmp_path_factory.mktemp("limits") / "data")
    convert({folder: TrainingPairs("Scene-CLS", 0, PAIRS)}, options={})  # every query has an image
    return Source.open(Data(url=folder, lanes=4, workers=1, timeout_s=5))


def recipe(*overrides: str):
    return load_recipe(DEMO, [f"batch.global_batch={BATCH}", *overrides])


def encode(item: Item) -> Encoded:
    images = tuple(Image(np.zeros((5, 3, 24, 24), np.uint8), 24, 24) for _ in item.images)
    return Encoded(np.arange(9, dtype=np.int32), images)


def test_batch_exceeding_shared_memory_raises_at_once(source, monkeypatch):
    def full(size: int) -> None:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)  # the worker inherits it
    order = source.order(BATCH, 0, Lengths(TILING, 8))
    with pytest.raises(PipelineError, match=r"/dev/shm has no room left .* --shm-size=8g.* data\.workers=0"):
        next(batches(source, order, encode, range(1), rank=0, world=1, timeout=HANG_SECONDS))


def test_pair_bytes_are_estimated_from_the_index(source):
    (_, shard), *_ = source.shards
    sizes = np.array(shard.image_sizes)
    cut = [TILING.cut(Picture.new("RGB", tuple(size)), anyres=True).nbytes for size in sizes.tolist()]
    exact = np.mean(cut) * shard.images / shard.samples
    # Padded grids have fewer tokens than patches; each row has an additional newline token.
    assert 0.6 < limits.pair_bytes(source, Lengths(TILING, 8)) / exact < 1.4
    assert limits.pair_bytes(source, Lengths(Square(196), 8)) == 3 * 224**2 * shard.images // shard.samples
    assert limits.pair_bytes(source, Lengths(Square(0), 8)) == 0


def test_pair_bytes_count_mined_images(source):
    class Mined:
        def references(self, shard: int, start: int, stop: int) -> np.ndarray:
            found = np.zeros((stop - start, 5), REFERENCE)
            found["shard"] = [0, 0, -1, 0, 0]
            found["images"] = [1, 3, 1, 0, 1]
            found["image_size"] = [(40, 24), (60, 70), (40, 24), (0, 0), (0, 0)]  # the last is unreadable
            return found

    class Texts(Mined):
        def references(self, shard: int, start: int, stop: int) -> np.ndarray:
            return np.zeros((stop - start, 5), REFERENCE)

    lengths = Lengths(TILING, 8)
    own, tile = limits.pair_bytes(source, lengths), 3 * TILING.patch**2
    expected = own + tile * (TILING.tokens(24, 40, anyres=True) + 3 * TILING.tokens(70, 60, anyres=False))
    assert limits.pair_bytes(replace(source, mined=(Mined(),)), lengths) == pytest.approx(expected, abs=2)
    both = replace(source, indexes=2 * source.indexes, mined=(Mined(), Texts()))
    assert limits.pair_bytes(both, lengths) == pytest.approx((own + expected) / 2, abs=2)


def test_first_batch_exceeding_shared_memory_is_refused_at_start(source, monkeypatch):
    lengths, workers = Lengths(TILING, 8), recipe("data.workers=1")
    least = BATCH // 2 * limits.pair_bytes(source, lengths) // 2
    monkeypatch.setattr(limits, "free_bytes", lambda folder: least)
    limits.require_shared_memory(workers, source, lengths, 2, 1)
    monkeypatch.setattr(limits, "free_bytes", lambda folder: least - 1)
    with pytest.raises(PipelineError, match=r"/dev/shm has .* MB free, .* --shm-size=8g"):
        limits.require_shared_memory(workers, source, lengths, 2, 1)
    limits.require_shared_memory(recipe("data.workers=0"), source, lengths, 2, 1)
    monkeypatch.setattr(limits, "free_bytes", lambda folder: None)  # not on Linux
    limits.require_shared_memory(workers, source, lengths, 2, 1)


def test_free_bytes_of_missing_folder_are_unknown(tmp_path):
    assert limits.free_bytes(tmp_path) > 0
    assert limits.free_bytes(tmp_path / "none") is None


def checked(source: Source, *overrides: str, nodes: int = 1, **zero: int) -> tuple[str, str]:
    job = Job(recipe(*overrides), 2, gpus=0, guessed=False, source=source, lengths=Lengths(TILING, 8), zero=zero)
    check = machine(job, nodes)
    return check.state, f"{check.found} - {check.do}"


def test_preflight_refuses_groups_that_would_span_nodes(source):
    said = "zero_hpz_partition_size=2 does not divide the 1 processes of a node"
    assert said in checked(source, nodes=2, zero_hpz_partition_size=2)[1]
    assert said not in checked(source, nodes=1, zero_hpz_partition_size=2)[1]


def test_preflight_checks_shared_memory(source, monkeypatch):
    assert checked(source, "data.workers=0")[0] in ("green", "red", "yellow")
    needed = BATCH * limits.pair_bytes(source, Lengths(TILING, 8))
    for free, state in ((4 * needed, "green"), (needed, "yellow"), (needed // 2 - 1, "red"), (None, "green")):
        monkeypatch.setattr(
            limits, "free_bytes", lambda folder, free=free: free if folder == limits.SHARED else 1 << 40
        )
        found = checked(source, "data.workers=1")
        assert found[0] == state
        assert ("--shm-size" in found[1]) == (state in ("yellow", "red"))


def test_preflight_checks_resource_limits(source, monkeypatch):
    monkeypatch.setattr(limits, "free_bytes", lambda folder: 1 << 40)
    monkeypatch.setattr(limits, "_cgroup", lambda kind: None)
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda which: unlimited)
    assert checked(source)[0] == "green"
    for which, found in ((resource.RLIMIT_NOFILE, "may open 40 files"), (resource.RLIMIT_NPROC, "ulimit -u allows 40")):
        with monkeypatch.context() as patch:
            patch.setattr(resource, "getrlimit", lambda one, which=which: (40, 40) if one == which else unlimited)
            assert checked(source, "data.workers=2")[0] == "red"
            assert found in checked(source, "data.workers=2")[1]
    for kind, said in (
        ("pids", "pids.max allows 40"),
        ("memory", "may use 0 MiB of memory, and 2 times data.memory_mb"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(limits, "_cgroup", lambda one, kind=kind: 40 if one == kind else None)
            assert said in checked(source, "data.workers=2")[1]
    monkeypatch.setattr(limits, "free_bytes", lambda folder: 0 if folder != limits.SHARED else 1 << 40)
    assert "set TMPDIR to another folder" in checked(source)[1]
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._get_default_tempdir", lambda: (_ for _ in ()).throw(FileNotFoundError(2, "none")))
    assert "no folder for temporary files" in checked(source)[1]


def test_open_file_limit_is_raised_to_the_hard_limit():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[1]), before[1]))
        limits.raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def deepspeeds_shared_memory(rank: int) -> bool:
    dist.destroy_process_group()
    start_distributed(1)
    return deepspeed.comm.comm.cdb.shm_comm_op is not None


@pytest.mark.slow
def test_deepspeed_shared_memory_reduction_is_disabled():
    """It would take 66 MB per rank; a container has 64 MB by default."""
    assert on_two_ranks(deepspeeds_shared_memory) == [False, False]


@pytest.mark.parametrize(
    ("version_1", "limit", "used", "total"),
    [(False, "memory.max", "memory.current", ""), (True, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")],
)
def test_available_memory_is_the_least_of_the_machine_and_control_groups(
    version_1, limit, used, total, tmp_path, monkeypatch
):
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < limits.available_memory() < machine
    (tmp_path / limit).write_text("9000000\n")
    (tmp_path / used).write_text("5000000\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\n{total}inactive_file 100\n{total}active_file 20\n")
    monkeypatch.setattr(limits, "_groups", lambda kind: iter([(tmp_path.parent, version_1), (tmp_path, version_1)]))
    assert limits.available_memory() == 4000120
    (tmp_path / limit).write_text("max\n")
    assert 4000120 < limits.available_memory() < machine
