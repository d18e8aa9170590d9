"""The loss compared with its formula in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close_in_norm
from plain_loss import ALPHA, OF_LOGITS, TEMPERATURE, call, example, near, plain_loss, prefix, unit, with_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.objectives.contrastive import loss as contrastive
from pipeline.objectives.contrastive.loss import Distill, Positives, Teacher, hardness_weighted_loss

IDS = {
    "query_ids": torch.tensor([1, 2, 3, 4, 5, 1, 15]),  # the last equals the fifth's target
    "target_ids": torch.tensor([11, 12, 12, 14, 15, 16, 17]),
    "negative_ids": torch.tensor([20, 14, 15, 12]),
}
TEACHER = {"reward": "teacher"} | {
    f"teacher_{name}": unit(count, 3, seed=seed)
    for seed, (name, count) in enumerate({"query": 7, "target": 7, "negatives": 4}.items(), 5)
}
FURTHER = {  # five further positives, of three queries
    "further_owners": torch.tensor([3, 0, 3, 4, 3]),
    "further_weights": torch.tensor([0.5, 2.0, 0.0, 1.0, 1.0], dtype=torch.float64),
    "further_target_weights": torch.tensor([1, 2, 1, 0.5, 1, 1, 1], dtype=torch.float64),
    # The second's equals the target of another query, and the third's that of its owner and an explicit negative.
    "further_ids": torch.tensor([30, 12, 14, 31, 32]),
}
DISTILL = TEACHER | {"reward": "policy", "distill": Distill(weight=0.7, temperature=0.2)}
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
    "positives": FURTHER,
    "positives, ids": FURTHER | IDS,
    "distilled": DISTILL,
    "sizes": {"dimensions": (2, 3, 6), "dimension_weights": (1.0, 0.0, 3.0)},
    "smaller sizes": {"dimensions": (2, 5)},
    "int8": {"quantized": "int8"},
    "bits at sizes": {"quantized": "binary", "dimensions": (4, 6)},
    "all": {
        **IDS,
        **TEACHER,
        "valid": torch.tensor([1, 1, 1, 1, 0, 1, 1]).bool(),
        "negatives_valid": torch.tensor([0, 1, 1, 1]).bool(),
        "margin": 0.1,
    },
}
SEVERAL = {
    **OPTIONS["all"],
    **DISTILL,
    **FURTHER,
    "teacher_positives": unit(5, 3, seed=9),
    "margin": PAIR_MARGINS,
    "temperature": PAIR_TEMPERATURES,
    "dimensions": (3, 6),
}
OPTIONS |= {"several": SEVERAL, "several, teacher's reward": SEVERAL | {"reward": "teacher"}}


def case(name: str) -> tuple[dict, dict]:
    """Return tensors that get gradients, and options."""
    options = {"alpha": ALPHA, **OPTIONS[name]}
    inputs = example() | {"temperature": options.pop("temperature", torch.tensor(TEMPERATURE).double())}
    if "further_owners" in options:
        inputs["further_vectors"] = near(inputs["query"][options["further_owners"]], 1.1, seed=4)
    return inputs, options


@pytest.mark.parametrize("tile", [1, 3, 1000])
@pytest.mark.parametrize("explicit", [True, False], ids=["negatives", "no negatives"])
@pytest.mark.parametrize("directions", ["both", "query"])
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradients_match_formula(name, directions, explicit, tile):
    inputs, options = case(name)
    options |= {"directions": directions}
    if not explicit:
        del inputs["negatives"]
        options = {key: x for key, x in options.items() if "negative" not in key}
    expected, by_formula = with_gradients(plain_loss, inputs, **options)
    output, gradients = with_gradients(hardness_weighted_loss, inputs, **options, tile=tile)
    assert expected.loss > 0.01
    assert output.loss.dtype == torch.float64
    near_zero = {"rtol": 1e-9, "atol": 1e-9}
    for part in ("loss", "contrastive", "distillation"):
        torch.testing.assert_close(getattr(output, part), getattr(expected, part), **near_zero)
    torch.testing.assert_close(gradients, by_formula, **near_zero)
    valid = options.get("valid", torch.ones(7, dtype=torch.bool))
    torch.testing.assert_close(output.hardest_negative[valid], expected.hardest[valid], **near_zero)
    torch.testing.assert_close(output.effective_negatives[valid], expected.effective[valid], **near_zero)
    torch.testing.assert_close(output.hardest_share[valid], expected.share[valid], **near_zero)
    torch.testing.assert_close(output.mean_negative[valid], expected.mean_negative[valid], **near_zero)
    assert output.masked_pairs.item() == pytest.approx(expected.masked / expected.pairs)
    assert output.masked_by_margin.item() == pytest.approx(expected.by_margin / expected.pairs)
    assert (expected.masked > 0) == any(key in options for key in ("margin", "query_ids"))


@pytest.mark.parametrize("name", ["ids", "margin", "several"])
@pytest.mark.parametrize("tiles", [0, 2])
def test_uncached_tile_is_recomputed(name, tiles, monkeypatch):
    """Use four tiles of two rows, the last one of one row."""
    inputs, options = case(name)
    options["tile"] = 2
    output, expected = with_gradients(hardness_weighted_loss, inputs, **options)
    # Numbers in a row: logits, those of the targets if their masks differ; then at each of two sizes all logits, those
    # of the targets, the distillation's gradients, and the similarities for the temperatures' gradients.
    numbers = {"ids": 11, "margin": 11 + 7, "several": 2 * (16 + 7 + 16 + 7)}[name]
    monkeypatch.setattr(contrastive, "CACHED_BYTES", tiles * 2 * numbers * 8)
    products = CountProducts()
    with products:
        again, gradients = with_gradients(hardness_weighted_loss, inputs, **options)
    assert again.loss == output.loss
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)
    # Each tile's logits at each size, and the teacher's, once, and again unless cached; then two for the gradients.
    sizes, teachers = (2, 1) if name == "several" else (1, 0)
    assert products.count == (4 + (4 - tiles)) * (sizes + teachers) + 2 * 4 * sizes


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


FIXED_REWARD = ["teacher's reward", "positives", "distilled", "sizes", "temperatures of pairs", "several"]


@pytest.mark.parametrize("name", FIXED_REWARD)
def test_gradients_match_finite_differences(name):
    """Use a fixed reward: with r = s the loss depends on s through r, where no gradient flows."""
    inputs, options = case(name)
    options |= TEACHER | {key: x for key, x in options.items() if key.startswith("teacher")}
    if "further_owners" in options:
        options["teacher_positives"] = unit(5, 3, seed=9)

    def loss(*values):
        return call(hardness_weighted_loss, dict(zip(inputs, values, strict=True)) | options | {"tile": 3}).loss

    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(loss, leaves, eps=1e-7, atol=1e-5, fast_mode=True)


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


def broken(name: str, base: str) -> tuple[dict, dict]:
    inputs, options = case(base)
    inputs, options = ({key: as_float32(x) for key, x in each.items()} for each in (inputs, options))
    if name == "identical":
        inputs |= {key: x[:1].expand(len(x), -1) for key, x in inputs.items() if x.ndim == 2}
        inputs["target"] = inputs["query"]
    if name == "zero":
        inputs["query"][0] = inputs["target"][0] = inputs["negatives"][0] = 0
    if name == "zero prefix":
        for key in ("query", "target", "negatives"):
            inputs[key][0, :3] = 0
    valid = torch.ones(7, dtype=torch.bool)
    if name == "nan in an invalid row":
        valid[3] = False
        per_pair = [x for x in (inputs["temperature"], options.get("margin")) if x is not None and x.ndim]
        teachers = [options[key] for key in ("teacher_query", "teacher_target") if key in options]
        for x in (inputs["query"], inputs["target"], *per_pair, *teachers):
            x[3] = torch.nan
    if name == "none valid":
        valid[:] = False
    ids = torch.zeros(7, dtype=torch.int64) if name == "no negatives left" else torch.arange(7)
    options |= {"target_ids": ids, "negative_ids": torch.zeros(4, dtype=torch.int64), "valid": valid, "tile": 2}
    return inputs, options | ({"further_ids": torch.zeros(5, dtype=torch.int64)} if "further_ids" in options else {})


def as_float32(x):
    return x.float().clone() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("base", ["plain", "several"])
@pytest.mark.parametrize(
    "name", ["identical", "zero", "zero prefix", "nan in an invalid row", "none valid", "no negatives left"]
)
def test_degenerate_inputs_give_finite_loss_and_gradients(name, base):
    inputs, options = broken(name, base)
    output, gradients = with_gradients(hardness_weighted_loss, inputs, **options)
    for x in (output.loss, output.effective_negatives, output.hardest_share):
        assert x.isfinite().all()
    assert all(g.isfinite().all() for g in gradients.values())
    assert all(g.abs().max() < 1e4 for g in gradients.values())
    if name == "none valid" or (name == "no negatives left" and base == "plain"):
        assert output.loss == 0
        assert output.valid_count == (0 if name == "none valid" else 7)
        assert not any(g.any() for g in gradients.values())
    if name == "no negatives left":
        assert output.contrastive == 0
        assert not output.effective_negatives.any()
        assert not output.hardest_share.any()


def test_tiny_loss_keeps_its_precision():
    """In float32, log(sum) - positive would round 1e-9 to 0."""
    query = torch.eye(4)
    loss = hardness_weighted_loss(query, query, alpha=0.0, temperature=1 / 20).loss
    assert loss.item() == pytest.approx(math.log1p(3 * math.exp(-20)), rel=1e-5)


@pytest.mark.parametrize("extra", [{}, {"dimensions": (4, 8), "distill": Distill(1.0, 0.1)}], ids=["plain", "several"])
def test_similarity_matrix_is_never_whole_in_memory(extra):
    rows, dim, tile = 96, 8, 16

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return result

    inputs = example(n=rows, m=4, d=dim)
    options = {"alpha": ALPHA, "temperature": TEMPERATURE, "tile": tile, **extra}
    if extra:
        options |= {f"teacher_{name}": x for name, x in inputs.items()}
    with Largest() as largest:
        with_gradients(hardness_weighted_loss, inputs, **options)
    assert largest.numel == tile * (rows + 4)


class CountSyncs(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "nonzero", "_to_copy", "is_nonzero", "masked_select")
        self.count += any(func is getattr(torch.ops.aten, name).default for name in names)
        return func(*args, **(kwargs or {}))


def test_tiles_do_not_wait_for_the_device():
    """A number, an index by a mask, or a copy to the host waits for all work that was queued before."""
    counts = []
    for tile in (1, 7):
        inputs, options = case("several")
        with CountSyncs() as syncs:
            with_gradients(hardness_weighted_loss, inputs, **options, tile=tile)
        counts.append(syncs.count)
    assert counts[0] == counts[1]


def test_sizes_equal_separate_losses_of_prefixes():
    inputs = example(n=40, m=9, d=32, dtype=torch.float32)
    options = {"alpha": ALPHA, "temperature": TEMPERATURE, "margin": 0.1, "tile": 16}
    together, gradients = with_gradients(
        hardness_weighted_loss, inputs, **options, dimensions=(8, 16, 32), dimension_weights=(1.0, 2.0, 5.0)
    )
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    separate = [
        hardness_weighted_loss(**{key: prefix(x, size) for key, x in leaves.items()}, **options) for size in (8, 16, 32)
    ]
    mean = (separate[0].loss + 2 * separate[1].loss + 5 * separate[2].loss) / 8
    torch.testing.assert_close(together.loss, mean, rtol=1e-6, atol=0)
    for mine, right in zip(gradients.values(), torch.autograd.grad(mean, list(leaves.values())), strict=True):
        assert_close_in_norm(mine, right, operations=64)
    assert torch.equal(together.positive, separate[-1].positive)
    assert torch.equal(together.hardest_negative, separate[-1].hardest_negative)
    assert torch.equal(together.hardest_share, separate[-1].hardest_share)


def test_teacher_gets_no_gradient():
    inputs, options = case("several")
    teachers = {key: x.clone().requires_grad_() for key, x in options.items() if key.startswith("teacher_")}
    call(
        hardness_weighted_loss, inputs | options | teachers | {"query": inputs["query"].requires_grad_()}
    ).loss.backward()
    assert all(x.grad is None for x in teachers.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "teacher"}, "give `teacher`"),
        ({"distill": Distill(1.0, 0.1)}, "give `teacher`"),
        ({"reward": "teacher", "teacher": Teacher(unit(7, 3), unit(7, 3))}, "teacher.negatives has 0 rows"),
        ({"temperature": torch.ones(6)}, r"temperature has the shape \(6,\)"),
        ({"margin": torch.ones(7, 1)}, r"margin has the shape \(7, 1\)"),
        ({"dimensions": (4, 2)}, "ascending sizes"),
        ({"dimensions": (2, 7)}, "from 1 to 6"),
        ({"dimensions": (2, 6), "dimension_weights": (1.0,)}, r"one for each of \[2, 6\]"),
        (
            {"positives": Positives(unit(1, 6), torch.tensor([7]), torch.ones(1), torch.ones(7))},
            r"owners 7 ... 7: they must be from 0 to 6",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hardness_weighted_loss(**example(), **{"alpha": 1.0, "temperature": 1.0, **options})
