"""What the loss compares: this rank's vectors, padded and gathered from all ranks, and which of them are answers."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipeline.distributed import all_gather_constant, all_gather_rows, rank_and_world
from pipeline.models.chunks import sent


@dataclass(frozen=True)
class Vectors:
    """The rows or columns of a comparison.

    vectors: (k, d), zero where invalid.  valid: bool (k,).  teacher: (k, e), another embedder's, or None.
    ids: int64 (k,) hashes by name, "query" and "target", if given.
    """

    vectors: Tensor
    valid: Tensor
    teacher: Tensor | None
    ids: dict[str, Tensor]

    @classmethod
    def of(cls, vectors: Tensor, valid: Tensor | None, teacher: Tensor | None, **ids: Tensor | None) -> "Vectors":
        if valid is None:
            valid = torch.ones(len(vectors), dtype=torch.bool, device=vectors.device)
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        # Zeroed, not only masked, so that NaN in an invalid row does not spread.
        vectors = vectors.to(dtype).masked_fill(~valid[:, None], 0)
        teacher = None if teacher is None else teacher.detach().to(dtype).masked_fill(~valid[:, None], 0)
        return cls(vectors, valid, teacher, {name: x for name, x in ids.items() if x is not None})

    def padded(self, rows: int) -> "Vectors":
        """Return these with invalid rows appended, `rows` in total."""
        return self._map(lambda x: F.pad(x, (0, 0) * (x.ndim - 1) + (0, rows - len(x))))

    def gathered(self, group: dist.ProcessGroup | None) -> "Vectors":
        return self._map(lambda x: gathered(x, group))

    def followed_by(self, other: "Vectors") -> "Vectors":
        teacher = None if self.teacher is None or other.teacher is None else torch.cat([self.teacher, other.teacher])
        ids = {name: torch.cat([x, other.ids[name]]) for name, x in self.ids.items()}
        return Vectors(torch.cat([self.vectors, other.vectors]), torch.cat([self.valid, other.valid]), teacher, ids)

    def _map(self, f: Callable[[Tensor], Tensor]) -> "Vectors":
        ids = {name: f(x) for name, x in self.ids.items()}
        return Vectors(f(self.vectors), f(self.valid), None if self.teacher is None else f(self.teacher), ids)


@dataclass(frozen=True)
class Answers:
    """The right answers to this rank's n queries: their targets, and p further positives, at most K for a query.

    owners, places, columns: int64 (p,), sorted by owner: whose answer a positive is, its number among the owner's
        positives, and its column.
    table: int64 (n, K): the inverse of owners and places; 0 if absent.
    weights: (n, 1 + K) of the target and the positives, with sum 1, or 0 if all are 0; 0 if absent.
    ids: int64 (n, K) hashes, the target's if absent; None without hashes.
    ends: by query, the number of positives of the queries before it; n + 1 numbers, on the host.
    """

    owners: Tensor
    places: Tensor
    columns: Tensor
    table: Tensor
    weights: Tensor
    ids: Tensor | None
    ends: list[int]

    @classmethod
    def targets_only(cls, like: Tensor) -> "Answers":
        """Return the answers to queries (n, d) that have no further positives."""
        n, none = len(like), torch.zeros(0, dtype=torch.int64, device=like.device)
        return cls(none, none, none, none.reshape(n, 0), like.new_ones(n, 1), None, [0] * (n + 1))

    @classmethod
    def of(
        cls,
        owners: Tensor,
        weights: Tensor,
        target_weights: Tensor,
        ids: Tensor | None,
        target_ids: Tensor | None,
        first_column: int,
    ) -> "Answers":
        """Place positives, whose columns begin with `first_column`.  Raises ValueError for an owner that is no query.

        Positives are few, so the host sorts them: this waits for the device if it has `owners`.
        """
        n, device = len(target_weights), target_weights.device
        numbers = owners.cpu().numpy()
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < n:
            raise ValueError(
                f"positives have owners {numbers.min()} ... {numbers.max()}: they must be from 0 to {n - 1}"
            )
        order = np.argsort(numbers, kind="stable")
        numbers = numbers[order]
        counts = np.bincount(numbers, minlength=n)
        ends = np.concatenate([[0], counts.cumsum()])
        places = np.arange(len(numbers)) - ends[numbers]
        table = np.zeros((n, counts.max(initial=0)), np.int64)
        table[numbers, places] = np.arange(len(numbers))
        by_owner, place, where, rows = (
            sent(torch.from_numpy(x.astype(np.int64)), device) for x in (numbers, places, order, table)
        )
        all_weights = target_weights.new_zeros(n, 1 + rows.shape[1])
        all_weights[:, 0] = target_weights
        all_weights[by_owner, 1 + place] = weights[where]
        all_weights /= all_weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(all_weights.dtype).tiny)
        known = None
        if ids is not None and target_ids is not None:
            known = target_ids[:, None].repeat(1, rows.shape[1])
            known[by_owner, place] = ids[where]
        return cls(by_owner, place, where + first_column, rows, all_weights, known, ends.tolist())

    def similarities(self, rows: Tensor, columns: Tensor, positive: Tensor) -> Tensor:
        """Return (n, 1 + K) similarities of queries (n, d) to their answers; any positive's if absent.

        positive: (n,) those to their targets.
        """
        further = (rows[self.owners] * columns[self.columns]).sum(dim=1)
        return torch.cat([positive[:, None], further[self.table]], dim=1)

    def inside(self, start: int, stop: int) -> tuple[slice, tuple[Tensor, Tensor]]:
        """Return which positives belong to the queries start ... stop - 1, and their places in that tile."""
        part = slice(self.ends[start], self.ends[min(stop, len(self.ends) - 1)])
        return part, (self.owners[part] - start, self.columns[part])


def gathered(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return (all_gather_rows if x.requires_grad else all_gather_constant)(x, group)


def most_of_any_rank(query: Tensor, counts: tuple[int, int], group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return the largest of each count on any rank; ValueError if ranks differ in their number of rows."""
    rows = len(query)
    if rank_and_world(group)[1] == 1:
        return counts
    sizes = sent(torch.tensor([*counts, rows, -rows]), query.device)
    dist.all_reduce(sizes, dist.ReduceOp.MAX, group=group)
    first, second, largest, smallest = sizes.tolist()
    if largest != -smallest:
        raise ValueError(f"ranks have between {-smallest} and {largest} rows: all need the same number")
    return first, second
