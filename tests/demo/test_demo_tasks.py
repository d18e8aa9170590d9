"""The small MMEB: no leak into training, one right answer, hard candidates, the row format.

test_vqa.py has what concerns the questions of Scene-VQA alone.
"""

import json
import re
from functools import cache
from io import BytesIO

import pyarrow.parquet as pq
import pytest

from pipeline.data.sample import Pair
from pipeline.demo import captions, tasks
from pipeline.demo.scenes import COLOURS, HELD_OUT, SHAPES, Scene
from pipeline.demo.tasks import CANDIDATES, DATASETS, TASKS, evaluation_rows, training_pair

SEED = 0
COMBINATION = re.compile(f"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")


@cache
def evaluated(name: str) -> tuple[list[dict], dict[str, bytes]]:
    return evaluation_rows(name, SEED)


@pytest.fixture(scope="module", params=TASKS)
def evaluation(request: pytest.FixtureRequest) -> tuple[str, list[dict], dict[str, bytes]]:
    return request.param, *evaluated(request.param)


def training_questions(dataset: str, count: int) -> list[tasks._Question]:
    return [tasks._ask(dataset, "train", tasks._rng(f"{dataset} train", SEED, index)) for index in range(count)]


def shown(question: tasks._Question) -> list[Scene]:
    """Return every scene in a training pair: in its query, answer or negative."""
    sides = (question.query, question.right, next(iter(question.hard)))
    return [side.picture.scene for side in sides if side.picture]


def training_pairs(dataset: str, seed: int, count: int) -> list[Pair]:
    return [training_pair(dataset, seed, index) for index in range(count)]


@pytest.mark.parametrize("dataset", DATASETS)
def test_training_is_deterministic_and_random_access(dataset: str) -> None:
    pairs = training_pairs(dataset, SEED, 40)
    assert pairs == training_pairs(dataset, SEED, 40)
    assert pairs[33] == training_pair(dataset, SEED, 33)
    assert pairs != training_pairs(dataset, SEED + 1, 40)
    assert pairs[33].key == "00000033"
    assert {(pair.dataset, pair.task) for pair in pairs} == {(dataset, DATASETS[dataset])}


@pytest.mark.parametrize("dataset", DATASETS)
def test_training_pairs_are_well_formed(dataset: str) -> None:
    for index, pair in enumerate(training_pairs(dataset, SEED, 60)):
        for item in pair.items:
            assert item.text.count("<image>") == len(item.images)
        assert pair.target.content_hash not in [negative.content_hash for negative in pair.negatives]
        pictures = dataset in ("Scene-T2I", "Scene-Ground")
        assert len(pair.negatives) == (not pictures or index % 4 == 0)


@pytest.mark.parametrize("dataset", ["Scene-CLS", "Scene-I2T"])
def test_text_negatives_differ_in_one_attribute(dataset: str) -> None:
    for pair in training_pairs(dataset, SEED, 200):
        right, wrong = pair.target.text, pair.negatives[0].text
        words = set(right.replace(",", "").split()) ^ set(wrong.replace(",", "").split())
        if dataset != "Scene-I2T":
            assert len(words) == 2
        assert wrong != right


@pytest.mark.parametrize("dataset", DATASETS)
def test_training_excludes_held_out_combinations(dataset: str) -> None:
    for question in training_questions(dataset, 500):
        assert not any(scene.held_out for scene in shown(question))
        for side in (question.query, question.right, *question.hard):
            assert not HELD_OUT.intersection(COMBINATION.findall(side.text))


@pytest.mark.slow
@pytest.mark.parametrize("dataset", DATASETS)
def test_evaluation_scenes_are_not_in_training(dataset: str) -> None:
    trained = {scene.content for question in training_questions(dataset, 2000) for scene in shown(question)}
    rng = tasks._rng
    for part, name in (("in-distribution", dataset), ("held-out", f"{dataset}-OOD")):
        asked = [tasks._ask(dataset, part, rng(name, SEED, index)) for index in range(tasks.QUERIES)]
        scenes = [(q.query.picture or q.right.picture).scene for q in asked]
        assert trained.isdisjoint(scene.content for scene in scenes)
        assert all(scene.held_out == (part == "held-out") for scene in scenes)


@pytest.mark.slow
def test_held_out_questions_ask_about_held_out_things() -> None:
    for row in evaluated("Scene-CLS-OOD")[0]:
        assert HELD_OUT.issuperset(COMBINATION.findall(row["tgt_text"][0]))
    for row in evaluated("Scene-CLS")[0]:
        assert HELD_OUT.isdisjoint(COMBINATION.findall(row["tgt_text"][0]))
    for row in evaluated("Scene-Ground-OOD")[0]:
        assert HELD_OUT.issuperset(COMBINATION.findall(row["qry_text"]))


