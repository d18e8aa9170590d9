"""The matrix of logits of queries and columns, a tile of rows at a time."""

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.models.chunks import sent
from pipeline.objectives.contrastive.vectors import Answers, Vectors


@dataclass(frozen=True)
class Size:
    """The vectors at one of the sizes that have a loss.

    rows: (n, d) this rank's queries.  columns: (N + M, d).  positives: (N,) similarities of all pairs.
    answers: (n, 1 + K) those of this rank's queries to their answers.
    """

    rows: Tensor
    columns: Tensor
    positives: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Tile:
    """Logits of the queries `part`, -inf where a pair is not a negative.

    forth: (rows, N + M), for the queries' losses.  back: (rows, N), for the targets' losses; a view of forth unless
    rows and columns differ in their masks or temperatures; None if the targets have no loss.
    distilled: (rows, N + M) derivative of the distillation by the similarities, or None.
    similarity: (rows, N), finite, only if the targets have a loss and each pair its own learned temperature.
    """

    part: slice
    forth: Tensor
    back: Tensor | None
    distilled: Tensor | None
    similarity: Tensor | None

    @property
    def bytes(self) -> int:
        tensors = [x for x in (self.forth, self.back, self.distilled, self.similarity) if x is not None]
        return sum({x.data_ptr(): x.nbytes for x in reversed(tensors)}.values())


@dataclass(frozen=True)
class Band:
    """The tiles of the same queries at all sizes.

    teacher: (rows, N + M) the teacher's similarities, or None.  masked: int64 (2, rows) pairs masked by content or
    margin, and of these by the margin alone, at the last size.  divergences: for each size, of the teacher from each
    query, (rows,), or None.
    """

    tiles: list[Tile]
    teacher: Tensor | None
    masked: Tensor
    divergences: list[Tensor | None]


