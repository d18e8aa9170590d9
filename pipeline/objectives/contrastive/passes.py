"""The two passes over the matrix of logits: its sums, and with them its gradients."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.distributed import rank_and_world
from pipeline.objectives.contrastive.hardness import effective_number, hardest_share
from pipeline.objectives.contrastive.matrix import Matrix, Tile


@dataclass(frozen=True)
class Sums:
    """Reductions of the matrix.  The first three have a row for each size; the others are of the last size.

    rows: log-sum-exp of the negatives' logits of this rank's queries, (sizes, n).  columns: the same of all targets,
    over all ranks, (sizes, N); None if they have no loss.  divergences: of the teacher from each query, (sizes, n);
    0 without distillation.  hardest, mean: (n,) largest and mean similarity of each query's negatives.  effective,
    share: (n,), how the weight is spread over them.  masked: int64 (2,) pairs of all ranks masked by content or margin,
    and of these by the margin alone.
    cached: the first tiles, at all sizes.
    """

    rows: Tensor
    columns: Tensor | None
    divergences: Tensor
    hardest: Tensor
    mean: Tensor
    effective: Tensor
    share: Tensor
    masked: Tensor
    cached: list[list[Tile]]


@dataclass(frozen=True)
class Slopes:
    """Derivatives of the loss of one size, divided by tau.

    rows: (n, 1 + K) by the excess of each query over each of its answers.  columns: (N,) by that of each target; None
    if the targets have no loss.
    """

    rows: Tensor
    columns: Tensor | None


@dataclass(frozen=True)
class Gradients:
    """This rank's contributions to the gradients of the loss of one size.

    rows: (n, d).  columns: (N + M, d).  tau: (), or (N,) if each pair has its own.
    """

    rows: Tensor
    columns: Tensor
    tau: Tensor


def sums(matrix: Matrix, room: int) -> Sums:
    """Compute the sums.  room: bytes of tiles to cache."""
    n, count, last = len(matrix.queries.vectors), len(matrix.sizes), len(matrix.sizes) - 1
    lowest = torch.finfo(matrix.tau.dtype).min
    rows, divergences = matrix.tau.new_empty(count, n), matrix.tau.new_zeros(count, n)
    hardest, mean, effective, share = matrix.tau.new_empty(4, n)
    column_top = matrix.tau.new_full((count, matrix.count), lowest)
    columns = torch.zeros_like(column_top)
    all_masked = torch.zeros(2, dtype=torch.int64, device=rows.device)
    cached: list[list[Tile]] = []
    for start in range(0, n, matrix.height):
        found = matrix.band(start)
        for k, (tile, divergence) in enumerate(zip(found.tiles, found.divergences, strict=True)):
            part = tile.part
            # Like logsumexp, but the clamp avoids -inf minus -inf, which is NaN.
            top = tile.forth.amax(dim=1)
            if k == last:
                negatives = matrix.most_negatives[part] - found.masked[0]
                hardest[part], mean[part] = matrix.of_negatives(tile, top, negatives, found.teacher)
            top.clamp_(min=lowest)
            weights = (tile.forth - top[:, None]).exp_()
            total = weights.sum(dim=1)
            rows[k, part] = total.log().add_(top)
            if k == last:
                effective[part] = effective_number(weights, total)
                share[part] = hardest_share(weights, total, negatives)
                all_masked += found.masked.sum(dim=1)
            del weights
            if divergence is not None:
                divergences[k, part] = divergence
            if tile.back is not None:
                top = torch.maximum(column_top[k], tile.back.amax(dim=0))
                columns[k].mul_((column_top[k] - top).exp_()).add_((tile.back - top).exp_().sum(dim=0))
                column_top[k] = top
        size = sum(tile.bytes for tile in found.tiles)
        if len(cached) * matrix.height == start and size <= room:
            cached.append(found.tiles)
            room -= size
    rows.clamp_(min=lowest)
    return Sums(
        rows=rows,
        columns=_over_ranks(matrix, columns, column_top, all_masked),
        divergences=divergences,
        hardest=hardest,
        mean=mean,
        effective=effective,
        share=share,
        masked=all_masked,
        cached=cached,
    )


def _over_ranks(matrix: Matrix, columns: Tensor, top: Tensor, masked: Tensor) -> Tensor | None:
    """Return the log-sum-exp of the columns, and sum `masked` in place, over ranks."""
    several = rank_and_world(matrix.group)[1] > 1
    if several:
        dist.all_reduce(masked, group=matrix.group)
    if not matrix.both:
        return None
    if several:
        own_top, top = top, top.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=matrix.group)
        columns.mul_((own_top - top).exp_())
        dist.all_reduce(columns, group=matrix.group)
    return columns.log_().add_(top).clamp_(min=torch.finfo(top.dtype).min)


def gradients(matrix: Matrix, sums: Sums, slopes: list[Slopes]) -> list[Gradients]:
    """Return the gradients at each size.  It consumes the cached tiles."""
    by_rows = [torch.empty_like(size.rows) for size in matrix.sizes]
    by_columns = [torch.zeros_like(size.columns) for size in matrix.sizes]
    # If each pair has its tau: sums by row and by column of G_ij s_ij, for the targets' part G of the gradient.
    back_rows, back_columns = torch.zeros_like(sums.rows), matrix.tau.new_zeros(len(matrix.sizes), matrix.count)
    for start in range(0, len(matrix.queries.vectors), matrix.height):
        tiles = sums.cached.pop(0) if sums.cached else matrix.band(start).tiles
        for k, (tile, size, slope) in enumerate(zip(tiles, matrix.sizes, slopes, strict=True)):
            part, by_answer = tile.part, -slope.rows[tile.part]
            # Before `forth` is overwritten, of which `back` may be a view.
            back = None
            if tile.back is not None and sums.columns is not None and slope.columns is not None:
                back = (tile.back - sums.columns[k]).exp_().mul_(slope.columns)
            gradient = tile.forth.sub_(sums.rows[k, part, None]).exp_().mul_(slope.rows[part].sum(dim=1)[:, None])
            if back is not None and slope.columns is not None:
                gradient[:, : matrix.count] += back
                by_answer[:, 0] -= slope.columns[matrix.own][part]
                if tile.similarity is not None:
                    products = back.mul_(tile.similarity)
                    back_rows[k][part] = products.sum(dim=1)
                    back_columns[k] += products.sum(dim=0)
            matrix.set_answers(gradient, start, by_answer)
            if tile.distilled is not None:
                gradient += tile.distilled
            by_rows[k][part] = gradient @ size.columns
            by_columns[k].addmm_(gradient.T, size.rows[part])
    found = []
    for k, (size, rows, columns) in enumerate(zip(matrix.sizes, by_rows, by_columns, strict=True)):
        # Only s / tau contributes: the reward has no gradient.
        if not matrix.learned:
            by_tau = torch.zeros_like(matrix.tau)
        elif matrix.tau.ndim:
            back_columns[k, matrix.own] += (size.rows * rows).sum(dim=1) - back_rows[k]
            by_tau = -back_columns[k] / matrix.tau
        else:
            by_tau = -(size.rows * rows).sum() / matrix.tau
        found.append(Gradients(rows, columns, by_tau))
    return found
