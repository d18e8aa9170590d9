"""The loss compared with its formula in float64, and two processes compared with one."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close_in_norm
from plain_loss import plain_loss
from torch.utils._python_dispatch import TorchDispatchMode
from two_ranks import on_two_ranks

from pipeline.objectives.contrastive import loss as contrastive
from pipeline.objectives.contrastive.loss import Distill, Positives, Teacher, hardness_weighted_loss

ALPHA, TEMPERATURE = 9.0, 0.02

# A logit's absolute error is its exponential's relative error. A few dozen operations lead from the vectors to it.
OF_LOGITS = {"scale": 1 / TEMPERATURE + ALPHA, "operations": 64}


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def near(x: torch.Tensor, noise: float, seed: int) -> torch.Tensor:
    """Return unit rows near those of x, which give losses between zero and those of noise."""
    return F.normalize(x + noise * unit(*x.shape, seed=seed, dtype=x.dtype), dim=-1)


def example(n: int = 7, m: int = 4, d: int = 6, dtype: torch.dtype = torch.float64) -> dict:
    query = unit(n, d, seed=1, dtype=dtype)
    return {
        "query": query,
        "target": near(query, 1.2, seed=2),
        "negatives": near(query[torch.arange(m) % n], 0.9, seed=3),
    }


def with_gradients(function, inputs: dict, **options):
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    output = function(**leaves, **options)
    return output, dict(zip(leaves, torch.autograd.grad(output.loss, list(leaves.values())), strict=True))


IDS = {
    "query_ids": torch.tensor([1, 2, 3, 4, 5, 1, 15]),  # the last equals the fifth's target
    "target_ids": torch.tensor([11, 12, 12, 14, 15, 16, 17]),
    "negative_ids": torch.tensor([20, 14, 15, 12]),
}
TEACHER = {
    "reward": "teacher",
    "teacher": Teacher(unit(7, 3, seed=5), unit(7, 3, seed=6), unit(4, 3, seed=7), unit(5, 3, seed=9)),
}
FURTHER = {  # five further positives, of three queries
    "owners": torch.tensor([3, 0, 3, 4, 3]),
    "weights": torch.tensor([0.5, 2.0, 0.0, 1.0, 1.0], dtype=torch.float64),
    "target_weights": torch.tensor([1, 2, 1, 0.5, 1, 1, 1], dtype=torch.float64),
    # The second's equals the target of another query, and the third's that of its owner and an explicit negative.
    "ids": torch.tensor([30, 12, 14, 31, 32]),
}
DISTILL = {"distill": Distill(weight=0.7, temperature=0.2), "teacher": TEACHER["teacher"]}
PAIR_MARGINS = torch.tensor([0.1, 0.0, torch.inf, 0.3, 0.05, -0.1, 0.2], dtype=torch.float64)
PAIR_TEMPERATURES = torch.tensor([0.02, 0.03, 0.05, 0.1, 0.04, 0.025, 0.2], dtype=torch.float64)
OPTIONS = {
    "plain": {},
    "ids": IDS,
    "invalid rows": {"valid": torch.tensor([1, 1, 0, 1, 0, 1, 1]).bool()},
    "invalid negatives": {"negatives_valid": torch.tensor([1, 0, 1, 0]).bool()},
    "margin": {"margin": 0.05},
    "margins of pairs": {"margin": PAIR_MARGINS},
    "temperatures of pairs": {"temperature": PAIR_TEMPERATURES},
    "teacher's reward": TEACHER,
    "alpha 0": {"alpha": 0.0},
    "positives": {"positives": FURTHER},
    "positives, ids": {"positives": FURTHER, **IDS},
    "distilled": DISTILL,
    "sizes": {"dimensions": (2, 3, 6), "dimension_weights": (1.0, 0.0, 3.0)},
    "smaller sizes": {"dimensions": (2, 5)},
    "all": {
        **IDS,
        **TEACHER,
        "valid": torch.tensor([1, 1, 1, 1, 0, 1, 1]).bool(),
        "negatives_valid": torch.tensor([0, 1, 1, 1]).bool(),
        "margin": 0.1,
    },
}
OPTIONS |= {
    "all, teacher's": OPTIONS["all"]
    | DISTILL
    | {
        "margin": PAIR_MARGINS,
        "temperature": PAIR_TEMPERATURES,
        "positives": FURTHER,
        "dimensions": (3, 6),
    }
}
OPTIONS |= {"all, own": OPTIONS["all, teacher's"] | {"reward": "policy"}}


def with_positives(function):
    """Return the function with the positives' vectors as its argument `further`."""

    def call(*, positives=None, further=None, teacher=None, **options):
        if positives is not None:
            options["positives"] = Positives(vectors=further, **positives)
        elif teacher is not None:
            teacher = replace(teacher, positives=None)
        if options.get("negatives") is None and teacher is not None:
            teacher = replace(teacher, negatives=None)
        return function(**options, teacher=teacher)

    return call


