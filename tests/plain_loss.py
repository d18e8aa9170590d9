"""The contrastive loss as its formula, over whole matrices in float64, and examples for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.models.compact import quantized
from pipeline.objectives.contrastive.loss import Distill, Positives, Teacher


@dataclass
class Plain:
    loss: torch.Tensor
    contrastive: torch.Tensor
    distillation: torch.Tensor
    masked: int
    by_margin: int
    pairs: int
    hardest: torch.Tensor
    mean_negative: torch.Tensor
    effective: torch.Tensor
    share: torch.Tensor


ALPHA, TEMPERATURE = 9.0, 0.02

# A logit's absolute error is its exponential's relative error. A few dozen operations lead from the vectors to it.
OF_LOGITS = {"scale": 1 / TEMPERATURE + ALPHA, "operations": 64}


def plain_loss(query, target, *, teacher=None, positives=None, **options) -> Plain:
    dimensions, dimension_weights = options.pop("dimensions", ()), options.pop("dimension_weights", ())
    kind = options.pop("quantized", None)
    negatives = options.pop("negatives", None)
    negatives = query[:0] if negatives is None else negatives
    further = query[:0] if positives is None else positives.vectors
    t = None
    if teacher is not None:
        parts = (teacher.target, teacher.negatives, teacher.positives)
        t = (teacher.query @ torch.cat([x for x in parts if x is not None]).T).detach()
    columns = torch.cat([target, negatives, further])
    cut = [(prefix(query, d), prefix(columns, d)) for d in dimensions or [query.shape[1]]]
    if kind:
        cut = [(x, y + (quantized(y, kind) - y).detach()) for x, y in cut]
    found = [of_one_size(x, y, t, positives, **options) for x, y in cut]
    weights = torch.tensor(dimension_weights or [1.0] * len(cut), dtype=torch.float64)
    for name in ("loss", "contrastive", "distillation"):
        mean = weights @ torch.stack([getattr(each, name) for each in found]) / weights.sum()
        setattr(found[-1], name, mean)
    return found[-1]


def prefix(vectors: torch.Tensor, size: int) -> torch.Tensor:
    """Return the vectors' first numbers with unit length; whole vectors as they are."""
    return vectors if size == vectors.shape[1] else F.normalize(vectors[:, :size], dim=1)


