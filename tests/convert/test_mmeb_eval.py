import argparse
import io
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from conversion import make_shards
from PIL import Image

from pipeline.convert import mmeb
from pipeline.data.index import Index, IndexedFile, load_sidecar, read_samples
from pipeline.data.mmeb import MMEB_TASKS, evaluation_rows, mmeb_text
from pipeline.data.sample import Item, Single, mended
from pipeline.data.shards import parse_sample
from pipeline.demo.tasks import evaluation_files
from pipeline.errors import PipelineError
from pipeline.evaluation.sets import load
from pipeline.evaluation.tasks import Collection
from pipeline.storage import objects


def convert(*arguments: str | Path) -> None:
    parser = argparse.ArgumentParser()
    mmeb.EVAL.add_arguments(parser)
    mmeb.EVAL.run(parser.parse_args([*map(str, arguments), "--processes", "1"]))


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path):
    """Create two of MMEB's datasets in their published layout."""
    folder = tmp_path / "MMEB-eval"
    for name in ("red", "blue"):
        path = folder / f"images/NIGHTS/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(name))
    asked = "<|image_1|>\nFind a day-to-day image that looks similar to the provided image.\n"
    shown = "<|image_1|>\nRepresent the given image."
    red, blue = "NIGHTS/red.png", "NIGHTS/blue.png"
    rows = {
        "NIGHTS": [
            {"qry_text": asked, "qry_img_path": red, "tgt_text": [shown, shown], "tgt_img_path": [blue, red]},
            {"qry_text": asked, "qry_img_path": blue, "tgt_text": [shown, shown], "tgt_img_path": [red, blue]},
        ],
        "GQA": [
            {"qry_text": "What is 图?", "qry_img_path": red, "tgt_text": "a red one", "tgt_img_path": ""},
            {"qry_text": "What is 图?", "qry_img_path": blue, "tgt_text": "a blue one", "tgt_img_path": ""},
        ],
    }
    for name, listed in rows.items():
        (folder / name).mkdir()
        parquet.write_table(pa.Table.from_pylist(listed), folder / name / "test-00000-of-00001.parquet")
    return folder


COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")


def put_rows(source: Path, rows: list[tuple]) -> None:
    """Replace GQA's rows: (qry_text, qry_img_path, tgt_text, tgt_img_path)."""
    columns = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
    table = pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in rows])
    parquet.write_table(table, source / "GQA/test-00000-of-00001.parquet")


def broken(source: Path) -> str:
    """Write an invalid image and return its name. Only GQA uses it, since either of two datasets may fail first."""
    (source / "images/NIGHTS/broken.png").write_bytes(b"x")
    return "NIGHTS/broken.png"


def items_of(folder: Path) -> list[Single]:
    index = Index.load(str(folder))
    return [
        parse_sample(data)
        for shard in index.shards
        for data in read_samples(str(folder), shard, load_sidecar(str(folder), shard))
    ]


def test_rows_reference_deduplicated_items(source, tmp_path):
    convert(source, tmp_path / "dest")
    asked = "<image>\nFind a day-to-day image that looks similar to the provided image.\n"
    shown = "<image>\nRepresent the given image."
    red, blue = (picture("red"),), (picture("blue"),)
    singles = items_of(tmp_path / "dest/NIGHTS")
    assert [single.item for single in singles] == [
        Item(asked, red),
        Item(asked, blue),
        Item(shown, blue),
        Item(shown, red),
    ]
    assert {(single.dataset, single.task) for single in singles} == {("NIGHTS", "retrieval")}
    rows = parquet.read_table(tmp_path / "dest/NIGHTS/rows.parquet")
    assert rows.to_pydict() == {"query": [0, 1], "candidates": [[2, 3], [3, 2]]}
    assert rows.schema.types == [pa.int32(), pa.list_(pa.int32())]
    assert [single.item.text for single in items_of(tmp_path / "dest/GQA")] == [
        "What is 图?",
        "What is 图?",
        "a red one",
        "a blue one",
    ]
    assert json.loads((tmp_path / "dest/tasks.json").read_text()) == {
        "GQA": {"task": "vqa", "in_distribution": False},
        "NIGHTS": {"task": "retrieval", "in_distribution": True},
    }