plain, ours = with_positives(plain_loss), with_positives(hardness_weighted_loss)


def inputs_of(name: str) -> tuple[dict, dict]:
    """Return tensors that get gradients, and options."""
    options = {"alpha": ALPHA, **OPTIONS[name]}
    inputs = example() | {"temperature": options.pop("temperature", torch.tensor(TEMPERATURE).double())}
    if "positives" in options:
        inputs["further"] = near(inputs["query"][FURTHER["owners"]], 1.1, seed=4)
    return inputs, options


@pytest.mark.parametrize("tile", [1, 3, 1000])
@pytest.mark.parametrize("explicit", [True, False], ids=["negatives", "no negatives"])
@pytest.mark.parametrize("directions", ["both", "query"])
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradients_match_formula(name, directions, explicit, tile):
    inputs, options = inputs_of(name)
    options |= {"directions": directions}
    if not explicit:
        del inputs["negatives"]
        options = {key: x for key, x in options.items() if "negative" not in key}
    expected, by_formula = with_gradients(plain, inputs, **options)
    output, gradients = with_gradients(ours, inputs, **options, tile=tile)
    assert expected.loss > 0.01
    assert output.loss.dtype == torch.float64
    near_zero = {"rtol": 1e-9, "atol": 1e-9}
    for part in ("loss", "contrastive", "distillation"):
        torch.testing.assert_close(getattr(output, part), getattr(expected, part), **near_zero)
    torch.testing.assert_close(gradients, by_formula, **near_zero)
    valid = options.get("valid", torch.ones(7, dtype=torch.bool))
    torch.testing.assert_close(output.effective_negatives[valid], expected.effective[valid], **near_zero)
    torch.testing.assert_close(output.hardest_share[valid], expected.share[valid], **near_zero)
    assert output.masked_pairs.item() == pytest.approx(expected.masked / expected.pairs)
    assert (expected.masked > 0) == any(key in options for key in ("margin", "query_ids"))


@pytest.mark.parametrize("name", ["ids", "margin"])
@pytest.mark.parametrize("tiles", [0, 2])
def test_uncached_tile_is_recomputed(name, tiles, monkeypatch):
    """Use four tiles of two rows (the last one: one row), with 11 logits per row, and 7 more with a margin."""
    inputs, options = example(), {"alpha": ALPHA, "temperature": TEMPERATURE, **OPTIONS[name], "tile": 2}
    output, expected = with_gradients(hardness_weighted_loss, inputs, **options)
    monkeypatch.setattr(contrastive, "CACHED_BYTES", tiles * 2 * (11 + 7 * (name == "margin")) * 8)
    products = CountProducts()
    with products:
        again, gradients = with_gradients(hardness_weighted_loss, inputs, **options)
    assert again.loss == output.loss
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)
    # Each tile's logits once, and again unless cached; then two products for its gradients.
    assert products.count == 4 + (4 - tiles) + 2 * 4


class CountProducts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_computed_in_float32_for_any_dtype(dtype):
    inputs = {name: x.to(dtype) for name, x in example(n=32, m=8, d=16).items()}
    loss = plain_loss(**{k: x.double() for k, x in inputs.items()}, alpha=ALPHA, temperature=TEMPERATURE).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, gradients = with_gradients(hardness_weighted_loss, inputs, alpha=ALPHA, temperature=TEMPERATURE, tile=5)
    assert output.loss.dtype == torch.float32
    assert_close_in_norm(output.loss, loss, **OF_LOGITS)
    assert all(g.dtype == dtype for g in gradients.values())


def test_gradients_match_finite_differences():
    """Use a fixed reward: with r = s the loss depends on s through r, where no gradient flows."""
    inputs = [x.requires_grad_() for x in example(n=7, m=4, d=4).values()]

    def loss(query, target, negatives):
        return hardness_weighted_loss(
            query, target, negatives=negatives, alpha=ALPHA, temperature=0.1, tile=3, **IDS, **REWARD
        ).loss

    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-6)


