"""Hardness-weighted contrastive loss over the global batch, in row tiles.

Each rank compares its own queries with the targets of all ranks, once for both directions. A row of this matrix is a
query against all targets. A column is a target against all queries, so it is summed over ranks; it is left out where
only the queries have a loss. The gradient needs the sums and so uses each tile of rows a second time: tiles are cached
up to a limit, and the rest are recomputed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.distributed import all_gather_constant, all_gather_rows, rank_and_world

TILE = 256  # rows
CACHED_BYTES = 1 << 30


@dataclass(frozen=True)
class LossOutput:
    """The loss and detached metrics.

    loss: scalar; this rank's part, whose mean over ranks is the loss of the global batch.
    positive: (n,) similarity of query and target in this rank's rows; 0 for an invalid row.
    hardest_negative: (n,) largest similarity of each of this rank's queries to a negative; -inf without negatives;
        undefined for an invalid row.
    masked_pairs: scalar; the fraction masked by content or margin, among all pairs of a valid query of the global batch
        and a valid column (explicit negatives included) other than its target.
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
    directions: Literal["both", "query"] = "both",
    reward_query: Tensor | None = None,
    reward_target: Tensor | None = None,
    reward_negatives: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    tile: int = TILE,
) -> LossOutput:
    """Compute LLaVE's loss (arXiv 2503.04812), the mean over the directions query to target and target to query:

        L_i = -log( exp(s_ii/tau) / (exp(s_ii/tau) + sum_{j != i} m_ij exp(alpha r_ij) exp(s_ij/tau)) )

    s are similarities, tau is the temperature, r are rewards, which carry no gradient, and m_ij = 0 masks pair (i, j).
    With alpha 0 and no mask it is cross entropy (InfoNCE). With directions "query" it is the first direction alone, as
    in HardNegativeNLLLoss, with which LLM2CLIP (arXiv 2411.04997) trains its text encoder.

    query, target: (n, d) unit rows of this rank, of any float dtype; computation is in float32 (or float64).
    temperature: a number, or a scalar tensor, which may require grad (a learned temperature).
    negatives: (m, d) unit rows; extra columns for the queries of all ranks. m may differ between ranks.
    query_ids, target_ids, negative_ids: int64 (n,), (n,), (m,) content hashes. They mask pair (i, j) if i and j share
        their target or query, or if one's query is the other's target; and negatives equal to target i.
    valid, negatives_valid: bool (n,), (m,); an invalid row has no loss and is not a column.
    margin: masks negatives whose similarity exceeds the positive's by more than this.
    directions: "both", or "query": the loss of each query against all targets and negatives, and none of the targets.
    reward_query, reward_target, reward_negatives: (n, e), (n, e), (m, e) unit rows of another embedder, whose
        similarities are r; by default r = s.
    tile: rows per tile.

    Raises ValueError if n differs between ranks, or if rewards are given for only some of queries, targets and
    negatives. All ranks must call it with the same options; only `negatives` and their ids, validity and rewards may be
    missing on some. `query` requires grad on all ranks or on none; likewise `target` and `temperature`.

    Each rank's loss is W / (valid rows of all W ranks) times the sum over its valid rows; the mean over ranks is the
    global batch's loss. An engine that averages gradients over ranks gets exactly its gradient: each rank computes the
    contribution of its own queries, in all directions.
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
    # Part of the graph on every rank: a rank without negatives must also run the gather's backward.
    negatives = torch.cat([negatives, query[:0], target[:0]])

    with torch.autocast(query.device.type, enabled=False):
        if negative_ids is None:  # a value that in practice is no row's hash
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
        both = directions == "both"
        matrix = _Matrix(
            queries, targets, extra, columns.detach(), positives, own, alpha, tau.detach(), margin, both, tile, group
        )
        sums = matrix.sums(CACHED_BYTES if differentiable else 0)

        # L = log(1 + exp(excess)) is also exact for tiny losses.
        valid_count = targets.valid.sum()
        weights = targets.valid.to(rows.dtype) * world / ((1 + both) * valid_count.clamp(min=1))
        row_excess = sums.rows - positive / matrix.tau
        terms, column_excess = F.softplus(row_excess), None
        if sums.columns is not None:
            column_excess = sums.columns - positives / matrix.tau
            terms = terms + F.softplus(column_excess[own])
        loss = weights[own] @ terms
        if differentiable:
            row_slope = weights[own] * row_excess.sigmoid() / matrix.tau
            column_slope = None if column_excess is None else weights * column_excess.sigmoid() / matrix.tau
            loss = _WithGradients.apply(loss, *matrix.gradients(sums, row_slope, column_slope), rows, columns, tau)

        pairs = valid_count * (valid_count + extra.valid.sum() - 1)
        return LossOutput(loss, positive, sums.hardest, sums.masked / pairs.clamp(min=1), valid_count)


@dataclass(frozen=True)
class _Vectors:
    """The rows or columns of a comparison.

    vectors: (k, d), zero where invalid.  valid: bool (k,).  reward: (k, e) or None.
    ids: int64 (k,) hashes by name, "query" and "target", if given.
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
        # Zeroed, not only masked, so that NaN in an invalid row does not spread.
        vectors = vectors.to(dtype).masked_fill(~valid[:, None], 0)
        reward = None if reward is None else reward.detach().to(dtype).masked_fill(~valid[:, None], 0)
        return cls(vectors, valid, reward, {name: x for name, x in ids.items() if x is not None})

    def padded(self, rows: int) -> "_Vectors":
        """Return these with invalid rows appended, `rows` in total."""
        return self._map(lambda x: F.pad(x, (0, 0) * (x.ndim - 1) + (0, rows - len(x))))

    def gathered(self, group: dist.ProcessGroup | None) -> "_Vectors":
        return self._map(lambda x: (all_gather_rows if x.requires_grad else all_gather_constant)(x, group))

    def _map(self, f: Callable[[Tensor], Tensor]) -> "_Vectors":
        ids = {name: f(x) for name, x in self.ids.items()}
        return _Vectors(f(self.vectors), f(self.valid), None if self.reward is None else f(self.reward), ids)


