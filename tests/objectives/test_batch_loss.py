"""The loss of a step's batch: sub-batches compared with gradient accumulation, and pairs that share items."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.config import Recipe, load_recipe
from pipeline.data.batch import Batch
from pipeline.models.compact import quantized
from pipeline.objectives.contrastive.batch_loss import contrastive_loss
from pipeline.objectives.contrastive.loss import Distill, Positives, Teacher, hardness_weighted_loss

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

    loss = contrastive_loss(embed(list(batch.items)), batch, recipe, 0.05, recipe.objective.alpha).loss
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
    together = contrastive_loss(embed(list(batch.items)), batch, alone, 0.05, alone.objective.alpha).loss
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
    output = contrastive_loss(embeddings, batch, recipe, 0.5, 0.0)

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


@pytest.mark.parametrize("sub_batch", [None, SUB_BATCH])
def test_pairs_bring_their_positives_teacher_temperatures_and_margins(sub_batch):
    """Compare with the loss of rows that are assembled pair by pair."""
    counts = [i % 3 for i in range(PAIRS)]
    batch = batch_of(counts)
    numbers = iter(range(5001, 9999))
    positives = [tuple(next(numbers) for _ in range(i % 2)) for i in range(PAIRS)]
    batch.items.update(dict.fromkeys(key for keys in positives for key in keys))
    rng = np.random.default_rng(0)
    taught = {
        key: vector / np.linalg.norm(vector)
        for key, vector in zip(batch.items, rng.normal(size=(999, 5)), strict=False)
    }
    keys = [(batch.query[i], batch.target[i], *positives[i], *batch.negatives[i]) for i in range(PAIRS)]
    batch = replace(
        batch,
        positives=positives,
        weights=[(2.0, *(1.5 for _ in each)) for each in positives],
        tasks=["ab"[i % 2] for i in range(PAIRS)],
        teacher=[np.stack([taught[key] for key in each]) for each in keys],
    )
    fields = ["data.teacher=beside", "objective.reward=teacher", "objective.margin=0.3", "objective.margins={a: null}"]
    fields += ["objective.distill={scores: teacher, weight: 0.5, temperature: 0.2}", "objective.dimensions=[2,4]"]
    recipe = recipe_of(*fields, "objective.dimension_weights=[1,3]", f"batch.sub_batch={sub_batch or 'null'}")
    vectors = F.normalize(torch.from_numpy(rng.normal(size=(len(batch.items), WIDTH))), dim=-1)
    rows = {key: vectors[row] for row, key in enumerate(batch.items)}
    tau = torch.tensor([0.5 if task == "a" else 0.2 for task in batch.tasks], dtype=torch.float64)
    output = contrastive_loss(vectors, batch, recipe, tau, 7.0)

    def whole(chosen: list[int]) -> torch.Tensor:
        def of(keys: list[int], table: dict) -> torch.Tensor:
            return torch.stack([torch.as_tensor(table[key]) for key in keys])

        query, target = [batch.query[i] for i in chosen], [batch.target[i] for i in chosen]
        hard = [key for i in chosen for key in batch.negatives[i]]
        further = [key for i in chosen for key in positives[i]]
        owners = [place for place, i in enumerate(chosen) for _ in positives[i]]
        weights = torch.full((len(further),), 1.5), torch.full((len(chosen),), 2.0)
        return hardness_weighted_loss(
            of(query, rows),
            of(target, rows),
            alpha=7.0,
            temperature=tau[chosen],
            negatives=of(hard, rows),
            margin=torch.tensor([torch.inf if batch.tasks[i] == "a" else 0.3 for i in chosen]),
            valid=torch.tensor([batch.valid[i] for i in chosen]),
            positives=Positives(of(further, rows), torch.tensor(owners), *weights),
            teacher=Teacher(of(query, taught), of(target, taught), of(hard, taught), of(further, taught)),
            reward="teacher",
            distill=Distill(0.5, 0.2),
            dimensions=[2, 4],
            dimension_weights=[1, 3],
        ).loss

    share = PAIRS // LANES
    part = share if sub_batch is None else SUB_BATCH // LANES
    groups = [
        [lane * share + first + i for lane in range(LANES) for i in range(part)] for first in range(0, share, part)
    ]
    expected = torch.stack([whole(group) for group in groups]).mean()
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)


def test_stored_scores_are_labels_of_a_pairs_own_candidates():
    """Scores cover the target and the pair's own negatives; a mined negative after them has none."""
    batch = batch_of([3] * PAIRS)
    rng = np.random.default_rng(1)
    scores = [tuple(rng.normal(size=3)) if i % 2 else None for i in range(PAIRS)]  # of the target and two negatives
    batch = replace(batch, scores=scores)
    fields = ["batch.sub_batch=null", "objective.distill={scores: stored, weight: 0.5, temperature: 0.7}"]
    vectors = F.normalize(torch.from_numpy(rng.normal(size=(len(batch.items), WIDTH))), dim=-1).requires_grad_()
    output = contrastive_loss(vectors, batch, recipe_of(*fields), 0.2, 9.0)
    plain = contrastive_loss(vectors, batch, recipe_of("batch.sub_batch=null"), 0.2, 9.0)

    rows, divergences = {key: row for row, key in enumerate(batch.items)}, []
    for i, of_pair in enumerate(scores):
        if of_pair and batch.valid[i]:
            candidates = vectors[[rows[key] for key in (batch.target[i], *batch.negatives[i][:2])]]
            log_q = (candidates @ vectors[rows[batch.query[i]]] / 0.2).log_softmax(0)
            p = (torch.tensor(of_pair, dtype=torch.float64) / 0.7).softmax(0)
            divergences.append((p * (p.log() - log_q)).sum())
    expected = 0.5 * torch.stack(divergences).sum() / sum(batch.valid)
    torch.testing.assert_close(output.distillation, expected.detach(), rtol=1e-6, atol=0)
    (ours,) = torch.autograd.grad(output.loss - plain.loss, vectors)
    (theirs,) = torch.autograd.grad(expected, vectors)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_loss_of_rounded_vectors_has_their_gradient(kind):
    batch, recipe = batch_of([1] * PAIRS), recipe_of("batch.sub_batch=null")
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(len(batch.items), WIDTH, generator=generator), dim=-1)
    of_queries = torch.tensor([key in batch.query for key in batch.items])[:, None]  # which stay as they are
    rounded = torch.where(of_queries, vectors, quantized(vectors, kind)).requires_grad_()
    vectors.requires_grad_()
    ours = contrastive_loss(vectors, batch, recipe_of("batch.sub_batch=null", f"objective.quantized={kind}"), 0.2, 9.0)
    theirs = contrastive_loss(rounded, batch, recipe, 0.2, 9.0)
    assert ours.loss == theirs.loss
    assert torch.autograd.grad(ours.loss, vectors)[0].equal(torch.autograd.grad(theirs.loss, rounded)[0])
