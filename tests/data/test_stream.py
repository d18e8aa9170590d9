"""The reader follows the order: the same samples for every number of ranks and workers, and none read twice."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import psutil
import pytest
from limits import HANG_SECONDS

from pipeline.config import Data
from pipeline.data import plan, reader, stream, tars
from pipeline.data.batch import Batch, Encoded
from pipeline.data.lengths import Lengths
from pipeline.data.neighbours import write_neighbours
from pipeline.data.once import Once
from pipeline.data.sample import BadSample, ContentDraw, Item, Pair, Single
from pipeline.data.shards import write_shards
from pipeline.data.source import Source
from pipeline.data.stream import Stream, batches
from pipeline.data.tiles import Tiling
from pipeline.errors import PipelineError

LENGTHS = Lengths(Tiling(size=24, patches=3, pinpoints=((24, 24), (24, 48), (48, 24), (48, 48))), 8)
SAMPLES = {"first": 70, "second": 53}
BATCH, CLUSTER = 12, 4


def pair(dataset: str, number: int) -> Pair:
    negatives = (Item(f"{dataset} no {number}"),) if number % 3 == 0 else ()
    alternatives = tuple(f"answer {number} {i}" for i in range(number % 4))
    target = Item(f"answer {number}")
    return Pair(f"{number:04d}", dataset, "retrieval", Item(f"{dataset} {number}"), target, negatives, alternatives)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    folder = tmp_path_factory.mktemp("stream")
    for dataset, count in SAMPLES.items():
        pairs = (pair(dataset, number) for number in range(count))
        index = write_shards(pairs, folder / dataset, dataset=dataset, shard_bytes=30_000)
        write_neighbours(str(folder / dataset), index, np.random.default_rng(0).permutation(count), CLUSTER, {})
    parts = [{"name": name} for name in SAMPLES]
    return Data(url=str(folder), datasets=parts, lanes=4, block_samples=8, window_blocks=2, workers=0)


def encode(item: Item) -> Encoded:
    if item.text == "first 7":
        raise BadSample("made so")
    return Encoded(np.frombuffer(item.text.encode(), np.uint8).astype(np.int32))


def text(batch: Batch, content: int) -> str:
    return bytes(batch.items[content].input_ids.astype(np.uint8)).decode()


def changed(data: Data, **changes: object) -> Data:
    return Data.model_validate(data.model_dump() | changes)


def reading(data: Data, steps: range, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    opened = Source.open(data)
    order = opened.order(BATCH, 5, LENGTHS)
    return batches(opened, order, encode, steps, rank=rank, world=world, timeout=HANG_SECONDS)


def read(*arguments) -> list[Batch]:
    return list(reading(*arguments))


@pytest.mark.parametrize(
    "mixture",
    [
        {},
        {"batches": "homogeneous"},
        {"batches": "interleaved:3", "cap": 30},
        {"datasets": [{"name": "first", "weight": 2.5}, {"name": "second", "cap": 20}]},
        {"batches": "neighbours", "datasets": [{"name": "first", "weight": 2.5}, {"name": "second", "cap": 20}]},
    ],
    ids=["mixed", "homogeneous", "interleaved", "weights", "neighbours"],
)
def test_batches_match_order_for_any_world_size_and_workers(data, mixture):
    data = changed(data, **mixture)
    opened = Source.open(data)
    order = opened.order(BATCH, 5, LENGTHS)
    steps = range(3, 3 + 2 * order.steps_per_epoch)  # across the boundaries of epochs
    expected = [[opened.origin(*row) for row in order.batch(step).tolist()] for step in steps]
    contents = None
    for world, workers in [(1, 0), (1, 3), (2, 0), (2, 2), (4, 1)]:
        ranks = [read(changed(data, workers=workers), steps, rank, world) for rank in range(world)]
        rows = []
        for step, wanted in enumerate(expected):
            parts = [rank[step] for rank in ranks]
            assert [origin for part in parts for origin in part.origins] == wanted, (world, workers, step)
            rows.append([(part.query, part.target, part.negatives, part.valid) for part in parts])
            for part in parts:
                assert set(part.items) == {*part.query, *part.target, *chain.from_iterable(part.negatives)}
        if world == 1:
            assert contents in (None, rows)
            contents = rows


def test_batch_contains_written_samples(data):
    origins = {}
    for batch in read(data, range(10)):
        rows = zip(batch.origins, batch.query, batch.target, batch.valid, strict=True)
        for origin, query, target, _ in (row for row in rows if row[3]):
            dataset, number = text(batch, query).split()
            assert text(batch, target).split()[:2] == ["answer", number]
            assert f"/{dataset}/" in origin.shard
            origins[text(batch, query)] = origin
    assert len(origins) == 119  # 10 steps of 12, each sample once, except for the one that cannot be encoded


@pytest.mark.parametrize("dataset_cap", [None, 30])
def test_first_rows_of_a_capped_dataset_are_used_in_every_epoch(data, dataset_cap):
    """Like `split[:cap]`: the rows at the beginning of the shards, whatever the seed; by default others each epoch."""

    def rows(epoch: int, seed: int, **changes: object) -> set[tuple[str, str]]:
        parts = [{"name": "first", "cap": dataset_cap}, {"name": "second"}]
        opened = Source.open(changed(data, datasets=parts, cap=24, **changes))
        assert len(opened.indexes[0][1].shards) > 2  # the cap cuts a shard
        order = opened.order(6, seed, LENGTHS)
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        read = batches(opened, order, encode, steps, rank=0, world=1, timeout=HANG_SECONDS)
        # Number 7 of the first dataset cannot be encoded.
        return {tuple(text(batch, query).split()) for batch in read for query in batch.query} - {()}

    firsts = {("first", str(i)) for i in range(dataset_cap or 24)} | {("second", str(i)) for i in range(24)}
    for epoch, seed in ((0, 5), (1, 5), (0, 6)):
        assert rows(epoch, seed, cap_rows="first", lanes=2) == firsts - {("first", "7")}
    assert rows(0, 5, lanes=2) - firsts
    assert rows(0, 5, lanes=2) != rows(1, 5, lanes=2)


def test_samples_own_hard_negatives_can_be_left_out(data):
    """Only they are left out: in batches, and in the token lengths that balance them."""
    without = changed(data, hard_negatives=False)
    with_them, without_them = read(data, range(10)), read(without, range(10))
    assert any(any(batch.negatives) for batch in with_them)
    assert not any(any(batch.negatives) for batch in without_them)
    for batch in without_them:
        assert set(batch.items) == {*batch.query, *batch.target}
    queries = [sorted(text(batch, key) for batch in read for key in batch.query) for read in (with_them, without_them)]
    assert queries[0] == queries[1]
    opened = Source.open(without)
    records = opened.records(0, 0, 3)
    assert records["negatives"].tolist() == [1, 0, 0]
    texts = records["query_text"].astype(int) + records["target_text"]
    assert opened.order(BATCH, 5, LENGTHS).lengths(0, 0, 3).tolist() == (2 * 21 + texts // 4).tolist()
    assert opened.records(0, 0, 3)["negatives"].tolist() == [1, 0, 0]  # the cached records are not changed


def test_batches_of_one_modality(data, tmp_path):
    """Each batch is from datasets whose queries have images, or from those whose queries have none."""
    noise = np.random.default_rng(0)
    for name, count, seen in (("a", 30, True), ("b", 40, False), ("c", 30, True), ("d", 20, False)):
        query, images = ("<image>", (noise.bytes(50),)) if seen else ("", ())
        target = (noise.bytes(50),) if name in "bc" else ()  # the targets' images do not matter
        pairs = (
            Pair(f"{i:03d}", name, "", Item(f"{query}{name} {i}", images), Item(f"{i}", target)) for i in range(count)
        )
        write_shards(pairs, tmp_path / name, dataset=name)
    parts = [{"name": name} for name in "abcd"]
    modality = changed(data, url=str(tmp_path), datasets=parts, batches="modality", lanes=2)
    opened = Source.open(modality)
    order = opened.order(20, 5, LENGTHS)
    whole = [batch.origins for batch in batches(opened, order, encode, range(6), rank=0, world=1, timeout=HANG_SECONDS)]
    names = [Counter(Path(origin.shard).parent.name for origin in batch) for batch in whole]
    assert sorted(map(sorted, names)) == 3 * [["a", "c"]] + 3 * [["b", "d"]]
    assert names != sorted(names, key=sorted)
    resumed = batches(opened, order, encode, range(4, 6), rank=1, world=2, timeout=HANG_SECONDS)
    assert [batch.origins for batch in resumed] == [batch[10:] for batch in whole[4:]]


def test_items_are_keyed_by_encoded_content(data):
    for batch in read(data, range(40)):  # items of the index, of drawn alternatives, and of negatives
        assert all(encode(Item(text(batch, key))).key == key for key in batch.items)


def test_each_step_draws_one_alternative(data):
    drawn = Counter()
    for batch in read(data, range(100)):
        for target in batch.target:
            _, number, *alternative = (text(batch, target) or "none 0").split()
            if int(number) % 4 == 2:
                drawn[tuple(alternative)] += 1
    assert drawn.keys() == {(), ("0",), ("1",)}
    assert min(drawn.values()) > 0.8 * drawn.total() / 3
    again = [batch.target for batch in read(data, range(50, 60))]
    assert again == [batch.target for batch in read(data, range(60))][50:]


def test_augmentation_depends_only_on_step_and_content(data):
    """Encode each item as a draw, with any number of ranks and workers, and with a resumed run."""

    def augmented(draws: ContentDraw) -> Callable[[Item], Encoded]:
        def encode(item: Item) -> Encoded:
            (number,) = draws(item.content_hash, 1)
            return Encoded(np.frombuffer(item.text.encode() + number.tobytes(), np.uint8).astype(np.int32))

        return encode

    opened = Source.open(data)
    order = opened.order(BATCH, 5, LENGTHS)
    runs = []
    for world, workers, steps in [(1, 0, range(6)), (2, 2, range(6)), (4, 0, range(6)), (2, 0, range(4, 6))]:
        opened = Source.open(changed(data, workers=workers))
        options = {"world": world, "timeout": HANG_SECONDS, "augmented": augmented}
        ranks = [list(batches(opened, order, encode, steps, rank=rank, **options)) for rank in range(world)]
        for step, parts in zip(steps, zip(*ranks, strict=True), strict=True):
            for item in (item for part in parts for item in part.items.values()):
                content = item.input_ids.astype(np.uint8).tobytes()
                (drawn,) = np.frombuffer(content[-8:])
                assert drawn == order.draw_of_step(step, Item(content[:-8].decode()).content_hash, 1)
        runs.append([[part.query for part in parts] for parts in zip(*ranks, strict=True)])
    whole, *others, resumed = [[[*chain.from_iterable(parts)] for parts in run] for run in runs]
    assert others == [whole, whole] and resumed == whole[4:]
    assert len({key for step in whole for key in step}) == 6 * BATCH


def test_bad_sample_becomes_invalid_row_with_origin_and_reason(data):
    found = [batch for batch in read(data, range(10)) if not all(batch.valid)]
    assert len(found) == 1
    (batch,) = found
    row = batch.valid.index(False)
    (bad,) = batch.bad
    assert (bad.origin, bad.key, bad.reason) == (batch.origins[row], "0007", "made so")
    assert batch.query[row] == batch.target[row] == encode(Item("")).key
    assert len(batch.query) == len(batch.target) == len(batch.valid) == BATCH


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_bytes_raise_error_instead_of_bad_sample(data, tmp_path, workers):
    pairs = (pair("first", number) for number in range(40))
    write_shards(pairs, tmp_path, dataset="first")
    shard = tmp_path / "000000.tar"
    content = bytearray(shard.read_bytes())
    for place in range(len(content) // 4, len(content), len(content) // 4):
        content[place] ^= 1
    shard.write_bytes(content)
    with pytest.raises(PipelineError, match=r"000000\.tar is damaged: bytes \d+-\d+"):
        read(changed(data, url=str(tmp_path), datasets=[], workers=workers), range(3))
    assert multiprocessing.active_children() == []


_RANK = """
import multiprocessing, os, signal, sys
import test_stream
reading = test_stream.reading(test_stream.Data.model_validate_json(sys.argv[1]), range(9))
next(reading)
for worker in multiprocessing.active_children():
    os.kill(worker.pid, signal.SIGTERM)
