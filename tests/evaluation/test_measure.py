"""A report's examples of queries show what was compared."""

import base64
import io
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.sample import Item
from pipeline.evaluation.measure import measure
from pipeline.evaluation.metrics import scores_of
from pipeline.evaluation.report import Shown
from pipeline.evaluation.store import MemoryStore
from pipeline.evaluation.tasks import Collection, Ranking, Retrieval
from pipeline.models.compact import Form, quantized, shortened


def angled(*degrees: float) -> MemoryStore:
    """Return vectors with these angles, whose differences are easy to compare."""
    store = MemoryStore(len(degrees), 2)
    store.vectors[:] = np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)
    return store


@pytest.fixture
def collection() -> Collection:
    """Return a collection of two images as queries and five texts."""
    picture = io.BytesIO()
    Image.new("RGB", (400, 200), "red").save(picture, "PNG")
    items = [Item(f"<image>\nWhat is {n}?", (picture.getvalue(),)) for n in range(2)]
    items += [Item(f"answer {n}") for n in range(5)]
    collection = Collection()
    for number, item in enumerate(items):
        name = f"{number}.png" if item.images else item.text
        collection.row(bytes([number]) * 16, name, partial(lambda item: item, item))
    return collection


def test_worst_queries_show_right_and_first_candidates(collection):
    candidates = [np.array([2, 3, 4]), np.array([5, 6, 3])]
    collection.tasks.append(Ranking("QA", "vqa", True, np.array([0, 1]), candidates))
    take = angled(0, 100, 50, 10, 70, 100, 130).take
    report = measure("a model", collection, take, worst=5)
    assert report.model == "a model"
    found, wrong = report.results["QA"].worst[1], report.results["QA"].worst[0]
    assert report.results["QA"].score == 0.5
    assert (wrong.query.name, wrong.right, wrong.first) == (
        "What is 0? (0.png)",
        Shown("answer 0"),
        Shown("answer 1"),
    )
    assert (wrong.rank, wrong.positive, wrong.similarity) == (2, 0.6428, 0.9848)
    assert (found.right, found.first) == (Shown("answer 3"), Shown("answer 3"))
    assert (found.rank, found.positive, found.similarity) == (1, 1.0, 1.0)
    shown = Image.open(io.BytesIO(base64.b64decode(wrong.query.picture)))
    assert shown.size == (160, 80)
    assert [case.rank for case in measure("m", collection, take, worst=1).results["QA"].worst] == [2]
    assert measure("m", collection, take).results["QA"].worst == []


def test_directions_share_one_result_and_classes_show_names(collection):
    right = [np.array([0]), np.array([1])]
    pictures, texts = np.array([0, 1]), np.array([2, 3])
    collection.tasks += [
        Retrieval("both", "text-image", "t2i", "en", texts, pictures, right),
        Retrieval("both", "text-image", "i2t", "en", pictures, texts, right),
        Retrieval("classes", "classification", "", "en", pictures, texts[:, None], right, ("cat", "dog")),
    ]
    take = angled(0, 90, 80, 85, 0, 0, 0).take
    report = measure("m", collection, take, worst=20)
    assert len(measure("m", collection, take, worst=1).results["both"].worst) == 1
    both, classes = report.results["both"], report.results["classes"]
    assert both.queries == {"t2i": 2, "i2t": 2}
    assert [case.direction for case in both.worst] == ["t2i", "i2t", "i2t", "t2i"]
    margins = [case.positive - case.similarity for case in both.worst]
    assert margins[0] == min(margins) == pytest.approx(np.cos(np.radians(80)) - np.cos(np.radians(10)), abs=1e-4)
    assert both.worst[0].query == Shown("answer 0")
    assert both.worst[0].first.name == "What is 1? (1.png)"
    assert {(case.right.name, case.first.name) for case in classes.worst} == {("cat", "cat"), ("dog", "dog")}


def tasks_of(ways: int = 7) -> list[Ranking | Retrieval]:
    """Return tasks in which each item's right answer is itself: in lists, among all, and among means of two."""
    rows = np.arange(ways)
    lists = [np.roll(rows, -row) for row in rows]
    pairs = np.stack([rows, np.roll(rows, -1)], axis=1)
    right = [np.array([row]) for row in rows]
    return [
        Ranking("QA", "vqa", True, rows, lists),
        Retrieval("Captions", "text-image", "t2i", "en", rows, rows, right),
        Retrieval("Captions", "text-image", "i2t", "en", rows, rows, right),
        Retrieval("Classes", "classification", "", "en", rows, pairs, right),
    ]


