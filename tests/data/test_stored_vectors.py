"""Caption vectors: written once despite interruptions, and read together with the image of each drawn caption."""

import json
import shutil
import sys
import tarfile
import tempfile
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from limits import HANG_SECONDS
from PIL import Image
from safetensors.numpy import load_file

from pipeline.config import Data
from pipeline.convert.img2dataset import indexing
from pipeline.data import tars
from pipeline.data.batch import Encoded
from pipeline.data.index import INDEX_FILE, Captions, Index, checksum_of
from pipeline.data.lengths import Lengths, Square
from pipeline.data.reader import Reader
from pipeline.data.sample import BadSample, Item, Pair
from pipeline.data.shards import write_shards
from pipeline.data.source import Source
from pipeline.data.stored_vectors import CAPTIONS, StoredVectors, sample_bytes
from pipeline.data.stream import batches
from pipeline.embed import main
from pipeline.embedding import embed_shards
from pipeline.embedding.dataset import open_datasets
from pipeline.embedding.embed_shards import embed_datasets
from pipeline.embedding.published import index_published
from pipeline.errors import PipelineError
from pipeline.storage import objects
from pipeline.storage.objects import ObjectError

WIDTH = 6
SAMPLES = {"first": 40, "second": 23}
BATCH = 8


def vector(text: str) -> np.ndarray:
    """Return a float64 vector (WIDTH,) of length 1."""
    drawn = np.random.default_rng(zlib.crc32(text.encode())).normal(size=WIDTH)
    return drawn / np.linalg.norm(drawn)


def as_stored(text: str, stored: str) -> np.ndarray:
    """Return the vector as float32 (WIDTH,), rounded to the stored format; bf16 manually, to nearest, ties to even."""
    exact = vector(text).astype(np.float32)
    if stored == "fp16":
        return exact.astype(np.float16).astype(np.float32)
    step = np.exp2(np.floor(np.log2(np.abs(exact.astype(np.float64)))) - 7)
    return (np.rint(exact / step) * step).astype(np.float32)


class Texts:
    """An encoder that records the texts that it embeds, and fails after a number of calls."""

    name, identity, dimension, instructed = "texts", "1", WIDTH, False

    def __init__(self, calls: int = 10**6) -> None:
        self.groups, self.calls = [], calls

    def prepare(self, item: Item) -> str:
        if "unusable" in item.text:
            raise BadSample("made so")
        return item.text

    def embed(self, prepared: Sequence[str]) -> torch.Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("killed")
        self.groups.append(list(prepared))
        return torch.tensor(np.array([vector(text) for text in prepared]).reshape(-1, WIDTH), dtype=torch.float32)

    @property
    def texts(self) -> list[str]:
        return [text for group in self.groups for text in group]


def pair(dataset: str, number: int) -> Pair:
    image = np.random.default_rng(number).bytes(300 + 50 * (number % 7))  # not an image, but no code decodes it
    texts = [f"{dataset} {number}", *(f"{dataset} {number} long {i}" * 3 for i in range(number % 4)), "the same"]
    if number == 17:
        texts[0] += " unusable"
    return Pair(f"{number:04d}", dataset, "", Item("<image>", (image,)), Item(texts[0]), alternatives=tuple(texts[1:]))


def write(folder: Path) -> Path:
    for dataset, count in SAMPLES.items():
        write_shards((pair(dataset, i) for i in range(count)), folder / dataset, dataset=dataset, shard_bytes=25_000)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("shards"))


@pytest.fixture(autouse=True)
def small_groups(monkeypatch) -> None:
    monkeypatch.setattr(embed_shards, "GROUP", 4)


def embed(shards: str | Path | list, out: str | Path | None, encoder: Texts, stored: str = "fp16", **options) -> Texts:
    urls = [str(url) for url in (shards if isinstance(shards, list) else [shards])]
    datasets = open_datasets(urls, out and str(out))
    embed_datasets(encoder, datasets, stored, torch.device("cpu"), overwrite=options.get("overwrite", False))
    return encoder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def data_of(shards: str | Path, embeddings: str | Path | None, **fields) -> Data:
    given = {"datasets": list(SAMPLES), "lanes": 2, "block_samples": 8, "window_blocks": 2, "workers": 0} | fields
    return Data(url=str(shards), text_embeddings=embeddings and str(embeddings), **given)