def _most_negatives(query: Tensor, negatives: Tensor | None, group: dist.ProcessGroup | None) -> int:
    """Return the largest number of negatives of any rank; ValueError if ranks differ in their number of rows."""
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
    """Logits of the queries `part`, -inf where a pair is not a negative.

    forth: (rows, N + M), for the queries' losses.  back: (rows, N), for the targets' losses; without a margin it is a
    view of forth; None if the targets have no loss.
    """

    part: slice
    forth: Tensor
    back: Tensor | None

    @property
    def bytes(self) -> int:
        if self.back is None or self.back.data_ptr() == self.forth.data_ptr():
            return self.forth.nbytes
        return self.forth.nbytes + self.back.nbytes


@dataclass(frozen=True)
class _Sums:
    """Reductions of the matrix.

    rows: (n,) log-sum-exp of the negatives' logits of this rank's queries.  columns: (N,) the same of all targets, over
    all ranks; None if they have no loss.  hardest: (n,) largest similarity of each query's negatives.  masked: number
    of pairs of all ranks masked by content or margin.  cached: the first tiles.
    """

    rows: Tensor
    columns: Tensor | None
    hardest: Tensor
    masked: Tensor
    cached: list[_Tile]


@dataclass(frozen=True)
class _Matrix:
    """This rank's n queries (rows) with all ranks' N targets and M extra vectors (columns), a tile of rows at a time.

    own: the columns of this rank's targets.  positives: (N,) similarities of all pairs.  both: whether the targets have
    a loss too.  height: rows per tile.
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
    both: bool
    height: int
    group: dist.ProcessGroup | None

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """(n, k) and (N + M, k) factors of the logits s / tau + alpha r."""
        x, y, reward = self.queries.vectors.detach(), self.columns, self.queries.reward
        if reward is None:
            return x * self._scale, y
        rewards = torch.cat(cast(list[Tensor], [self.targets.reward, self.extra.reward]))
        return torch.cat([x / self.tau, self.alpha * reward], dim=1), torch.cat([y, rewards], dim=1)

    @cached_property
    def _scale(self) -> Tensor:
        """The ratio of logit to similarity if the similarity is the reward."""
        return 1 / self.tau + self.alpha

    @cached_property
    def _bias(self) -> tuple[Tensor, Tensor]:
        """(n, 1) and (1, N + M): 0, or -inf for invalid rows and columns."""
        valid = self.queries.valid[:, None], torch.cat([self.targets.valid, self.extra.valid])[None]
        rows, columns = (torch.zeros_like(x, dtype=self.columns.dtype).masked_fill_(~x, -torch.inf) for x in valid)
        return rows, columns

    def sums(self, room: int) -> _Sums:
        """Compute the sums.  room: bytes of tiles to cache."""
        n, lowest = len(self.queries.vectors), torch.finfo(self.columns.dtype).min
        rows, hardest = self.columns.new_empty(n), self.columns.new_empty(n)
        column_top, columns = torch.full_like(self.positives, lowest), torch.zeros_like(self.positives)
        all_masked = torch.zeros((), dtype=torch.int64, device=rows.device)
        cached: list[_Tile] = []
        for start in range(0, n, self.height):
            tile, masked = self._tile(start)
            all_masked += masked
            # Like logsumexp, but the clamp avoids -inf minus -inf, which is NaN.
            top = tile.forth.amax(dim=1)
            hardest[tile.part] = self._hardest(tile, top)
            top.clamp_(min=lowest)
            rows[tile.part] = (tile.forth - top[:, None]).exp_().sum(dim=1).log_().add_(top)
            if tile.back is not None:
                top = torch.maximum(column_top, tile.back.amax(dim=0))
                columns.mul_((column_top - top).exp_()).add_((tile.back - top).exp_().sum(dim=0))
                column_top = top
            if len(cached) * self.height == start and tile.bytes <= room:
                cached.append(tile)
                room -= tile.bytes
        rows.clamp_(min=lowest)
        several = rank_and_world(self.group)[1] > 1
        if several:
            dist.all_reduce(all_masked, group=self.group)
        if not self.both:
            return _Sums(rows, None, hardest, all_masked, cached)
        if several:
            top = column_top.clone()
            dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)
            columns.mul_((column_top - top).exp_())
            column_top = top
            dist.all_reduce(columns, group=self.group)
        columns = columns.log_().add_(column_top)
        return _Sums(rows, columns.clamp_(min=lowest), hardest, all_masked, cached)

    def gradients(self, sums: _Sums, row_slope: Tensor, column_slope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return this rank's contributions to the loss's gradients by its queries (n, d), columns (N + M, d), and tau.

        row_slope, column_slope: (n,), (N,) derivatives of the loss by each excess, divided by tau; column_slope is None
        if the targets have no loss.  It consumes the cached tiles.
        """
        x, y, count = self.queries.vectors.detach(), self.columns, len(self.positives)
        by_rows, by_columns = torch.empty_like(x), torch.zeros_like(y)
        positive_slope = -row_slope if column_slope is None else -(row_slope + column_slope[self.own])
        for start in range(0, len(x), self.height):
            tile = sums.cached.pop(0) if sums.cached else self._tile(start)[0]
            # Before `forth` is overwritten, of which `back` may be a view.
            back = None
            if tile.back is not None and sums.columns is not None and column_slope is not None:
                back = (tile.back - sums.columns).exp_().mul_(column_slope)
            gradient = tile.forth.sub_(sums.rows[tile.part, None]).exp_().mul_(row_slope[tile.part, None])
            if back is not None:
                gradient[:, :count] += back
            gradient[self._diagonal(start, len(gradient))] = positive_slope[tile.part]
            by_rows[tile.part] = gradient @ y
            by_columns.addmm_(gradient.T, x[tile.part])
        # Only s / tau contributes: the reward has no gradient.
        return by_rows, by_columns, -(x * by_rows).sum() / self.tau

    def _tile(self, start: int) -> tuple[_Tile, Tensor]:
        """Return a tile, and the number of its pairs masked by content or margin."""
        part, count = slice(start, start + self.height), len(self.positives)
        (left, right), (row_bias, column_bias) = self._factors, self._bias
        forth = (row_bias[part] + column_bias).addmm_(left[part], right.T)
        diagonal = self._diagonal(start, len(forth))
        forth[diagonal] = -torch.inf
        back = forth[:, :count] if self.both else None
        masked = torch.zeros((), dtype=torch.int64, device=forth.device)
        if self.queries.ids or self.margin is not None:
            near = self._alike(part, forth)
            if self.margin is not None:
                similarity = self._similarity(part, forth)
                if back is not None:
                    back = back.masked_fill(
                        near[:, :count] | (similarity[:, :count] > self.positives + self.margin), -torch.inf
                    )
                near |= similarity > self.positives[self.own][part, None] + self.margin
            masked = (near & (forth > -torch.inf)).sum()
            forth.masked_fill_(near, -torch.inf)
        return _Tile(part, forth, back), masked

    def _similarity(self, part: slice, logits: Tensor) -> Tensor:
        """Return the similarities (rows, N + M) of a tile; valid where the logits are finite."""
        if self.queries.reward is None:
            return logits / self._scale
        return self.queries.vectors[part].detach() @ self.columns.T

    def _hardest(self, tile: _Tile, largest: Tensor) -> Tensor:
        """Return the largest similarity of each query's negatives, (rows,).  largest: their largest logits."""
        if self.queries.reward is None:
            return largest / self._scale
        return self._similarity(tile.part, tile.forth).masked_fill_(tile.forth == -torch.inf, -torch.inf).amax(dim=1)

    def _alike(self, part: slice, logits: Tensor) -> Tensor:
        """Return bool (rows, N + M): pairs that are not negatives because of their content."""
        alike = torch.zeros_like(logits, dtype=torch.bool)
        for name, ids in self.queries.ids.items():
            alike[:, : len(self.positives)] |= ids[part, None] == self.targets.ids[name]
        if len(self.queries.ids) == 2:  # one pair's query may be another's target, for example if both are captions
            for name, other in (("query", "target"), ("target", "query")):
                alike[:, : len(self.positives)] |= self.queries.ids[name][part, None] == self.targets.ids[other]
        if "target" in self.queries.ids:
            alike[:, len(self.positives) :] = self.queries.ids["target"][part, None] == self.extra.ids["target"]
        return alike

    def _diagonal(self, start: int, rows: int) -> tuple[Tensor, Tensor]:
        """Return the indices of the queries' own targets in a tile."""
        index = torch.arange(rows, device=self.columns.device)
        return index, index + self.own.start + start


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