def of_one_size(
    query: torch.Tensor,
    columns: torch.Tensor,
    t: torch.Tensor | None,
    positives: Positives | None,
    *,
    alpha: float,
    temperature: float | torch.Tensor,
    negatives_valid: torch.Tensor | None = None,
    query_ids: torch.Tensor | None = None,
    target_ids: torch.Tensor | None = None,
    negative_ids: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    margin: float | torch.Tensor | None = None,
    directions: str = "both",
    reward: str = "policy",
    distill: Distill | None = None,
    tile: int | None = None,
) -> Plain:
    n, count = len(query), len(columns)
    p = 0 if positives is None else len(positives.vectors)
    m, owners = count - n - p, torch.zeros(0, dtype=torch.int64) if positives is None else positives.owners
    valid = torch.ones(n, dtype=torch.bool) if valid is None else valid
    negatives_valid = torch.ones(m, dtype=torch.bool) if negatives_valid is None else negatives_valid
    tau = torch.as_tensor(temperature).expand(n)
    margin = torch.as_tensor(torch.inf if margin is None else margin).expand(n)

    answer, weights = torch.eye(n, count, dtype=torch.bool), torch.eye(n, count, dtype=query.dtype)
    if positives is not None:
        answer[owners, n + m + torch.arange(p)] = True
        weights[range(n), range(n)] = positives.target_weights
        weights[owners, n + m + torch.arange(p)] = positives.weights
        weights = weights / weights.sum(dim=1, keepdim=True)

    alike = torch.zeros(n, count, dtype=torch.bool)
    if query_ids is not None:
        alike[:, :n] |= query_ids[:, None] == query_ids
    if target_ids is not None:
        nobody = torch.full((count,), -1)
        ids = torch.cat([target_ids, nobody[n:]])
        ids[n : n + m] = nobody[:m] if negative_ids is None else negative_ids
        if positives is not None and positives.ids is not None:
            ids[n + m :] = positives.ids
            for owner, number in zip(owners, positives.ids, strict=True):
                alike[owner] |= ids == number
        alike |= target_ids[:, None] == ids
        if query_ids is not None:
            alike[:, n + m :] |= query_ids[:, None] == query_ids[owners]
            alike[:, :n] |= (query_ids[:, None] == target_ids) | (target_ids[:, None] == query_ids)

    s = query @ columns.T
    r = s.detach() if reward == "policy" else t
    pair = s.diagonal()
    possible = valid[:, None] & torch.cat([valid, negatives_valid, valid[owners]]) & ~answer
    masked = alike | (s > pair[:, None] + margin[:, None])
    negative = possible & ~masked
    hard = negative * torch.exp(alpha * r + s / tau[:, None])
    total = hard.sum(dim=1)
    losses = (weights * torch.log(1 + total[:, None] / torch.exp(s / tau[:, None]))).sum(dim=1)
    if directions == "both":
        back = possible[:, :n] & ~(alike[:, :n] | (s[:, :n] > pair + margin))
        of_targets = (back * torch.exp(alpha * r[:, :n] + s[:, :n] / tau)).sum(dim=0)
        losses = (losses + torch.log(1 + of_targets / torch.exp(pair / tau))) / 2
    contrastive, distillation = losses[valid].mean(), torch.zeros((), dtype=query.dtype)
    if distill is not None:
        seen = negative | answer
        log_p, log_q = t / distill.temperature, s / tau[:, None]
        log_p, log_q = (x - (seen * x.exp()).sum(dim=1, keepdim=True).log() for x in (log_p, log_q))
        divergence = (seen * log_p.exp() * (log_p - log_q)).sum(dim=1)
        distillation = distill.weight * divergence[valid].mean()

    hard = hard.detach()
    share = hard / hard.sum(dim=1, keepdim=True)
    largest = share.sort(dim=1, descending=True).values
    top = [int(-(-k // 100)) for k in negative.sum(dim=1)]
    return Plain(
        loss=contrastive + distillation,
        contrastive=contrastive.detach(),
        distillation=distillation.detach(),
        masked=int((possible & masked).sum()),
        by_margin=int((possible & masked & ~alike).sum()),
        pairs=int(possible.sum()),
        hardest=s.detach().masked_fill(~negative, -torch.inf).amax(dim=1),
        mean_negative=(s.detach() * negative).sum(dim=1) / negative.sum(dim=1).clamp(min=1),
        effective=(1 / share.square().sum(dim=1)).nan_to_num(0),
        share=torch.stack([row[:k].sum() for row, k in zip(largest, top, strict=True)]).nan_to_num(0),
    )


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


def call(function: Callable, flat: dict) -> Any:
    """Call a loss with tensors by name, of which those that begin with "teacher_" and "further" are put together."""
    flat = dict(flat)
    teacher = {key.removeprefix("teacher_"): flat.pop(key) for key in list(flat) if key.startswith("teacher_")}
    further = {key.removeprefix("further_"): flat.pop(key) for key in list(flat) if key.startswith("further_")}
    positives = Positives(**further) if further else None
    return function(**flat, teacher=Teacher(**teacher) if teacher else None, positives=positives)


def with_gradients(function: Callable, inputs: dict, **options: Any) -> tuple[Any, dict]:
    """Return a loss's output, and the gradients by the inputs; arguments are as in `call`."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    output = call(function, leaves | options)
    return output, dict(zip(leaves, torch.autograd.grad(output.loss, list(leaves.values())), strict=True))
