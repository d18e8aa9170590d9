"""Hardness-weighted contrastive loss over the global batch, in row tiles.

Each rank compares its own queries with the targets of all ranks, once for both directions. A row of this matrix is a
query against all targets. A column is a target against all queries, so it is summed over ranks; it is left out where
only the queries have a loss. The gradient needs the sums and so uses each tile of rows a second time: tiles are cached
up to a limit, and the rest are recomputed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.distributed import all_gather_constant, rank_and_world
from pipeline.models.chunks import sent
from pipeline.models.compact import SmallKind, shortened, straight_through
from pipeline.objectives.contrastive.matrix import Matrix, Size
from pipeline.objectives.contrastive.passes import Slopes, gradients, sums
from pipeline.objectives.contrastive.vectors import Answers, Vectors, gathered, most_of_any_rank

TILE = 256  # rows
CACHED_BYTES = 1 << 30


@dataclass(frozen=True)
class Positives:
    """Further right answers to this rank's queries.

    vectors: (p, d) unit rows.  owners: int64 (p,), the query of each, on the CPU: on a GPU the loss would wait for it.
    weights: (p,) and target_weights: (n,), at least 0: how much each answer counts in its query's loss; they are
    divided by their sum.  ids: int64 (p,) content hashes.
    """

    vectors: Tensor
    owners: Tensor
    weights: Tensor
    target_weights: Tensor
    ids: Tensor | None = None


@dataclass(frozen=True)
class Teacher:
    """Another embedder's unit rows of any width e, which get no gradient: (n, e), (n, e), (m, e), (p, e)."""

    query: Tensor
    target: Tensor
    negatives: Tensor | None = None
    positives: Tensor | None = None


@dataclass(frozen=True)
class Distill:
    """weight: of the teacher's divergence in the loss.  temperature: of the teacher's similarities."""

    weight: float
    temperature: float


@dataclass(frozen=True)
class LossOutput:
    """The loss and detached metrics.

    loss: scalar; this rank's part, whose mean over ranks is the loss of the global batch.
    contrastive, distillation: scalars; its two summands.
    positive: (n,) similarity of query and target in this rank's rows; 0 for an invalid row.
    hardest_negative: (n,) largest similarity of each of this rank's queries to a negative; -inf without negatives;
        undefined for an invalid row, as are the next three.
    mean_negative: (n,) mean similarity of each of this rank's queries to its negatives; 0 without any.
    effective_negatives: (n,) 1 / sum_j w_ij^2, with w_ij negative j's share of the sum of exp(s_ij/tau + alpha r_ij);
        0 without negatives.
    hardest_share: (n,) sum of the query's largest w_ij, as many as 1 % of its negatives, rounded up; 0 without any.
    masked_pairs: scalar; the fraction masked by content or margin, among all pairs of a valid query of the global batch
        and a valid column (explicit negatives and others' further positives included) that is none of its answers.
    masked_by_margin: scalar; the part of it that no content masks.
    valid_count: int64 scalar; valid rows of the global batch.
    """

    loss: Tensor
    positive: Tensor
    hardest_negative: Tensor
    mean_negative: Tensor
    masked_pairs: Tensor
    masked_by_margin: Tensor
    valid_count: Tensor
    contrastive: Tensor
    distillation: Tensor
    effective_negatives: Tensor
    hardest_share: Tensor


