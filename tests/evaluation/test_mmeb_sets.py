"""MMEB's layout, converted and as published, and shards of pairs, as tasks over distinct items."""

import argparse
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import webdataset
from PIL import Image

from pipeline.convert import img2dataset
from pipeline.data.index import Index, IndexedFile
from pipeline.data.mmeb import MMEB_TASKS
from pipeline.data.sample import Item, Pair, Single
from pipeline.data.shards import write_shards
from pipeline.errors import PipelineError
from pipeline.evaluation.sets import load
from pipeline.storage import objects


@pytest.fixture
def mmeb(tmp_path):
    """Create two datasets in MMEB's layout that share an image."""
    (tmp_path / "images/x").mkdir(parents=True)
    for name in "ab":
        (tmp_path / f"images/x/{name}.png").write_bytes(name.encode())
    rows = {
        "VQA": [{"q": ("<|image_1|>\nWhat?", "x/a.png"), "t": [("a cat", ""), ("a dog\n", "")]}],
        "T2I": [
            {"q": ("find a", ""), "t": [("<|image_1|>\n", "x/a.png"), ("<|image_1|>\n", "x/b.png")]},
            {"q": ("find b", ""), "t": [("<|image_1|>\n", "x/b.png"), ("<|image_1|>\n", "x/a.png")]},
        ],
    }
    tasks = {"VQA": {"task": "vqa", "in_distribution": True}, "T2I": {"task": "retrieval", "in_distribution": False}}
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    for name, listed in rows.items():
        (tmp_path / name).mkdir()
        table = pa.Table.from_pylist(
            [
                {
                    "qry_text": row["q"][0],
                    "qry_img_path": row["q"][1],
                    "tgt_text": [text for text, _ in row["t"]],
                    "tgt_img_path": [path for _, path in row["t"]],
                }
                for row in listed
            ]
        )
        parquet.write_table(table, tmp_path / name / "test-00000-of-00001.parquet")
    return tmp_path


def test_mmeb_rows_become_tasks_over_distinct_items(mmeb):
    collection = load([str(mmeb)])
    vqa, t2i = collection.tasks
    assert (vqa.name, vqa.meta_task, vqa.in_distribution) == ("VQA", "vqa", True)
    assert (t2i.meta_task, t2i.in_distribution) == ("retrieval", False)
    items = [item() for item in collection.items]
    assert len(items) == len(set(items)) == 7
    assert items[vqa.queries[0]] == Item("<image>\nWhat?", (b"a",))
    assert [items[row].text for row in vqa.candidates[0]] == ["a cat", "a dog\n"]
    assert [[items[row].images for row in candidates] for candidates in t2i.candidates] == [
        [(b"a",), (b"b",)],
        [(b"b",), (b"a",)],
    ]


def test_pair_shards_become_task_ranking_all_targets(tmp_path):
    texts = [("q0", "t0"), ("q1", "t1"), ("q1", "t2"), ("q3", "t0")]  # q1 has two right answers, t0 two queries
    pairs = [Pair(str(i), "d", "grounding", Item(q), Item(t)) for i, (q, t) in enumerate(texts)]
    write_shards(pairs, tmp_path, dataset="pairs")
    (task,) = (collection := load([str(tmp_path)])).tasks
    items = [item().text for item in collection.items]
    assert (task.name, task.meta_task) == ("pairs", "grounding")
    assert [
        (items[query], [items[row] for row in rows]) for query, rows in zip(task.queries, task.candidates, strict=True)
    ] == [
        ("q0", ["t0", "t1", "t2"]),
        ("q1", ["t1", "t0"]),
        ("q1", ["t2", "t0"]),
        ("q3", ["t0", "t1", "t2"]),
    ]


