"""Which forms of the vectors an evaluation during training scores, and which it shows in TensorBoard."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.config import load_recipe
from pipeline.data.sample import Item
from pipeline.evaluation.report import Report
from pipeline.evaluation.tasks import Collection, Ranking
from pipeline.training import evaluation as module
from pipeline.training.evaluation import Evaluation

VECTORS = np.eye(8, dtype=np.float32)[[0, 1, 0, 1]]


@pytest.fixture
def report_of(tmp_path, monkeypatch):
    """Return a function that gives an evaluation's report, with fixed vectors, for a recipe with these fields."""
    collection = Collection()
    for number in range(4):
        collection.row(bytes([number]) * 16, str(number), lambda: Item("a text"))
    lists = [np.array([2, 3]), np.array([3, 2])]
    collection.tasks.append(Ranking("QA", "vqa", True, np.array([0, 1]), lists))

    def embed_collection(encoder, collection, store, **options) -> bool:
        store.append("QA", np.arange(4), VECTORS)
        return True

    monkeypatch.setattr(module, "embed_collection", embed_collection)
    monkeypatch.setattr(module, "on_first_rank", lambda work, what: work())
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    engine = SimpleNamespace(module=SimpleNamespace(dimension=8), device=torch.device("cpu"))

    def report(fields: list[str]) -> Report:
        recipe = load_recipe("demo.yaml", [*fields, f"run={tmp_path}"])
        evaluation = Evaluation(recipe, collection, 1, engine, None, None, lambda: False)
        evaluation._reader_and_features = (None, None)
        return evaluation.report(7, 100)

    return report


@pytest.mark.parametrize(
    ("fields", "forms"),
    [
        ([], []),
        (["evaluation.projector=1"], []),
        (["objective.dimensions=[2,4,8]"], ["8 float32", "4 float32", "2 float32"]),
        (["objective.quantized=int8"], ["8 float32", "8 int8"]),
        (
            ["objective.dimensions=[4]", "objective.quantized=binary"],
            ["8 float32", "8 binary", "4 float32", "4 binary"],
        ),
    ],
)
def test_vectors_are_scored_in_the_forms_that_are_trained(fields, forms, report_of, tmp_path):
    report = report_of(fields)
    assert report.score == 1
    assert [str(variant.form) for variant in report.variants] == forms
    shown = [path.name for path in tmp_path.glob("tensorboard/projector/*")]
    assert shown == (["step-00000007"] if fields == ["evaluation.projector=1"] else [])


def test_projector_that_fails_costs_a_warning_and_no_report(report_of, tmp_path, caplog):
    (tmp_path / "tensorboard").touch()  # no folder
    assert report_of(["evaluation.projector=1"]).score == 1
    assert "the embedding projector does not show step 7" in caplog.text