def test_converted_item_names_match_published_layout(source, tmp_path):
    convert(source, tmp_path / "dest")
    (source / "tasks.json").write_bytes((tmp_path / "dest/tasks.json").read_bytes())
    published, converted = load([str(source)]), load([str(tmp_path / "dest")])
    assert sorted(converted.names) == sorted(published.names)
    assert {"NIGHTS/red.png", "a red one"} < set(converted.names)


def test_subset_limit_and_images_options_are_applied(source, tmp_path):
    (source / "images").rename(tmp_path / "pictures")
    convert(source, tmp_path / "dest", "--subset", "NIGHTS", "--limit", "1", "--images", tmp_path / "pictures")
    assert {path.name for path in (tmp_path / "dest").iterdir()} == {"NIGHTS", "tasks.json"}
    (task,) = load([str(tmp_path / "dest")]).tasks
    assert (task.queries.tolist(), [row.tolist() for row in task.candidates]) == ([0], [[1, 2]])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda source: put_rows(source, [("q", "NIGHTS/gone.png", ["a"], [""])]),
            "GQA, row 0, query: missing file: NIGHTS/gone.png is not in .*/images; .* complete",
        ),
        (
            lambda source: put_rows(source, [("q", "", ["a"], [""]), ("r", None, ["a", " "], ["", None])]),
            "GQA, row 1, candidate 1: empty text",
        ),
        (lambda source: put_rows(source, [("q", "", ["a"], [""]), (None, None, ["b"], [""])]), "GQA, row 1, query: em"),
        (
            lambda source: put_rows(source, [("q", broken(source), ["a"], [""])]),
            "GQA, row 0, query: broken image: NIGHTS/broken.png",
        ),
        (lambda source: (source / "NIGHTS").rename(source / "Nights"), "Nights: not in MMEB's 36 datasets; choose"),
        (lambda source: (source / "tasks.json").write_text("{}"), "GQA, NIGHTS: not in .*MMEB-eval/tasks.json; choose"),
        (lambda source: (source / "GQA/x.parquet").write_bytes(b"x"), "GQA/x.parquet does not contain MMEB's rows"),
        (lambda source: [path.unlink() for path in source.glob("*/*.parquet")], r"has no <dataset>/\*.parquet"),
    ],
)
def test_invalid_evaluation_set_is_not_converted(source, tmp_path, spoil, reason):
    spoil(source)
    with pytest.raises(PipelineError, match=reason):
        convert(source, tmp_path / "dest", "--max-rejected", "1")
    assert not (tmp_path / "dest/GQA/index.json").exists()  # another process may have finished the valid dataset


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (("q", "", ["a"], ["", ""]), "row 70: 1 tgt_text and 2 tgt_img_path"),
        (("q", "", [], []), "row 70: 0 tgt_text and 0 tgt_img_path"),
    ],
)
def test_rows_with_inconsistent_candidates_are_refused(source, tmp_path, row, reason):
    put_rows(source, [("q", "", ["a"], [""])] * 70 + [row])
    with pytest.raises(PipelineError, match=f"GQA/.* does not contain MMEB's rows .*: {reason}"):
        convert(source, tmp_path / "dest")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ((7, "", ["a"], [""]), "row 0: 7 is not a text"),
        (("q", "", ["a"], [False]), "row 0: False is not a text"),
        (
            ("q", "", ["<|image_2|>"], [""]),
            r"row 0: the mark <\|image_2\|>, but only <\|image_1\|> is supported",
        ),
        (("<|video_1|> q", "", ["a"], [""]), r"row 0: the mark <\|video_1\|>, but"),
        (("<|vision_start|><|image_pad|> q", "", ["a"], [""]), r"row 0: the mark <\|image_pad\|>, but"),
        (("<|image_1|><|image_1|>", "x", ["a"], [""]), "row 0: 2 <image>, but a row has at most one image"),
        (("q", "", ["a", "a <video>"], [""]), "row 0: marks and files differ: 1 <video> for 0 files"),
        (("a\0b", "", ["a"], [""]), "row 0: NUL character"),
    ],
)
def test_invalid_mmeb_text_error_names_row(source, tmp_path, row, reason):
    put_rows(source, [row])
    with pytest.raises(PipelineError, match=reason):
        list(evaluation_rows(str(source / "GQA")))


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_null_text_is_empty_and_byte_order_mark_is_kept(source, tmp_path, nothing):
    put_rows(source, [(None, "NIGHTS/red.png", "\ufeff a \n", nothing)])
    convert(source, tmp_path / "dest", "--subset", "GQA")
    assert [single.item.text for single in items_of(tmp_path / "dest/GQA")] == ["", "\ufeff a \n"]


