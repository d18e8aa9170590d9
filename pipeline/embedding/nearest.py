"""Rank candidates for queries: exactly, and independently of tiles, threads, kernels and devices.

A float32 product of all pairs is fast, but its last digits depend on the kernel. It only decides which pairs can be
among the nearest: its error has a proven bound. The similarities of these few are then computed exactly.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.exact import fixed

_QUERIES = 4096  # in one product: candidates are read once for each such block
_LEAST = -2.0  # below all similarities, above -inf, which marks excluded candidates
_NONE = torch.iinfo(torch.int64).min
_LOW = 0xFFFFFFFF  # a candidate's number fills the lower half of a key: at most 4 billion


@dataclass(frozen=True)
class Candidates:
    """What queries are compared with.

    vectors: (N, width) float32 unit rows, perhaps in a memory-mapped file.
    numbers: (C,) int64, rising: the rows of `vectors` that are candidates.
    """

    vectors: np.ndarray
    numbers: np.ndarray

    def tile(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Return candidates start..stop-1 as (stop - start, width) float32 from `fixed`."""
        numbers = self.numbers[start:stop]
        first, last = int(numbers[0]), int(numbers[-1])
        rows = self.vectors[first : last + 1] if last - first < len(numbers) else self.vectors[numbers]
        return fixed(torch.tensor(np.asarray(rows), device=device))


def nearest(
    queries: np.ndarray,
    candidates: Candidates,
    depth: int,
    excluded: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    device: torch.device | str = "cpu",
    tile_bytes: int = 1 << 28,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `depth` most similar candidates of each query, the most similar first; equal ones by their number.

    queries: (q, width) float32 unit rows.  excluded: (E,) rows of queries and (E,) numbers of candidates, which are
        left out for them.
    device: for the products; it must support float64.  tile_bytes: approximate size of a tile, of which a few are in
        memory at a time, for any number of candidates.

    Returns (q, depth) int64 numbers, -1 where there are fewer candidates, and their (q, depth) float32 similarities,
    then -inf. The similarity of two rows is their exact dot product (see `fixed`), rounded to float32.
    """
    device = torch.device(device)
    owners, numbers = excluded or (np.empty(0, np.int64), np.empty(0, np.int64))
    places = np.searchsorted(candidates.numbers, numbers)
    found = places < len(candidates.numbers)
    found[found] = candidates.numbers[places[found]] == numbers[found]
    owners, places = owners[found], places[found]
    parts = []
    for start in range(0, len(queries), _QUERIES):
        block = torch.tensor(queries[start : start + _QUERIES], device=device)
        here = (start <= owners) & (owners < start + len(block))
        by_place = np.argsort(places[here], kind="stable")
        left_out = owners[here][by_place] - start, places[here][by_place]
        parts.append(_keys_of_nearest(fixed(block), candidates, depth, left_out, tile_bytes).cpu())
    keys = torch.cat(parts) if parts else torch.empty(0, depth, dtype=torch.int64)
    return _decoded(keys)


def similarities(queries: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the (n,) similarities of the rows of two (n, width) arrays, as `nearest` computes them."""
    rows = (fixed(torch.tensor(each)).double() for each in (queries, others))
    return torch.linalg.vecdot(*rows).float().numpy()


@torch.no_grad()
def _keys_of_nearest(
    queries: Tensor, candidates: Candidates, depth: int, excluded: tuple[np.ndarray, np.ndarray], tile_bytes: int
) -> Tensor:
    """Return (q, depth) keys, falling; see `_keys`.  excluded: rows of queries, and places of candidates, rising."""
    width = queries.shape[1]
    # |computed - exact| <= n u / (1 - n u) sum |q_i c_i| for n products in any order, u = 2^-24 (Higham, Accuracy and
    # Stability of Numerical Algorithms, 3.1); the sum is at most 1, up to the tolerance for unit vectors.
    slack = 1.001 * width * 2.0**-24 / (1 - width * 2.0**-24)
    rounding = 2.0**-23  # of an exact similarity to float32
    height = max(1, tile_bytes // (4 * (len(queries) + 2 * width)))
    keys = torch.full((len(queries), depth), _NONE, device=queries.device)
    for start in range(0, len(candidates.numbers), height):
        stop = min(start + height, len(candidates.numbers))
        tile = candidates.tile(start, stop, queries.device)
        near = _products(queries, tile)
        here = slice(*np.searchsorted(excluded[1], (start, stop)))
        near[_index(excluded[0][here], near), _index(excluded[1][here] - start, near)] = -torch.inf
        least = _scores(keys[:, -1:]) - slack - rounding
        if stop - start >= depth and bool((least == -torch.inf).any()):  # mostly in the first tile
            least = torch.maximum(least, near.topk(depth, dim=1).values[:, -1:] - 2 * slack - rounding)
        rows, columns = (near >= least.clamp(min=_LEAST)).nonzero(as_tuple=True)
        if len(rows):
            scores = _exact(queries, tile, rows, columns, tile_bytes)
            numbers = _index(candidates.numbers[start:stop], near)[columns]
            keys = _merged(keys, rows, _keys(scores, numbers))
    return keys


def _exact(queries: Tensor, tile: Tensor, rows: Tensor, columns: Tensor, tile_bytes: int) -> Tensor:
    """Return the (p,) exact similarities of pairs of a query and a candidate, rounded to float32."""
    size = max(1, tile_bytes // (16 * queries.shape[1]))
    pairs = zip(rows.split(size), columns.split(size), strict=True)
    return torch.cat(
        [torch.linalg.vecdot(queries[row].double(), tile[column].double()) for row, column in pairs]
    ).float()


def _merged(keys: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """Return the largest (q, depth) of keys (q, depth) and of new ones (p,), which belong to `rows` (p,), rising."""
    counts = torch.bincount(rows, minlength=len(keys))
    within = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    padded = torch.full((len(keys), int(counts.max())), _NONE, device=keys.device)
    padded[rows, within] = new
    return torch.cat([keys, padded], dim=1).topk(keys.shape[1], dim=1).values


def _keys(scores: Tensor, numbers: Tensor) -> Tensor:
    """Return int64 keys, larger for higher scores (float32), and for lower numbers where scores are equal."""
    bits = (scores + 0.0).view(torch.int32).long()  # -0.0 becomes 0.0
    return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32) | (_LOW - numbers)


def _scores(keys: Tensor) -> Tensor:
    bits = (keys >> 32).int()
    scores = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
    return torch.where(keys == _NONE, -torch.inf, scores)


def _decoded(keys: Tensor) -> tuple[np.ndarray, np.ndarray]:
    numbers = torch.where(keys == _NONE, -1, _LOW - (keys & _LOW))
    return numbers.numpy(), _scores(keys).numpy()


def _index(numbers: np.ndarray, like: Tensor) -> Tensor:
    return torch.as_tensor(numbers, device=like.device)


def _products(queries: Tensor, tile: Tensor) -> Tensor:
    """Return (q, c) products with the error of float32, see `configure_device`."""
    return queries @ tile.T