def encode(item: Item) -> Encoded:
    """Use a text's bytes as token ids."""
    return Encoded(np.frombuffer(item.text.encode(), np.uint8).astype(np.int32), vector=item.vector)


def read(data: Data, steps: int = 7, world: int = 1) -> Iterator:
    """Yield (batch, row, caption, vector) for all rows."""
    opened = Source.open(data)
    order = opened.order(BATCH, 3, Lengths(Square(), 8))
    for rank in range(world):
        for batch in batches(opened, order, encode, range(steps), rank=rank, world=world, timeout=HANG_SECONDS):
            for row, target in enumerate(batch.target):
                item = batch.items[target]
                yield batch, row, bytes(item.input_ids.astype(np.uint8)).decode(), item.vector


@pytest.mark.parametrize("stored", ["fp16", "bf16"])
def test_embedding_tars_have_one_row_per_text(shards, tmp_path, stored):
    encoder = embed(shards, tmp_path, Texts(), stored)
    assert max(Counter(encoder.texts).values()) < sum(SAMPLES.values()) / 2  # "the same" is embedded once per group
    assert all(group == sorted(group, key=len, reverse=True) for group in encoder.groups)
    for dataset, count in SAMPLES.items():
        made = StoredVectors.load(str(tmp_path / dataset), CAPTIONS).metadata
        assert (made.model, made.identity, made.width, made.stored) == ("texts", "1", WIDTH, stored)
        tars = sorted(map(str, (tmp_path / dataset).glob("*_text_embeddings.tar")))
        assert len(tars) > 1
        found = [sample for tar in tars for sample in webdataset.WebDataset(tar, shardshuffle=False).decode()]
        assert [sample["__key__"] for sample in found] == [f"{number:04d}" for number in range(count)]
        for number, sample in enumerate(found):
            rows, texts = sample["text_embeddings.npy"], pair(dataset, number).texts
            if number == 17:
                assert rows.shape == (0, WIDTH)
                continue
            rows = torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16 if stored == "bf16" else torch.float16)
            np.testing.assert_array_equal(rows.float().numpy(), [as_stored(text, stored) for text in texts])


@pytest.mark.parametrize("place", ["beside", "elsewhere", "s3"])
@pytest.mark.slow
def test_each_drawn_caption_comes_with_its_embedding(request, shards, tmp_path, place):
    url, out, embeddings, stored = shutil.copytree(shards, tmp_path / "shards"), None, "beside", "fp16"
    if place == "elsewhere":
        out = embeddings = tmp_path / "vectors"
        stored = "bf16"
    if place == "s3":
        request.getfixturevalue("s3")
        url, out, stored = "s3://pipeline-tests/vectors/in", "s3://pipeline-tests/vectors/out", "bf16"
        embeddings = out
        for name, content in files(shards).items():
            objects.write(f"{url}/{name}", content)
    embed([f"{url}/{name}" for name in SAMPLES], out, Texts(), stored)
    seen, drawn = None, Counter()
    for world, workers in ((1, 0), (1, 2), (2, 0)):
        rows = []
        for batch, row, text, found in read(data_of(url, embeddings, workers=workers), world=world):
            rows.append((batch.origins[row], batch.query[row], text))
            if not batch.valid[row]:
                assert (found, batch.bad[0].key) == (None, "0017")
                assert batch.bad[0].reason == "its captions have no embeddings"
                continue
            drawn[text] += 1
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, as_stored(text, stored))
        assert len(rows) == 7 * BATCH
        assert len({str(origin) for origin, *_ in rows}) == len(rows)  # the steps are one epoch
        if world == 1:
            assert seen in (None, rows)
            seen = rows
    assert sum("long" in text for text in drawn) > 10
    assert sum(drawn.values()) >= 3 * 7 * BATCH - 6


def test_text_embeddings_change_fingerprint_but_not_captions(shards, tmp_path):
    embed(shards, tmp_path, Texts())
    without, with_them = (Source.open(data_of(shards, place)) for place in (None, tmp_path))
    assert without.embedding_metadata is None and len(without.tars(0)) == 1
    assert (with_them.embedding_metadata.width, with_them.embedding_metadata.model) == (WIDTH, "texts")
    assert without.fingerprint != with_them.fingerprint
    texts = {(row, text): found for _, row, text, found in read(data_of(shards, None), 3)}
    assert set(texts.values()) == {None}
    assert {(row, text) for _, row, text, _ in read(data_of(shards, tmp_path), 3)} == texts.keys()