def test_further_positives_of_pairs_are_right_answers(tmp_path, monkeypatch):
    pairs = [
        Pair("0", "d", "vqa", Item("q0"), Item("t0"), (Item("n"),), positives=(Item("t1"), Item("t2"))),
        Pair("1", "d", "vqa", Item("q1"), Item("t1")),
    ]
    write_shards(pairs, tmp_path, dataset="pairs")
    (task,) = (collection := load([str(tmp_path)])).tasks
    items = [item().text for item in collection.items]
    assert [
        (items[query], [items[row] for row in rows]) for query, rows in zip(task.queries, task.candidates, strict=True)
    ] == [("q0", ["t0"]), ("q0", ["t1"]), ("q0", ["t2"]), ("q1", ["t1", "t0", "t2"])]
    monkeypatch.setattr("pipeline.evaluation.sets.pairs._SIMILARITIES", 11)
    with pytest.raises(PipelineError, match="has 4 pairs of a query and a right answer, and each would be"):
        load([str(tmp_path)])


def test_mmeb_training_pairs_get_separate_task_name(tmp_path):
    write_shards([Pair("0", "d", "vqa", Item("q"), Item("t"))], tmp_path, dataset="OK-VQA")
    assert [task.name for task in load([str(tmp_path)]).tasks] == ["OK-VQA, pairs"]


def test_indexed_caption_tars_become_task(tmp_path):
    (tmp_path / "tars").mkdir()
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with webdataset.TarWriter(str(tmp_path / "tars/0.tar"), encoder=False) as writer:
        for number in range(3):
            image.seek(0)
            writer.write({"__key__": str(number), "png": image.getvalue() + bytes(number), "txt": f"{number}".encode()})
    parser = argparse.ArgumentParser()
    img2dataset.COMMAND.add_arguments(parser)
    img2dataset.COMMAND.run(parser.parse_args([str(tmp_path / "tars"), str(tmp_path / "index"), "--processes", "1"]))
    (task,) = (collection := load([str(tmp_path / "index")])).tasks
    assert (task.name, task.meta_task, len(task.queries)) == ("tars", "retrieval", 3)
    items = [item() for item in collection.items]
    for number, (query, candidates) in enumerate(zip(task.queries, task.candidates, strict=True)):
        assert items[query].images == (image.getvalue() + bytes(number),)
        assert items[candidates[0]].text == f"{number}"
        assert {items[row].text for row in candidates} == {"0", "1", "2"}


def put_rows(folder, queries: list[int], candidates: list[list[int]], items: int) -> None:
    """Write the rows and names of an evaluation set, and update its index."""
    rows = {"query": pa.array(queries, pa.int32()), "candidates": pa.array(candidates, pa.list_(pa.int32()))}
    parquet.write_table(pa.table(rows), folder / "rows.parquet")
    parquet.write_table(pa.table({"name": [f"name {number}" for number in range(items)]}), folder / "items.parquet")
    files = {name: IndexedFile.of((folder / name).read_bytes()) for name in ("rows.parquet", "items.parquet")}
    (folder / "index.json").write_text(replace(Index.load(str(folder)), files=files).to_json())


@pytest.fixture
def singles(tmp_path):
    """Create a converted set of 600 items in blocks of a few hundred."""
    folder = tmp_path / "collection/Set"
    samples = [Single(f"{number}", "Set", "vqa", Item(f"item {number}")) for number in range(600)]
    write_shards(samples, folder, dataset="Set", shard_bytes=1 << 20)
    put_rows(folder, [0, 599], [[1, 2], [3]], 600)
    (tmp_path / "collection/tasks.json").write_text('{"Set": {"task": "vqa", "in_distribution": true}}')
    return tmp_path / "collection"