@pytest.mark.parametrize(
    ("text", "converted"),
    [
        ("<|image_1|>\nWhat?\n", "<image>\nWhat?\n"),
        (" What?", " What?"),
        ("Before <|image_1|> after", "Before <image> after"),
        ("<image> as it is", "<image> as it is"),
    ],
)
def test_mmeb_image_placeholders_are_converted(text, converted):
    assert mmeb_text(text) == converted


@pytest.mark.parametrize(
    ("text", "images", "read"),
    [
        ("<image>\n A text alone.\n", 0, "A text alone.\n"),
        ("A text alone.", 0, "A text alone."),
        ("What?\n", 1, "<image>\nWhat?\n"),
        ("What <image>?", 1, "What <image>?"),
        ("two images", 2, "two images"),
    ],
)
def test_marks_are_mended(text, images, read):
    assert mended(text, images) == read


def test_mmeb_has_36_datasets():
    names = MMEB_TASKS.keys() - {"ImageNet_1K"}
    assert len(names) == 36 and sum(MMEB_TASKS[name][1] for name in names) == 20
    counts = {task: sum(MMEB_TASKS[name][0] == task for name in names) for task in ("classification", "vqa")}
    assert counts == {"classification": 10, "vqa": 10}
    assert MMEB_TASKS["MSCOCO"] == ("grounding", True) and MMEB_TASKS["OVEN"] == ("retrieval", False)


def content(collection: Collection) -> list[tuple]:
    """Return a collection's tasks with items instead of their numbers."""
    items = [read() for read in collection.items]
    return [
        (task.name, task.meta_task, task.in_distribution, items[query], [items[row] for row in candidates])
        for task in collection.tasks
        for query, candidates in zip(task.queries, task.candidates, strict=True)
    ]


@pytest.fixture(params=["file", "s3"])
def dest(request, tmp_path) -> str:
    if request.param == "file":
        return str(tmp_path / "converted")
    request.getfixturevalue("s3")
    return f"s3://pipeline-tests/mmeb-eval/{tmp_path.name}"


@pytest.mark.parametrize("file", ["rows.parquet", "items.parquet", "000000.tar"])
def test_corrupt_converted_set_error_names_file(source, tmp_path, file):
    convert(source, tmp_path / "dest")
    (tmp_path / "dest/GQA" / file).write_bytes(bytes(1 << 16))
    with pytest.raises(PipelineError, match=f"dest/GQA/{file}"):
        for read in load([str(tmp_path / "dest")]).items:
            read()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda dest: (dest / "GQA/rows.parquet").unlink(), r"GQA/rows\.parquet: there is no such file"),
        (lambda dest: (dest / "GQA/items.parquet").write_bytes(b""), r"GQA/items\.parquet is damaged"),
        (
            lambda dest: (dest / "GQA/rows.parquet").write_bytes((dest / "NIGHTS/rows.parquet").read_bytes()),
            r"GQA/rows\.parquet is damaged",
        ),
        (lambda dest: renumber(dest / "GQA"), r"GQA: rows\.parquet or items\.parquet does not match its 4 items"),
        (lambda dest: (dest / "tasks.json").unlink(), r"dest/tasks\.json: there is no such file"),
        (lambda dest: (dest / "tasks.json").write_text("{}"), r"dest/tasks\.json does not name GQA"),
    ],
)
def test_verify_checks_files_beside_shards(source, tmp_path, spoil, reason):
    dest = tmp_path / "dest"
    convert(source, dest)
    make_shards("verify", dest)
    make_shards("verify", dest / "GQA")
    spoil(dest)
    with pytest.raises(PipelineError, match=reason):
        make_shards("verify", dest)


