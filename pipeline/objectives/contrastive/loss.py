"""Hardness-weighted contrastive loss over the global batch, in row tiles.

Each rank compares its own queries with the targets of all ranks, once for both directions: a row of that matrix is a
query among all targets; a column, a target among all queries, is summed over ranks. The gradient needs these sums and
so sees every tile of rows twice: tiles are kept for that up to a bound, past which they are computed again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.distributed import all_gather_constant, all_gather_rows, rank_and_world

TILE = 256  # rows
KEPT_BYTES = 1 << 30


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
    temperature: float | Tensor,
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
    tile: int = TILE,
) -> LossOutput:
    """LLaVE's loss (arXiv 2503.04812) from query to target and back, the mean of both:

        L_i = -log( exp(s_ii/tau) / (exp(s_ii/tau) + sum_{j != i} m_ij exp(alpha r_ij) exp(s_ij/tau)) )

    s are similarities, tau the temperature, r the rewards, which carry no gradient, and m_ij = 0 masks
    what is no negative. With alpha 0 and no mask it is cross entropy (InfoNCE).

    query, target: (n, d) unit rows of this rank, of any float dtype; float32 (or float64) is computed with.
    temperature: a number, or a scalar tensor, which may require grad (a learnt temperature).
    negatives: (m, d) unit rows; further columns for the queries of all ranks. m may differ between ranks.
    query_ids, target_ids, negative_ids: int64 (n,), (n,), (m,) content hashes. For row i, column j is no
        negative where it has the same target or the same query, or where one's query is the other's target; nor is
        a negative equal to target i.
    valid, negatives_valid: bool (n,), (m,); what is not valid has no loss and is no column.
    margin: masks negatives whose similarity exceeds the positive's by more than this.
    reward_query, reward_target, reward_negatives: (n, e), (n, e), (m, e) unit rows of another embedder, whose
        similarities are r; by default r = s.
    tile: rows per tile.

    Requirements: n is the same on all ranks, or ValueError; all ranks call it with the same options; only
    `negatives` and what belongs to them may be missing on some. `query` requires grad on all ranks or on
    none, likewise `target` and `temperature`. Rewards come for queries, targets and negatives alike, or ValueError.

    Each rank's loss is the sum over its own valid rows / valid rows of all ranks * W; the mean over ranks is the global
    batch's. An engine that averages gradients over ranks thus gets exactly the gradient of that mean, of which each
    rank computes what its own queries bring, in both directions.
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
        if negative_ids is None:  # what no row has; no hash in practice
            negative_ids = torch.full((len(negatives),), torch.iinfo(torch.int64).max, device=query.device)
        queries = _Vectors.of(query, valid, reward_query, query=query_ids, target=target_ids)
        targets = _Vectors.of(target, valid, reward_target, query=query_ids, target=target_ids).gathered(group)
        extra = _Vectors.of(negatives, negatives_valid, reward_negatives, target=negative_ids)
        extra = extra.padded(most).gathered(group) if most else extra
        rows, columns = queries.vectors, torch.cat([targets.vectors, extra.vectors])
        tau = torch.as_tensor(temperature, dtype=rows.dtype, device=rows.device)
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (rows, columns, tau))

        own = slice(rank * len(rows), (rank + 1) * len(rows))
        positive = (rows.detach() * columns[own].detach()).sum(dim=1)
        positives = all_gather_constant(positive, group)
        matrix = _Matrix(
            queries, targets, extra, columns.detach(), positives, own, alpha, tau.detach(), margin, tile, group
        )
        sums = matrix.sums(KEPT_BYTES if differentiable else 0)

        # L = log(1 + exp(excess)), exact where the loss is tiny, too
        row_excess, column_excess = sums.rows - positive / matrix.tau, sums.columns - positives / matrix.tau
        valid_count = targets.valid.sum()
        weights = targets.valid.to(rows.dtype) * world / (2 * valid_count.clamp(min=1))
        loss = weights[own] @ (F.softplus(row_excess) + F.softplus(column_excess[own]))
        if differentiable:
            row_slope = weights[own] * row_excess.sigmoid() / matrix.tau
            column_slope = weights * column_excess.sigmoid() / matrix.tau
            loss = _WithGradients.apply(loss, *matrix.gradients(sums, row_slope, column_slope), rows, columns, tau)

        pairs = valid_count * (valid_count + extra.valid.sum() - 1)
        return LossOutput(loss, positive, sums.hardest, sums.masked / pairs.clamp(min=1), valid_count)