@dataclass(frozen=True)
class Matrix:
    """This rank's n queries (rows) with all ranks' N targets and M extra vectors (columns), a tile of rows at a time.

    own: the columns of this rank's targets.  tau: () or (N,), by pair.  learned: whether tau needs a gradient.
    margin: a number, (N,), or None.  both: whether the targets have a loss too.  by_teacher: whether the rewards are
    the teacher's similarities.  distill: the slope of each query's divergence (n,), divided by its tau, and the
    teacher's temperature; or None.  height: rows per tile.
    """

    queries: Vectors
    targets: Vectors
    extra: Vectors
    sizes: list[Size]
    answers: Answers
    own: slice
    alpha: float
    tau: Tensor
    learned: bool
    margin: float | Tensor | None
    both: bool
    by_teacher: bool
    distill: tuple[Tensor, float] | None
    height: int
    group: dist.ProcessGroup | None

    @property
    def count(self) -> int:
        return len(self.sizes[0].positives)

    @cached_property
    def _scale(self) -> Tensor:
        """The ratio of the similarity's part of a logit to the similarity, () or (N,)."""
        return 1 / self.tau if self.by_teacher else 1 / self.tau + self.alpha

    @cached_property
    def _factors(self) -> list[Tensor]:
        """For each size the left factor (n, d) of this part of the logits; the columns are the right one."""
        scale = self._of_rows(self._scale)
        return [size.rows * scale for size in self.sizes]

    @cached_property
    def _bias(self) -> tuple[Tensor, Tensor]:
        """(n, 1) and (1, N + M): 0, or -inf for invalid rows and columns."""
        valid = self.queries.valid[:, None], torch.cat([self.targets.valid, self.extra.valid])[None]
        rows, columns = (torch.zeros_like(x, dtype=self.tau.dtype).masked_fill_(~x, -torch.inf) for x in valid)
        return rows, columns

    @cached_property
    def _limits(self) -> list[Tensor]:
        """For each size the largest similarity of a negative of each pair, (N,)."""
        return [size.positives + cast(float | Tensor, self.margin) for size in self.sizes]

    @cached_property
    def most_negatives(self) -> Tensor:
        """(n,) valid columns other than each query's answers; undefined for an invalid row."""
        further = sent(torch.tensor(self.answers.ends).diff(), self.tau.device)
        return self.targets.valid.sum() + self.extra.valid.sum() - 1 - further

    @cached_property
    def _teacher(self) -> Tensor | None:
        """(N + M, e) the teacher's vectors of the columns."""
        if self.targets.teacher is None or self.extra.teacher is None:
            return None
        return torch.cat([self.targets.teacher, self.extra.teacher])

    @cached_property
    def _target_ids(self) -> Tensor:
        """int64 (N + M,) hashes of the columns."""
        return torch.cat([self.targets.ids["target"], self.extra.ids["target"]])

    def _of_rows(self, x: Tensor, part: slice = slice(None)) -> Tensor:
        """Return a pair's number x, () or (N,), for the rows of a tile: () or (rows, 1)."""
        return x[self.own][part, None] if x.ndim else x

    def band(self, start: int) -> Band:
        """Return the tile of the queries from `start` at each size.  All share the masks by content."""
        part = slice(start, start + self.height)
        alike = self._alike(part)
        teacher: Tensor | None = None
        if self.queries.teacher is not None and self._teacher is not None:
            teacher = self.queries.teacher[part] @ self._teacher.T
        tiles, masked, divergences = zip(
            *(self._tile(part, k, alike, teacher) for k in range(len(self.sizes))), strict=True
        )
        return Band(list(tiles), teacher, masked[-1], list(divergences))

    def _tile(
        self, part: slice, k: int, alike: Tensor | None, teacher: Tensor | None
    ) -> tuple[Tile, Tensor, Tensor | None]:
        """Return a tile at size k, the number of pairs masked in each row (see `Band.masked`), and the divergences.

        alike: bool (rows, N + M), or None.  teacher: (rows, N + M) the teacher's similarities, or None.
        """
        size, count, (row_bias, column_bias) = self.sizes[k], self.count, self._bias
        forth = row_bias[part] + column_bias
        if self.by_teacher and teacher is not None:
            forth.add_(teacher, alpha=self.alpha)
        forth.addmm_(self._factors[k][part], size.columns.T)
        self.set_answers(forth, part.start, forth.new_full((), -torch.inf))
        scale = self._of_rows(self._scale, part)
        policy = self._without_reward(forth, teacher)
        back = forth[:, :count] if self.both else None
        if self.both and self.tau.ndim:
            back = policy[:, :count] * (self._scale / scale)
            if self.by_teacher and teacher is not None:
                back.add_(teacher[:, :count], alpha=self.alpha)
        finite: Tensor | None = None
        if self.learned and self.both and self.tau.ndim:  # before `forth`, which `policy` may be, loses more pairs
            finite = (policy[:, :count] / scale).clamp_(min=torch.finfo(forth.dtype).min)
        near = alike
        if self.margin is not None:
            limit, similarity = self._limits[k], policy / scale
            near = similarity > limit[self.own][part, None]
            of_targets = similarity[:, :count] > limit
            if alike is not None:
                near |= alike
                of_targets |= alike[:, :count]
            back = None if back is None else back.masked_fill(of_targets, -torch.inf)
        elif back is not None and near is not None and self.tau.ndim:
            back.masked_fill_(near[:, :count], -torch.inf)
        masked = torch.zeros(2, len(forth), dtype=torch.int64, device=forth.device)
        if near is not None:
            masked[0] = (near & (forth > -torch.inf)).sum(dim=1)
            if self.margin is not None:
                masked[1] = masked[0] if alike is None else masked[0] - (alike & (forth > -torch.inf)).sum(dim=1)
            forth.masked_fill_(near, -torch.inf)
        distilled = divergence = None
        if self.distill is not None and teacher is not None:
            divergence, distilled = self._distilled(
                part, size, forth, policy / (scale * self._of_rows(self.tau, part)), teacher
            )
        return Tile(part, forth, back, distilled, finite), masked, divergence

    def _without_reward(self, logits: Tensor, teacher: Tensor | None) -> Tensor:
        """Return a tile's similarities (rows, N + M), multiplied by _scale; -inf where the logits are."""
        return logits if teacher is None or not self.by_teacher else logits.sub(teacher, alpha=self.alpha)

    def of_negatives(self, tile: Tile, largest: Tensor, count: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the largest and the mean similarity of each query's negatives, (rows,); without any -inf and 0.

        largest: (rows,) their largest logits.  count: int64 (rows,) their number.
        """
        policy = self._without_reward(tile.forth, teacher)
        if self.by_teacher:  # a copy
            largest = policy.amax(dim=1)
        to_finite = policy.nan_to_num_ if self.by_teacher else policy.nan_to_num
        finite = to_finite(nan=torch.nan, posinf=torch.inf, neginf=0.0)
        scale = self._of_rows(self._scale, tile.part).squeeze(-1)
        return largest / scale, finite.sum(dim=1) / count.clamp(min=1) / scale

    def _distilled(
        self, part: slice, size: Size, forth: Tensor, mine: Tensor, teacher: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the teacher's divergence from each query (rows,), and its part of the gradient (rows, N + M).

        mine: (rows, N + M) similarities / tau, which it overwrites.
        """
        slope, temperature = cast(tuple[Tensor, float], self.distill)
        hidden = forth == -torch.inf
        self.set_answers(hidden, part.start, torch.zeros_like(hidden[0, 0]))
        self.set_answers(mine, part.start, size.answers[part] / self._of_rows(self.tau, part))
        mine = mine.masked_fill_(hidden, -torch.inf).log_softmax(dim=1)
        theirs = (teacher / temperature).masked_fill_(hidden, -torch.inf).log_softmax(dim=1)
        shares = theirs.exp()
        divergence = (theirs.sub_(mine).masked_fill_(hidden, 0).mul_(shares)).sum(dim=1)
        return divergence, mine.exp_().sub_(shares).mul_(slope[part, None])

    def _alike(self, part: slice) -> Tensor | None:
        """Return bool (rows, N + M): pairs that are not negatives because of their content; None without hashes."""
        ids, count = self.queries.ids, self.count
        if not ids:
            return None
        rows = len(self.queries.valid[part])
        alike = torch.zeros(rows, count + len(self.extra.valid), dtype=torch.bool, device=self.tau.device)
        for name, hashes in ids.items():
            alike[:, :count] |= hashes[part, None] == self.targets.ids[name]
        if len(ids) == 2:  # one pair's query may be another's target, for example if both are captions
            for name, other in (("query", "target"), ("target", "query")):
                alike[:, :count] |= ids[name][part, None] == self.targets.ids[other]
        for name in ids.keys() & self.extra.ids.keys():
            alike[:, count:] |= ids[name][part, None] == self.extra.ids[name]
        if self.answers.ids is not None:
            for hashes in self.answers.ids[part].unbind(dim=1):
                alike |= hashes[:, None] == self._target_ids
        return alike

    def set_answers(self, tile: Tensor, start: int, values: Tensor) -> None:
        """Write the values, () or (rows, 1 + K), at the queries' answers in a tile that begins at `start`."""
        further, (rows, columns) = self.answers.inside(start, start + self.height)
        of_targets, of_further = values, values
        if values.ndim:
            of_targets, of_further = values[:, 0], values[rows, 1 + self.answers.places[further]]
        tile.diagonal(self.own.start + start).copy_(of_targets)
        if further.stop > further.start:
            tile.index_put_((rows, columns), of_further)
