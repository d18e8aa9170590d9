import numpy as np
import pytest

from pipeline.config import Data
from pipeline.data.collate import Encoded
from pipeline.data.sample import BadSample, Item, Pair
from pipeline.data.shards import write_shards
from pipeline.data.stream import Source, batches
from pipeline.errors import PipelineError

SAMPLES = {"first": 70, "second": 53}
BATCH = 12


def pair(dataset: str, number: int) -> Pair:
    negatives = (Item(f"{dataset} no {number}"),) if number % 3 == 0 else ()
    return Pair(
        f"{number:04d}", dataset, "retrieval", Item(f"{dataset} {number}"), Item(f"answer {number % 20}"), negatives
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    folder = tmp_path_factory.mktemp("stream")
    for dataset, count in SAMPLES.items():
        pairs = (pair(dataset, number) for number in range(count))
        write_shards(pairs, folder / dataset, dataset=dataset, shard_bytes=30_000)
    return Data(url=str(folder), datasets=list(SAMPLES), lanes=4, block_samples=8, window_blocks=2)


def encode(item: Item) -> Encoded:
    if item.text == "first 7":
        raise BadSample("made so")
    return Encoded(np.frombuffer(item.text.encode(), np.uint8).astype(np.int32))


def read(data: Data, steps: range, rank: int = 0, world: int = 1, workers: int = 0):
    source = Source.open(data)
    order = source.order(data, BATCH, seed=5)
    return list(batches(source, order, encode, steps, rank=rank, world=world, workers=workers, timeout=60))


def test_every_world_and_number_of_workers_sees_the_batches_of_the_order(data):
    source = Source.open(data)
    order = source.order(data, BATCH, seed=5)
    steps = range(7, 7 + order.steps_per_epoch)  # over an epoch's border
    expected = [[source.key(*row) for row in order.batch(step).tolist()] for step in steps]
    for world, workers in [(1, 0), (1, 3), (2, 0), (2, 2), (4, 1)]:
        ranks = [read(data, steps, rank, world, workers) for rank in range(world)]
        for step, wanted in enumerate(expected):
            assert [key for rank in ranks for key in rank[step].keys] == wanted, (world, workers, step)


def test_a_batch_holds_what_was_written(data):
    texts = {}
    for batch in read(data, range(10)):
        decoded = {key: bytes(item.input_ids.astype(np.uint8)).decode() for key, item in batch.items.items()}
        assert len(batch.items) == len(set(batch.query + batch.target + batch.negatives))
        for key, query, target, valid in zip(batch.keys, batch.query, batch.target, batch.valid, strict=True):
            if valid:
                dataset, number = decoded[query].split()
                assert decoded[target] == f"answer {int(number) % 20}"
                assert f"/{dataset}/" in key
                texts[decoded[query]] = key
    assert len(texts) == 119  # 10 steps of 12, each sample once, less the one that cannot be encoded


def test_a_bad_sample_is_an_invalid_row_with_its_key_and_reason(data):
    found = [batch for batch in read(data, range(10)) if not all(batch.valid)]
    assert len(found) == 1
    (batch,) = found
    row = batch.valid.index(False)
    assert batch.bad == [(batch.keys[row], "made so")]
    assert batch.query[row] == batch.target[row] == Item("").content_hash
    assert len(batch.query) == len(batch.target) == len(batch.valid) == BATCH


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_bytes_are_an_error_that_names_them_not_a_bad_sample(data, tmp_path, workers):
    pairs = (pair("first", number) for number in range(40))
    write_shards(pairs, tmp_path, dataset="first")
    shard = tmp_path / "000000.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(PipelineError, match=r"000000\.tar is damaged: bytes \d+-\d+"):
        read(data.model_copy(update={"url": str(tmp_path), "datasets": []}), range(3), workers=workers)


def test_lanes_that_do_not_divide_are_refused(data):
    source = Source.open(data)
    order = source.order(data, BATCH, seed=5)
    with pytest.raises(PipelineError, match="could be 1, 2, 4"):
        list(batches(source, order, encode, range(1), rank=0, world=3, workers=0, timeout=60))