def test_rows_have_mmeb_format_and_candidates(
    evaluation: tuple[str, list[dict], dict[str, bytes]],
) -> None:
    name, rows, pictures = evaluation
    assert len(rows) == 200
    used = set()
    for row in rows:
        assert list(row) == ["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"]
        assert len(row["tgt_text"]) == len(row["tgt_img_path"]) == CANDIDATES[TASKS[name][0]]
        sides = [
            (row["qry_text"], row["qry_img_path"]),
            *zip(row["tgt_text"], row["tgt_img_path"], strict=True),
        ]
        for text, path in sides:
            assert text.count("<|image_1|>") == (path != "")
            assert "<image>" not in text
        used |= {path for _, path in sides if path}
    assert used == set(pictures)
    assert all(path.startswith(f"{name}/") and path.endswith(".png") for path in pictures)


def test_candidates_of_row_are_distinct(evaluation: tuple[str, list[dict], dict[str, bytes]]) -> None:
    _, rows, pictures = evaluation
    for row in rows:
        pairs = zip(row["tgt_text"], row["tgt_img_path"], strict=True)
        contents = [(text, pictures.get(path)) for text, path in pairs]
        assert len(set(contents)) == len(contents)


def test_rows_contain_hard_candidates(evaluation: tuple[str, list[dict], dict[str, bytes]]) -> None:
    name, rows, _ = evaluation
    for row in rows:
        right, *wrong = zip(row["tgt_text"], row["tgt_img_path"], strict=True)
        stem = right[1].removesuffix(".png")
        if name.startswith("Scene-T2I"):
            assert [path for _, path in wrong[:6]] == [f"{stem}-v{i}.png" for i in range(1, 7)]
        elif name.startswith("Scene-Ground"):
            own = row["qry_img_path"].removesuffix(".png")
            assert all(path.startswith(own) for _, path in wrong[:3])
        elif name.startswith("Scene-CLS"):
            assert all(len(set(text.split()) ^ set(right[0].split())) == 2 for text, _ in wrong[:8])
        elif name.startswith("Scene-I2T"):
            assert all(len(set(text.split()) - set(right[0].split())) <= 2 for text, _ in wrong[:6])
        else:
            assert name.startswith("Scene-VQA")
            (named,) = re.findall("|".join((*COLOURS, *SHAPES)), row["qry_text"])
            assert sum(named in text.split() for text in row["tgt_text"]) == 16  # all that fit the question


def test_right_answer_follows_from_scene() -> None:
    """Answer each dataset's question from the scene itself, and compare."""
    for dataset in TASKS:
        base = dataset.removesuffix("-OOD")
        if base == "Scene-VQA":  # test_vqa.py
            continue
        part = "in-distribution" if base == dataset else "held-out"
        for index in range(100):
            question = tasks._ask(base, part, tasks._rng(dataset, SEED, index))
            scene = (question.query.picture or question.right.picture).scene
            text, answer = question.query.text, question.right.text
            match base:
                case "Scene-CLS":
                    assert [captions.label(t) for t in scene.things if t.size == "large"] == [answer]
                case "Scene-T2I":
                    assert text.endswith(captions.short(scene, "en") + "\n")
                case "Scene-I2T":
                    assert answer == captions.short(scene, "en")
                case "Scene-Ground":
                    thing = question.right.picture.thing
                    assert thing in scene.things
                    assert text.endswith(captions.phrase(thing, "en", "definite") + "\n")
                case _:
                    raise AssertionError(base)


def test_evaluation_has_at_most_6000_images() -> None:
    assert sum(len(evaluated(name)[1]) for name in TASKS) <= 6000


def test_rows_do_not_depend_on_count() -> None:
    few, _ = evaluation_rows("Scene-Ground", SEED, 5)
    many, _ = evaluation_rows("Scene-Ground", SEED, 220)
    assert few == many[:5]
    assert len(many) == 220


def test_captioned_pictures_are_those_that_queries_ask_for() -> None:
    rows, pictures = evaluated("Scene-T2I")
    for row, (caption, png) in zip(rows[:40], tasks.captioned_pictures(SEED, 40), strict=True):
        assert row["qry_text"] == tasks.FIND_IMAGE.format(caption)
        assert png == pictures[row["tgt_img_path"][0]]


@pytest.mark.slow
def test_evaluation_files_are_deterministic_and_round_trip() -> None:
    files = dict(tasks.evaluation_files(SEED, 3))
    described = json.loads(files["tasks.json"])
    assert described["Scene-T2I-OOD"] == {"task": "retrieval", "in_distribution": False}
    assert list(described) == list(TASKS)
    for name in TASKS:
        rows = pq.read_table(BytesIO(files[f"{name}/test-00000-of-00001.parquet"])).to_pylist()
        expected, pictures = evaluation_rows(name, SEED, 3)
        assert rows == expected
        for path, content in pictures.items():
            assert files[f"images/{path}"] == content
