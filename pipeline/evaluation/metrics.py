"""Compute exact ranks from embeddings, in tiles, and the metrics that papers report."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.evaluation.exact import STEP, fixed
from pipeline.evaluation.report import Case, DatasetResult, Similarities
from pipeline.evaluation.tasks import Ranking, Retrieval, Task
from pipeline.models.chunks import UNIT_TOLERANCE
from pipeline.models.compact import Form

Take = Callable[[np.ndarray], np.ndarray]  # (n,) rows of the collection -> (n, D) float32 unit vectors

_SAMPLE = 256  # items that are tested for collapse
_COLLAPSED = 1e-3  # distance of unit vectors below which they count as equal
_GROUP = 32  # queries of a ranking in one product; with more, most of the computed similarities would not be needed


@dataclass(frozen=True)
class Scores:
    """Ranks and similarities of a task's Q queries. "Best" means most similar.

    rank: (Q,) int64, 1 + the number of wrong candidates that are strictly more similar than the best right one.
    tied: (Q,) bool, whether a wrong candidate is exactly as similar as the best right one.
    positive: (Q,) float32, the similarity of the best right candidate.
    hardest: (Q,) float32, the similarity of the best wrong candidate; -inf without one.
    right: (Q,) int64, the number of the best right candidate; 0 in a Ranking.
    first: (Q,) int64, the number of the first candidate: the best right one if its rank is 1, else the best wrong one.
    chance: the expected share of queries with rank 1 in a random ranking.
    equal: (Q,) int64, the number of wrong candidates exactly as similar as the best right one that are other items.
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
        """(Q,) int64: the rank that metrics use. Ties count against the model.

        Another item that is exactly as similar as the right candidate ranks before it, so a model that gives all items
        the same vector scores zero. A copy of the right candidate, as defined by Collection, does not, as in MMEB.
        """
        return self.rank + self.equal


def scores_of(
    task: Task,
    take: Take,
    *,
    form: Form | None = None,
    device: torch.device | str = "cpu",
    tile_bytes: int = 1 << 28,
) -> Scores:
    """Compare each query with its candidates.

    The result is bitwise independent of tiles, kernels and threads.
    form: of the candidates' vectors; None: as they are. A candidate of several items is the mean of their full vectors.
    device: for the matrix products; it must support float64.
    tile_bytes: approximate size of a tile; a few are in memory at a time, for any number of queries and candidates.

    Raises PipelineError for an embedding that is not a unit vector (a NaN would count as right, as nothing is larger),
    for a task without queries, and for a query without a right candidate.
    """
    if not len(task.queries):
        raise PipelineError(f"{task.name} has no queries; check its annotations")
    vectors = partial(_vectors, task.name, take, device)
    of_queries = partial(vectors, form.query if form else None)
    of_candidates = partial(vectors, form.document if form else None)
    dimension = of_queries(task.queries[:1]).shape[1]
    if isinstance(task, Ranking):
        chances = [1 / len(candidates) for candidates in task.candidates]
        parts = _ranked(task, of_queries, of_candidates, dimension, tile_bytes)
    else:
        chances = [len(np.unique(numbers)) / len(task.candidates) for numbers in task.right]
        if not all(chances):
            raise PipelineError(f"{task.name}: query {chances.index(0)} has no right candidate; check its annotations")
        parts = _retrieved(task, of_queries, of_candidates, dimension, tile_bytes)
    columns = zip(*parts, strict=True)
    above, tied, positive, hardest, right, wrong, equal = (np.concatenate(column) for column in columns)
    first = np.where(above == 0, right, wrong)
    return Scores(1 + above, tied, positive, hardest, right, first, float(np.mean(chances)), equal)


# (q,) arrays for some queries: the number of wrong candidates above the best right one, whether any ties with it, the
# similarities of the best right and the best wrong candidate, their numbers, and the number of ties with other items.
_Part = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_Vectors = Callable[[np.ndarray], Tensor]


