"""Damaged and malicious indexes and sidecars: every program names the file and refuses it before reading further."""

import hashlib
import io
import json
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest

from pipeline.data.arrays import array_of, mapped
from pipeline.data.index import (
    FORMAT,
    Captions,
    Index,
    checksum_of,
    load_sidecar,
    read_records,
    sidecar_dtype,
    sidecar_of,
)
from pipeline.data.sample import Item, Pair
from pipeline.data.shards import write_shards
from pipeline.data.stored_vectors import KINDS, StoredVectors
from pipeline.storage.objects import ObjectError


@pytest.fixture
def folder(tmp_path):
    pairs = [Pair(f"{number}", "X", "t", Item(f"q{number}"), Item("t")) for number in range(3)]
    write_shards(pairs, tmp_path, dataset="X")
    return tmp_path


def put(folder, change):
    """Rewrite the index as `change` modifies it, with a valid checksum."""
    path = folder / "index.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    change(content)
    path.write_text(json.dumps(content | {"checksum": checksum_of(content)}))


def first(**values):
    return lambda content: content["shards"][0].update(values)


def without(name):
    return lambda content: content["shards"][0].pop(name)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (first(samples=3.0), "shards.0.samples: .*integer, got 3.0"),
        (first(samples="3"), "shards.0.samples: .*integer, got '3'"),
        (first(samples=True), "shards.0.samples"),
        (first(samples=0), "shards.0.samples: .*greater than or equal to 1, got 0"),
        (first(samples=1 << 32), "shards.0.samples"),
        (first(samples=1 << 31, sidecar_bytes=53 * (1 << 31) + 128, images=1), "1 images .* too many .* at most 0"),
        (first(images=1 << 50), "images .* too many"),
        (first(videos=1 << 50), "videos .* too many"),
        (first(bytes=-1), "shards.0.bytes"),
        (first(bytes=1 << 63), "shards.0.bytes"),
        (first(sidecar_bytes=-1), "shards.0.sidecar_bytes"),
        (first(sidecar_bytes=1 << 40), "cannot hold 3 samples"),
        (first(max_images=1 << 40), "shards.0.max_images"),
        (first(max_images=700), "cannot hold 3 samples"),
        (first(file="a\0.tar"), r"x00.tar' is not a valid name of a shard"),
        (first(file="\x1b[31m.tar"), r"x1b\[31m.tar' is not a valid name of a shard"),
        (first(file="a\nb.tar"), "is not a valid name of a shard"),
        (first(file="..tar"), "is not a valid name of a shard"),
        (first(file="a/b.tar"), "is not a valid name of a shard"),
        (first(file="/etc/passwd"), "is not a valid name of a shard"),
        (first(file="index.json"), "does not end with .tar"),
        (first(file=""), "is not a valid name of a shard"),
        (first(file=7), "shards.0.file"),
        (first(sha256="00"), "shards.0.sha256"),
        (first(image_sizes=[[1, 2, 3]]), "shards.0.image_sizes"),
        (first(image_sizes=[[1, -2]]), "shards.0.image_sizes"),
        (first(image_sizes=None), "shards.0.image_sizes"),
        (first(tasks=[]), "shards.0.tasks"),
        (first(tasks={"t": "3"}), "shards.0.tasks.t"),
        (first(more=1), "shards.0.more is unknown"),
        (without("videos"), "shards.0.videos is missing"),
        (lambda content: content.update(shards=[]), "shards"),
        (lambda content: content.update(shards={}), "shards"),
        (lambda content: content["shards"].append(None), "shards.1"),
        (lambda content: content["shards"].append(content["shards"][0]), "two shards are called 000000.tar"),
        (lambda content: content.update(samples=4), "its totals .* are not those of its shards"),
        (lambda content: content.update(bytes="1"), "its totals"),
        (lambda content: content.update(more=1), "more is unknown"),
        (lambda content: content.pop("captions"), "'captions' is missing"),
        (lambda content: content.update(captions={"query": "<image>", "columns": [], "task": ""}), "captions.columns"),
        (lambda content: content.update(captions={"query": "x", "columns": ["txt"], "task": ""}), "one <image>"),
        (
            lambda content: content.update(files={"../x": {"bytes": 1, "sha256": "0" * 64}}),
            "'../x' is not a valid name",
        ),
        (lambda content: content.update(files={"x": {"bytes": 1.5, "sha256": "0" * 64}}), "files.x.bytes"),
        (lambda content: content.update(dataset=None), "dataset"),
        (lambda content: content.update(format=2.0), "has format 2.0"),
        (lambda content: content.update(format=True), "has format True"),
    ],
)
def test_invalid_index_values_are_refused_by_name(folder, change, reason):
    put(folder, change)
    with pytest.raises(ObjectError, match=reason) as caught:
        Index.load(str(folder))
    message = str(caught.value)
    assert message.startswith(str(folder / "index.json")) and message.endswith("make the shards again")
    assert message.isprintable()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>", "is HTML or XML"),
        (b'{"format": 2,', "it is not JSON"),
        (b"[" * 300_000, "it is not JSON"),
        (b"\x80\x03]q", "it is not JSON"),
        (b'{"format": NaN}', "not JSON"),
        (b"9" * 5000, "not JSON"),
        (b"null", "has format None"),
    ],
)
def test_non_index_files_are_refused(folder, content, reason):
    stores = [(kind.index_file, partial(StoredVectors.load, kind=kind)) for kind in KINDS]
    for name, load in (("index.json", Index.load), *stores):
        (folder / name).write_bytes(content)
        with pytest.raises(ObjectError, match=f"{name} .*{reason}"):
            load(str(folder))


