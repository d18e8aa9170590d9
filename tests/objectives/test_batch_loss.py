"""The loss of a step's batch: sub-batches compared with gradient accumulation, and pairs that share items."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.config import Recipe, load_recipe
from pipeline.data.batch import Batch
from pipeline.objectives.contrastive.loss import hardness_weighted_loss
from pipeline.objectives.contrastive.step import contrastive_loss

PAIRS, LANES, SUB_BATCH, WIDTH = 64, 4, 8, 6
INVALID = 5


def batch_of(negatives: list[int]) -> Batch:
    """Return a batch of distinct items: queries 1 ..., targets 1001 ..., and as many hard negatives for each pair."""
    query, target = list(range(1, PAIRS + 1)), list(range(1001, PAIRS + 1001))
    numbers = iter(range(2001, 9999))
    extra = [tuple(next(numbers) for _ in range(count if i != INVALID else 0)) for i, count in enumerate(negatives)]
    items = dict.fromkeys(key for i in range(PAIRS) for key in (query[i], target[i], *extra[i]))
    valid = [i != INVALID for i in range(PAIRS)]
    rest = {"positives": [()] * PAIRS, "weights": [(1.0,)] * PAIRS, "scores": [None] * PAIRS, "tasks": [""] * PAIRS}
    return Batch(items, query, target, extra, valid, [None] * PAIRS, [], 0, **rest)


def recipe_of(*fields: str) -> Recipe:
    sizes = [f"batch.global_batch={PAIRS}", f"batch.sub_batch={SUB_BATCH}", f"data.lanes={LANES}"]
    return load_recipe("pipeline/recipes/demo.yaml", [*sizes, *fields])


@pytest.mark.parametrize("hard", [False, True], ids=["no hard negatives", "hard negatives"])
@pytest.mark.parametrize("directions", ["both", "query"])
def test_sub_batches_equal_accumulated_gradients_of_separate_losses(directions, hard):
    """As LLaVE's: each micro-step has its own loss; the engine divides each by their number, and adds the gradients."""
    batch = batch_of([i % 3 if hard else 0 for i in range(PAIRS)])
    recipe = recipe_of(f"objective.directions={directions}")
    generator = torch.Generator().manual_seed(0)
    seen = dict(zip(batch.items, torch.randn(len(batch.items), WIDTH, generator=generator).double(), strict=True))
    weight = torch.randn(WIDTH, WIDTH, generator=generator).double().requires_grad_()  # of a model of one layer

    def embed(keys: list[int]) -> torch.Tensor:
        return F.normalize(torch.stack([seen[key] for key in keys]) @ weight, dim=-1)

    loss = contrastive_loss(embed(list(batch.items)), batch, recipe, 0.05).loss
    (whole,) = torch.autograd.grad(loss, weight)

    accumulated, losses, steps = torch.zeros_like(weight), [], PAIRS // SUB_BATCH
    for step in range(steps):
        # Equally many consecutive pairs of every lane; a lane's pairs are consecutive.
        share, part = PAIRS // LANES, SUB_BATCH // LANES
        pairs = [lane * share + step * part + i for lane in range(LANES) for i in range(part)]
        negatives = [key for i in pairs for key in batch.negatives[i]]
        separate = hardness_weighted_loss(
            embed([batch.query[i] for i in pairs]),
            embed([batch.target[i] for i in pairs]),
            negatives=embed(negatives) if negatives else None,
            alpha=recipe.objective.alpha,
            temperature=0.05,
            directions=directions,
            valid=torch.tensor([batch.valid[i] for i in pairs]),
        ).loss
        accumulated += torch.autograd.grad(separate / steps, weight)[0]
        losses.append(separate.detach())

    torch.testing.assert_close(loss.detach(), torch.stack(losses).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(whole, accumulated, rtol=1e-10, atol=1e-12)
    # It matters: with all pairs as negatives of each other, both differ.
    alone = recipe_of(f"objective.directions={directions}", "batch.sub_batch=null")
    together = contrastive_loss(embed(list(batch.items)), batch, alone, 0.05).loss
    assert abs(float(together.detach()) / float(loss.detach()) - 1) > 0.1


@pytest.mark.parametrize("masked", [True, False])
def test_pairs_that_share_items_are_negatives_if_the_recipe_says_so(masked):
    """The papers' published code masks nothing.

    Two pairs have one target, two have one query, and one has its own target as hard negative.
    """
    batch = batch_of([1] * PAIRS)
    batch.target[1] = batch.target[0]
    batch.negatives[2] = (batch.target[2],)
    batch.query[4] = batch.query[3]
    recipe = recipe_of(f"objective.mask_duplicates={str(masked).lower()}", "batch.sub_batch=null", "objective.alpha=0")
    rows = {key: i for i, key in enumerate(batch.items)}
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(len(rows), WIDTH, generator=generator).double(), dim=-1)
    output = contrastive_loss(embeddings, batch, recipe, 0.5)

    keep = [i for i in range(PAIRS) if batch.valid[i]]
    query = embeddings[[rows[batch.query[i]] for i in keep]]
    target = embeddings[[rows[batch.target[i]] for i in keep]]
    hard = embeddings[[rows[batch.negatives[i][0]] for i in keep]]
    forth, back = query @ torch.cat([target, hard]).T / 0.5, target @ query.T / 0.5
    if masked:
        for logits in (forth, back):
            logits[0, 1] = logits[1, 0] = logits[3, 4] = logits[4, 3] = -torch.inf
        forth[2, len(keep) + 2] = -torch.inf
    diagonal = torch.arange(len(keep))
    expected = (F.cross_entropy(forth, diagonal) + F.cross_entropy(back, diagonal)) / 2
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)
    assert (output.masked_pairs > 0) == masked
