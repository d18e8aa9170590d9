"""Scores of tasks from embeddings, exact and in tiles; and the figures that papers print."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.evaluation.results import Case, Result, Similarities
from pipeline.evaluation.tasks import Ranking, Retrieval, Task
from pipeline.models.chunks import UNIT_TOLERANCE

Take = Callable[[np.ndarray], np.ndarray]  # (n,) rows of the collection -> their embeddings, (n, D) float32 unit rows

_SAMPLE = 256  # items that tell whether a model tells items apart
_COLLAPSED = 1e-3  # of unit vectors: how far apart two may lie that are one but for rounding
_GROUP = 32  # queries of a ranking that share a product: few, or most of it is of lists that have nothing in common


@dataclass(frozen=True)
class Scores:
    """Of a task's Q queries. A candidate is right or wrong for a query; the best is the most similar.

    rank: (Q,) int64, 1 + how many wrong candidates are strictly more similar than the best right one.
    tied: (Q,) bool, a wrong candidate is exactly as similar as the best right one.
    positive: (Q,) float32, the similarity of the best right candidate.
    hardest: (Q,) float32, of the best wrong one; -inf where there is none.
    right: (Q,) int64, the number of the best right candidate among the query's; 0 in a Ranking.
    first: (Q,) int64, of the candidate that ranks first: the best right one if its rank is 1, else the best wrong one.
    chance: the expected share of queries whose rank is 1, if candidates are drawn at random.
    equal: (Q,) int64, how many wrong candidates are exactly as similar as the best right one, and not the same item.
    """

    rank: np.ndarray
    tied: np.ndarray
    positive: np.ndarray
    hardest: np.ndarray
    right: np.ndarray
    first: np.ndarray
    chance: float
    equal: np.ndarray | int = 0

    @property
    def worst_rank(self) -> np.ndarray:
        """(Q,) int64: the rank by which figures are made, where ties do not flatter.

        What is exactly as similar as the right one and another item ranks before it: a model that gives all items one
        vector finds nothing. A copy of the right one, which no model can tell from it, does no harm, as MMEB has it.
        What is a copy, Collection says.
        """
        return self.rank + self.equal


def scores_of(task: Task, take: Take, *, device: torch.device | str = "cpu", tile_bytes: int = 1 << 28) -> Scores:
    """Compare each query with its candidates.

    The result is the same to the bit whatever the tiles, kernels and threads are.
    device: where the products are made; it must have float64.
    tile_bytes: about what a tile takes; a few are in memory, however many queries and candidates there are.

    Raises PipelineError for an embedding that is no unit vector (a NaN would count as right: nothing is larger), for a
    task without queries and for a query without a right candidate.
    """
    if not len(task.queries):
        raise PipelineError(f"{task.name} has no queries; check its annotations")
    if isinstance(task, Ranking):
        compare, chances = _ranked, [1 / len(candidates) for candidates in task.candidates]
    else:
        compare, chances = _retrieved, [len(np.unique(numbers)) / len(task.candidates) for numbers in task.right]
        if not all(chances):
            raise PipelineError(f"{task.name}: query {chances.index(0)} has no right candidate; check its annotations")
    vectors = partial(_vectors, task.name, take, device)
    dimension = vectors(task.queries[:1]).shape[1]
    parts = zip(*compare(task, vectors, dimension, tile_bytes), strict=True)
    above, tied, positive, hardest, right, wrong, equal = (np.concatenate(part) for part in parts)
    first = np.where(above == 0, right, wrong)
    return Scores(1 + above, tied, positive, hardest, right, first, float(np.mean(chances)), equal)


# Of some queries, (q,) each: wrong candidates above the best right one, whether any equals it, its similarity, that of
# the best wrong one, the numbers of both, and how many equal it that are other items.
_Part = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_Vectors = Callable[[np.ndarray], Tensor]


def _ranked(task: Ranking, vectors: _Vectors, dimension: int, tile_bytes: int) -> Iterable[_Part]:
    height = max(1, tile_bytes // (16 * dimension))
    for group in _cuts(len(task.queries), _GROUP):
        queries, lists = vectors(task.queries[group]), task.candidates[group]
        distinct, places = np.unique(np.concatenate(lists), return_inverse=True)
        tiles = [_similarities(queries, vectors(distinct[tile])) for tile in _cuts(len(distinct), height)]
        rows = torch.cat(tiles, dim=1).cpu().numpy()
        own = [row[chosen] for row, chosen in zip(rows, _split(places, lists), strict=True)]
        yield (
            np.array([(row[1:] > row[0]).sum() for row in own]),
            np.array([(row[1:] == row[0]).any() for row in own]),
            np.array([row[0] for row in own]),
            np.array([row[1:].max(initial=-np.inf) for row in own]),
            np.zeros(len(own), np.int64),
            np.array([1 + row[1:].argmax() if len(row) > 1 else 0 for row in own]),
            np.array([((row == row[0]) & (items != items[0])).sum() for row, items in zip(own, lists, strict=True)]),
        )


def _split(joined: np.ndarray, lists: list[np.ndarray]) -> list[np.ndarray]:
    return np.split(joined, np.cumsum([len(each) for each in lists])[:-1])


def _retrieved(task: Retrieval, vectors: _Vectors, dimension: int, tile_bytes: int) -> Iterable[_Part]:
    candidates, width = task.candidates, dimension * task.candidates[0].size
    items = np.sort(candidates.reshape(len(candidates), -1), axis=1)
    same = np.unique(items, axis=0, return_inverse=True)[1].reshape(-1)  # a number for each candidate's items
    for group in _cuts(len(task.queries), max(1, tile_bytes // (16 * dimension))):
        queries, right = vectors(task.queries[group]), task.right[group]
        height = max(1, tile_bytes // (16 * (width + len(queries))))
        owner = np.repeat(np.arange(len(right)), [len(numbers) for numbers in right])
        # Pairs of a query and a right candidate, each once, by the candidate's number.
        number, owner = np.unique(np.stack([np.concatenate(right), owner]), axis=1)

        # Each query's best right candidate first: the others are counted by it.
        pairs = []
        for tile in _cuts(len(number), height):
            distinct, places = np.unique(number[tile], return_inverse=True)
            chosen = vectors(candidates[distinct])[_index(places, queries)]
            pairs.append(torch.linalg.vecdot(queries[_index(owner[tile], queries)], chosen).float())
        similarity = torch.cat(pairs).cpu().numpy()
        order = np.lexsort((number, -similarity, owner))
        best = order[np.unique(owner[order], return_index=True)[1]]

        positive = torch.as_tensor(similarity[best], device=queries.device)
        above, wrong, equal = (torch.zeros_like(positive, dtype=torch.int64) for _ in range(3))
        own = _index(same[number[best]], queries)[:, None]
        tied, hardest = torch.zeros_like(positive, dtype=torch.bool), torch.full_like(positive, -torch.inf)
        for tile in _cuts(len(candidates), height):
            rows = _similarities(queries, vectors(candidates[tile]))
            here = slice(*np.searchsorted(number, (tile.start, tile.stop)))
            rows[_index(owner[here], rows), _index(number[here] - tile.start, rows)] = -torch.inf
            above += (rows > positive[:, None]).sum(dim=1)
            ties = rows == positive[:, None]
            tied |= ties.any(dim=1)
            equal += (ties & (_index(same[tile], rows) != own)).sum(dim=1)
            largest, place = rows.max(dim=1)
            wrong = torch.where(largest > hardest, place + tile.start, wrong)
            hardest = torch.maximum(largest, hardest)
        counted = [x.cpu().numpy() for x in (above, tied, positive, hardest, wrong, equal)]
        yield *counted[:4], number[best], *counted[4:]


def _similarities(queries: Tensor, candidates: Tensor) -> Tensor:
    """(q, c) float32, of float64 rows made by `_fixed`.

    What is compared is what is reported: the exact similarities' nearest float32.
    """
    return (queries @ candidates.T).float()


def _vectors(name: str, take: Take, device: torch.device | str, rows: np.ndarray) -> Tensor:
    """(n, D) float64 vectors, by `_fixed`, of the items in rows (n,), or of the means of K items each in rows (n, K).

    name: of the task, for errors.
    """
    taken = torch.tensor(take(rows.ravel()), device=device)
    lengths = torch.linalg.vector_norm(taken, dim=1)
    if (wrong := ~((lengths - 1).abs() <= UNIT_TOLERANCE)).any():
        place = int(wrong.nonzero()[0])
        raise PipelineError(
            f"{name}: the embedding of item {rows.flat[place]} is no unit vector, its length is {lengths[place]:.3g}; "
            "check the model's weights, whether it overflows, and that its vectors are normalised in float32"
        )
    vectors = _fixed(taken.double())
    if rows.ndim == 1:
        return vectors
    # All exact but division and square root, which no tile changes. A mean of zero stays zero.
    means = _fixed(vectors.view(*rows.shape, -1).sum(dim=1) / rows.shape[1])
    return _fixed(means / means.square().sum(dim=1, keepdim=True).sqrt().clamp(min=_STEP))


_STEP = 2.0**-26


def _fixed(vectors: Tensor) -> Tensor:
    """Round float64 unit vectors in place to multiples of 2^-26, so that their dot products are exact.

    Each product is a multiple of 2^-52, and no sum of some of them exceeds 1 by Cauchy and Schwarz, or 2 for vectors
    within the tolerance: float64 holds all partial sums, and the order in which a kernel adds does not matter.
    Otherwise the last digits would depend on kernel, tile and threads, and a candidate identical to the right one could
    count as strictly more similar. A similarity moves by about 1e-8, less than a float32 near 1 resolves.
    """
    return vectors.mul_(1 / _STEP).round_().mul_(_STEP)


def _index(numbers: np.ndarray, like: Tensor) -> Tensor:
    return torch.as_tensor(numbers, device=like.device)


def _cuts(count: int, size: int) -> Iterable[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def precision_at_1(scores: Scores) -> float:
    """Share of queries whose right candidate ranks first."""
    return recall_at(scores, 1)


def recall_at(scores: Scores, k: int) -> float:
    """Share of queries with a right candidate among the first k; of a classification, its top-k accuracy.

    As CLIP's papers count R@k of an image with several captions: any of them will do.
    """
    return float(np.mean(scores.rank <= k))


def median_rank(scores: Scores) -> float:
    """MdR of the text-video papers, from 1 on."""
    return float(np.median(scores.rank))


def mean_rank(scores: Scores) -> float:
    """MnR of the text-video papers, from 1 on."""
    return float(np.mean(scores.rank))


def worst_queries(scores: Scores, count: int) -> np.ndarray:
    """The numbers of up to `count` queries, the lowest positive minus hardest similarity first."""
    return np.argsort(scores.positive - scores.hardest, kind="stable")[:count]


def collapsed(task: Task, take: Take) -> bool:
    """Whether the model gives all queries, or all candidates, of a task one vector but for rounding.

    By some hundred of each, spread over the task.
    """
    candidates = np.concatenate(task.candidates) if isinstance(task, Ranking) else task.candidates.ravel()
    for rows in (task.queries, candidates):
        rows = np.unique(rows)
        vectors = take(rows[:: -(-len(rows) // _SAMPLE)])
        if len(vectors) > 1 and np.linalg.norm(vectors - vectors[0], axis=1).max() < _COLLAPSED:
            return True
    return False


def result_of(tasks: list[Task], scores: list[Scores], worst: list[Case], *, collapsed: bool = False) -> Result:
    """The result of one dataset: of a Ranking, or of a Retrieval for each direction.

    The direction that begins with a text comes first, whatever the order of the tasks: its R@1 is the dataset's score.
    worst: of all directions.  collapsed: see `collapsed`.
    """
    fair = [replace(own, rank=own.worst_rank) for own in scores]
    both = sorted(zip(tasks, fair, strict=True), key=lambda pair: not _direction(pair[0]).startswith("t"))
    task, first = both[0]
    if isinstance(task, Ranking):
        group, in_distribution, language = task.meta_task, task.in_distribution, ""
    else:
        group = "zero-shot classification" if task.kind == "classification" else task.kind
        in_distribution, language = None, task.language
    return Result(
        group=group,
        in_distribution=in_distribution,
        language=language,
        queries={_direction(task): len(own.rank) for task, own in both},
        metrics={name: value for task, own in both for name, value in _metrics(task, own).items()},
        chance=first.chance,
        ties=sum(int(own.tied.sum()) for own in scores),
        similarities=Similarities.of(
            np.concatenate([own.positive for own in scores]), np.concatenate([own.hardest for own in scores])
        ),
        worst=worst,
        collapsed=collapsed,
    )


def _direction(task: Task) -> str:
    return "" if isinstance(task, Ranking) else task.direction


def _metrics(task: Task, scores: Scores) -> dict[str, float]:
    if isinstance(task, Ranking):
        return {"P@1": precision_at_1(scores)}
    if task.kind == "classification":
        return {f"top-{k}": recall_at(scores, k) for k in (1, 5)}
    figures = {f"R@{k}": recall_at(scores, k) for k in (1, 5, 10)}
    figures |= {"MdR": median_rank(scores), "MnR": mean_rank(scores)}
    return {f"{task.direction} {name}": value for name, value in figures.items()}