def test_alpha_zero_equals_cross_entropy():
    inputs = example()
    query, target, negatives = inputs.values()
    diagonal = torch.arange(len(query))
    forth = F.cross_entropy(query @ torch.cat([target, negatives]).T / TEMPERATURE, diagonal)
    back = F.cross_entropy(target @ query.T / TEMPERATURE, diagonal)
    output = hardness_weighted_loss(**inputs, alpha=0.0, temperature=TEMPERATURE, tile=2)
    torch.testing.assert_close(output.loss, (forth + back) / 2, rtol=1e-9, atol=1e-9)
    output = hardness_weighted_loss(**inputs, alpha=0.0, temperature=TEMPERATURE, tile=2, directions="query")
    torch.testing.assert_close(output.loss, forth, rtol=1e-9, atol=1e-9)


def test_harder_negative_is_weighted_by_exp_alpha_times_reward():
    """A negative's share of the gradient, relative to that with alpha 0, is multiplied by exp(alpha r)."""
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    angles = torch.tensor([0.5, 1.2], dtype=torch.float64)
    negatives = torch.stack([angles.cos(), angles.sin()], dim=1).requires_grad_()

    def pull(alpha: float) -> torch.Tensor:
        loss = hardness_weighted_loss(query, query, negatives=negatives, alpha=alpha, temperature=0.1).loss
        return torch.autograd.grad(loss, negatives)[0][:, 0]

    hard, easy = pull(ALPHA) / pull(0.0)
    expected = math.exp(ALPHA * (math.cos(0.5) - math.cos(1.2)))
    assert (hard / easy).item() == pytest.approx(expected)
    assert hard > easy


def test_output_reports_similarities_and_masked_pairs():
    inputs = example()
    query, target, negatives = inputs.values()
    output = hardness_weighted_loss(**inputs, alpha=ALPHA, temperature=TEMPERATURE, tile=3, **IDS)
    torch.testing.assert_close(output.positive, (query * target).sum(1))
    similarity = query @ torch.cat([target, negatives]).T
    for i, j in [
        *((i, i) for i in range(7)),
        (0, 5),
        (5, 0),
        (1, 2),
        (2, 1),
        (3, 8),
        (4, 9),
        (4, 6),
        (6, 4),
        (1, 10),
        (2, 10),
    ]:
        similarity[i, j] = -torch.inf
    torch.testing.assert_close(output.hardest_negative, similarity.amax(1))
    assert output.masked_pairs.item() == pytest.approx(10 / (7 * 10))
    assert output.valid_count.item() == 7
    alone = hardness_weighted_loss(query[:1], target[:1], alpha=ALPHA, temperature=TEMPERATURE)
    assert alone.hardest_negative.item() == -torch.inf
    assert alone.loss == alone.masked_pairs == 0


def broken(name: str) -> tuple[dict, dict]:
    inputs = example(dtype=torch.float32)
    if name == "identical":
        inputs = {key: x[:1].expand(len(x), -1) for key, x in example(dtype=torch.float32).items()}
        inputs["target"] = inputs["query"]
    if name == "zero":
        inputs["query"][0] = inputs["target"][0] = inputs["negatives"][0] = 0
    valid = torch.ones(7, dtype=torch.bool)
    if name == "nan in an invalid row":
        valid[2] = False
        inputs["query"][2] = inputs["target"][2] = torch.nan
    if name == "none valid":
        valid[:] = False
    ids = torch.zeros(7, dtype=torch.int64) if name == "no negatives left" else torch.arange(7)
    ids = {"target_ids": ids, "negative_ids": torch.zeros(4, dtype=torch.int64)}
    return inputs, {**ids, "valid": valid, "alpha": ALPHA, "temperature": 0.01, "tile": 2}


@pytest.mark.parametrize("name", ["identical", "zero", "nan in an invalid row", "none valid", "no negatives left"])
def test_degenerate_inputs_give_finite_loss_and_gradients(name):
    inputs, options = broken(name)
    output, gradients = with_gradients(hardness_weighted_loss, inputs, **options)
    assert output.loss.isfinite()
    assert all(g.isfinite().all() for g in gradients.values())
    if name in ("none valid", "no negatives left"):
        assert output.loss == 0
        assert output.valid_count == (0 if name == "none valid" else 7)
        assert not any(g.any() for g in gradients.values())


def test_tiny_loss_keeps_its_precision():
    """In float32, log(sum) - positive would round 1e-9 to 0."""
    query = torch.eye(4)
    loss = hardness_weighted_loss(query, query, alpha=0.0, temperature=1 / 20).loss
    assert loss.item() == pytest.approx(math.log1p(3 * math.exp(-20)), rel=1e-5)