def _ranked(
    task: Ranking, of_queries: _Vectors, of_candidates: _Vectors, dimension: int, tile_bytes: int
) -> Iterable[_Part]:
    height = max(1, tile_bytes // (16 * dimension))
    for group in _cuts(len(task.queries), _GROUP):
        queries, lists = of_queries(task.queries[group]), task.candidates[group]
        distinct, places = np.unique(np.concatenate(lists), return_inverse=True)
        tiles = [_similarities(queries, of_candidates(distinct[tile])) for tile in _cuts(len(distinct), height)]
        rows = torch.cat(tiles, dim=1).cpu().numpy()
        parts = np.split(places, np.cumsum([len(each) for each in lists])[:-1])
        own = [row[chosen] for row, chosen in zip(rows, parts, strict=True)]
        yield (
            np.array([(row[1:] > row[0]).sum() for row in own]),
            np.array([(row[1:] == row[0]).any() for row in own]),
            np.array([row[0] for row in own]),
            np.array([row[1:].max(initial=-np.inf) for row in own]),
            np.zeros(len(own), np.int64),
            np.array([1 + row[1:].argmax() if len(row) > 1 else 0 for row in own]),
            np.array([((row == row[0]) & (items != items[0])).sum() for row, items in zip(own, lists, strict=True)]),
        )


def _retrieved(
    task: Retrieval, of_queries: _Vectors, of_candidates: _Vectors, dimension: int, tile_bytes: int
) -> Iterable[_Part]:
    candidates, width = task.candidates, dimension * task.candidates[0].size
    items = np.sort(candidates.reshape(len(candidates), -1), axis=1)
    same = np.unique(items, axis=0, return_inverse=True)[1].reshape(-1)  # equal for candidates with the same items
    for group in _cuts(len(task.queries), max(1, tile_bytes // (16 * dimension))):
        queries, right = of_queries(task.queries[group]), task.right[group]
        height = max(1, tile_bytes // (16 * (width + len(queries))))
        owner = np.repeat(np.arange(len(right)), [len(numbers) for numbers in right])
        # Unique pairs of a query and a right candidate, sorted by the candidate's number.
        number, owner = np.unique(np.stack([np.concatenate(right), owner]), axis=1)

        # First find each query's best right candidate; the others are compared with it.
        pairs = []
        for tile in _cuts(len(number), height):
            distinct, places = np.unique(number[tile], return_inverse=True)
            chosen = of_candidates(candidates[distinct])[_index(places, queries)]
            pairs.append(torch.linalg.vecdot(queries[_index(owner[tile], queries)], chosen).float())
        similarity = torch.cat(pairs).cpu().numpy()
        order = np.lexsort((number, -similarity, owner))
        best = order[np.unique(owner[order], return_index=True)[1]]

        positive = torch.as_tensor(similarity[best], device=queries.device)
        above, wrong, equal = (torch.zeros_like(positive, dtype=torch.int64) for _ in range(3))
        own = _index(same[number[best]], queries)[:, None]
        tied, hardest = torch.zeros_like(positive, dtype=torch.bool), torch.full_like(positive, -torch.inf)
        for tile in _cuts(len(candidates), height):
            rows = _similarities(queries, of_candidates(candidates[tile]))
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
    """Return (q, c) exact products of rows from `fixed`, rounded to float32: ranks compare the reported values."""
    return (queries @ candidates.T).float()


def _vectors(
    name: str, take: Take, device: torch.device | str, formed: Callable[[Tensor], Tensor] | None, rows: np.ndarray
) -> Tensor:
    """Return (n, D) float64 vectors from `fixed`: of the items in rows (n,), or means over K items in rows (n, K).

    name: of the task, for errors.  formed: converts the float32 vectors, or the means, to another form.
    """
    taken = torch.tensor(take(rows.ravel()), device=device)
    lengths = torch.linalg.vector_norm(taken, dim=1)
    if (wrong := ~((lengths - 1).abs() <= UNIT_TOLERANCE)).any():
        place = int(wrong.nonzero()[0])
        raise PipelineError(
            f"{name}: the embedding of item {rows.flat[place]} has length {lengths[place]:.5g}, not 1: check the "
            "model's weights, that it does not overflow, and that its vectors are normalised in float32"
        )
    vectors = taken.double()
    if rows.ndim > 1:
        # Everything is exact except division and square root, which do not depend on tiles. A mean of zero stays zero.
        means = fixed(fixed(vectors).view(*rows.shape, -1).sum(dim=1) / rows.shape[1])
        vectors = means / means.square().sum(dim=1, keepdim=True).sqrt().clamp(min=STEP)
    return fixed(formed(vectors.float()).double() if formed else vectors)


def _index(numbers: np.ndarray, like: Tensor) -> Tensor:
    return torch.as_tensor(numbers, device=like.device)


def _cuts(count: int, size: int) -> Iterable[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def recall_at(scores: Scores, k: int) -> float:
    """Return the share of queries with a right candidate among the first k; for classification, the top-k accuracy.

    For an image with several captions, one of them among the first k suffices, as in the CLIP papers.
    """
    return float(np.mean(scores.rank <= k))


def worst_queries(scores: Scores, count: int) -> np.ndarray:
    """Return the numbers of up to `count` queries with the lowest positive minus hardest similarity, lowest first."""
    return np.argsort(scores.positive - scores.hardest, kind="stable")[:count]


def collapsed(task: Task, take: Take) -> bool:
    """Return whether all queries, or all candidates, of a task have the same vector, up to rounding.

    Up to _SAMPLE of each, spread over the task, are tested.
    """
    candidates = np.concatenate(task.candidates) if isinstance(task, Ranking) else task.candidates.ravel()
    for rows in (task.queries, candidates):
        rows = np.unique(rows)
        vectors = take(rows[:: -(-len(rows) // _SAMPLE)])
        if len(vectors) > 1 and np.linalg.norm(vectors - vectors[0], axis=1).max() < _COLLAPSED:
            return True
    return False


def leading(tasks: list[Task]) -> Task:
    """Return the task of a dataset whose first metric is the dataset's score: of two directions, the one from text."""
    return min(tasks, key=_not_from_text)


def _not_from_text(task: Task) -> bool:
    return not task.direction.startswith("t")


def result_of(tasks: list[Task], scores: list[Scores], worst: list[Case], *, collapsed: bool = False) -> DatasetResult:
    """Return the result of one dataset, from a Ranking or from one Retrieval for each direction.

    The direction from text comes first, in any order of the tasks: its R@1 is the dataset's score.
    worst: cases of all directions.  collapsed: see `collapsed`.
    """
    strict = map(_strict, scores)
    both = sorted(zip(tasks, strict, strict=True), key=lambda pair: _not_from_text(pair[0]))
    task, first = both[0]
    in_distribution, language = None, ""
    if isinstance(task, Ranking):
        group, in_distribution = task.meta_task, task.in_distribution
    else:
        group, language = "zero-shot classification" if task.kind == "classification" else task.kind, task.language
    return DatasetResult(
        group=group,
        in_distribution=in_distribution,
        language=language,
        queries={task.direction: len(own.rank) for task, own in both},
        metrics={name: value for task, own in both for name, value in _metrics(task, own).items()},
        chance=first.chance,
        ties=sum(int(own.tied.sum()) for own in scores),
        similarities=Similarities.of(
            np.concatenate([own.positive for own in scores]), np.concatenate([own.hardest for own in scores])
        ),
        worst=worst,
        collapsed=collapsed,
    )


def score_of(task: Task, scores: Scores) -> float:
    """Return the first metric of a task: the dataset's score, if the task is the leading one."""
    return next(iter(_metrics(task, _strict(scores)).values()))


def _strict(scores: Scores) -> Scores:
    return replace(scores, rank=scores.worst_rank)


def _metrics(task: Task, scores: Scores) -> dict[str, float]:
    if isinstance(task, Ranking):
        return {"P@1": recall_at(scores, 1)}
    if task.kind == "classification":
        return {f"top-{k}": recall_at(scores, k) for k in (1, 5)}
    figures = {f"R@{k}": recall_at(scores, k) for k in (1, 5, 10)}
    figures |= {"MdR": float(np.median(scores.rank)), "MnR": float(np.mean(scores.rank))}
    return {f"{task.direction} {name}": value for name, value in figures.items()}
