"""Hardness-weighted contrastive loss over the global batch, in row tiles.

Each rank compares its own rows with the columns of all ranks. Loss and gradient of a tile of rows are
computed at once, so a tile times the columns is all that is ever in memory, and nothing is computed twice.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.losses.gather import all_gather_constant, all_gather_rows, rank_and_world


@dataclass(frozen=True)
class LossOutput:
    """The loss, and what one wants to see of it (detached).

    loss: scalar; this rank's part, whose mean over ranks is the loss of the global batch.
    positive: (n,) similarity of each own row's query and target; 0 for an invalid row.
    hardest_negative: (n,) the largest similarity of each own query to what counts as its negative; -inf
        where there is none; of no meaning for an invalid row.
    masked_pairs: scalar; of the global batch's valid queries with the valid columns that are not their own
        target (explicit negatives included), the share taken out for their content or by the margin.
    valid_count: int64 scalar; valid rows of the global batch.
    """

    loss: Tensor
    positive: Tensor
    hardest_negative: Tensor
    masked_pairs: Tensor
    valid_count: Tensor


def hardness_weighted_loss(
    query: Tensor,
    target: Tensor,
    *,
    alpha: float,
    temperature: float,
    negatives: Tensor | None = None,
    negatives_valid: Tensor | None = None,
    query_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    valid: Tensor | None = None,
    margin: float | None = None,
    reward_query: Tensor | None = None,
    reward_target: Tensor | None = None,
    reward_negatives: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    tile: int = 1024,
) -> LossOutput:
    """LLaVE's loss (arXiv 2503.04812) from query to target and back, the mean of both:

        L_i = -log( exp(s_ii/tau) / (exp(s_ii/tau) + sum_{j != i} m_ij exp(alpha r_ij) exp(s_ij/tau)) )

    s are similarities, tau the temperature, r the rewards, which carry no gradient, and m_ij = 0 masks
    what is no negative. With alpha 0 and no mask it is cross entropy (InfoNCE).

    query, target: (n, d) unit rows of this rank, of any float dtype; float32 (or float64) is computed with.
    negatives: (m, d) unit rows; further columns for the queries of all ranks. m may differ between ranks.
    query_ids, target_ids, negative_ids: int64 (n,), (n,), (m,) content hashes. For row i, column j is no
        negative where it has the same target or the same query, nor is a negative equal to target i.
    valid, negatives_valid: bool (n,), (m,); what is not valid has no loss and is no column.
    margin: masks negatives whose similarity exceeds the positive's by more than this.
    reward_query, reward_target, reward_negatives: (n, e), (n, e), (m, e) unit rows of another embedder, whose
        similarities are r; by default r = s.
    tile: rows per tile.

    Requirements: n is the same on all ranks, or ValueError; all ranks call it with the same options; only
    `negatives` and what belongs to them may be missing on some. `query` requires grad on all ranks or on
    none, likewise `target`. Rewards come for queries, targets and negatives alike, or ValueError.

    Each rank's loss is the sum over its own valid rows / valid rows of all ranks * W. An engine that
    averages gradients over ranks thus gets exactly the gradient of the global batch's loss.
    """
    rank, world = rank_and_world(group)
    most = _most_negatives(query, negatives, group)
    if (reward_query is None) != (reward_target is None):
        raise ValueError("reward_query and reward_target are given together or not at all")
    if negatives is None:
        negatives = query[:0]
        reward_negatives = None if reward_query is None else reward_query[:0]
    if (reward_query is None) != (reward_negatives is None):
        raise ValueError("reward_negatives are given where negatives and reward_query are, and only there")
    # Part of the graph on every rank: one without negatives, too, must run the gather's backward.
    negatives = torch.cat([negatives, query[:0], target[:0]])

    with torch.autocast(query.device.type, enabled=False):
        # Ids that were not given: a different one for each row, and what no row has; no hash in practice.
        unlike = torch.arange(len(query), device=query.device) + rank * len(query) + torch.iinfo(torch.int64).min
        no_row = torch.full((len(negatives),), torch.iinfo(torch.int64).max, device=query.device)
        pair_ids = [unlike if ids is None else ids for ids in (query_ids, target_ids)]
        extra_ids = [no_row, no_row if negative_ids is None else negative_ids]
        queries = _Vectors.of(query, *pair_ids, valid, reward_query)
        targets = _Vectors.of(target, *pair_ids, valid, reward_target)
        extra = _Vectors.of(negatives, *extra_ids, negatives_valid, reward_negatives)

        all_queries, all_targets = queries.gathered(group), targets.gathered(group)
        columns = all_targets.joined(extra.padded(most).gathered(group) if most else extra)
        valid_count = all_queries.labels[:, 2].sum()
        weights = queries.labels[:, 2].to(queries.vectors.dtype) * world / (2 * valid_count.clamp(min=1))
        own, options = rank * len(query), (alpha, temperature, margin, tile)
        forth, positive, hardest, masked = _one_direction(queries, columns, own, weights, *options)
        back, *_ = _one_direction(targets, all_queries, own, weights, *options)

        if world > 1:
            dist.all_reduce(masked, group=group)
        pairs = valid_count * (columns.labels[:, 2].sum() - 1)
        return LossOutput(forth + back, positive, hardest, masked / pairs.clamp(min=1), valid_count)


@dataclass(frozen=True)
class _Vectors:
    """One side of a comparison.

    vectors: (k, d), zero where invalid. reward: (k, e) or None.
    labels: int64 (k, 3), rows of (hash of the query, hash of the target, valid).
    """

    vectors: Tensor
    labels: Tensor
    reward: Tensor | None

    @classmethod
    def of(
        cls,
        vectors: Tensor,
        query_ids: Tensor,
        target_ids: Tensor,
        valid: Tensor | None,
        reward: Tensor | None,
    ):
        valid = torch.ones_like(query_ids, dtype=torch.bool) if valid is None else valid
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        # Zeroed, not only masked: whatever an invalid row holds (NaN, too) ends here.
        vectors = vectors.to(dtype).masked_fill(~valid[:, None], 0)
        reward = None if reward is None else reward.detach().to(dtype).masked_fill(~valid[:, None], 0)
        return cls(vectors, torch.stack([query_ids, target_ids, valid.long()], dim=1), reward)

    def padded(self, rows: int) -> "_Vectors":
        """With invalid rows at the end, up to `rows`."""
        return self._map(lambda x: F.pad(x, (0, 0, 0, rows - len(x))))

    def gathered(self, group: dist.ProcessGroup | None) -> "_Vectors":
        return self._map(lambda x: (all_gather_rows if x.requires_grad else all_gather_constant)(x, group))

    def joined(self, other: "_Vectors") -> "_Vectors":
        reward = None if self.reward is None else torch.cat([self.reward, other.reward])
        vectors, labels = torch.cat([self.vectors, other.vectors]), torch.cat([self.labels, other.labels])
        return _Vectors(vectors, labels, reward)

    def _map(self, f: Callable[[Tensor], Tensor]) -> "_Vectors":
        return _Vectors(f(self.vectors), f(self.labels), None if self.reward is None else f(self.reward))


def _most_negatives(query: Tensor, negatives: Tensor | None, group: dist.ProcessGroup | None) -> int:
    """The largest number of negatives any rank has; ValueError where ranks differ in their rows."""
    rows, most = len(query), 0 if negatives is None else len(negatives)
    if rank_and_world(group)[1] > 1:
        sizes = torch.tensor([most, rows, -rows], device=query.device)
        dist.all_reduce(sizes, dist.ReduceOp.MAX, group=group)
        most, largest, smallest = sizes.tolist()
        if largest != -smallest:
            raise ValueError(f"ranks have between {-smallest} and {largest} rows: all need the same number")
    return most


def _one_direction(
    rows: _Vectors,
    columns: _Vectors,
    first: int,
    weights: Tensor,
    alpha: float,
    temperature: float,
    margin: float | None,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row i's positive is column first + i. Returns (sum of weights * L, positive similarities (n,),
    hardest negatives (n,), number of pairs that content or margin masked); only the first has a gradient.
    """
    x, y = rows.vectors.detach(), columns.vectors.detach()
    loss, masked_count = x.new_zeros(()), rows.labels.new_zeros(())
    grad_x, grad_y = torch.empty_like(x), torch.zeros_like(y)
    all_positive, hardest = x.new_empty(len(x)), x.new_empty(len(x))
    column_query, column_target, column_valid = columns.labels.T
    column_valid = column_valid.bool()
    for start in range(0, len(x), tile):
        part = slice(start, start + tile)
        row_query, row_target, row_valid = rows.labels[part, :, None].unbind(1)
        similarity = x[part] @ y.T  # (tile, columns)
        index = torch.arange(len(similarity), device=x.device)
        own = (index, index + first + start)
        all_positive[part] = positive = similarity[own]

        masked = (row_query == column_query) | (row_target == column_target)
        if margin is not None:
            masked |= similarity > positive[:, None] + margin
        masked[own] = False
        masked_count += (masked & row_valid.bool() & column_valid).sum()
        masked |= ~column_valid
        masked[own] = True
        hardest[part] = similarity.masked_fill(masked, -torch.inf).amax(dim=1)

        reward = similarity if rows.reward is None else rows.reward[part] @ columns.reward.T
        logits = (similarity / temperature + alpha * reward).masked_fill_(masked, -torch.inf)
        # L = log(1 + exp(excess)), exact where the loss is tiny, too; the clamp: rows without a negative
        total = logits.logsumexp(dim=1).clamp(min=torch.finfo(x.dtype).min)
        excess = total - positive / temperature
        loss += weights[part] @ F.softplus(excess)

        slope = weights[part] * excess.sigmoid() / temperature
        gradient = logits.sub_(total[:, None]).exp_().mul_(slope[:, None])
        gradient[own] = -slope
        grad_x[part] = gradient @ y
        grad_y.addmm_(gradient.T, x[part])
    return (
        _WithGradient.apply(rows.vectors, columns.vectors, loss, grad_x, grad_y),
        all_positive,
        hardest,
        masked_count,
    )


class _WithGradient(torch.autograd.Function):
    """A scalar `loss` of rows (n, d) and columns (C, d) whose gradients are known already."""

    @staticmethod
    def forward(ctx, rows: Tensor, columns: Tensor, loss: Tensor, grad_rows: Tensor, grad_columns: Tensor) -> Tensor:
        ctx.save_for_backward(grad_rows, grad_columns)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, grad_columns = ctx.saved_tensors
        return grad * grad_rows, grad * grad_columns, None, None, None