def renumber(folder: Path) -> None:
    """Make a row refer to an item that does not exist, and update the index."""
    rows = parquet.read_table(folder / "rows.parquet").to_pydict()
    parquet.write_table(pa.table(rows | {"query": [0, 9999]}), folder / "rows.parquet")
    index = Index.load(str(folder))
    files = index.files | {"rows.parquet": IndexedFile.of((folder / "rows.parquet").read_bytes())}
    (folder / "index.json").write_text(replace(index, files=files).to_json())


@pytest.mark.slow
def test_converted_demo_gives_same_evaluation_tasks(tmp_path, dest):
    for path, file in evaluation_files(seed=0, count=2):
        objects.write(str(tmp_path / "demo" / path), file)
    convert(tmp_path / "demo", dest, "--shards", "2")
    assert objects.exists(f"{dest}/Scene-CLS/000001.tar")
    as_published, converted = load([str(tmp_path / "demo")]), load([dest])
    assert content(converted) == content(as_published)
    assert len(converted.items) < len(as_published.items)  # images with equal content and different names are one item


def put_table(source: Path, **columns: list) -> None:
    parquet.write_table(pa.table(columns), source / "GQA/test-00000-of-00001.parquet")


def test_instruction_columns_are_prepended_to_texts(source, tmp_path):
    put_table(
        source,
        qry_inst=["<|image_1|> Answer the question:", "Find the picture:", None],
        qry_text=["What is it? \n", "a red one", "<|image_1|>\nAs it was\n"],
        qry_img_path=["NIGHTS/red.png", "", "NIGHTS/red.png"],
        tgt_inst=["", "<|image_1|>\nRepresent the picture.\n", ""],
        tgt_text=[["red", "blue"], [" "], ["red"]],
        tgt_img_path=[[""], ["NIGHTS/red.png", "NIGHTS/blue.png"], [""]],
    )
    put = source / "GQA/test-00000-of-00001.parquet"
    rows = parquet.read_table(put).to_pylist()
    rows[1]["tgt_text"] = ""  # one text for all images
    parquet.write_table(pa.Table.from_pylist([rows[1] | {"tgt_text": [""]}, rows[0], rows[2]]), put)
    find, answer, as_it_was = evaluation_rows(str(source / "GQA"))
    shown = "Represent the picture.\n"
    assert find == (("Find the picture: a red one\n", ""), [(shown, "NIGHTS/red.png"), (shown, "NIGHTS/blue.png")])
    asked = "Answer the question: What is it?\n\n"
    assert answer == ((asked, "NIGHTS/red.png"), [("red", ""), ("blue", "")])
    assert as_it_was == (("<image>\nAs it was\n", "NIGHTS/red.png"), [("red", "")])
    convert(source, tmp_path / "dest")
    texts = {item.item.text for item in items_of(tmp_path / "dest/GQA")}
    assert {asked, shown, "Find the picture: a red one\n"} <= texts
    assert texts >= {item().text for item in load([str(source)]).items} - {
        "<image>\nFind a day-to-day image that looks similar to the provided image.\n",
        "<image>\nRepresent the given image.",
    }


@pytest.mark.parametrize("name", ["Qry_Text", "qry_image_path", "tgt_prompt", "query_video"])
def test_unknown_column_affecting_rows_is_refused_by_name(source, name):
    columns = {column: [["a"]] if column.startswith("tgt") else ["a"] for column in COLUMNS}
    put_table(source, **columns | {name: ["x"]})
    if name in ("Qry_Text", "qry_image_path"):
        columns.pop({"Qry_Text": "qry_text", "qry_image_path": "qry_img_path"}[name])
        put_table(source, **columns | {name: ["x"]})
    with pytest.raises(PipelineError, match=f"has the column '{name}', which nothing reads"):
        list(evaluation_rows(str(source / "GQA")))


def test_ignored_columns_are_listed_once(source, capsys):
    put_table(source, **{c: [["a"]] if c[0] == "t" else ["a"] for c in COLUMNS}, shard_no=[1], qry_id=["\x1b[31m"])
    for _ in range(2):
        list(evaluation_rows(str(source / "GQA")))
    assert capsys.readouterr().err.count("nothing reads the columns shard_no, qry_id of ") == 1