@dataclass(frozen=True)
class _Vectors:
    """One side of a comparison.

    vectors: (k, d), zero where invalid. valid: bool (k,). reward: (k, e) or None.
    ids: int64 (k,) hashes of the "query" and of the "target", as far as they are given.
    """

    vectors: Tensor
    valid: Tensor
    reward: Tensor | None
    ids: dict[str, Tensor]

    @classmethod
    def of(cls, vectors: Tensor, valid: Tensor | None, reward: Tensor | None, **ids: Tensor | None) -> "_Vectors":
        if valid is None:
            valid = torch.ones(len(vectors), dtype=torch.bool, device=vectors.device)
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        # Zeroed, not only masked: whatever an invalid row holds (NaN, too) ends here.
        vectors = vectors.to(dtype).masked_fill(~valid[:, None], 0)
        reward = None if reward is None else reward.detach().to(dtype).masked_fill(~valid[:, None], 0)
        return cls(vectors, valid, reward, {name: x for name, x in ids.items() if x is not None})

    def padded(self, rows: int) -> "_Vectors":
        """With invalid rows at the end, up to `rows`."""
        return self._map(lambda x: F.pad(x, (0, 0) * (x.ndim - 1) + (0, rows - len(x))))

    def gathered(self, group: dist.ProcessGroup | None) -> "_Vectors":
        return self._map(lambda x: (all_gather_rows if x.requires_grad else all_gather_constant)(x, group))

    def _map(self, f: Callable[[Tensor], Tensor]) -> "_Vectors":
        ids = {name: f(x) for name, x in self.ids.items()}
        return _Vectors(f(self.vectors), f(self.valid), None if self.reward is None else f(self.reward), ids)


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


@dataclass(frozen=True)
class _Tile:
    """Logits of the queries `part`, -inf where there is no negative.

    forth: (rows, N + M), of the queries' losses. back: (rows, N), of the targets'; a part of forth without a margin.
    """

    part: slice
    forth: Tensor
    back: Tensor

    @property
    def bytes(self) -> int:
        return self.forth.nbytes + (0 if self.back.data_ptr() == self.forth.data_ptr() else self.back.nbytes)


@dataclass(frozen=True)
class _Sums:
    """rows: (n,) log of the sum over each own query's negatives. columns: (N,) over each target's, of all ranks.

    hardest: (n,) largest similarity of each own query's negatives. masked: pairs masked by content or margin, of all
    ranks. kept: the first tiles.
    """

    rows: Tensor
    columns: Tensor
    hardest: Tensor
    masked: Tensor
    kept: list[_Tile]