for _ in range(5):
    next(reading)
print(len(multiprocessing.active_children()))
raise RuntimeError("out of memory")
"""


def test_workers_ignore_sigterm_and_end_with_rank(data):
    """The rank fails in its own step, while the reader is in the middle of an epoch."""
    given = changed(data, workers=2).model_dump_json()
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here, *here.parents[:2])))
    ended = subprocess.run(
        [sys.executable, "-c", _RANK, given],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert (ended.stdout, ended.returncode) == ("2\n", 1)
    assert ended.stderr.endswith("RuntimeError: out of memory\n")


_FROM_A_THREAD = """
import multiprocessing, os, sys, threading
import test_stream
found = []
def begin():
    found.append(test_stream.reading(test_stream.Data.model_validate_json(sys.argv[1]), range(9)))
    next(found[0])
thread = threading.Thread(target=begin)
thread.start()
thread.join()
print(len(list(found[0])), flush=True)
found.append(test_stream.reading(test_stream.Data.model_validate_json(sys.argv[1]), range(9)))
next(found[1])
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
sys.stdin.read()
"""


def test_workers_outlive_starting_thread_and_end_with_process(data):
    given = changed(data, workers=2).model_dump_json()
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here, *here.parents[:2])))
    rank = subprocess.Popen(
        [sys.executable, "-c", _FROM_A_THREAD, given],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with rank:
        left, pids = rank.stdout.readline(), rank.stdout.readline().split()
        workers = [psutil.Process(int(pid)) for pid in pids]
        for worker in workers:  # a terminal also sends Ctrl-C to them
            worker.send_signal(signal.SIGINT)
        assert (left, len(pids)) == ("8\n", 2), rank.communicate()[1]
        assert not psutil.wait_procs(workers, timeout=1)[0]
        rank.kill()
        assert not psutil.wait_procs(workers, timeout=HANG_SECONDS)[1]
        assert rank.communicate()[1] == ""


@pytest.fixture
def hanging(data, monkeypatch) -> Iterator[Stream]:
    """Return a stream whose worker hangs."""
    monkeypatch.setattr(stream, "_STOP_SECONDS", 0.05)
    opened = Source.open(changed(data, workers=1))
    order, encode = opened.order(BATCH, 5, LENGTHS), lambda item: time.sleep(HANG_SECONDS)
    reading = Stream(opened, order, encode, range(3), rank=0, world=1, timeout=HANG_SECONDS)
    yield reading
    reading.close()
    assert multiprocessing.active_children() == []


def waiting(reading: Stream) -> Future[Batch]:
    """Wait for a batch in a thread."""
    pool = ThreadPoolExecutor(1)
    got = pool.submit(next, reading)
    pool.shutdown(wait=False)
    return got


def test_thread_stops_waiting_for_a_batch(hanging):
    got = waiting(hanging)
    hanging.stop.set()
    with pytest.raises(PipelineError):
        got.result(HANG_SECONDS)


def test_thread_that_waits_for_a_batch_notices_hanging_and_dead_workers(hanging):
    seconds, hanging._seconds = hanging._seconds, 0
    with pytest.raises(PipelineError, match="sent nothing for 0 seconds"):
        waiting(hanging).result(HANG_SECONDS)
    hanging._seconds = seconds
    got, (worker,) = waiting(hanging), multiprocessing.active_children()
    with suppress(RuntimeError):  # torch raises it on the main thread, unless the other one has noticed before
        worker.kill()
        got.exception(HANG_SECONDS)
    with pytest.raises(PipelineError, match="a data worker failed"):
        got.result(HANG_SECONDS)


def test_evaluation_items_are_invalid_for_training(data, tmp_path):
    write_shards((Single(str(i), "d", "vqa", Item(str(i))) for i in range(12)), tmp_path, dataset="d")
    (batch,) = read(changed(data, url=str(tmp_path), datasets=[]), range(1))
    assert not any(batch.valid)
    assert "not a pair to train on" in batch.bad[0].reason


def test_invalid_world_size_and_memory_limit_are_refused(data):
    opened = Source.open(data)
    order = opened.order(BATCH, 5, LENGTHS)
    with pytest.raises(PipelineError, match="could be 1, 2, 4"):
        list(batches(opened, order, encode, range(1), rank=0, world=3, timeout=HANG_SECONDS))
    large = replace(opened, data=changed(data, memory_mb=1), indexes=tuple((u, _heavy(i)) for u, i in opened.indexes))
    with pytest.raises(PipelineError, match=r"memory_mb=1 is too little: a rank's 4 windows .* take about \d+ MiB"):
        large.check_memory(order, 1)
    clustered = Source.open(changed(data, batches="neighbours"))
    large = replace(large, neighbours=clustered.neighbours)
    with pytest.raises(PipelineError, match=r"a rank's 6 samples of a step take about \d+ MiB; raise it, or use more"):
        large.check_memory(clustered.order(BATCH, 5, LENGTHS), 2)


def _heavy(index):
    return replace(index, shards=tuple(replace(shard, size=shard.size * 1000) for shard in index.shards))


def test_epoch_reads_each_sample_once_within_memory_limit(data, tmp_path, monkeypatch):
    """Blocks are read ahead while memory allows, and none is read twice."""
    noise = np.random.default_rng(0)
    pairs = (Pair(str(i), "d", "", Item("<image>", (noise.bytes(50_000),)), Item(str(i))) for i in range(160))
    write_shards(pairs, tmp_path, dataset="d")
    asked, held = [], []
    read_samples, read_ahead = tars.read_samples, reader.Reader._read_ahead

    def noting_asked(url, shard, records):
        asked.extend(records["offset"].tolist())
        return read_samples(url, shard, records)

    def noting_held(reader):
        read_ahead(reader)
        held.append(reader.held)

    monkeypatch.setattr(tars, "read_samples", noting_asked)
    monkeypatch.setattr(reader.Reader, "_read_ahead", noting_held)
    small = {"url": str(tmp_path), "datasets": [], "lanes": 2, "block_samples": 2, "window_blocks": 4}
    for memory_mb, more in ((1, False), (100, True)):
        asked.clear(), held.clear()
        opened = Source.open(changed(data, **small, memory_mb=memory_mb))
        order = opened.order(6, 5, LENGTHS)
        steps = range(order.steps_per_epoch)
        assert len(list(batches(opened, order, encode, steps, rank=0, world=1, timeout=HANG_SECONDS))) == 26
        assert len(asked) == len(set(asked)) == 26 * 6
        assert (max(held) > 1 << 20) == more


@pytest.mark.parametrize("mixture", ["mixed", "homogeneous", "interleaved:3", "neighbours"])
def test_run_from_any_step_reads_only_its_samples(data, monkeypatch, mixture):
    """Also test windows that began earlier, and steps without samples of some dataset."""
    opened = Source.open(changed(data, batches=mixture))
    order = opened.order(BATCH, 5, LENGTHS)
    asked = []
    read_samples = tars.read_samples
    monkeypatch.setattr(tars, "read_samples", lambda *args: asked.extend(args[2]) or read_samples(*args))
    for first in range(order.steps_per_epoch):
        asked.clear()
        steps = range(first, order.steps_per_epoch)
        list(batches(opened, order, encode, steps, rank=0, world=1, timeout=HANG_SECONDS))
        assert BATCH * len(steps) <= len(asked) <= BATCH * len(steps) + order.lanes * data.block_samples
        list(batches(opened, order, encode, range(first, first + 1), rank=0, world=1, timeout=HANG_SECONDS))


@pytest.mark.parametrize("batches_of", ["mixed", "neighbours"])
@pytest.mark.parametrize("workers", [0, 1, 5])
def test_sidecar_reads_do_not_grow_with_workers(data, workers, batches_of, monkeypatch):
    monkeypatch.setattr(tars, "kept_records", Once(tars._kept_records))
    opened = Source.open(changed(data, workers=workers, batches=batches_of))
    order = opened.order(BATCH, 5, LENGTHS)
    steps = range(order.steps_per_epoch)
    received = sum(b.received for b in batches(opened, order, encode, steps, rank=0, world=1, timeout=HANG_SECONDS))
    samples = sum(index.total_bytes for _, index in opened.indexes)
    sidecars = sum(shard.sidecar_bytes for _, shard in opened.shards)
    assert 0.85 * (samples + sidecars) < received <= samples + sidecars


def test_sidecars_are_read_once_for_batches_of_neighbours(data, monkeypatch):
    """Single samples are all over the shards: one small read for the record of each would take as long as its data."""
    names, load = [], tars.load_sidecar
    monkeypatch.setattr(tars, "kept_records", Once(tars._kept_records))
    monkeypatch.setattr(tars, "load_sidecar", lambda *given: names.append(given) or load(*given))
    monkeypatch.setattr(tars, "_records", None)
    clustered = changed(data, batches="neighbours")
    read(clustered, range(20))
    opened = Source.open(clustered)
    assert len(names) == len(set(names)) == len(opened.shards)
    assert opened.records(0, 0, 3).dtype.itemsize == 32  # bytes that are kept of a sample
    assert len(names) == len(opened.shards)


def test_batches_of_neighbours_have_whole_clusters(data):
    """Each of a step's clusters is a run of CLUSTER samples of the stored arrangement; the last samples are in none."""
    data = changed(data, batches="neighbours")
    runs = {
        frozenset((name, number) for number in run.tolist())
        for name, count in SAMPLES.items()
        for run in np.random.default_rng(0).permutation(count)[: count // CLUSTER * CLUSTER].reshape(-1, CLUSTER)
    }
    whole = 0
    for batch in read(data, range(Source.open(data).order(BATCH, 5, LENGTHS).steps_per_epoch)):
        queries = [text(batch, query).split() for query, valid in zip(batch.query, batch.valid, strict=True) if valid]
        samples = {(name, int(number)) for name, number in queries}
        whole += sum(run <= samples for run in runs)
    assert 27 <= whole <= 30  # of 10 steps; a run may have a sample from the remainder, or the one that cannot be read


def _different(one: Source, other: Source) -> set[str]:
    return {name for name, value in one.fingerprints.items() if value != other.fingerprints[name]}


def test_clusters_are_part_of_the_data_and_belong_to_its_shards(data, tmp_path):
    mixed, clustered = Source.open(data), Source.open(changed(data, batches="neighbours"))
    assert mixed.fingerprints == Source.open(changed(data, neighbours="elsewhere")).fingerprints
    assert _different(mixed, clustered) == {"the neighbours' fingerprint"}
    for name, count in SAMPLES.items():
        (tmp_path / name).mkdir()
        index = dict(zip(SAMPLES, (index for _, index in mixed.indexes), strict=True))[name]
        write_neighbours(str(tmp_path / name), index, np.arange(count), CLUSTER, {})
    elsewhere = changed(data, batches="neighbours", neighbours=str(tmp_path))
    assert _different(Source.open(elsewhere), clustered) == {"the neighbours' fingerprint"}
    (_, first), (_, second) = mixed.indexes
    write_neighbours(str(tmp_path / "second"), second, np.arange(53), 6, {})
    with pytest.raises(PipelineError, match=r"first have 4 samples, but those in .*second have 6: mine all datasets"):
        Source.open(elsewhere)
    write_neighbours(str(tmp_path / "second"), first, np.arange(70), CLUSTER, {})
    with pytest.raises(PipelineError, match=r"second/neighbours.json belongs to other shards .* of .*second"):
        Source.open(elsewhere)
    with pytest.raises(PipelineError, match=r"neighbours.json is missing: python -m pipeline.mine MODEL"):
        Source.open(changed(elsewhere, neighbours=str(tmp_path / "none")))


@pytest.mark.parametrize("workers", [1, 7])
def test_pieces_are_cut_for_memory_and_workers(data, workers, monkeypatch):
    monkeypatch.setattr(plan, "_READ_BYTES", 6_000)
    opened = Source.open(data)
    order = opened.order(BATCH, 5, LENGTHS)
    planner = plan.Planner(opened, order, order.lanes_of(0, 2), range(order.steps_per_epoch), workers)
    windows = [planned for planned in planner if isinstance(planned, plan.PlannedWindow)]
    for window in windows:
        assert len(window.pieces) >= min(workers, window.rows[..., 0].size)
        for number, ((shard, start, stop), (records,)) in enumerate(zip(window.pieces, window.records, strict=True)):
            mine = window.rows[window.rows[:, :, 0] == number]
            assert sorted(mine[:, 2]) == list(range(start, stop))
            assert set(mine[:, 1]) == {shard}
            np.testing.assert_array_equal(records, opened.records(int(shard), int(start), int(stop)))
            assert stop - start == 1 or records["length"].sum() <= 2 * 6_000


def test_window_is_released_after_last_slice(data, monkeypatch):
    """Otherwise memory, and the time of every step, would grow over an epoch."""
    monkeypatch.setattr(reader, "_STEPS_AHEAD", 1)
    known, read_ahead = [], reader.Reader._read_ahead

    def noting_known(reader):
        known.append(len(reader.readings))
        read_ahead(reader)

    monkeypatch.setattr(reader.Reader, "_read_ahead", noting_known)
    opened = Source.open(changed(data, window_blocks=1, block_samples=3))
    order = opened.order(BATCH, 5, LENGTHS)
    steps = range(order.steps_per_epoch)
    assert len(list(batches(opened, order, encode, steps, rank=0, world=1, timeout=HANG_SECONDS))) == len(steps)
    assert max(known) <= 2 * order.lanes


def test_pairs_have_the_name_by_which_the_recipe_calls_their_dataset(tmp_path):
    """model.query_instructions finds a sample's dataset by it; img2dataset's samples name none."""
    write_shards([Pair("0", "other", "t", Item("q"), Item("t"))], tmp_path / "renamed", dataset="stored")
    (pair,) = Source.open(Data(url=str(tmp_path), datasets=["renamed"]))
    assert pair.dataset == "renamed"
    (pair,) = Source.open(Data(url=str(tmp_path / "renamed")))
    assert pair.dataset == "stored"