def hardness_weighted_loss(
    query: Tensor,
    target: Tensor,
    *,
    alpha: float,
    temperature: float | Tensor,
    negatives: Tensor | None = None,
    negatives_valid: Tensor | None = None,
    query_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    valid: Tensor | None = None,
    margin: float | Tensor | None = None,
    directions: Literal["both", "query"] = "both",
    positives: Positives | None = None,
    teacher: Teacher | None = None,
    reward: Literal["policy", "teacher"] = "policy",
    distill: Distill | None = None,
    dimensions: Sequence[int] = (),
    dimension_weights: Sequence[float] = (),
    quantized: SmallKind | None = None,
    group: dist.ProcessGroup | None = None,
    tile: int = TILE,
) -> LossOutput:
    """Compute LLaVE's loss (arXiv 2503.04812), the mean over the directions query to target and target to query:

        L_i = -log( exp(s_ii/tau) / (exp(s_ii/tau) + sum_{j != i} m_ij exp(alpha r_ij) exp(s_ij/tau)) )

    s are similarities, tau is the temperature, r are rewards, which carry no gradient, and m_ij = 0 masks pair (i, j).
    With alpha 0 and no mask it is cross entropy (InfoNCE). With directions "query" it is the first direction alone, as
    in HardNegativeNLLLoss, with which LLM2CLIP (arXiv 2411.04997) trains its text encoder.

    query, target: (n, d) unit rows of this rank, of any float dtype; computation is in float32 (or float64).
    temperature: a number, a scalar tensor, or (n,), the tau of each pair, as query and as target. A tensor may require
        grad (learned temperatures).
    negatives: (m, d) unit rows; extra columns for the queries of all ranks. m may differ between ranks.
    query_ids, target_ids, negative_ids: int64 (n,), (n,), (m,) content hashes. They mask pair (i, j) if i and j share
        their target or query, or if one's query is the other's target; and negatives equal to target i. Further
        positives of j are masked if i and j share their query.
    valid, negatives_valid: bool (n,), (m,); an invalid row has no loss and is not a column.
    margin: a number, or (n,) for each pair: masks negatives whose similarity exceeds the positive's by more than this,
        in the pair's row and in its target's column. An infinite margin masks nothing.
    directions: "both", or "query": the loss of each query against all targets and negatives, and none of the targets.
    positives: further answers. A query's loss becomes sum_k w_k L_ik over its target and further positives k, where
        L_ik has s_ik for s_ii. None of them is among its negatives, nor is a column with the hash of one of them. For
        other queries they are explicit negatives. In the direction target to query they have no loss, and the target's
        has weight 1. An invalid row's positives are no columns. p may differ between ranks.
    teacher: vectors of the same rows as query, target, negatives and positives, for `reward` and `distill`.
    reward: "policy": r = s; "teacher": r are the teacher's similarities.
    distill: adds distill.weight times the mean of KL_i over the valid queries; it is not halved if both directions have
        a loss. KL_i = sum_j p_ij log(p_ij / q_ij) over i's answers and its negatives that are not masked, with
        p_ij ~ exp(t_ij / distill.temperature), t the teacher's similarities, and q_ij ~ exp(s_ij / tau).
    dimensions: ascending sizes, at most d. The loss is the mean over sizes, weighted by `dimension_weights` (default:
        equally), of the loss of the vectors' first numbers, scaled to unit length (Matryoshka, arXiv 2205.13147). The
        teacher's vectors stay whole. Metrics are those of the largest size. Without sizes, vectors are compared whole,
        as they are.
    quantized: rounds the targets, positives and negatives, at each size, as an index stores them (`Form`); queries stay
        as they are. The gradient is that of unrounded ones.
    tile: rows per tile.

    Raises ValueError if n differs between ranks, or if an option does not fit the others. All ranks must call it with
    the same options; only `negatives`, `positives`, and what belongs to them, may be missing on some. `query` requires
    grad on all ranks or on none; likewise `target` and `temperature`.

    Each rank's loss is W / (valid rows of all W ranks) times the sum over its valid rows; the mean over ranks is the
    global batch's loss. An engine that averages gradients over ranks gets exactly its gradient: each rank computes the
    contribution of its own queries, in all directions.
    """
    rank, world = rank_and_world(group)
    counts = (0 if negatives is None else len(negatives), 0 if positives is None else len(positives.vectors))
    most_negatives, most_positives = most_of_any_rank(query, counts, group)
    _check_lengths(query, temperature, margin)
    _check_sizes(dimensions, dimension_weights, query.shape[1])
    taught = _taught(teacher, (len(query), *counts), needed=reward == "teacher" or distill is not None)

    with torch.autocast(query.device.type, enabled=False):
        queries = Vectors.of(query, valid, taught[0], query=query_ids, target=target_ids)
        targets = Vectors.of(target, valid, taught[1], query=query_ids, target=target_ids)
        targets = targets.gathered(group)
        nothing = torch.cat([query[:0], target[:0]])
        of_queries = {"query": None} if most_positives else {}  # only further positives have a query's hash
        extra = _columns(nothing, negatives, negatives_valid, taught[2], target=negative_ids, **of_queries)
        answers = Answers.targets_only(queries.vectors)
        if most_positives:
            if positives is None:
                further = _columns(nothing, None, None, taught[3], target=None, query=None)
            else:
                first = len(targets.valid) + rank * (most_negatives + most_positives) + most_negatives
                answers = _answers(positives, queries.vectors, target_ids, first)
                owners = sent(positives.owners, query.device)
                of_owners = None if query_ids is None else query_ids[owners]
                further = _columns(
                    nothing,
                    positives.vectors,
                    queries.valid[owners],
                    taught[3],
                    target=positives.ids,
                    query=of_owners,
                )
            extra = extra.padded(most_negatives).followed_by(further.padded(most_positives))
        if most_negatives + most_positives:
            extra = extra.padded(most_negatives + most_positives).gathered(group)
        rows, columns = queries.vectors, torch.cat([targets.vectors, extra.vectors])
        tau = temperature.to(rows) if isinstance(temperature, Tensor) else rows.new_full((), temperature)
        if tau.ndim:
            tau = gathered(tau.where(queries.valid, 1), group)
        if isinstance(margin, Tensor) and margin.ndim:
            margin = all_gather_constant(margin.to(rows), group)
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (rows, columns, tau))

        own, both = slice(rank * len(rows), (rank + 1) * len(rows)), directions == "both"
        compared = [
            (shortened(rows, size), straight_through(shortened(columns, size), quantized))
            for size in dimensions or [rows.shape[1]]
        ]
        detached = [(x.detach(), y.detach()) for x, y in compared]
        positive = torch.stack([(x * y[own]).sum(dim=1) for x, y in detached], dim=1)
        pairs = all_gather_constant(positive, group).T.contiguous()
        sizes = [Size(x, y, pairs[k], answers.similarities(x, y, positive[:, k])) for k, (x, y) in enumerate(detached)]
        valid_count = targets.valid.sum()
        weights = targets.valid.to(rows.dtype) * world / ((1 + both) * valid_count.clamp(min=1))
        own_tau = (tau[own] if tau.ndim else tau).detach()
        of_distillation = weights[own] * (1 + both) * (0.0 if distill is None else distill.weight)
        matrix = Matrix(
            queries=queries,
            targets=targets,
            extra=extra,
            sizes=sizes,
            answers=answers,
            own=own,
            alpha=alpha,
            tau=tau.detach(),
            learned=tau.requires_grad,
            margin=margin,
            both=both,
            by_teacher=reward == "teacher",
            distill=None if distill is None else (of_distillation / own_tau, distill.temperature),
            height=tile,
            group=group,
        )
        found = sums(matrix, CACHED_BYTES if differentiable else 0)

        contrastive, slopes = [], []
        column_tau = own_tau[:, None] if own_tau.ndim else own_tau
        for k, size in enumerate(sizes):
            # L = log(1 + exp(excess)) is also exact for tiny losses.
            row_excess = found.rows[k, :, None] - size.answers / column_tau
            terms, column_slope = (answers.weights * F.softplus(row_excess)).sum(dim=1), None
            if found.columns is not None:
                column_excess = found.columns[k] - size.positives / matrix.tau
                terms = terms + F.softplus(column_excess[own])
                column_slope = weights * column_excess.sigmoid() / matrix.tau
            row_slope = weights[own, None] * (answers.weights * row_excess.sigmoid()) / column_tau
            contrastive.append(weights[own] @ terms)
            slopes.append(Slopes(row_slope, column_slope))
        distillation = list(found.divergences @ of_distillation)
        losses = [first + second for first, second in zip(contrastive, distillation, strict=True)]
        if differentiable:
            losses = [
                _WithGradients.apply(loss, by.rows, by.columns, by.tau, *vectors, tau)
                for loss, by, vectors in zip(losses, gradients(matrix, found, slopes), compared, strict=True)
            ]

        def mean(values: list[Tensor]) -> Tensor:
            shares = dimension_weights or [1.0] * len(values)
            return torch.stack([x * (share / sum(shares)) for x, share in zip(values, shares, strict=True)]).sum()

        further_count = extra.valid.reshape(world, most_negatives + most_positives)[:, most_negatives:].sum()
        candidates = valid_count * (valid_count + extra.valid.sum() - 1) - further_count
        masked = found.masked / candidates.clamp(min=1)
        return LossOutput(
            loss=mean(losses),
            contrastive=mean(contrastive),
            distillation=mean(distillation),
            positive=positive[:, -1],
            hardest_negative=found.hardest,
            effective_negatives=found.effective,
            hardest_share=found.share,
            mean_negative=found.mean,
            masked_pairs=masked[0],
            masked_by_margin=masked[1],
            valid_count=valid_count,
        )


