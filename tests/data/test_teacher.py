"""A teacher's vectors of all items: written once, and read together with the items of each drawn pair."""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from limits import HANG_SECONDS
from PIL import Image

from pipeline.config import Data, Part
from pipeline.convert import img2dataset
from pipeline.data import teacher
from pipeline.data.batch import Batch, Encoded
from pipeline.data.index import INDEX_FILE, Captions, Index
from pipeline.data.lengths import Lengths, Square
from pipeline.data.sample import BadSample, Item, Pair
from pipeline.data.shards import write_shards
from pipeline.data.source import Source
from pipeline.data.stored_vectors import CAPTIONS, ITEMS, StoredVectors, sample_bytes
from pipeline.data.stream import batches
from pipeline.data.teacher import query_and_target_vectors
from pipeline.embedding import embed_shards
from pipeline.embedding.dataset import open_datasets
from pipeline.embedding.embed_shards import embed_datasets
from pipeline.errors import PipelineError
from pipeline.storage import objects
from pipeline.storage.objects import ObjectError

WIDTH, BATCH = 6, 8
SAMPLES = {"first": 30, "second": 13}
UNREAD, UNENCODED = 17, 5  # samples that the teacher, or the trained model, cannot read


def vector(item: Item) -> np.ndarray:
    """Return the teacher's vector of an item, (WIDTH,) float64 of length 1."""
    drawn = np.random.default_rng(item.content_hash).normal(size=WIDTH)
    return drawn / np.linalg.norm(drawn)


def as_read(item: Item) -> np.ndarray:
    """Return the vector as training sees it: rounded to fp16 and normalised again, (WIDTH,) float64."""
    rounded = vector(item).astype(np.float32).astype(np.float16).astype(np.float64)
    return rounded / np.linalg.norm(rounded)


class Teacher:
    """An encoder that records the items that it prepares and the number of those in each call that it embeds."""

    name, dimension, instructed = "teacher", WIDTH, True

    def __init__(self, identity: str = "1") -> None:
        self.identity, self.prepared, self.calls = identity, [], []

    def prepare(self, item: Item) -> Item:
        self.prepared.append(item)
        if "unread" in item.text:
            raise BadSample("made so")
        return item

    def embed(self, prepared: Sequence[Item]) -> torch.Tensor:
        self.calls.append(len(prepared))
        return torch.tensor(np.array([vector(item) for item in prepared]).reshape(-1, WIDTH), dtype=torch.float32)


def pair(dataset: str, number: int) -> Pair:
    image = (np.random.default_rng(number).bytes(300),)  # not an image, but no code decodes it
    query = Item(f"<image> {dataset} {number}" + " unread" * (number == UNREAD), image)
    target = Item("<image> the same", image) if number % 5 == 0 else Item(f"{dataset} {number} is right")
    mark = "<image> " if target.images else ""
    alternatives = tuple(f"{mark}{dataset} {number} alternative {i}" for i in range(number % 4))
    negatives = tuple(Item(f"wrong {i}") for i in range(number % 3))
    positives = (Item(f"{dataset} {number} is right, too"),) * (number % 2)
    one = Pair(f"{number:04d}", dataset, f"task {number}", query, target, negatives, alternatives, positives=positives)
    scores = tuple(float(i) for i in range(len(one.items) - 1)) if number % 4 < 2 else None
    return replace(one, weights=(2.0, 0.5)[: 1 + len(positives)], scores=scores)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for dataset, count in SAMPLES.items():
        pairs = (pair(dataset, number) for number in range(count))
        write_shards(pairs, folder / dataset, dataset=dataset, shard_bytes=30_000)
    return folder


@pytest.fixture(autouse=True)
def small_groups(monkeypatch) -> None:
    monkeypatch.setattr(embed_shards, "_WITH_IMAGES", 4)


