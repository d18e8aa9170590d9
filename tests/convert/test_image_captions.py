"""Karpathy's files: one pair per image, with all its captions."""

import json
import math
from pathlib import Path

import pytest
from conversion import error_of, make_shards, picture, read_all

from pipeline.data.index import Index
from pipeline.data.sample import Item, Pair


def entry(split: str, folder: str | None, name: str, *captions: object) -> dict:
    place = {} if folder is None else {"filepath": folder}
    return place | {"filename": name, "split": split, "sentences": [{"raw": text, "sentid": 1} for text in captions]}


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "coco"
    for number, name in enumerate(("train2014/a.jpg", "val2014/b.jpg", "c.jpg")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(20, 20, number, "JPEG"))
    images = [
        entry("train", "train2014", "a.jpg", " A cat. ", "A cat.", "Eine Katze ü", ""),
        entry("test", None, "c.jpg", "A car."),
        entry("restval", "val2014", "b.jpg", "A dog."),
        entry("train", None, "c.jpg", "A car.", "A red car."),
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return tmp_path / "dataset_coco.json"


QUERY = "<image>\nFind an image caption describing the given everyday image."


def test_train_and_restval_splits_are_merged(source, tmp_path):
    folder = tmp_path / "coco"
    make_shards("coco-captions", source, tmp_path / "out", "--images", folder)
    a, b, c = (Item(QUERY, ((folder / n).read_bytes(),)) for n in ("train2014/a.jpg", "val2014/b.jpg", "c.jpg"))
    assert read_all(str(tmp_path / "out")) == [
        Pair("00000000", "dataset_coco", "retrieval", a, Item(" A cat. "), alternatives=("Eine Katze ü",)),
        Pair("00000001", "dataset_coco", "retrieval", b, Item("A dog.")),
        Pair("00000002", "dataset_coco", "retrieval", c, Item("A car."), alternatives=("A red car.",)),
    ]


def test_split_query_and_dataset_options_are_applied(source, tmp_path):
    more = ("--split", "test", "--query", "<image> Say.", "--dataset", "COCO")
    make_shards("coco-captions", source, tmp_path / "out", "--images", tmp_path / "coco", *more)
    (pair,) = read_all(str(tmp_path / "out"))
    assert (pair.query.text, pair.target.text, pair.dataset) == ("<image> Say.", "A car.", "COCO")
    assert Index.load(str(tmp_path / "out")).dataset == "COCO"


def test_bad_rows_are_rejected(tmp_path):
    (tmp_path / "good.png").write_bytes(picture(5, 5))
    images = [
        entry("train", None, "good.png"),
        entry("train", None, "good.png", " ", "\ufeff", None, math.nan),
        entry("train", None, "good.png", 7),
        entry("train", None, "good.png") | {"sentences": None},
        entry("train", None, "good.png", "a <image>"),
        entry("train", None, "good.png", "a <video>"),
        entry("train", None, "good.png", "half \ud800"),
        entry("train", None, "good.png", "a\0b"),
        entry("train", "..", "good.png", "up"),
        entry("train", None, None, "no name"),
        entry("train", 7, "good.png", "no folder"),
        entry("train", None, "gone \ud800.png", "gone"),
        entry("train", None, "good.png", "\ufeffgood"),
    ]
    (tmp_path / "own.json").write_text(json.dumps({"images": images}))
    make_shards("coco-captions", tmp_path / "own.json", tmp_path / "out", "--max-rejected", 0.95)
    (pair,) = read_all(str(tmp_path / "out"))
    assert (pair.key, pair.target.text) == (f"{len(images) - 1:08d}", "good")
    lines = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["cause"] for line in lines] == [
        *["no caption"] * 4,
        *["marks and files differ"] * 2,
        "not UTF-8",
        "NUL character",
        "path leaves the source",
        *["missing file"] * 3,
    ]
    assert json.loads(lines[-1])["row"] == "gone \ud800.png"


def test_row_with_one_usable_caption_is_kept(tmp_path, caplog):
    (tmp_path / "good.png").write_bytes(picture(5, 5))
    captions = (None, "one", math.nan, 7, "a <video>", {"en": "x"}, " \ufeffone", "a\0b", "half \ud800", "two")
    images = [entry("train", folder, "good.png", *captions) for folder in ("", None)]
    images += [entry("train", None, "good.png", "three") | {"filepath": None}, None, {"filename": "good.png"}]
    images[0]["sentences"] += [None, "in no object", 3]
    (tmp_path / "own.json").write_text(json.dumps({"images": images}))
    make_shards("coco-captions", tmp_path / "own.json", tmp_path / "out", "--max-rejected", 0)
    assert [pair.texts for pair in read_all(str(tmp_path / "out"))] == [
        ("one", "two", "in no object"),
        ("one", "two"),
        ("three",),
    ]
    without_split, unusable = caplog.messages
    assert without_split == f"2 images of {tmp_path / 'own.json'} have no split and are skipped"
    assert unusable.startswith(f"11 unusable captions of {tmp_path / 'own.json'} are skipped; ")
    assert unusable.endswith("good.png: no caption: 7 is not a text")


def test_invalid_options_and_files_are_refused(source, tmp_path):
    dest = tmp_path / "out"
    assert "has no split 'dev': it has restval, test, train" in error_of(
        "coco-captions", source, dest, "--images", tmp_path, "--split", "dev"
    )
    assert "must have one <image>" in error_of("coco-captions", source, dest, "--query", "Describe.")
    for text in ("[]", '{"images": [{"filename": "a"}]}', '{"images": 3}'):
        source.write_text(text)
        assert "has none of the forms that --help describes" in error_of("coco-captions", source, dest)
    for text in ("{", "[" * 200_000):
        source.write_text(text)
        assert "dataset_coco.json is damaged: it is " in error_of("coco-captions", source, dest)
    assert not dest.exists()