def test_similarity_matrix_is_never_whole_in_memory():
    rows, dim, tile = 96, 8, 16

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return result

    inputs = {name: x.requires_grad_() for name, x in example(n=rows, m=4, d=dim).items()}
    with Largest() as largest:
        hardness_weighted_loss(**inputs, alpha=ALPHA, temperature=TEMPERATURE, tile=tile).loss.backward()
    assert largest.numel == tile * (rows + 4)


def test_incomplete_rewards_are_refused():
    inputs = example()
    with pytest.raises(ValueError, match="reward_query and reward_target"):
        hardness_weighted_loss(**inputs, alpha=1.0, temperature=1.0, reward_query=inputs["query"])
    with pytest.raises(ValueError, match="reward_negatives"):
        hardness_weighted_loss(
            **inputs, alpha=1.0, temperature=1.0, reward_query=inputs["query"], reward_target=inputs["target"]
        )


# Two processes, each with half of the rows, compared with one that has all rows.

ROWS = 6
NEGATIVES = {  # number of negatives per rank
    "unequal": (2, 5),
    "on one rank only": (0, 5),
    "none": (0, 0),
    "without gradient, on one rank only": (0, 5),
    "without ids": (2, 5),
    "queries alone": (2, 5),
    "queries alone, no negatives": (0, 0),
}


def directions(name: str) -> str:
    return "query" if name.startswith("queries alone") else "both"


def global_batch(name: str) -> tuple[dict, dict]:
    """Return 2 * ROWS rows, with ids, reward and masks for all of them."""
    negatives = sum(NEGATIVES[name])
    n = 2 * ROWS
    inputs = example(n=n, m=negatives, d=8, dtype=torch.float32)
    options = {
        "query_ids": torch.arange(n) % 9,
        "target_ids": 100 + torch.arange(n) % 10,
        "negative_ids": 100 + torch.arange(negatives) * 3,
        "valid": torch.arange(n) != 3,
        "negatives_valid": torch.arange(negatives) != 1,
        "reward_query": unit(n, 3, seed=5, dtype=torch.float32),
        "reward_target": unit(n, 3, seed=6, dtype=torch.float32),
        "reward_negatives": unit(negatives, 3, seed=7, dtype=torch.float32),
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
        "masked": output.masked_pairs,
        "valid": output.valid_count,
    }


def on_rank(rank: int) -> dict:
    results = {}
    for name, counts in NEGATIVES.items():
        inputs, options = global_batch(name)
        rows = slice(rank * ROWS, (rank + 1) * ROWS)
        own = slice(rank * counts[0], counts[0] + rank * counts[1])

        def local(batch: dict, rows=rows, own=own) -> dict:
            return {key: x[own if "negative" in key else rows] for key, x in batch.items()}

        inputs, options = local(inputs), local(options)
        if not counts[rank]:  # a rank without negatives passes none
            inputs = {key: x for key, x in inputs.items() if "negative" not in key}
            options = {key: x for key, x in options.items() if "negative" not in key}
        inputs["temperature"] = torch.tensor(TEMPERATURE)
        options |= {"alpha": ALPHA, "directions": directions(name), "tile": 4}
        output, gradients = with_gradients(hardness_weighted_loss, inputs, **options)
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
    inputs["temperature"] = torch.tensor(TEMPERATURE)
    options |= {"alpha": ALPHA, "directions": directions(name)}
    output, expected = with_gradients(hardness_weighted_loss, inputs, **options)
    ranks = [results[name] for results in of_two_ranks]
    assert_close_in_norm(torch.stack([r["loss"] for r in ranks]).mean(), output.loss, **OF_LOGITS)
    for key, whole in expected.items():
        # The engine averages over ranks, so each rank's gradient counts half.
        parts = [r["gradients"][key] / 2 for r in ranks if key in r["gradients"]]
        if key == "temperature":
            parts = [sum(parts)[None]]
            whole = whole[None]
        if whole.numel():
            largest = whole.abs().max()
            assert_close_in_norm(torch.cat(parts) / largest, whole / largest, **OF_LOGITS)
    for key, whole in numbers(output).items():
        parts = [r[key] for r in ranks]
        if key in ("masked", "valid"):
            assert parts == [whole, whole]
        else:
            assert_close_in_norm(torch.cat(parts), whole)


def test_ranks_with_different_row_counts_are_refused():
    assert on_two_ranks(unequal_rows) == ["ranks have between 3 and 4 rows: all need the same number"] * 2