def embed(shards: Path, out: Path | None, encoder: Teacher | None = None, stored: str = "fp16") -> Teacher:
    encoder = encoder or Teacher()
    datasets = open_datasets([str(shards)], out and str(out), ITEMS)
    embed_datasets(encoder, datasets, stored, torch.device("cpu"), overwrite=True)
    return encoder


def data_of(shards: Path, place: str | Path | None, **fields: object) -> Data:
    given = {"datasets": list(SAMPLES), "lanes": 2, "block_samples": 8, "window_blocks": 2, "workers": 0} | fields
    return Data(url=str(shards), teacher=place and str(place), **given)


def encode(item: Item) -> Encoded:
    """Use a text's bytes as token ids."""
    if item.text.startswith("<image>") and item.text.endswith(f" {UNENCODED}"):
        raise BadSample("made so")
    return Encoded(np.frombuffer(item.text.encode(), np.uint8).astype(np.int32))


def text(batch: Batch, key: int) -> str:
    return bytes(batch.items[key].input_ids.astype(np.uint8)).decode()


def read(data: Data, steps: int = 5, world: int = 1) -> list[Batch]:
    source = Source.open(data)
    order = source.order(BATCH, 3, Lengths(Square(), 8))
    ranks = range(world)
    given = {"world": world, "timeout": HANG_SECONDS}
    return [batch for rank in ranks for batch in batches(source, order, encode, range(steps), rank=rank, **given)]


