"""The nearest candidates of a dataset's queries, which of them are likely right, and which become negatives."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from pipeline.config import MiningRun
from pipeline.data.source import Source
from pipeline.data.teacher import query_and_target_vectors
from pipeline.distributed import on_every_rank, rank_and_world
from pipeline.embedding.nearest import Candidates, nearest, similarities
from pipeline.embedding.targets import Targets

_QUERIES = 4096  # of a shard that are ranked together: all candidates are read once for them


@dataclass(frozen=True)
class Ranks:
    """The nearest candidates of n queries.

    usable: (n,) bool, False for a sample without vectors, which has no candidates.
    positive: (n,) float32, the similarity of each query and its own target.
    numbers: (n, depth) int64, samples whose targets are nearest, the most similar first, as `Targets` numbers them;
        -1 where there are fewer.  scores: (n, depth) float32, their similarities, -inf likewise.
    above_margin, above_absolute_margin: (n, depth) bool, candidates that are likely right, by the first such rule.
    left_out: how many candidates were left out before, over all queries.
    """

    usable: np.ndarray
    positive: np.ndarray
    numbers: np.ndarray
    scores: np.ndarray
    above_margin: np.ndarray
    above_absolute_margin: np.ndarray
    left_out: int

    @property
    def remaining(self) -> np.ndarray:
        """(n, depth) bool: the candidates that can be negatives."""
        return (self.numbers >= 0) & ~self.above_margin & ~self.above_absolute_margin


class Ranking:
    """Ranks the targets of a dataset, or of all, for queries of the dataset `number`.

    Candidates are the targets of usable samples; of equal ones, by their hash, the first. For a query these are left
    out: its target, the targets of samples with an equal query, and an item that equals the query itself.
    """

    def __init__(self, targets: Targets, number: int, options: MiningRun, device: torch.device) -> None:
        self.targets, self.number, self.options, self.device = targets, number, options, device
        scope = targets.of_dataset(number) if options.among == "own" else slice(0, len(targets.facts))
        usable = scope.start + np.flatnonzero(targets.facts["usable"][scope])
        # Sorted by hash, then number: of equal targets np.unique returns the first.
        self.hashes, places = np.unique(targets.facts["target_hash"][usable], return_index=True)
        self.by_hash = usable[places]
        self.candidates = Candidates(targets.vectors, np.sort(self.by_hash))

    def first_sample(self, shard: int) -> int:
        """Return the number of the first sample of the dataset's shard."""
        return int(self.targets.firsts[np.flatnonzero(self.targets.datasets[:, 0] == self.number)[shard]])

    def ranks(self, first: int, queries: np.ndarray, usable: np.ndarray) -> Ranks:
        """Rank the candidates of the samples from number `first` on.

        queries: (n, width) float32 unit rows, zeros for an unusable sample.  usable: (n,) bool.
        """
        depth, n = self.options.depth, len(queries)
        rows = np.flatnonzero(usable)
        owners, numbers = self._excluded(first + rows)
        positive = np.zeros(n, np.float32)
        positive[rows] = similarities(queries[rows], self.targets.vectors[first + rows])
        found, scores = np.full((n, depth), -1), np.full((n, depth), -np.inf, np.float32)
        found[rows], scores[rows] = nearest(
            queries[rows], self.candidates, depth, (owners, numbers), device=self.device
        )
        above = scores > limits(positive, self.options.margin)[:, None]
        margin = self.options.absolute_margin
        far = np.inf if margin is None else positive.astype(np.float64) - margin
        also = (scores > np.broadcast_to(far, n)[:, None]) & ~above
        return Ranks(usable, positive, found, scores, above, also, len(owners))

    def _excluded(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (E,) rows of `samples` and (E,) numbers of candidates that are left out for them, without repeats."""
        facts, (sorted_hashes, by_query) = self.targets.facts, self.targets.by_query
        queries = facts["query_hash"][samples]
        begin, end = (np.searchsorted(sorted_hashes, queries, side=side) for side in ("left", "right"))
        counts = end - begin
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        alike = by_query[np.repeat(begin, counts) + within]  # samples with an equal query, itself included
        hashes = np.concatenate([facts["target_hash"][alike], queries])
        owners = np.concatenate([np.repeat(np.arange(len(samples)), counts), np.arange(len(samples))])
        places = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        known = self.hashes[places] == hashes
        pairs = np.unique(owners[known] * len(facts) + self.by_hash[places[known]])
        return pairs // len(facts), pairs % len(facts)


class Numbered(Protocol):
    """A dataset.  number: among those whose targets are ranked together."""

    number: int


D = TypeVar("D", bound=Numbered)


def rank_in_turn(
    todo: Sequence[tuple[D, int]],
    targets: Targets,
    options: MiningRun,
    device: torch.device,
    rank_shard: Callable[[D, int, Ranking], Iterable[int]],
    bar: tqdm,
) -> None:
    """Rank the queries of (dataset, shard) on the ranks in turn; a dataset's shards are consecutive. Collective.

    rank_shard: ranks the queries of a shard, and yields the number of queries after each part of them.
    bar: shows how many all ranks have ranked.
    """
    rank, world = rank_and_world()
    begun, done = bar.n, 0

    def work() -> None:
        nonlocal done
        for dataset, shards in groupby(todo[rank::world], key=lambda each: each[0]):
            ranking = Ranking(targets, dataset.number, options, device)
            for _, shard in shards:
                for count in rank_shard(dataset, shard, ranking):
                    done += count

    on_every_rank(work, lambda: done, lambda now: bar.update(begun + now - bar.n))


def ranked_queries(source: Source, shard: int, ranking: Ranking) -> Iterator[tuple[int, Ranks]]:
    """Yield the ranks of a shard's queries: (number of the first one in the shard, `Ranks`), some thousand at a time.

    source: a dataset that was opened with its teacher's vectors, with the number that `ranking` was made for.
    """
    first = ranking.first_sample(shard)
    parts = list[tuple[int, np.ndarray, np.ndarray]]()
    for part in query_and_target_vectors(source, shard):
        parts.append((part.first, part.query, part.usable))
        begin, end = parts[0][0], part.first + len(part.usable)
        if end - begin >= _QUERIES or end == source.shards[shard][1].samples:
            queries, usable = (np.concatenate(column) for column in list(zip(*parts, strict=True))[1:])
            yield begin, ranking.ranks(first + begin, queries, usable)
            parts = []


def limits(positive: np.ndarray, margin: float | None) -> np.ndarray:
    """Return the (n,) float64 scores above which candidates are likely right, from the positives' scores.

    positive - (1 - margin) |positive|: for positive scores this is TopK-PercPos of NV-Retriever (arXiv 2407.15831),
    margin x positive. For negative ones that product would lie above the positive.
    """
    if margin is None:
        return np.full(len(positive), np.inf)
    wide = positive.astype(np.float64)
    return wide - (1 - margin) * np.abs(wide)


def chosen(ranks: Ranks, options: MiningRun, key: tuple[int, int], first: int) -> np.ndarray:
    """Return (n, count) places in the ranks of each query's negatives, rising; -1 where there are fewer.

    key: the numbers of the dataset and of the shard.  first: the number of the first query in the shard. With
        choose=sampled, they and the seed determine the draw.
    """
    remaining = ranks.remaining & (np.cumsum(ranks.remaining, axis=1) > options.skip)
    order = np.where(remaining, np.arange(options.depth), options.depth)  # of preference; `depth`: never
    if options.choose == "sampled":
        draws = np.stack([_draw((options.seed, *key, first + row), options.depth) for row in range(len(order))])
        worst = np.sort(np.where(remaining, draws, options.depth), axis=1)[:, : options.count][:, -1:]
        order = np.where(remaining & (draws <= worst), order, options.depth)
    order = np.sort(order, axis=1)[:, : options.count]
    order = np.pad(order, ((0, 0), (0, options.count - order.shape[1])), constant_values=options.depth)
    return np.where(order < options.depth, order, -1)


def _draw(key: tuple[int, ...], depth: int) -> np.ndarray:
    """Return a permutation of the ranks, determined by `key`: numpy guarantees the raw numbers (NEP 19)."""
    raw = np.random.PCG64(key).random_raw(depth)
    return np.argsort(np.argsort(raw, kind="stable"), kind="stable")