def test_bytes_read_and_held_count_both_tars(shards, tmp_path, monkeypatch):
    embed(shards, tmp_path, Texts())
    held, read_ahead = [], Reader._read_ahead

    def noting(reader: Reader) -> None:
        read_ahead(reader)
        futures = [future for reading in reader.readings.values() for future in reading.samples.values()]
        found = [data for future in futures for sample in future.result().values() for data in sample.data]
        held.append((reader.held, sum(map(len, found))))

    monkeypatch.setattr(Reader, "_read_ahead", noting)
    for embeddings in (None, tmp_path):
        tars._records.cache_clear()
        opened = Source.open(data_of(shards, embeddings))
        order = opened.order(BATCH, 3, Lengths(Square(), 8))
        steps = range(order.steps_per_epoch)
        received = sum(
            batch.received for batch in batches(opened, order, encode, steps, rank=0, world=1, timeout=HANG_SECONDS)
        )
        read_bytes = received - sum(
            tar.shard.sidecar_bytes for n in range(len(opened.shards)) for tar in opened.tars(n)
        )
        both = sum(index.total_bytes for _, index in (*opened.indexes, *opened.embeddings))
        assert 0.75 * both < read_bytes < both
    assert [counted for counted, _ in held] == [there for _, there in held]
    assert max(held) > (50_000, 50_000)
    heavy = Source(opened.data.model_copy(update={"memory_mb": 1}), opened.indexes, opened.shards)
    heavy.check_memory(order, 1)
    for _, index in opened.embeddings:
        monkeypatch.setattr(type(index), "total_bytes", property(lambda self: 2 << 20))
    with pytest.raises(PipelineError, match="memory_mb=1 is too little"):
        Source(heavy.data, heavy.indexes, heavy.shards, opened.embeddings).check_memory(order, 1)


def test_shards_are_embedded_in_bounded_pieces(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "_READ_BYTES", 4_000)
    pieces, plain = [], tars.read_samples

    def noting(url, shard, records):
        pieces.append(int(records["length"].sum()))
        return plain(url, shard, records)

    monkeypatch.setattr(embed_shards, "GROUP", 1000)
    monkeypatch.setattr(tars, "read_samples", noting)
    embed(shards, tmp_path, Texts())
    largest = max(len(content) for content in files(shards).values())
    assert max(pieces) < 4_000 + 3_000 < largest
    assert sum(pieces) > 0.9 * sum(index.total_bytes for _, index in Source.open(data_of(shards, None)).indexes)


