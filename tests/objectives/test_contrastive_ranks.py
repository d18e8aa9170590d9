"""The loss of two processes, each with half of the rows, compared with that of one that has all rows."""

import pytest
import torch
from closeness import assert_close_in_norm
from plain_loss import ALPHA, OF_LOGITS, TEMPERATURE, example, near, unit, with_gradients
from two_ranks import on_two_ranks

from pipeline.objectives.contrastive.loss import Distill, hardness_weighted_loss

ROWS = 6
NEGATIVES = {  # number of negatives per rank
    "unequal": (2, 5),
    "on one rank only": (0, 5),
    "none": (0, 0),
    "without gradient, on one rank only": (0, 5),
    "without ids": (2, 5),
    "queries alone": (2, 5),
    "queries alone, no negatives": (0, 0),
    "several": (2, 5),
    "several, no negatives": (0, 0),
    "several, queries alone": (0, 5),
}
POSITIVES = {"several": (0, 3), "several, no negatives": (4, 2), "several, queries alone": (3, 0)}
OWNERS = {"several": [7, 11, 7], "several, no negatives": [5, 1, 3, 5, 7, 6], "several, queries alone": [3, 5, 5]}


def directions(name: str) -> str:
    return "query" if "queries alone" in name else "both"


def global_batch(name: str) -> tuple[dict, dict]:
    """Return 2 * ROWS rows, with ids, reward and masks for all of them."""
    negatives, n = sum(NEGATIVES[name]), 2 * ROWS
    dtype = torch.float64 if name in POSITIVES else torch.float32
    inputs = example(n=n, m=negatives, d=8, dtype=dtype)
    inputs["temperature"] = torch.tensor(TEMPERATURE)
    options = {
        "query_ids": torch.arange(n) % 9,
        "target_ids": 100 + torch.arange(n) % 10,
        "negative_ids": 100 + torch.arange(negatives) * 3,
        "valid": torch.arange(n) != 3,
        "negatives_valid": torch.arange(negatives) != 1,
        "reward": "teacher",
        "teacher_query": unit(n, 3, seed=5, dtype=dtype),
        "teacher_target": unit(n, 3, seed=6, dtype=dtype),
        "teacher_negatives": unit(negatives, 3, seed=7, dtype=dtype),
        "alpha": ALPHA,
        "directions": directions(name),
    }
    if name in POSITIVES:
        owners = torch.tensor(OWNERS[name])
        p = len(owners)
        inputs["further_vectors"] = near(inputs["query"][owners], 1.1, seed=4)
        inputs["temperature"] = 0.02 + 0.01 * torch.arange(n).double()
        options |= {
            "further_owners": owners,
            "further_weights": 1 + torch.arange(p).double(),
            "further_target_weights": 1 + torch.arange(n).double() % 3,
            "further_ids": 104 + torch.arange(p),
            "teacher_positives": unit(p, 3, seed=8),
            "margin": 0.3 - 0.02 * torch.arange(n).double(),
            "distill": Distill(weight=0.5, temperature=0.1),
            "dimensions": (3, 8),
            "reward": "policy" if name == "several" else "teacher",
        }
    if name == "without gradient, on one rank only":
        options["negatives"] = inputs.pop("negatives")
    if name == "without ids":
        options = {key: x for key, x in options.items() if "ids" not in key}
    return inputs, options


def numbers(output) -> dict:
    return {
        "positive": output.positive,
        "hardest": output.hardest_negative,
        "effective": output.effective_negatives,
        "share": output.hardest_share,
        "mean": output.mean_negative,
        "masked": output.masked_pairs,
        "by margin": output.masked_by_margin,
        "valid": output.valid_count,
    }


def shares_of(key: str, name: str, rank: int) -> slice:
    """Return the part of a batch's rows that a rank has."""
    first, second = (ROWS, ROWS)
    if "negative" in key:
        first, second = NEGATIVES[name]
    if ("further" in key and "target" not in key) or key == "teacher_positives":
        first, second = POSITIVES[name]
    return slice(rank * first, first + rank * second)


def on_rank(rank: int) -> dict:
    results = {}
    for name, counts in NEGATIVES.items():
        local = [
            {
                key: x[shares_of(key, name, rank)] if isinstance(x, torch.Tensor) and x.ndim else x
                for key, x in each.items()
                if counts[rank] or "negative" not in key  # a rank without negatives passes none
            }
            for each in global_batch(name)
        ]
        if name in POSITIVES:
            local[1]["further_owners"] = local[1]["further_owners"] - rank * ROWS
            if name == "several" and not rank:  # the other ranks without positives pass empty ones
                local = [
                    {key: x for key, x in each.items() if "further" not in key and "positives" not in key}
                    for each in local
                ]
        inputs, options = local
        output, gradients = with_gradients(hardness_weighted_loss, inputs, **options, tile=4)
        results[name] = {"loss": output.loss.detach(), "gradients": gradients, **numbers(output)}
    return results


def unequal_rows(rank: int) -> str:
    x = unit(3 + rank, 4, dtype=torch.float32)
    with pytest.raises(ValueError) as error:
        hardness_weighted_loss(x, x, alpha=1.0, temperature=1.0)
    return str(error.value)


@pytest.fixture(scope="module")
def of_two_ranks():
    return on_two_ranks(on_rank)


@pytest.mark.parametrize("name", NEGATIVES)
def test_two_processes_equal_one_with_whole_batch(of_two_ranks, name):
    inputs, options = global_batch(name)
    output, expected = with_gradients(hardness_weighted_loss, inputs, **options)
    ranks = [results[name] for results in of_two_ranks]
    assert_close_in_norm(torch.stack([r["loss"] for r in ranks]).mean(), output.loss, **OF_LOGITS)
    for key, whole in expected.items():
        # The engine averages over ranks, so each rank's gradient counts half.
        parts = [r["gradients"][key] / 2 for r in ranks if key in r["gradients"]]
        if not whole.ndim:
            parts = [sum(parts)[None]]
            whole = whole[None]
        if whole.numel():
            largest = whole.abs().max()
            assert_close_in_norm(torch.cat(parts) / largest, whole / largest, **OF_LOGITS)
    for key, whole in numbers(output).items():
        parts = [r[key] for r in ranks]
        if key in ("masked", "by margin", "valid"):
            assert parts == [whole, whole]
        else:
            valid = options["valid"]
            assert_close_in_norm(torch.cat(parts)[valid], whole[valid], **OF_LOGITS)


def test_ranks_with_different_row_counts_are_refused():
    assert on_two_ranks(unequal_rows) == ["ranks have between 3 and 4 rows: all need the same number"] * 2
