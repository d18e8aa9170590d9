"""MMEB-train's layout: every text and every image byte is converted, with image placeholders at the right positions."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from conversion import error_of, make_shards, picture, read_all

from pipeline.convert.sharding import ImageFolder
from pipeline.data.index import Index
from pipeline.data.sample import Item, Pair

COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")

# {subset: rows of the split `original`}, with columns in the order of COLUMNS.
ROWS = {
    "ImageNet_1K": [
        ("<|image_1|>\nClassify: 图", "images/ImageNet_1K/a.jpg", "Katze ü", "", "", ""),
        ("<|image_1|>\nClassify: 图", "images/ImageNet_1K/b.png", "dog\t'\"", None, None, None),
    ],
    "VisDial": [
        ("Q: is it?\n A: no", "", "<|image_1|>\nThe image", "images/V/c.png", "<|image_1|>", "images/V/a.jpg"),
        ("no mark", "images/V/c.png", "", "images/V/c.png", "", "images/V/a.jpg"),
    ],
    "WebQA": [("<|image_1|> \n Find: who?", "", "she", "", "<|image_1|>\n", ""), ("who?", "", "he", "", "it", None)],
    "Own": [("q", "", "a", "", "", "")],
}


def images(folder: Path) -> dict[str, bytes]:
    """Write the images that the rows name to `folder`; return {path: bytes}."""
    paths = {path for rows in ROWS.values() for row in rows for path in row[1::2] if path}
    found = {}
    for number, path in enumerate(sorted(paths)):
        found[path] = picture(20 + number, 30, number, "JPEG" if path.endswith("jpg") else "PNG")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(found[path])
    return found


def write(file: Path, rows: list[tuple], **options: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([dict(zip(COLUMNS, row, strict=True)) for row in rows])
    parquet.write_table(table.select(COLUMNS), file, **options)


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "MMEB-train"
    for subset, rows in ROWS.items():
        # A column of nulls only has no type. One file has three rows in a group; the other has groups of one row.
        write(folder / subset / "original-00000-of-00002.parquet", rows[:1] * 3)
        if rows[1:]:
            write(folder / subset / "original-00001-of-00002.parquet", rows[1:] * 2, row_group_size=1)
        write(folder / subset / "diverse_instruction-00000-of-00001.parquet", [("diverse", "", "yes", "", "", "")])
    (folder / ".git").mkdir()
    return folder


def rejected(dest: Path) -> list[dict]:
    return [json.loads(line) for line in (dest / "rejected.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("place", ["beside", "in the folder images", "elsewhere"])
def test_every_text_and_image_is_converted(source, tmp_path, place):
    found = images({"beside": source, "in the folder images": source / "images", "elsewhere": tmp_path / "x"}[place])
    more = ("--images", tmp_path / "x") if place == "elsewhere" else ()
    make_shards("mmeb-train", source, tmp_path / "out", *more)
    a, b = found["images/ImageNet_1K/a.jpg"], found["images/ImageNet_1K/b.png"]
    c, d = found["images/V/c.png"], found["images/V/a.jpg"]
    expected = {
        "ImageNet_1K": [
            ("classification", Item("<image>\nClassify: 图", (a,)), Item("Katze ü"), ()),
            ("classification", Item("<image>\nClassify: 图", (b,)), Item("dog\t'\""), ()),
        ],
        "VisDial": [
            ("retrieval", Item("Q: is it?\n A: no"), Item("<image>\nThe image", (c,)), (Item("<image>", (d,)),)),
            ("retrieval", Item("no mark", (c,)), Item("", (c,)), (Item("", (d,)),)),
        ],
        "WebQA": [
            ("retrieval", Item("<image> \n Find: who?"), Item("she"), (Item("<image>\n"),)),
            ("retrieval", Item("who?"), Item("he"), (Item("it"),)),
        ],
        "Own": [("", Item("q"), Item("a"), ())],
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(ROWS)
    for subset, pairs in expected.items():
        pairs = pairs[:1] * 3 + pairs[1:] * 2
        assert read_all(str(tmp_path / "out" / subset)) == [
            Pair(f"{number:08d}", subset, *pair) for number, pair in enumerate(pairs)
        ]
        assert rejected(tmp_path / "out" / subset) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_keep_their_order_in_shards(tmp_path, processes):
    """Rows of several files and row groups follow each other, so `data.cap_rows=first` takes the published rows."""
    rows = [(f"q {number}", "", f"a {number}", "", "", "") for number in range(50)]
    for number, first in enumerate((0, 17, 18)):
        last = (17, 18, 50)[number]
        write(tmp_path / f"in/Own/original-{number:05d}-of-00003.parquet", rows[first:last], row_group_size=5)
    make_shards("mmeb-train", tmp_path / "in", tmp_path / "out", "--shards", 7, "--processes", processes)
    assert len(Index.load(str(tmp_path / "out/Own")).shards) == 7
    assert [pair.query.text for pair in read_all(str(tmp_path / "out/Own"))] == [row[0] for row in rows]


def test_split_subset_and_limit_options_are_applied(source, tmp_path):
    images(source)
    make_shards("mmeb-train", source, tmp_path / "a", "--split", "diverse_instruction", "--subset", "Own", "WebQA")
    assert [pair.query.text for name in ("Own", "WebQA") for pair in read_all(str(tmp_path / "a" / name))] == [
        "diverse",
        "diverse",
    ]
    assert len(list((tmp_path / "a").iterdir())) == 2
    make_shards("mmeb-train", source, tmp_path / "b", "--limit", 4)
    lengths = {subset: len(read_all(str(tmp_path / "b" / subset))) for subset in ROWS}
    assert lengths == {"ImageNet_1K": 4, "VisDial": 4, "WebQA": 4, "Own": 3}


def test_limit_skips_images_of_other_rows(source, tmp_path, monkeypatch):
    images(source)
    sized, original = set(), ImageFolder.size
    monkeypatch.setattr(ImageFolder, "size", lambda self, name: sized.add(name) or original(self, name))
    for limit, seen in ((1, {"a.jpg"}), (3, {"a.jpg"}), (4, {"a.jpg", "b.png"})):
        make_shards("mmeb-train", source, tmp_path / f"{limit}", "--subset", "ImageNet_1K", "--limit", limit)
        assert sized == {f"images/ImageNet_1K/{name}" for name in seen}
        assert len(read_all(str(tmp_path / f"{limit}/ImageNet_1K"))) == limit
    (source / "ImageNet_1K/original-00001-of-00002.parquet").write_bytes(b"not opened")
    make_shards("mmeb-train", source, tmp_path / "first file", "--subset", "ImageNet_1K", "--limit", 3)


def test_bad_rows_are_rejected(source, tmp_path):
    (source / "images").mkdir()
    (source / "a.png").write_bytes(picture(5, 5))
    rows = [("q", path, "t", "", "", "") for path in ("../a.png", "/etc/hostname", "a\0b", "images", "gone.png")]
    rows += [("", "", "t", "", "", ""), ("<|image_1|><|image_1|>", "a.png", "t", "", "", "")]
    rows += [("<video>", "", "t", "", "", ""), ("q", "", "<image>", "", "", ""), ("q", "", "t", "", "n", "gone.png")]
    rows += [("good", "", "t", "", "", ""), ("bytes", "", "t", "", "", ""), ("q", "bytes", "t", "", "", "")]
    columns = {
        name: pa.array([b"\xff" if text == "bytes" else text.encode() for text in texts]).view(pa.string())
        for name, texts in zip(COLUMNS, zip(*rows, strict=True), strict=True)
    }
    (source / "Bad").mkdir()
    parquet.write_table(pa.table(columns), source / "Bad/original-0.parquet")
    make_shards("mmeb-train", source, tmp_path / "out", "--subset", "Bad", "--max-rejected", 0.95)
    marked, good = read_all(str(tmp_path / "out/Bad"))
    assert (marked.key, marked.target) == ("00000008", Item("<image>"))
    assert (good.key, good.query.text) == ("00000010", "good")
    assert [(each["row"], each["cause"]) for each in rejected(tmp_path / "out/Bad")] == [
        ("row 0", "path leaves the source"),
        ("row 1", "path leaves the source"),
        ("row 2", "missing file"),
        ("row 3", "missing file"),
        ("row 4", "missing file"),
        ("row 5", "empty text"),
        ("row 6", "marks and files differ"),
        ("row 7", "marks and files differ"),
        ("row 9", "missing file"),
        ("row 11", "not UTF-8"),
        ("row 12", "not UTF-8"),
    ]


def test_non_text_values_and_unsupported_placeholders_are_rejected(source, tmp_path):
    (source / "a.png").write_bytes(picture(5, 5))
    nan = float("nan")
    columns = {
        "qry": ["\ufeff q \n", "<|image_1|> <|image_2|>", "<|video_1|>", "q", "<|image_1|>\n<|image_1|>", "\ufeffq"],
        "qry_image_path": ["", "a.png", "a.png", None, "a.png", "a.png"],
        "pos_text": pa.array(["t"] * 6).dictionary_encode(),
        "pos_image_path": [None] * 6,
        "neg_text": [nan, nan, nan, 1.5, nan, None],
        "neg_image_path": pa.array([None] * 6, pa.bool_()),
    }
    (source / "Bad").mkdir()
    parquet.write_table(pa.table(columns), source / "Bad/original-0.parquet")
    make_shards("mmeb-train", source, tmp_path / "out", "--subset", "Bad", "--max-rejected", 0.95)
    first, last = read_all(str(tmp_path / "out/Bad"))
    assert (first.query.text, first.negatives, last.query.text) == ("\ufeff q \n", (), "\ufeffq")
    assert [(each["row"], each["cause"], each["detail"]) for each in rejected(tmp_path / "out/Bad")] == [
        ("row 1", "marks and files differ", "the mark <|image_2|>, but only <|image_1|> is supported, in "
                  "'<|image_1|> <|image_2|>'"),
        ("row 2", "marks and files differ", "the mark <|video_1|>, but only <|image_1|> is supported, in "
                  "'<|video_1|>'"),
        ("row 3", "wrong fields", "neg_text is 1.5, which is not a text"),
        ("row 4", "marks and files differ", "2 <image>, but a row has at most one image, in '<image>\\n<image>'"),
    ]  # fmt: skip


def test_invisible_text_is_kept_with_an_image_or_if_empty_ones_are(source, tmp_path):
    (source / "a.png").write_bytes(picture(5, 5))
    write(source / "Blank/original-0.parquet", [("\u200b", "a.png", "t", "", "", ""), ("q", "", "\u2060", "", "", "")])
    make_shards("mmeb-train", source, tmp_path / "some", "--subset", "Blank", "--max-rejected", 0.95)
    assert [pair.query.text for pair in read_all(str(tmp_path / "some/Blank"))] == ["\u200b"]
    assert [each["cause"] for each in rejected(tmp_path / "some/Blank")] == ["empty text"]
    make_shards("mmeb-train", source, tmp_path / "all", "--subset", "Blank", "--keep-empty")
    assert [pair.target.text for pair in read_all(str(tmp_path / "all/Blank"))] == ["t", "\u2060"]


def test_invalid_options_and_files_are_refused(source, tmp_path):
    images(source)
    dest = tmp_path / "out"
    assert "--subset: no Owl in" in error_of("mmeb-train", source, dest, "--subset", "Owl")
    assert "it has ImageNet_1K, Own, VisDial, WebQA" in error_of("mmeb-train", source, dest, "--subset", "Owl")
    assert "has no <subset>/original-*.parquet" in error_of("mmeb-train", source / "Own", dest)
    assert "is not a folder" in error_of("mmeb-train", source / "none", dest)
    file = source / "Own/original-0.parquet"
    parquet.write_table(pa.table({"qry": ["q"]}), file)
    assert f"{file} does not contain MMEB's rows: it has no column neg_image_path, neg_text" in error_of(
        "mmeb-train", source, dest
    )
    parquet.write_table(pa.table({name: [[1]] for name in COLUMNS}), file)
    said = f"{file} does not contain MMEB's rows: its column qry contains list<element: int64> instead of texts"
    assert said in error_of("mmeb-train", source, dest)
    parquet.write_table(pa.table({name: ["a"] for name in (*COLUMNS, "qry_inst")}), file)
    assert f"{file} has the column 'qry_inst', which nothing reads" in error_of("mmeb-train", source, dest)
    file.write_bytes(b"version https://git-lfs")
    assert f"{file} does not contain MMEB's rows" in error_of("mmeb-train", source, dest)
    assert not dest.exists()
