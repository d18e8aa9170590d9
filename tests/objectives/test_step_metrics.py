"""The metrics of a contrastive step over two ranks, compared with formulas over the whole matrix in float64."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plain_loss import near, plain_loss, unit
from two_ranks import on_two_ranks

from pipeline.data.batch import Origin
from pipeline.evaluation.report import Similarities
from pipeline.objectives.contrastive.loss import LossOutput, hardness_weighted_loss
from pipeline.objectives.contrastive.step import ContrastiveResult

ROWS, INVALID, DATASETS = 20, 7, ("a", "b", "unused")
OPTIONS = {"alpha": 9.0, "temperature": torch.tensor(0.05).double()}


def pairs() -> tuple[dict, np.ndarray]:
    """Return all ranks' vectors with their options, and the number of each pair's dataset."""
    query = unit(ROWS, 6, seed=1)
    ids = {"query_ids": torch.arange(ROWS) % 17, "target_ids": 100 + torch.arange(ROWS) % 18}
    valid, margin = torch.arange(ROWS) != INVALID, torch.full((ROWS,), 0.1).double()
    return {"query": query, "target": near(query, 1.0, seed=2), "valid": valid, "margin": margin} | ids, np.arange(
        ROWS
    ) % 2


def on_rank(rank: int) -> tuple[dict, dict, list[list[int]]]:
    """Return the metrics, the histograms, and the ranks that are named if a negative, or a rank's loss, is NaN."""
    inputs, datasets = pairs()
    own = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    settings = {"grad_norm": 1.0, "tokens": 1, "padded": 1, "largest_chunk": 1, "settings": {}}
    origins = [Origin("", number, int(dataset)) for number, dataset in enumerate(datasets[own])]
    batch = SimpleNamespace(valid=inputs["valid"][own].tolist(), origins=origins)

    def loss_of(vectors: dict) -> LossOutput:
        return hardness_weighted_loss(**{name: x[own] for name, x in vectors.items()}, **OPTIONS, tile=3)

    def metrics_of(output: LossOutput, *, finite: bool = True) -> tuple[dict, dict]:
        settings["finite"] = torch.tensor(finite)
        return ContrastiveResult(loss=output, distills=False, has_margin=True, **settings).metrics(batch, DATASETS)

    output = loss_of(inputs)
    metrics, histograms = metrics_of(output)
    of_all = metrics_of(replace(output, loss=output.loss * torch.nan), finite=rank == 0)  # a vector of rank 1 is NaN
    of_one = metrics_of(replace(output, loss=output.loss * (torch.nan if rank else 1)))
    named = [each["not_finite"] for each, _ in (of_all, of_one)]
    return metrics, {name: torch.from_numpy(values) for name, values in histograms.items()}, named


@pytest.fixture(scope="module")
def of_two_ranks():
    return on_two_ranks(on_rank)


def test_metrics_equal_formulas_over_the_whole_matrix(of_two_ranks):
    inputs, datasets = pairs()
    expected = plain_loss(**inputs, **OPTIONS)
    valid = inputs["valid"]
    positive = (inputs["query"] * inputs["target"]).sum(dim=1)
    compared = valid & (expected.hardest > -torch.inf)
    right = positive > expected.hardest
    wanted = {
        "loss": expected.loss,
        "precision": right[compared].double().mean(),
        "positive_similarity": positive[valid].mean(),
        "hardest_negative_similarity": expected.hardest[compared].mean(),
        "negative_similarity": expected.mean_negative[compared].mean(),
        "effective_negatives": expected.effective[compared].mean(),
        "hardest_percent_weight": expected.share[compared].mean(),
        "masked_pairs": expected.masked / expected.pairs,
        "masked_pairs/margin": expected.by_margin / expected.pairs,
        "valid": ROWS - 1,
        **{
            f"precision/{name}": right[compared & torch.from_numpy(datasets == number)].double().mean()
            for number, name in enumerate(DATASETS[:2])
        },
    }
    assert 0 < wanted["precision"] < 1 and wanted["precision/a"] != wanted["precision/b"]
    assert 0 < wanted["masked_pairs/margin"] < wanted["masked_pairs"]
    for metrics, histograms, _ in of_two_ranks:
        assert metrics == pytest.approx({name: float(value) for name, value in wanted.items()}, rel=1e-7)
        assert torch.allclose(histograms["positive"], positive[valid])
        assert torch.allclose(histograms["hardest_negative"], expected.hardest[compared])


def test_overlap_is_the_common_area_of_the_two_distributions(of_two_ranks):
    _, histograms, _ = of_two_ranks[0]
    positive, negative = (values.numpy() for values in histograms.values())
    edges = np.arange(-100, 101) / 100
    expected = sum(
        min(np.mean((positive >= low) & (positive < high)), np.mean((negative >= low) & (negative < high)))
        for low, high in pairwise(edges)
    )
    assert Similarities.of(positive, negative).overlap == pytest.approx(expected)


def test_rank_from_which_a_loss_is_not_finite_is_named(of_two_ranks):
    assert [named for _, _, named in of_two_ranks] == [[[1], [1]]] * 2


def test_run_of_one_dataset_has_no_precision_by_dataset(of_two_ranks):
    assert not [name for name in of_two_ranks[0][0] if name == "precision/unused"]