def test_store_has_one_row_per_item_and_equal_items_are_embedded_once(shards, tmp_path):
    encoder = embed(shards, tmp_path)
    groups = sum(-(-shard.samples // 4) for name in SAMPLES for shard in Index.load(str(shards / name)).shards)
    assert len(encoder.calls) == groups
    occurring = sum(number % 3 > 0 for count in SAMPLES.values() for number in range(count))
    assert Counter(item.text for item in encoder.prepared)["wrong 0"] <= groups < occurring
    for dataset, count in SAMPLES.items():
        assert StoredVectors.load(str(tmp_path / dataset), ITEMS).metadata.model == "teacher"
        tars = sorted(map(str, (tmp_path / dataset).glob("*_item_embeddings.tar")))
        found = [sample for tar in tars for sample in webdataset.WebDataset(tar, shardshuffle=False).decode()]
        assert [sample["__key__"] for sample in found] == [f"{number:04d}" for number in range(count)]
        for number, sample in enumerate(found):
            one = pair(dataset, number)
            targets = [replace(one.target, text=text) for text in one.texts]
            expected = [vector(item) for item in (one.query, *targets, *one.positives, *one.negatives)]
            rows = sample["item_embeddings.npy"]
            if number == UNREAD:
                assert rows.shape == (0, WIDTH)
            else:
                np.testing.assert_array_equal(rows, np.array(expected, np.float32).astype(np.float16))


@pytest.mark.parametrize("hard_negatives", [True, False])
def test_each_drawn_pair_comes_with_the_teachers_rows(shards, tmp_path, hard_negatives):
    embed(shards, tmp_path)
    texts, bad = {"": Item("")}, Counter()
    for dataset, count in SAMPLES.items():
        for one in (pair(dataset, number) for number in range(count)):
            items = (*one.items, *(replace(one.target, text=text) for text in one.alternatives))
            texts |= {(one.task, item.text): item for item in items}
    seen = None
    for world, workers in ((1, 0), (1, 2), (2, 0)):
        rows = []
        for batch in read(data_of(shards, tmp_path, workers=workers, hard_negatives=hard_negatives), world=world):
            assert len(batch.teacher) == len(batch.tasks) == len(batch.query) == BATCH // world
            for row, (vectors, task) in enumerate(zip(batch.teacher, batch.tasks, strict=True)):
                keys = (batch.query[row], batch.target[row], *batch.positives[row], *batch.negatives[row])
                items = [text(batch, key) for key in keys]
                rows.append((items, vectors.tolist()))
                assert vectors.dtype == np.float32
                if batch.valid[row]:
                    one = pair("first", int(task.removeprefix("task ")))
                    positives, negatives = len(one.positives), len(one.negatives) if hard_negatives else 0
                    assert (len(batch.positives[row]), len(batch.negatives[row])) == (positives, negatives)
                    assert batch.weights[row] == one.weights
                    assert batch.scores[row] == (one.scores and one.scores[: 1 + positives + negatives])
                    expected = np.array([as_read(texts[task, item]) for item in items])
                    np.testing.assert_allclose(vectors, expected, rtol=0, atol=2.0**-24)  # rounded to float32
                    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=0, atol=2.0**-22)
                else:
                    assert (items, task, vectors.tolist()) == (["", ""], "", np.zeros((2, WIDTH)).tolist())
                    assert (batch.weights[row], batch.scores[row]) == ((1.0,), None)
            bad.update(each.reason for each in batch.bad)
        if world == 1:
            assert seen in (None, rows)
            seen = rows
        assert any(" alternative " in items[1] for items, _ in rows)
        assert any("wrong 0" in items for items, _ in rows) == hard_negatives
        assert any("too" in items[-1] for items, _ in rows)
    reason = "the teacher has no vectors for it: teacher could not read one of its items"
    assert set(bad) == {reason, "made so"}


def test_without_a_teacher_batches_have_no_rows(shards):
    assert all(batch.teacher is None for batch in read(data_of(shards, None), 2))


def test_texts_of_a_pair_take_their_rows_along():
    rows = np.arange(8, dtype=np.float32)[:, None]
    image, negatives, positives = Item("<image>", (b"image",)), (Item("n"), Item("m")), (Item("p"),)
    given = {"positives": positives, "weights": (2, 3), "scores": (4, 5, 6, 7), "teacher": rows}
    one = Pair("0", "d", "t", image, Item("a"), negatives, (" a", "b", "a"), **given)
    for number in range(4):
        drawn = one.drawn(number)
        assert drawn.teacher.ravel().tolist() == [0, 1 + number, 5, 6, 7]
        assert (drawn.weights, drawn.scores) == ((2, 3), (4, 5, 6, 7))
    without = one.without_negatives()
    assert (without.weights, without.scores, without.teacher.ravel().tolist()) == ((2, 3), (4, 5), [0, 1, 2, 3, 4, 5])
    assert without.drawn(2).teacher.ravel().tolist() == [0, 3, 5]
    both = [one.two_texts(lambda n, k=k: k) for k in range(2)]
    assert [each.teacher.ravel().tolist() for each in both] == [[1, 3], [3, 1]]
    assert [each.items for each in both] == [(Item("a"), Item("b")), (Item("b"), Item("a"))]
    assert {(each.weights, each.scores) for each in both} == {((2,), None)}


def test_tars_of_img2dataset_get_vectors_of_their_query_and_captions(tmp_path):
    image = BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with webdataset.TarWriter(str(tmp_path / "0.tar"), encoder=False) as writer:
        for number in range(3):
            writer.write({"__key__": str(number), "png": image.getvalue() + bytes(number), "txt": f"{number}".encode()})
    parser = argparse.ArgumentParser()
    img2dataset.COMMAND.add_arguments(parser)
    more = ["--query", "<image>\nWhat is it?", "--processes", "1"]
    img2dataset.COMMAND.run(parser.parse_args([str(tmp_path), str(tmp_path), *more]))
    embed(tmp_path, None)
    assert list(img2dataset._tars(str(tmp_path))) == ["0.tar"]  # another index would not take the vectors for samples
    source = Source.open(Data(url=str(tmp_path), teacher="beside"))
    assert (len(source), source.teacher_metadata.query) == (3, "<image>\nWhat is it?")
    samples, vectors = (list(tar.samples(0, 3)) for tar in source.tars(0))
    for number, ((record, data), (_, stored)) in enumerate(zip(samples, vectors, strict=True)):
        query = Item("<image>\nWhat is it?", (image.getvalue() + bytes(number),))
        expected = [as_read(item) for item in (query, Item(f"{number}"))]
        np.testing.assert_allclose(source.parse(0, record, data, stored).teacher, expected, rtol=0, atol=2.0**-24)


def test_captions_vectors_and_teachers_vectors_are_read_together(tmp_path):
    pairs = [Pair(f"{i}", "d", "t", Item("<image>", (b"image",)), Item(f"t{i}"), (), (f"u{i}",)) for i in range(20)]
    write_shards(pairs, tmp_path, dataset="d")
    for kind, identity in ((CAPTIONS, "text encoder"), (ITEMS, "teacher")):
        datasets = open_datasets([str(tmp_path)], None, kind)
        embed_datasets(Teacher(identity), datasets, "fp16", torch.device("cpu"), overwrite=False)
    source = Source.open(data_of(tmp_path, "beside", text_embeddings="beside", datasets=[]))
    metadata = source.embedding_metadata, source.teacher_metadata
    assert [each.identity for each in metadata] == ["text encoder", "teacher"]
    order = source.order(BATCH, 3, Lengths(Square(), 8))
    given = {"rank": 0, "world": 1, "timeout": HANG_SECONDS}
    vectors = {}

    def keeping(item: Item) -> Encoded:
        vectors[item.text] = item.vector
        return encode(item)

    for batch in batches(source, order, keeping, range(2), **given):
        for row, (query, target) in enumerate(zip(batch.query, batch.target, strict=True)):
            items = [Item("<image>", (b"image",)), Item(text(batch, target))]
            assert text(batch, query) == "<image>"
            assert np.array_equal(vectors[items[1].text], vector(items[1]).astype(np.float32).astype(np.float16))
            expected = [as_read(item) for item in items]
            np.testing.assert_allclose(batch.teacher[row], expected, rtol=0, atol=2.0**-24)


def test_fingerprint_and_memory_count_the_teachers_vectors(shards, tmp_path, monkeypatch):
    embed(shards, tmp_path / "one")
    embed(shards, tmp_path / "other", Teacher("2"))
    without, one, other = (Source.open(data_of(shards, tmp_path / p if p else None)) for p in (None, "one", "other"))
    prints = [dict(source.fingerprints) for source in (without, one, other)]
    assert len({each.pop("the teacher vectors' fingerprint") for each in prints}) == 3
    assert prints[0] == prints[1] == prints[2]
    assert (one.teacher_metadata.width, one.teacher_metadata.identity, without.teacher_metadata) == (WIDTH, "1", None)
    order = one.order(BATCH, 3, Lengths(Square(), 8))
    monkeypatch.setattr(StoredVectors, "total_bytes", property(lambda self: 1 << 30))
    without.check_memory(order, 1)
    small = replace(one, data=one.data.model_copy(update={"memory_mb": 64}))
    with pytest.raises(PipelineError, match="memory_mb=64 is too little"):
        small.check_memory(order, 1)


def test_vectors_of_other_shards_models_or_queries_are_refused(shards, tmp_path):
    embed(shards, tmp_path)
    embed(shards / "second", tmp_path / "second", Teacher("2"))
    with pytest.raises(ObjectError, match=r"are from teacher \(1\), but those in .*second are from teacher \(2\)"):
        Source.open(data_of(shards, tmp_path))
    write_shards([pair("first", 1)], tmp_path / "changed/first", dataset="first")
    with pytest.raises(ObjectError, match=r"first/item_embeddings\.json has \d shards, but .* has 1: embed its items"):
        Source.open(data_of(tmp_path / "changed", tmp_path, datasets=["first"]))
    with pytest.raises(ObjectError, match=r"no such file; .*first is itself a dataset: give data\.datasets=\[\]$"):
        Source.open(Data(url=str(shards / "first"), datasets=[Part(name="train")]))
    with pytest.raises(
        ObjectError, match=r"none/index\.json: there is no such file; tools/make_shards\.py makes shards$"
    ):
        Source.open(Data(url=str(tmp_path / "none")))
    with pytest.raises(ObjectError, match=r"first/text_embeddings\.json: there is no such file"):
        StoredVectors.load(str(tmp_path / "first"), CAPTIONS)
    url = str(shards / "first")
    index = replace(Index.load(url), captions=Captions("<image>\nWhat?", ("txt",), ""))
    found = StoredVectors.load(str(tmp_path / "first"), ITEMS)
    made = replace(found, metadata=replace(found.metadata, columns=("txt",), query="<image>"))
    with pytest.raises(ObjectError, match=r"embeds the query '<image>', but .*first has '<image>.nWhat\?': embed its"):
        made.check(str(tmp_path / "first"), url, index)


def test_queries_and_targets_are_read_as_arrays(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "_PIECE", 7)
    embed(shards, tmp_path, stored="bf16")
    (tmp_path / "alone").mkdir()
    for name, count in SAMPLES.items():
        (tmp_path / "alone" / INDEX_FILE).write_bytes((shards / name / INDEX_FILE).read_bytes())  # no tar of samples
        source = Source.open(Data(url=str(tmp_path / "alone"), teacher=str(tmp_path / name)))
        parts = [part for shard in range(len(source.shards)) for part in query_and_target_vectors(source, shard)]
        assert all(len(part.query) == len(part.target) == len(part.usable) <= 7 for part in parts)
        assert all(then.first in (0, part.first + 7) for part, then in pairwise(parts))
        query, target, usable = (np.concatenate([getattr(part, each) for part in parts])
                                 for each in ("query", "target", "usable"))  # fmt: skip
        assert usable.tolist() == [number != UNREAD for number in range(count)]
        assert not query[~usable].any() and not target[~usable].any()
        pairs = [pair(name, number) for number in range(count) if number != UNREAD]
        for rows, items in ((query, [one.query for one in pairs]), (target, [one.target for one in pairs])):
            expected = np.array([vector(item) for item in items])
            np.testing.assert_allclose(rows[usable], expected, rtol=0, atol=2.0**-8)  # bf16's rounding
            np.testing.assert_allclose(np.linalg.norm(rows[usable], axis=1), 1, rtol=0, atol=2.0**-22)
    with pytest.raises(PipelineError, match=r"was opened without data\.teacher"):
        next(query_and_target_vectors(Source.open(Data(url=str(tmp_path / "alone"))), 0))


def test_rows_of_another_sample_are_refused(shards, tmp_path):
    embed(shards, tmp_path)
    source = Source.open(data_of(shards, tmp_path))
    samples, vectors = source.tars(0)
    (record, sample), _ = samples.samples(0, 2)
    (_, own), (_, other) = vectors.samples(0, 2)
    assert source.parse(0, record, sample, own).teacher.shape == (2, WIDTH)
    with pytest.raises(ObjectError, match=r"item_embeddings\.tar: the vectors \(5, 6\) of sample '0001' are not those"):
        source.parse(0, record, sample, other)
    with pytest.raises(BadSample, match="an item's embedding is zero or not finite"):
        source.parse(0, record, sample, sample_bytes("0000", np.zeros((2, WIDTH), np.float16), ITEMS))


def test_vectors_of_items_are_never_those_of_published_code(shards, tmp_path):
    embed(shards / "first", tmp_path)
    stored = StoredVectors.load(str(tmp_path), ITEMS)
    changed = replace(stored, metadata=replace(stored.metadata, stored="fp32"))
    objects.write(str(tmp_path / ITEMS.index_file), changed.to_json().encode())
    with pytest.raises(ObjectError, match="only vectors of captions can be stored in fp32"):
        StoredVectors.load(str(tmp_path), ITEMS)