def test_other_forms_are_scored_as_their_vectors(collection):
    """Of texts whose vectors are noisy copies of each other: queries 0 to 19, their candidates 20 to 39."""
    rows, noise = np.random.default_rng(0).normal(size=(2, 20, 24))
    vectors = np.concatenate([rows, rows + noise]) * np.linspace(0.2, 1, 24)
    vectors = torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).float()
    queries, right, store = np.arange(20), [np.array([row]) for row in range(20)], MemoryStore(40, 24)
    store.vectors[:] = vectors
    classes = np.stack([queries + 20, np.roll(queries, 3) + 20], axis=1)
    collection.tasks += [
        Ranking("QA", "vqa", True, queries, [np.roll(queries, -row) + 20 for row in queries]),
        Retrieval("Captions", "text-image", "i2t", "en", queries, queries, right),  # its score is 1, but counts less
        Retrieval("Captions", "text-image", "t2i", "en", queries, queries + 20, right),
        Retrieval("Classes", "classification", "", "en", queries, classes, right),
    ]
    forms = [Form(24, "int8"), Form(24, "binary"), Form(7), Form(7, "int8"), Form(7, "binary")]
    report, plain = (measure("m", collection, store.take, forms=each) for each in (forms, []))
    assert (report.results, plain.variants) == (plain.results, ())
    assert [variant.form for variant in report.variants] == [Form(24), *forms]
    means = torch.nn.functional.normalize(vectors[torch.from_numpy(classes)].mean(dim=1), dim=1)
    scores = []
    for variant in report.variants:
        form, found = variant.form, []
        for candidates in (vectors[20:], means):
            kept = shortened(candidates, form.dimensions)
            if form.kind != "float32":
                kept = quantized(kept, form.kind)
            similarities = shortened(vectors[:20], form.dimensions).double() @ kept.double().T  # queries stay float32
            found.append(float((similarities.argmax(dim=1) == torch.arange(20)).double().mean()))
        assert variant.scores == {"QA": found[0], "Captions": found[0], "Classes": found[1]}, form
        scores.append(found)
    assert len({tuple(each) for each in scores}) > 3  # most forms differ, so that a wrong one is noticed
    assert report.variants[0].scores == {name: result.score for name, result in report.results.items()}


def test_scores_of_other_forms_do_not_depend_on_tiles():
    vectors = np.random.default_rng(0).normal(size=(24, 33))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    rows = np.arange(12)
    task = Retrieval("Set", "text-image", "t2i", "en", rows, rows + 12, list(rows[:, None]))
    for form in (Form(10), Form(33, "int8"), Form(10, "binary")):
        whole, *tiled = (
            scores_of(task, lambda numbers: vectors[numbers], form=form, tile_bytes=size) for size in (1 << 28, 1, 5000)
        )
        for each in tiled:
            for name, values in vars(whole).items():
                np.testing.assert_array_equal(getattr(each, name), values, err_msg=name)


def test_queries_and_candidates_that_begin_with_zeros_count_as_wrong(collection):
    rows = np.eye(7, dtype=np.float32)
    collection.tasks.append(Ranking("QA", "vqa", True, np.arange(7), [np.roll(np.arange(7), -row) for row in range(7)]))
    report = measure("m", collection, lambda numbers: rows[numbers], forms=[Form(3), Form(3, "int8")])
    assert [variant.scores["QA"] for variant in report.variants] == [1, 3 / 7, 3 / 7]


@pytest.mark.parametrize("spread", [0, 1e-7, 1e-5], ids=["one vector", "but for rounding", "but for more of it"])
def test_collapsed_embeddings_are_reported_and_score_zero(collection, spread):
    collection.tasks += tasks_of()
    store = angled(*(30 + 57 * spread * np.random.default_rng(0).random(7)))
    report = measure("a model", collection, store.take)
    assert report.collapsed == ["QA", "Captions", "Classes"]
    assert report.remarks()[0].startswith("THE MODEL HAS COLLAPSED")
    if spread:  # rounding decides the scores
        return
    assert report.score == 0
    assert all(value == 0 for name, value in report.results["Captions"].metrics.items() if name.endswith("R@1"))
    assert report.results["Captions"].metrics["t2i MnR"] == 7


def test_identical_candidate_embeddings_count_as_collapse(collection):
    rows = np.arange(3)
    collection.tasks.append(Ranking("QA", "vqa", True, rows, [np.array([3 + row, 3 + (row + 1) % 3]) for row in rows]))
    report = measure("a model", collection, angled(0, 10, 50, 30, 30, 30, 200).take)
    assert (report.collapsed, report.score, report.results["QA"].ties) == (["QA"], 0, 3)


def test_partial_collapse_scores_zero(collection):
    collection.tasks += tasks_of()
    report = measure("a model", collection, angled(0, 0, 0, 90, 90, 90, 90).take)
    assert report.collapsed == []
    assert [result.score for result in report.results.values()] == [0, 0, 0]


def test_copy_of_right_candidate_does_not_lower_score(collection):
    """Such copies occur in MMEB's lists, and in classes with the same name."""
    copies = [np.array([2, 3, 2, 2]), np.array([3, 2, 3, 4])]
    classes = np.array([[2, 3], [4, 5], [3, 2]])
    queries = np.array([0, 1])
    collection.tasks += [
        Ranking("QA", "vqa", True, queries, copies),
        Retrieval("Names", "text-image", "t2i", "en", queries, np.array([2, 3, 2]), [np.array([0]), np.array([1])]),
        Retrieval("Classes", "classification", "", "en", queries, classes, [np.array([2]), np.array([0])]),
    ]
    report = measure("a model", collection, angled(0, 80, 0, 70, 120, 160, 200).take)
    assert [(result.score, result.ties) for result in report.results.values()] == [(1, 2), (1, 1), (1, 2)]
    assert report.collapsed == []