def _columns(
    nothing: Tensor, vectors: Tensor | None, valid: Tensor | None, teacher: Tensor | None, **ids: Tensor | None
) -> Vectors:
    """Return this rank's extra columns, those of `vectors` (m, d) or none.

    nothing: (0, d), which makes them part of the graph on every rank: one without negatives must also run the gather's
    backward.  ids: (m,) hashes by name; None: in practice no row has their hash.
    """
    vectors = nothing if vectors is None else torch.cat([vectors, nothing])
    no_hash = torch.full((len(vectors),), torch.iinfo(torch.int64).max, device=vectors.device)
    return Vectors.of(vectors, valid, teacher, **{name: no_hash if x is None else x for name, x in ids.items()})


def _answers(positives: Positives, queries: Tensor, target_ids: Tensor | None, first_column: int) -> Answers:
    target_weights, weights = (x.detach().to(queries) for x in (positives.target_weights, positives.weights))
    return Answers.of(positives.owners, weights, target_weights, positives.ids, target_ids, first_column)


def _taught(
    teacher: Teacher | None, counts: tuple[int, int, int], *, needed: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the teacher's vectors of queries, targets, negatives and positives if an option needs them.

    counts: of queries, negatives and positives.  Raises ValueError if some are missing.
    """
    if not needed:
        return None, None, None, None
    if teacher is None:
        raise ValueError("rewards and distillation by a teacher need its vectors: give `teacher`")
    rows, nothing = counts[0], teacher.query[:0]
    negatives = nothing if teacher.negatives is None else teacher.negatives
    positives = nothing if teacher.positives is None else teacher.positives
    found = {"query": teacher.query, "target": teacher.target, "negatives": negatives, "positives": positives}
    for (name, vectors), count in zip(found.items(), (rows, *counts), strict=True):
        if len(vectors) != count:
            raise ValueError(f"teacher.{name} has {len(vectors)} rows, but there are {count} {name} rows to compare")
    return teacher.query, teacher.target, negatives, positives


def _check_lengths(query: Tensor, temperature: float | Tensor, margin: float | Tensor | None) -> None:
    """Raise ValueError if a number for each pair is not one."""
    for name, x in (("temperature", temperature), ("margin", margin)):
        if isinstance(x, Tensor) and x.ndim and x.shape != query.shape[:1]:
            raise ValueError(
                f"{name} has the shape {tuple(x.shape)}: it must be one number, or one for each of {len(query)} pairs"
            )


def _check_sizes(dimensions: Sequence[int], weights: Sequence[float], width: int) -> None:
    """Raise ValueError if sizes are not ascending, or too large, or if their weights do not fit."""
    if list(dimensions) != sorted({*dimensions}) or (dimensions and not 1 <= dimensions[0] <= dimensions[-1] <= width):
        raise ValueError(f"dimensions {list(dimensions)} must be ascending sizes from 1 to {width}, the vectors' size")
    if weights and (len(weights) != len(dimensions) or min(weights) < 0 or sum(weights) <= 0):
        raise ValueError(
            f"dimension_weights {list(weights)} must be one for each of {list(dimensions)}, at least 0, not all 0"
        )


class _WithGradients(torch.autograd.Function):
    """A scalar `loss` with precomputed gradients by rows (n, d), columns (C, d) and tau."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, by_rows: Tensor, by_columns: Tensor, by_tau: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(by_rows, by_columns, by_tau)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *(grad * gradient for gradient in ctx.saved_tensors)
