"""Jobs of several ranks that only read from a real S3 server: kills and faults do not change the batches."""

import ctypes
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest
from consume import Job, encode, open_order, rows
from fault_proxy import FLIP, RESET, TRUNCATE, UNAVAILABLE, Fault, FaultProxy, stall
from limits import HANG_SECONDS

from pipeline.config import Data, parse_options
from pipeline.data.sample import Item, Pair
from pipeline.data.shards import write_shards
from pipeline.data.stream import batches
from pipeline.storage import objects
from tools.s3_server import S3Server

BUCKET = "s3://pipeline-stream"
SAMPLES = {"first": 371, "second": 145}
DATA = [
    "datasets=[{name: first}, {name: second, weight: 1.5}]",
    "lanes=4",
    "block_samples=8",
    "window_blocks=3",
    "workers=1",
    "timeout_s=30",
]


def pair(dataset: str, number: int) -> Pair:
    noise = random.Random(f"{dataset} {number}")
    image = noise.randbytes(noise.randrange(2_000, 6_000))  # not an image, but no code decodes it
    texts = tuple(f"{dataset} {number} {i}" for i in range(number % 3))
    return Pair(f"{number:06d}", dataset, "", Item("<image> what?", (image,)), Item("x" * number), (), texts)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Start a server for this module alone, since tests kill it; the environment points to it."""
    folder = tmp_path_factory.mktemp("stream")
    with S3Server("pipeline-stream") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        for name, count in SAMPLES.items():
            index = write_shards(
                (pair(name, i) for i in range(count)), folder / name, dataset=name, shard_bytes=200_000
            )
            assert len(index.shards) > 2
            for path in (folder / name).iterdir():
                objects.write(f"{BUCKET}/{name}/{path.name}", path)
        yield server


@lru_cache
def undisturbed(*mixture: str) -> list[list]:
    """Return the rows of every step of two epochs, as one process reads them."""
    source, order = open_order(parse_options(Data, [f"url={BUCKET}", *DATA, *mixture, "workers=0"]))
    steps = range(2 * order.steps_per_epoch)
    return [rows(batch) for batch in batches(source, order, encode, steps, rank=0, world=1, timeout=HANG_SECONDS)]


def job(world: int, steps: range, folder: Path, *overrides: str) -> Job:
    return Job(world, steps, folder, [f"url={BUCKET}", *DATA, *overrides])


def test_six_kills_with_changing_world_size_preserve_batches(server, tmp_path):
    chance = random.Random(3)
    expected, seen = undisturbed(), []
    steps = len(expected)
    for number in range(7):
        began = job(chance.choice([1, 2, 4]), range(len(seen), steps), tmp_path / str(number))
        if number < 6:
            enough = chance.randrange(1, (steps - len(seen)) // (7 - number))
            while len(began.ledger()) < enough:
                assert began.runs, began.output
                time.sleep(0.005)
            began.kill()
        assert not any(status > 0 for status in began.wait()), began.output
        seen += began.ledger()
    assert seen == expected


def test_epoch_reads_each_sample_as_often_as_its_weight(server):
    _, order = open_order(parse_options(Data, [f"url={BUCKET}", *DATA]))
    for epoch in (0, 1):
        steps = undisturbed()[epoch * order.steps_per_epoch : (epoch + 1) * order.steps_per_epoch]
        keys = [row[0] for step in steps for row in step]
        left_over = sum(dataset.quota for dataset in order.datasets) - len(keys)
        assert left_over == (371 + round(1.5 * 145)) % order.global_batch
        first = [key for key in keys if "/first/" in key]
        assert len(first) == len(set(first)) >= 371 - left_over
        assert len({key for key in keys if "/second/" in key}) >= 145 - left_over
    second = Counter(row[0] for step in undisturbed() for row in step if "/second/" in row[0])
    assert max(second.values()) == 4  # in 2 epochs, the second dataset is read 3 times, plus one sample
    assert sum(second.values()) >= 3 * 145 + 1 - 2 * left_over
    assert not [row for step in undisturbed() for row in step if not row[3]]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_epoch_reads_each_byte_once(server, tmp_path, world):
    data = ["datasets=[first, second]", f"workers={2 if world < 4 else 1}"]
    source, order = open_order(parse_options(Data, [f"url={BUCKET}", *DATA, *data]))
    size = sum(index.total_bytes for _, index in source.indexes)
    read = job(world, range(order.steps_per_epoch), tmp_path, *data)
    assert read.wait() == [0] * world, read.output
    received = [int((tmp_path / f"received{rank}").read_text()) for rank in range(world)]
    assert size <= sum(received) + 64 * 6_000  # except for the samples that do not fill a batch
    assert sum(received) <= 1.05 * size


def test_transient_faults_do_not_change_batches(server, tmp_path, monkeypatch):
    """Inject resets, bursts of 503, stalls of 5 s, truncated bodies and flipped bits; the batches stay the same."""
    injected = Counter()
    mixture = ["batches=interleaved:2", "workers=2"]
    expected = undisturbed(*mixture)

    def plan(number: int, method: str, path: str) -> Fault | None:
        fault = (RESET, UNAVAILABLE, TRUNCATE, FLIP, stall(5))[number // 7 % 5]
        if fault.kind == "stall" and injected["stall"] == 3:
            return None
        if number % 7 >= (1 if fault is FLIP else 3):  # three consecutive faults also hit second attempts
            return None
        injected[fault.kind] += 1
        return fault

    with FaultProxy(server.endpoint, plan) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        read = job(2, range(len(expected)), tmp_path, *mixture)
        assert read.wait() == [0, 0], read.output
    assert read.ledger() == expected
    assert injected["stall"] == 3
    assert all(injected[fault.kind] > 5 for fault in (RESET, UNAVAILABLE, TRUNCATE, FLIP))


def test_server_restart_does_not_change_batches(server, tmp_path):
    expected = undisturbed("batches=homogeneous")
    read = job(2, range(len(expected)), tmp_path, "batches=homogeneous")
    while len(read.ledger()) < len(expected) // 4 and read.runs:
        time.sleep(0.005)
    assert read.runs, "it was over before the server was killed"
    server.restart()
    assert read.wait() == [0, 0], read.output
    assert read.ledger() == expected


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (FLIP, "first/000001.tar is damaged: bytes "),
        (UNAVAILABLE, "first/000001.tar"),
        (stall(60), "first/000001.tar"),
    ],
    ids=["flipped", "unavailable", "stalled"],
)
def test_permanent_fault_raises_one_error_naming_the_object(server, tmp_path, monkeypatch, fault, complaint):
    def plan(number: int, method: str, path: str) -> Fault | None:
        return fault if "first/000001.tar" in path else None

    with FaultProxy(server.endpoint, plan) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        read = job(1, range(100), tmp_path, "timeout_s=4")
        assert read.wait() == [2], read.output
    error, *_ = [line for line in read.output.splitlines() if line.startswith("error")]
    assert complaint in error
    assert "Traceback" not in read.output


def test_fork_waits_for_ending_threads_that_used_s3(server):
    """Such a thread may hold OpenSSL's locks, which a forked process could never acquire."""
    libc, key = ctypes.CDLL(None), ctypes.c_uint()
    libc.pthread_key_create(ctypes.byref(key), ctypes.cast(libc.usleep, ctypes.c_void_p))

    def speak(_: int) -> Path:
        libc.pthread_setspecific(key, ctypes.c_void_p(2_000_000))  # the thread takes 2,000,000 microseconds to end
        assert objects.exists(f"{BUCKET}/first/000001.tar")
        return Path(f"/proc/self/task/{threading.get_native_id()}")

    with ThreadPoolExecutor(4) as pool:
        threads = list(pool.map(speak, range(4)))
    assert any(thread.exists() for thread in threads)
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    assert not any(thread.exists() for thread in threads)
    child.join()


_RANK = """
import signal
import sys
import consume

def encode(item):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return consume.encode(item)

source, order = consume.open_order(consume.parse_options(consume.Data, sys.argv[1:]))
read = consume.batches(source, order, encode, range(9), rank=0, world=1, timeout=consume.HANG_SECONDS)
next(read)
raise RuntimeError("out of memory")
"""


def test_failing_rank_does_not_wait_for_unresponsive_workers(server):
    ended = subprocess.run(
        [sys.executable, "-c", _RANK, f"url={BUCKET}", *DATA],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert ended.returncode == 1
    assert ended.stderr.endswith("RuntimeError: out of memory\n"), ended.stderr