def test_converted_items_are_read_once_per_block(singles, monkeypatch):
    read, original = [], objects.read
    monkeypatch.setattr(objects, "read", lambda url, *arguments: read.append(url) or original(url, *arguments))
    collection = load([str(singles)])
    assert not [url for url in read if url.endswith(".tar")]
    with ThreadPoolExecutor(16) as pool:
        items = list(pool.map(lambda item: item(), collection.items))
    assert [item.text for item in items] == [f"item {number}" for number in range(600)]
    size = sum(path.stat().st_size for path in singles.glob("Set/*.tar"))
    assert 2 <= len([url for url in read if url.endswith(".tar")]) <= size / (256 << 10) + 3
    assert collection.names[17] == "name 17"
    (task,) = collection.tasks
    assert (task.queries.tolist(), [row.tolist() for row in task.candidates]) == ([0, 599], [[1, 2], [3]])


def test_inconsistent_converted_set_is_refused(singles):
    with pytest.raises(PipelineError, match=r"item of an evaluation set: give the folder above, with its tasks\.json"):
        load([str(singles / "Set")])
    for queries, candidates, items in (([0], [[1]], 599), ([600], [[1]], 600), ([0], [[1, -1]], 600)):
        put_rows(singles / "Set", queries, candidates, items)
        with pytest.raises(PipelineError, match=r"rows\.parquet or items\.parquet does not match its 600 items"):
            load([str(singles)])
    put_rows(singles / "Set", [599], [[599]], 600)
    load([str(singles)])
    index = Index.load(str(singles / "Set"))
    (singles / "Set/index.json").write_text(replace(index, files={}).to_json())
    with pytest.raises(PipelineError, match=r"Set/index\.json names no items\.parquet: make the shards again"):
        load([str(singles)])


def test_missing_column_and_unlisted_dataset_are_reported(mmeb, capsys):
    file = mmeb / "VQA/test-00000-of-00001.parquet"
    (mmeb / "Mine").mkdir()
    parquet.write_table(parquet.read_table(file), mmeb / "Mine/t.parquet")
    load([str(mmeb)])
    assert f"nothing reads the dataset Mine of {mmeb}, for its tasks.json does not name them" in capsys.readouterr().err
    parquet.write_table(parquet.read_table(file).drop_columns(["qry_text"]), file)
    with pytest.raises(PipelineError, match="it has no column qry_text"):
        load([str(mmeb)])


def test_invalid_evaluation_sets_are_refused(mmeb, tmp_path):
    with pytest.raises(PipelineError, match=r"nothing to evaluate at .*: it has no tasks\.json, index\.json or d"):
        load([str(tmp_path / "nowhere")])
    with pytest.raises(PipelineError, match="two evaluation sets have the name"):
        load([str(mmeb), str(mmeb)])
    (mmeb / "tasks.json").write_text("[" * 200_000)
    with pytest.raises(PipelineError, match="give each dataset its task"):
        load([str(mmeb)])
    (mmeb / "tasks.json").write_text('{"VQA": {"task": "guessing", "in_distribution": true}}')
    with pytest.raises(PipelineError, match="guessing"):
        load([str(mmeb)])


def test_mmeb_datasets_are_selected_by_name_and_group(tmp_path):
    names = {name for name in MMEB_TASKS if name != "ImageNet_1K"}
    assert len(names) == 36
    row = {"qry_text": "a?", "qry_img_path": "", "tgt_text": ["b", "c"], "tgt_img_path": ["", ""]}
    for name in names - {"GQA"}:
        (tmp_path / name).mkdir()
        parquet.write_table(pa.Table.from_pylist([row | {"qry_text": name}]), tmp_path / name / "test.parquet")

    def found(group: str) -> set[str]:
        return {task.name for task in load([f"{group}={tmp_path}"]).tasks}

    assert found("mmeb") == names - {"GQA"}
    assert found("mmeb/vqa") == {name for name in names if MMEB_TASKS[name][0] == "vqa"} - {"GQA"}
    assert found("mmeb/ood") == {name for name in names if not MMEB_TASKS[name][1]} - {"GQA"}
    assert found("mmeb/ind") == {name for name in names if MMEB_TASKS[name][1]}
    assert found("mmeb/DocVQA") == {"DocVQA"}
    assert {task.name for task in load([str(tmp_path)]).tasks} == names - {"GQA"}
    parts = [{task.name for task in load([str(tmp_path)], number=n, count=3).tasks} for n in range(3)]
    assert set.union(*parts) == names - {"GQA"}
    assert sum(map(len, parts)) == 35
    with pytest.raises(PipelineError, match="it has no dataset of mmeb/GQA"):
        load([f"mmeb/GQA={tmp_path}"])
    with pytest.raises(PipelineError, match="mmeb/vqa=/data/folder"):
        load(["mmeb/vqa"])
    with pytest.raises(PipelineError, match="no evaluation set 'mmebb'; the sets are mmeb, text-video"):
        load([f"mmebb={tmp_path}"])