def test_index_json_is_pinned_and_loads_with_byte_order_mark(folder):
    index = Index.load(str(folder))
    captions = Captions("<image>\nWas ist das? \x7f ä 图 \u2028", ("txt",), "")
    index = replace(index, dataset='ö"\\\x1f\n', captions=captions, shards_url="s3://b/é")
    content = {"format": FORMAT, "dataset": index.dataset, "samples": 3, "bytes": index.total_bytes}
    content |= {"captions": asdict(captions), "shards_url": index.shards_url, "files": {}}
    content["shards"] = [
        {"bytes" if name == "size" else name: value for name, value in asdict(shard).items()} for shard in index.shards
    ]
    text = json.dumps(content | {"checksum": checksum_of(content)}, indent=1, ensure_ascii=False) + "\n"
    assert index.to_json() == text
    (folder / "index.json").write_text(text, encoding="utf-8-sig")
    loaded = Index.load(str(folder))
    assert loaded == index and loaded.to_json() == text
    assert replace(loaded, dataset="other").to_json() != text


def sidecar_of_bytes(folder, data):
    """Replace the sidecar by these bytes; return a matching entry of the index."""
    index = Index.load(str(folder))
    (shard,) = index.shards
    (folder / shard.sidecar).write_bytes(data)
    return replace(shard, sidecar_bytes=len(data), sidecar_sha256=hashlib.sha256(data).hexdigest())


def stored(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def archive(array):
    buffer = io.BytesIO()
    np.savez(buffer, array)
    return buffer.getvalue()


def huge(records):
    return stored(records).replace(b"'shape': (3,), }      ", b"'shape': (99999999,), }"[:23].ljust(22), 1)


@pytest.mark.parametrize(
    "bad",
    [
        archive,
        huge,
        lambda records: b"",
        lambda records: stored(records)[:40],
        lambda records: stored(records)[:-1],
        lambda records: stored(records) + b"x",
        lambda records: stored(records[:2]),
        lambda records: stored(records[:, None]),
        lambda records: stored(np.array([{}] * 3, object), allow_pickle=True),
        lambda records: stored(records.astype(records.dtype.newbyteorder(">"))),
        lambda records: stored(records["offset"]),
        lambda records: b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
    ],
)
def test_malformed_sidecar_is_refused(folder, bad):
    (shard,) = Index.load(str(folder)).shards
    shard = sidecar_of_bytes(folder, bad(load_sidecar(str(folder), shard).copy()))
    with pytest.raises(ObjectError, match=r"000000\.idx\.npy is not a sidecar of 3 samples: make the shards again"):
        load_sidecar(str(folder), shard)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("offset", [0, 1 << 63, 1 << 63]),  # beyond the end of the tar
        ("offset", [0, 2**64 - 1, 4096]),  # wraps around
        ("length", [4096, 4096, 2**32 - 1]),
        ("offset", [4096, 0, 8192]),  # in the wrong order
        ("offset", [0, 0, 0]),  # overlapping
        ("length", [2**32 - 1, 0, 0]),
    ],
)
def test_inconsistent_records_are_refused(folder, name, values):
    (shard,) = Index.load(str(folder)).shards
    records = load_sidecar(str(folder), shard).copy()
    records[name] = values
    shard = sidecar_of_bytes(folder, sidecar_of(records))
    for read in (lambda: load_sidecar(str(folder), shard), lambda: read_records(str(folder), shard, 0, 3)):
        with pytest.raises(ObjectError, match=r"000000\.idx\.npy: its records are inconsistent"):
            read()


def test_array_reader_matches_numpy_and_refuses_other_bytes(tmp_path, monkeypatch):
    records = [np.arange(4 * sidecar_dtype(images).itemsize, dtype="u1") for images in (0, 1, 70)]
    arrays = [
        np.arange(6.0).reshape(2, 3),
        np.float32(2.5),
        np.zeros((0, 4), "<f2"),
        np.arange(3, dtype=">i8"),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.zeros(2, [("only", "<u4")]),
        np.zeros(2, [("nested", [("first", "u1"), ("second", "<i2", (2, 3))], (4,)), ("last", "<f4")]),
        *(each.view(sidecar_dtype(images)) for each, images in zip(records, (0, 1, 70), strict=True)),
    ]
    files = [stored(np.asarray(array)) for array in arrays]
    monkeypatch.delattr("ast.literal_eval")  # numpy's parser of headers, which threads must not call at once
    for array, data in zip(arrays, files, strict=True):
        (tmp_path / "array.npy").write_bytes(data)
        for found in (array_of(data), mapped(tmp_path / "array.npy")):
            assert found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes()
    whole = stored(np.zeros((2, 3)))
    huge = whole.replace(b"(2, 3), }", b"(999999999999, 3), }")
    unclosed = whole.replace(b"(2, 3), }", b"(2, 3(, }")
    for bad in (
        b"",
        whole[:-1],
        whole[:30],
        huge,
        unclosed,
        archive(np.zeros(3)),
        stored(np.array([{}]), allow_pickle=True),
    ):
        with pytest.raises(ValueError):
            array_of(bad)
        (tmp_path / "array.npy").write_bytes(bad)
        with pytest.raises(ValueError):
            mapped(tmp_path / "array.npy")


def test_sidecar_record_size_is_pinned():
    assert [sidecar_dtype(images).itemsize for images in (0, 1, 765)] == [53, 57, 53 + 4 * 765]