@dataclass(frozen=True)
class _Matrix:
    """This rank's n queries (rows) with all ranks' N targets and M extra vectors (columns), a tile of rows at a time.

    own: the targets of the queries. positives: (N,) similarities of all pairs.
    """

    queries: _Vectors
    targets: _Vectors
    extra: _Vectors
    columns: Tensor
    positives: Tensor
    own: slice
    alpha: float
    tau: Tensor
    margin: float | None
    height: int
    group: dist.ProcessGroup | None

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """(n, k), (N + M, k): their product is the logits s / tau + alpha r."""
        x, y, reward = self.queries.vectors.detach(), self.columns, self.queries.reward
        if reward is None:
            return x * self._scale, y
        rewards = torch.cat(cast(list[Tensor], [self.targets.reward, self.extra.reward]))
        return torch.cat([x / self.tau, self.alpha * reward], dim=1), torch.cat([y, rewards], dim=1)

    @cached_property
    def _scale(self) -> Tensor:
        """A logit by its similarity, where that is the reward."""
        return 1 / self.tau + self.alpha

    @cached_property
    def _bias(self) -> tuple[Tensor, Tensor]:
        """(n, 1), (1, N + M): 0, or -inf for what is not valid."""
        valid = self.queries.valid[:, None], torch.cat([self.targets.valid, self.extra.valid])[None]
        rows, columns = (torch.zeros_like(x, dtype=self.columns.dtype).masked_fill_(~x, -torch.inf) for x in valid)
        return rows, columns

    def sums(self, room: int) -> _Sums:
        """room: bytes of tiles to keep."""
        n, lowest = len(self.queries.vectors), torch.finfo(self.columns.dtype).min
        rows, hardest = self.columns.new_empty(n), self.columns.new_empty(n)
        column_top, columns = torch.full_like(self.positives, lowest), torch.zeros_like(self.positives)
        all_masked = torch.zeros((), dtype=torch.int64, device=rows.device)
        kept: list[_Tile] = []
        for start in range(0, n, self.height):
            tile, masked = self._tile(start)
            all_masked += masked
            # As logsumexp, without the difference of two -inf, which is no number.
            top = tile.forth.amax(dim=1)
            hardest[tile.part] = self._hardest(tile, top)
            top.clamp_(min=lowest)
            rows[tile.part] = (tile.forth - top[:, None]).exp_().sum(dim=1).log_().add_(top)
            top = torch.maximum(column_top, tile.back.amax(dim=0))
            columns.mul_((column_top - top).exp_()).add_((tile.back - top).exp_().sum(dim=0))
            column_top = top
            if len(kept) * self.height == start and tile.bytes <= room:
                kept.append(tile)
                room -= tile.bytes
        if rank_and_world(self.group)[1] > 1:
            top = column_top.clone()
            dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)
            columns.mul_((column_top - top).exp_())
            column_top = top
            dist.all_reduce(columns, group=self.group)
            dist.all_reduce(all_masked, group=self.group)
        columns = columns.log_().add_(column_top)
        return _Sums(rows.clamp_(min=lowest), columns.clamp_(min=lowest), hardest, all_masked, kept)

    def gradients(self, sums: _Sums, row_slope: Tensor, column_slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the loss by own queries (n, d), by the columns (N + M, d), and by tau: what own queries bring to each.

        row_slope, column_slope: (n,), (N,) derivatives of the loss by each excess, over tau. Takes the kept tiles.
        """
        x, y, count = self.queries.vectors.detach(), self.columns, len(self.positives)
        by_rows, by_columns = torch.empty_like(x), torch.zeros_like(y)
        positive_slope = -(row_slope + column_slope[self.own])
        for start in range(0, len(x), self.height):
            tile = sums.kept.pop(0) if sums.kept else self._tile(start)[0]
            back = (tile.back - sums.columns).exp_().mul_(column_slope)
            gradient = tile.forth.sub_(sums.rows[tile.part, None]).exp_().mul_(row_slope[tile.part, None])
            gradient[:, :count] += back
            gradient[self._diagonal(start, len(gradient))] = positive_slope[tile.part]
            by_rows[tile.part] = gradient @ y
            by_columns.addmm_(gradient.T, x[tile.part])
        # Of s / tau alone: the reward has no gradient.
        return by_rows, by_columns, -(x * by_rows).sum() / self.tau

    def _tile(self, start: int) -> tuple[_Tile, Tensor]:
        """With the number of its pairs that content or margin masked."""
        part, count = slice(start, start + self.height), len(self.positives)
        (left, right), (row_bias, column_bias) = self._factors, self._bias
        forth = (row_bias[part] + column_bias).addmm_(left[part], right.T)
        diagonal = self._diagonal(start, len(forth))
        forth[diagonal] = -torch.inf
        back, masked = forth[:, :count], torch.zeros((), dtype=torch.int64, device=forth.device)
        if self.queries.ids or self.margin is not None:
            near = self._alike(part, forth)
            if self.margin is not None:
                similarity = self._similarity(part, forth)
                back = back.masked_fill(
                    near[:, :count] | (similarity[:, :count] > self.positives + self.margin), -torch.inf
                )
                near |= similarity > self.positives[self.own][part, None] + self.margin
            masked = (near & (forth > -torch.inf)).sum()
            forth.masked_fill_(near, -torch.inf)
        return _Tile(part, forth, back), masked

    def _similarity(self, part: slice, logits: Tensor) -> Tensor:
        """(rows, N + M), where there are logits."""
        if self.queries.reward is None:
            return logits / self._scale
        return self.queries.vectors[part].detach() @ self.columns.T

    def _hardest(self, tile: _Tile, largest: Tensor) -> Tensor:
        """The largest similarity of each query's negatives, from the largest of their logits: (rows,)."""
        if self.queries.reward is None:
            return largest / self._scale
        return self._similarity(tile.part, tile.forth).masked_fill_(tile.forth == -torch.inf, -torch.inf).amax(dim=1)

    def _alike(self, part: slice, logits: Tensor) -> Tensor:
        """Bool (rows, N + M): pairs whose content forbids that one is the other's negative."""
        alike = torch.zeros_like(logits, dtype=torch.bool)
        for name, ids in self.queries.ids.items():
            alike[:, : len(self.positives)] |= ids[part, None] == self.targets.ids[name]
        if len(self.queries.ids) == 2:  # one pair's query may be another's target, as where both are captions
            for name, other in (("query", "target"), ("target", "query")):
                alike[:, : len(self.positives)] |= self.queries.ids[name][part, None] == self.targets.ids[other]
        if "target" in self.queries.ids:
            alike[:, len(self.positives) :] = self.queries.ids["target"][part, None] == self.extra.ids["target"]
        return alike

    def _diagonal(self, start: int, rows: int) -> tuple[Tensor, Tensor]:
        """Where a tile has its queries' own targets."""
        index = torch.arange(rows, device=self.columns.device)
        return index, index + self.own.start + start


class _WithGradients(torch.autograd.Function):
    """A scalar `loss` whose gradients by rows (n, d), columns (C, d) and tau are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, by_rows: Tensor, by_columns: Tensor, by_tau: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(by_rows, by_columns, by_tau)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *(grad * gradient for gradient in ctx.saved_tensors)