def test_images_are_found_in_either_folder_or_reported_missing(mmeb):
    keys = load([str(mmeb)]).keys
    assert load([str(mmeb)]).keys == keys
    (mmeb / "images").rename(mmeb / "eval_images")
    assert len(set(load([str(mmeb)]).keys) & set(keys)) == 4  # only the texts
    keys = load([str(mmeb)]).keys
    (mmeb / "eval_images/x/a.png").write_bytes(b"another")
    assert len(set(load([str(mmeb)]).keys) & set(keys)) == 5  # all keys except those of items with that image
    (mmeb / "eval_images/x/b.png").unlink()
    with pytest.raises(PipelineError, match=r"there is no .*/images/x/b\.png or .*/eval_images/x/b\.png"):
        load([str(mmeb)])


def test_ignored_non_mmeb_dataset_is_reported(tmp_path, capsys):
    row = {"qry_text": "a?", "qry_img_path": "", "tgt_text": ["b", "c"], "tgt_img_path": ["", ""]}
    for name in ("GQA", "GQA-mine"):
        (tmp_path / name).mkdir()
        parquet.write_table(pa.Table.from_pylist([row]), tmp_path / name / "test.parquet")
    assert [task.name for task in load([str(tmp_path)]).tasks] == ["GQA"]
    assert (
        f"note: nothing reads the dataset GQA-mine of {tmp_path}, for it has no tasks.json" in capsys.readouterr().err
    )


def test_instructions_can_stand_apart_from_the_texts(mmeb):
    """Of queries, as Qwen3-VL-Embedding is evaluated on MMEB-V2; candidates have none."""
    rows = [
        ("<|image_1|> Answer it:", "Which?", "x/a.png", "Represent it."),
        ("Find it.", "a cat", "", "Represent it."),
    ]
    names = ("qry_inst", "qry_text", "qry_img_path", "tgt_inst")
    columns = {name: [row[number] for row in rows] for number, name in enumerate(names)}
    columns |= {"tgt_text": [["cat", "dog"]] * 2, "tgt_img_path": [["", ""]] * 2}
    parquet.write_table(pa.table(columns), mmeb / "VQA" / "test-00000-of-00001.parquet")
    parquet.write_table(pa.table({**columns, "qry_inst": [None, ""]}), mmeb / "T2I" / "test-00000-of-00001.parquet")
    items = [each() for each in load([str(mmeb)], apart=True).items]
    assert [(item.text, item.instruction, len(item.images)) for item in items] == [
        ("Which?", "Answer it:", 1),
        ("cat", "", 0),
        ("dog", "", 0),
        ("a cat", "Find it.", 0),
        ("Which?", "", 1),
        ("a cat", "", 0),
    ]
    joined = load([str(mmeb)])
    texts = [each().text for each in joined.items]
    assert texts[:3] == ["Answer it: Which?\n", "Represent it. cat\n", "Represent it. dog\n"]
    del columns["qry_inst"]
    parquet.write_table(pa.table(columns), mmeb / "VQA/x.parquet")
    with pytest.raises(PipelineError, match="it has no column qry_inst: its instructions are in the texts"):
        load([str(mmeb)], apart=True)