def test_embedding_tars_are_not_held_in_memory(tmp_path, monkeypatch):
    write_shards((pair("one", number) for number in range(40)), tmp_path / "one", dataset="one")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(tars, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(embed_shards, "sample_bytes", lambda *given: sample_bytes(*given) + bytes(1 << 20))
    tracemalloc.start()
    try:
        embed(tmp_path / "one", tmp_path / "out", Texts())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    (tar,) = (tmp_path / "out").glob("*.tar")
    assert peak < 20 << 20 < 40 << 20 < tar.stat().st_size
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("calls", [0, 3, 9, 15])
def test_killed_embedding_resumes_and_embeds_no_shard_twice(shards, tmp_path, calls):
    whole = embed(shards, tmp_path / "whole", Texts())
    killed = Texts(calls)
    with pytest.raises(RuntimeError, match="killed"):
        embed(shards, tmp_path / "killed", killed)
    assert not list((tmp_path / "killed").rglob("text_embeddings.json"))
    begun = [json.loads(path.read_text()) for path in tmp_path.glob("killed/*/.text_embeddings/0*.json")]
    (tmp_path / "killed/first/.text_embeddings/.x.json.1.partial").write_bytes(b"{")
    done = sum(-(-part["shard"]["samples"] // 4) for part in begun)
    again = embed(shards, tmp_path / "killed", Texts())
    assert len(again.groups) == len(whole.groups) - done
    assert calls < 9 or done > 0
    assert again.groups == whole.groups[done:]
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert embed(shards, tmp_path / "killed", Texts()).groups == []  # the third start has nothing to do


def test_records_left_by_a_killed_start_do_not_outlive_the_index(shards, tmp_path):
    """A start that is killed while it deletes its records has written the index."""
    embed(shards, tmp_path, Texts())
    expected = files(tmp_path)
    (tmp_path / "first/.text_embeddings").mkdir(exist_ok=True)
    (tmp_path / "first/.text_embeddings/made.json").write_text("{}")
    tar = tmp_path / "first/000001_text_embeddings.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")  # the next start would find it again and again
    assert embed(shards, tmp_path, Texts()).groups == []
    tar.write_bytes(expected["first/000001_text_embeddings.tar"])
    assert files(tmp_path) == expected


def test_only_some_unusable_samples_are_logged(shards, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Texts, "prepare", lambda self, item: _refuse(item) if "first" in item.text else item.text)
    embed(shards, tmp_path, Texts())
    assert caplog.text.count("no embeddings for") == embed_shards._SHOWN
    assert "40 of 63 samples could not be used" in caplog.text


def _refuse(item: Item) -> None:
    raise BadSample("made so")


def test_truncated_or_corrupt_tar_is_embedded_again(shards, tmp_path, monkeypatch):
    embed(shards, tmp_path, Texts())
    expected = files(tmp_path)
    tar = tmp_path / "first/000001_text_embeddings.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    again = embed(shards, tmp_path, Texts())
    samples = Index.load(str(shards / "first")).shards[1].samples
    assert len(again.groups) == -(-samples // 4)
    assert files(tmp_path) == expected

    write_object = objects.write

    def flipping(url: str, content: bytes | Path) -> None:
        write_object(url, content)
        if url.endswith("first/000001_text_embeddings.tar"):
            changed = bytearray(Path(url).read_bytes())
            changed[700] ^= 1
            Path(url).write_bytes(changed)

    with monkeypatch.context() as patch:
        patch.setattr(objects, "write", flipping)
        with pytest.raises(PipelineError, match=r"first/000001_text_embeddings\.tar: the hash is wrong"):
            embed(shards, tmp_path / "flipped", Texts())
    assert not list((tmp_path / "flipped/first").glob("*.json"))
    assert len(embed(shards, tmp_path / "flipped", Texts()).groups) == -(-samples // 4)
    assert files(tmp_path / "flipped")["first/000001_text_embeddings.tar"] == tar.read_bytes()


def test_embeddings_are_replaced_only_with_overwrite(shards, tmp_path):
    shards, out = shutil.copytree(shards, tmp_path / "shards"), tmp_path / "out"
    embed(shards, out, Texts())
    before = files(out)

    class Other(Texts):
        name, identity = "other", "2"

    complaint = r"out/first has vectors of texts \(1, width 6, fp16\), not of other \(2, width 6, fp16\)"
    with pytest.raises(PipelineError, match=complaint + ": add --overwrite, or choose another --out"):
        embed(shards, out, Other())
    with pytest.raises(PipelineError, match="add --overwrite"):
        embed(shards, out, Texts(), "bf16")
    write_shards((pair("first", i + 1) for i in range(40)), shards / "first", dataset="first", shard_bytes=25_000)
    with pytest.raises(PipelineError, match=r"has vectors of other shards than .*first has now: add --overwrite"):
        embed(shards, out, Texts())
    assert files(out) == before
    with pytest.raises(
        PipelineError, match=r"text_embeddings\.json belongs to another 000000\.tar than that of .*first"
    ):
        Source.open(data_of(shards, out))

    changed = embed(shards, out, Texts(), overwrite=True)
    assert {text.split()[0] for text in changed.texts} == {"first", "the"}  # the second dataset is unchanged
    with pytest.raises(RuntimeError, match="killed"):
        embed(shards, out, Other(5), overwrite=True)
    assert not list((out / "first").glob("*.json"))  # without an index, no program reads the half-replaced vectors
    with pytest.raises(PipelineError, match="add --overwrite"):
        embed(shards, out, Texts())
    with pytest.raises(RuntimeError, match="killed"):
        embed(shards, out, Texts(5), overwrite=True)
    with pytest.raises(RuntimeError, match="killed"):
        embed(shards, out, Other(0), overwrite=True)
    assert len(embed(shards, out, Other()).groups) == len(embed(shards, tmp_path / "new", Texts()).groups)
    assert Source.open(data_of(shards, out)).embedding_metadata.identity == "2"


def test_damaged_missing_or_mismatched_embeddings_are_refused_by_name(shards, tmp_path):
    embed(shards, tmp_path, Texts())
    tar = tmp_path / "second/000001_text_embeddings.tar"
    content = bytearray(tar.read_bytes())
    content[len(content) // 4 :: 512] = bytes(b ^ 1 for b in content[len(content) // 4 :: 512])
    tar.write_bytes(content)
    with pytest.raises(PipelineError, match=r"second/000001_text_embeddings\.tar is damaged: bytes \d+-\d+ differ"):
        list(read(data_of(shards, tmp_path)))
    tar.unlink()
    with pytest.raises(PipelineError, match=r"second/000001_text_embeddings\.tar: there is no such file"):
        list(read(data_of(shards, tmp_path)))

    class Other(Texts):
        name, identity = "other", "2"

    embed(shards / "second", tmp_path / "second", Other(), overwrite=True)
    with pytest.raises(PipelineError, match=r"are from texts \(1\), but those in .*second are from other \(2\)"):
        Source.open(data_of(shards, tmp_path))
    index = tmp_path / "second/text_embeddings.json"
    index.write_text(index.read_text().replace('"other"', '"texts"'))
    with pytest.raises(PipelineError, match=r"second/text_embeddings\.json is damaged"):
        Source.open(data_of(shards, tmp_path))
    index.unlink()
    with pytest.raises(PipelineError, match=r"second/text_embeddings\.json: there is no such file"):
        Source.open(data_of(shards, tmp_path))


def test_embeddings_of_another_sample_are_refused(shards, tmp_path):
    """The tars' index may have been sorted manually."""
    embed(shards / "first", tmp_path, Texts())
    opened = Source.open(data_of(shards / "first", tmp_path, datasets=[]))
    tar, embedded = opened.tars(0)
    records = tar.records(0, 6)
    rows, samples = embedded.read(embedded.records(0, 6)), tar.read(records)
    assert opened.parse(0, records[1], samples[1], rows[1]).vectors.shape == (3, WIDTH)
    with pytest.raises(
        PipelineError, match=r"000000_text_embeddings\.tar: the vectors \(3, 6\) of sample '0001' are not"
    ):
        opened.parse(0, records[5], samples[5], rows[1])  # that sample has the same number of texts
    with pytest.raises(PipelineError, match=r"of sample '0002', which has 4 texts"):
        opened.parse(0, records[2], samples[2], rows[1])
    key, vectors = "0001", np.zeros((3, WIDTH), np.float16)
    with pytest.raises(BadSample, match="a caption's embedding is zero or not finite"):
        opened.parse(0, records[1], samples[1], sample_bytes(key, vectors, CAPTIONS))


def test_invalid_embeddings_and_shards_are_refused(shards, tmp_path):
    class Long(Texts):
        def embed(self, prepared):
            return super().embed(prepared) * 1.01

    class Wide(Texts):
        dimension = WIDTH + 1

    with pytest.raises(PipelineError, match=r": the embedding of a caption of sample \w+ has length 1\.01, not 1"):
        embed(shards, tmp_path, Long())
    with pytest.raises(PipelineError, match=r"returned \(\d+, 6\) for \d+ items of 7"):
        embed(shards, tmp_path / "wide", Wide())
    with pytest.raises(PipelineError, match="has no index"):
        embed(tmp_path, None, Texts())
    shutil.copytree(shards / "first", tmp_path / "copy/first")
    with pytest.raises(PipelineError, match="two of --shards have the name first"):
        embed([shards / "first", tmp_path / "copy/first"], tmp_path / "out", Texts())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--texts", "captions.txt"], "--shards cannot be combined with --texts"),
        (["--query-image", "a.png"], "--shards cannot be combined with --query-image"),
        (["--published"], "has no tars from img2dataset: embed its captions without --published"),
        (["--published", "--items"], "--items cannot be combined with --published"),
    ],
)
def test_invalid_option_combinations_are_refused(shards, monkeypatch, arguments, complaint):
    monkeypatch.setattr(sys, "argv", ["embed", "Llama", "--shards", str(shards), *arguments])
    with pytest.raises(PipelineError, match=complaint):
        main.__wrapped__()


# LLM2CLIP's own tars, which its llm2clip/data/extract_embedding.py writes next to those of img2dataset.

COLUMNS = ("shortSV_captions", "longSV_captions")


def published(folder: Path, tars: int = 2, samples: int = 9) -> dict[str, dict[str, str]]:
    """Write images with captions, and vectors of all captions. Return the captions by key."""
    folder.mkdir()
    captions = {}
    for tar in range(tars):
        name = folder / f"{tar:05d}"
        with (
            webdataset.TarWriter(f"{name}.tar") as images,
            webdataset.TarWriter(f"{name}_text_embeddings.tar") as vectors,
        ):
            for number in range(samples):
                key, buffer = f"{tar:05d}{number:04d}", BytesIO()
                Image.new("RGB", (8, 8), (number, tar, 0)).save(buffer, "JPEG")
                texts = [f"short {key}", f"long {key} " * 5]
                texts[1] = {3: texts[0], 4: ""}.get(number, texts[1])  # a repeated text and an empty one
                captions[key] = dict(zip(COLUMNS, texts, strict=True))
                described = json.dumps(captions[key] | {"url": "x"}).encode()
                jpeg = b"broken" if number == 5 else buffer.getvalue()
                images.write({"__key__": key, "jpg": jpeg, "json": described, "txt": "raw"})
                if number != 6:
                    rows = {name: 3 * vector(name + key).astype(np.float32) for name in COLUMNS}
                    vectors.write({"__key__": key, **{name: row.tobytes() for name, row in rows.items()}})
    return captions


def indexed_images(folder: Path, dest: Path, columns: tuple[str, ...] = COLUMNS) -> None:
    tars = {path.name: path.stat().st_size for path in sorted(folder.glob("?????.tar"))}
    work = indexing("cc", str(folder), str(dest), Captions("<image>", columns, "retrieval"), tars)
    dest.mkdir(exist_ok=True)
    shards = tuple(work.run(job, dest).shard for job in work.jobs)
    objects.write(str(dest / INDEX_FILE), replace(work.index, shards=shards).to_json().encode())


@pytest.mark.parametrize("columns", [COLUMNS, COLUMNS[::-1], COLUMNS[1:]], ids=["both", "reversed", "one"])
def test_published_llm2clip_tars_are_read_in_place(tmp_path, columns):
    folder = tmp_path / "cc"
    captions = published(folder)
    before = files(folder)
    indexed_images(folder, tmp_path / "index", columns)
    index_published("Llama-3-8B", open_datasets([str(tmp_path / "index")], str(tmp_path / "out")), overwrite=False)
    assert files(folder) == before
    assert not list((tmp_path / "out").rglob("*.tar"))
    data = data_of(tmp_path / "index", tmp_path / "out", datasets=[], block_samples=4, lanes=2)
    assert Source.open(data).embedding_metadata.model == "Llama-3-8B"
    seen, lacking = set(), Counter()
    for batch, row, text, found in read(data, 20):  # ten epochs
        if not batch.valid[row]:
            lacking[batch.bad[0].reason] += 1
            continue
        key = next(key for key in captions if f" {key}" in text)
        column = next(name for name in columns if captions[key][name] == text)
        np.testing.assert_array_equal(found, 3 * vector(column + key).astype(np.float32))
        seen.add((key[5:], column))
    usable = {f"{number:04d}" for number in range(9)} - {"0005", "0006"}
    wanted = {(number, name) for number in usable for name in columns}
    wanted -= {("0003", columns[1])} if len(columns) > 1 else set()
    assert seen == wanted - {("0004", COLUMNS[1])}
    assert set(lacking) == {"its captions have no embeddings"}


PAPERS = Path(__file__).parents[1] / "papers/llm2clip"


def test_tars_of_published_code_give_its_vectors(tmp_path):
    """Read tars that LLM2CLIP's code wrote; the order of a pair's vectors is that of the columns.

    The code keeps one vector a column. Here an empty caption has none, and of two equal captions one is kept.
    """
    columns = ("shortSV_captions", "longSV_captions")
    indexed_images(PAPERS / "shards", tmp_path / "index", columns)
    index_published("Llama", open_datasets([str(tmp_path / "index")], str(tmp_path / "out")), overwrite=False)
    source = Source.open(data_of(tmp_path / "index", tmp_path / "out", datasets=[]))
    expected = load_file(PAPERS / "shards_expected.safetensors")
    kept = {"000010000": columns[1:], "000010001": columns[:1]}
    keys = []
    for shard in range(2):
        images, vectors = source.tars(shard)
        known = [tar.records(0, source.indexes[0][1].shards[shard].samples) for tar in (images, vectors)]
        for record, *data in zip(known[0], images.read(known[0]), vectors.read(known[1]), strict=True):
            pair = source.parse(shard, record, *data)
            theirs = np.stack([expected[f"{pair.key}.{column}"] for column in kept.get(pair.key, columns)])
            assert np.array_equal(pair.vectors.view(np.uint32), theirs.view(np.uint32)), pair.key  # bit for bit
            assert len(pair.texts) == len(theirs)
            keys.append(pair.key)
    read_by_theirs = json.loads((PAPERS / "shards_read.json").read_text())
    assert sorted(keys) == sorted(read_by_theirs)
    assert all({column.lower() for column in columns} <= {*names} for names in read_by_theirs.values())
    first, second = (expected[f"000010001.{column}"] for column in columns)  # of one text, in batches of other lengths
    np.testing.assert_allclose(second, first, rtol=0, atol=2**-18 * np.abs(first).max())


def test_published_tars_of_other_captions_are_refused(tmp_path):
    folder = tmp_path / "cc"
    published(folder)

    def index(columns: tuple[str, ...] = COLUMNS, out: str | None = None) -> None:
        indexed_images(folder, folder, columns)
        index_published("Llama", open_datasets([str(folder)], out), overwrite=True)

    index()
    assert Source.open(data_of(folder, "beside", datasets=[])).embedding_metadata.stored == "fp32"
    indexed_images(folder, folder, COLUMNS[:1])
    with pytest.raises(
        PipelineError, match=r"embeds the captions in shortSV_captions, longSV_captions, but .* has them in sho"
    ):
        Source.open(data_of(folder, "beside", datasets=[]))
    with pytest.raises(PipelineError, match=r"has vectors for \w+_captions, \w+_captions, but not for captions in txt"):
        index((*COLUMNS, "txt"))
    first, second = folder / "00000_text_embeddings.tar", folder / "00001_text_embeddings.tar"
    shutil.copy(first, second)
    with pytest.raises(PipelineError, match=r"00001_text_embeddings\.tar has vectors .* for no sample of 00001\.tar"):
        index(out=str(tmp_path / "out"))
    with tarfile.open(first) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(first, "w") as tar:
        for member, content in members[4:] + members[:4]:
            tar.addfile(member, BytesIO(content))
    with pytest.raises(PipelineError, match="in another order"):
        index(out=str(tmp_path / "anew"))


@pytest.mark.parametrize("damage", [b"", b"<html>", b"{}", b"[" * 200_000])
def test_damaged_records_are_redone_and_damaged_metadata_is_refused(shards, tmp_path, damage):
    with pytest.raises(RuntimeError, match="killed"):
        embed(shards / "first", tmp_path / "out", Texts(9))
    begun = tmp_path / "out/.text_embeddings"
    made = (begun / "made.json").read_bytes()
    for record in begun.glob("0*.json"):
        record.write_bytes(damage)
    (begun / "made.json").write_bytes(damage)
    with pytest.raises(PipelineError, match=r"made\.json .*: add --overwrite, and all is embedded again"):
        embed(shards / "first", tmp_path / "out", Texts())
    (begun / "made.json").write_bytes(made)
    embed(shards / "first", tmp_path / "out", Texts())
    embed(shards / "first", tmp_path / "whole", Texts())
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    for name, content in (("made", damage), ("x", damage)):
        begun.mkdir(exist_ok=True)
        (begun / f"{name}.json").write_bytes(content)
    (tmp_path / "out/text_embeddings.json").unlink()
    embed(shards / "first", tmp_path / "out", Texts(), overwrite=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "value"),
    [("width", 4.0), ("width", -1), ("stored", "int8"), ("columns", 7), ("tars_url", None), ("parts", {}), ("more", 1)],
)
def test_invalid_embedding_index_is_refused(shards, tmp_path, name, value):
    embed(shards / "first", tmp_path, Texts())
    file = tmp_path / "text_embeddings.json"
    content = json.loads(file.read_text())
    del content["checksum"]
    content[name] = value
    file.write_text(json.dumps(content | {"checksum": checksum_of(content)}))
    with pytest.raises(ObjectError, match=r"text_embeddings\.json is not a valid index"):
        StoredVectors.load(str(tmp_path), CAPTIONS)
