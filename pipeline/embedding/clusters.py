"""Equal clusters of samples that a teacher finds alike: a partition of the graph of nearest neighbours.

Batches of such clusters have hard in-batch negatives (B3, arXiv 2505.11293). METIS (Karypis and Kumar, SIAM Journal on
Scientific Computing 20, 1998) partitions the graph. Its parts differ a little in size, and know no pairs that must be
apart; both are mended here by moving and exchanging samples. The same input gives the same clusters.

For N samples with m neighbours each, it needs about 200 N m bytes, and time in proportion to N m, but for the sorting.
"""

from dataclasses import dataclass

import numpy as np
import pymetis

from pipeline.errors import PipelineError

_WEIGHTS = 1000  # METIS needs integers: a weight is a score, scaled to 1 to 1000
_IMBALANCE = 100  # METIS cuts fewer edges if it may split unevenly: here by 100 in 1000
_ROUNDS = 4  # of exchanges between clusters
_TRIED = 8  # clusters that an exchange considers


@dataclass(frozen=True, eq=False)
class Graph:
    """An undirected graph as compressed rows: row i has the edges ends[i]:ends[i + 1] to `others`, rising in number.

    ends: int64 (N + 1,).  others, weights: int64 (E,), each edge in both directions.
    """

    ends: np.ndarray
    others: np.ndarray
    weights: np.ndarray

    @property
    def sources(self) -> np.ndarray:
        """The sample of each edge's row, int64 (E,)."""
        return np.repeat(np.arange(len(self.ends) - 1), np.diff(self.ends))

    @classmethod
    def of(cls, pairs: np.ndarray, weights: np.ndarray, count: int) -> "Graph":
        """Return the graph over `count` samples of (P, 2) pairs, in any direction; weights of equal ones are added."""
        keys = _keys(pairs, count)
        rising = np.argsort(keys, kind="stable")
        rising = rising[pairs[rising, 0] != pairs[rising, 1]]
        keys, weights = keys[rising], weights[rising]
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        low, high = np.divmod(keys[first], count)
        added = np.add.reduceat(weights, first) if len(first) else weights
        sources, others = np.concatenate([low, high]), np.concatenate([high, low])
        rising = np.lexsort((others, sources))
        ends = np.append(0, np.cumsum(np.bincount(sources, minlength=count)))
        return cls(ends, others[rising], np.concatenate([added, added])[rising])


def clusters_of(neighbours: np.ndarray, scores: np.ndarray, forbidden: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """Arrange N samples as clusters of `size`, whose members are each other's neighbours.

    neighbours: int64 (N, m), the most similar other samples of each sample; -1: none.  scores: float32 (N, m).
    forbidden: int64 (P, 2), pairs that should be in different clusters, such as false negatives.
    Returns int64 (N,), the samples' numbers: each run of `size` is a cluster, and the last N mod `size` are in none;
    and the number of forbidden pairs that are still in one cluster, because no exchange of two samples separates them.

    Raises PipelineError if there are fewer than `size` samples.
    """
    count, clusters = len(neighbours), len(neighbours) // size
    if not clusters:
        raise PipelineError(f"{count} samples do not fill a cluster of {size}: set clusters to {count} or less")
    pairs = np.stack([np.repeat(np.arange(count), neighbours.shape[1]), neighbours.reshape(-1)], axis=1)
    known = (pairs[:, 1] >= 0) & ~np.isin(_keys(pairs, count), _keys(forbidden, count))
    pairs, values = pairs[known], scores.reshape(-1)[known].astype(np.float64)
    spread = max(float(np.ptp(values)), 1e-9) if len(values) else 1.0
    weights = 1 + np.rint((_WEIGHTS - 1) * (values - values.min(initial=np.inf)) / spread).astype(np.int64)
    graph = Graph.of(pairs, weights, count)

    adjacency = pymetis.CSRAdjacency(graph.ends, graph.others)
    options = pymetis.Options(seed=0, ufactor=_IMBALANCE)
    _, parts = pymetis.part_graph(clusters, adjacency, eweights=graph.weights, recursive=True, options=options)
    cluster = _equal(graph, np.array(parts, np.int64), clusters, size)
    left = _separate(graph, Graph.of(forbidden, np.ones(len(forbidden), np.int64), count), cluster, clusters, size)
    return np.lexsort((np.arange(count), np.where(cluster < 0, clusters, cluster))), left


def _keys(pairs: np.ndarray, count: int) -> np.ndarray:
    """Number pairs so that both directions of a pair have the same number."""
    return pairs.min(axis=1) * count + pairs.max(axis=1)


def _attachment(graph: Graph, cluster: np.ndarray) -> np.ndarray:
    """Return the weight of each sample's edges within its cluster, int64 (N,)."""
    sources = graph.sources
    inside = cluster[sources] == cluster[graph.others]
    return np.bincount(sources[inside], graph.weights[inside], len(cluster)).astype(np.int64)


def _equal(graph: Graph, cluster: np.ndarray, clusters: int, size: int) -> np.ndarray:
    """Move samples from larger to smaller clusters. Returns the cluster of each sample, -1 for those in none."""
    count, before = len(cluster), cluster
    # The samples of too large clusters that are least attached to them become free.
    rising = np.lexsort((np.arange(count), _attachment(graph, cluster), cluster))
    sizes = np.bincount(cluster, minlength=clusters)
    place = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    cluster = cluster.copy()
    cluster[rising[place < np.repeat(sizes - size, sizes)]] = -1
    room = np.maximum(size - sizes, 0)

    # Each goes to the cluster with room to which it is most attached; the most attached sample comes first.
    sources, others = graph.sources, graph.others
    possible = (cluster[sources] < 0) & (cluster[others] >= 0)
    possible[possible] &= room[cluster[others[possible]]] > 0
    keys, edges = np.unique(sources[possible] * clusters + cluster[others[possible]], return_inverse=True)
    weights = np.bincount(edges, graph.weights[possible], len(keys))
    for key in keys[np.argsort(-weights, kind="stable")].tolist():
        sample, to = divmod(key, clusters)
        if cluster[sample] < 0 and room[to]:
            cluster[sample] = to
            room[to] -= 1

    # The others fill the rest, those with few neighbours none. METIS numbers parts so that close ones are often alike.
    free = np.flatnonzero(cluster < 0)
    free = free[np.argsort(-np.diff(graph.ends)[free], kind="stable")][: room.sum()]
    free = free[np.argsort(before[free], kind="stable")]
    cluster[free] = np.repeat(np.arange(clusters), room)
    return cluster


def _separate(graph: Graph, apart: Graph, cluster: np.ndarray, clusters: int, size: int) -> int:
    """Exchange samples between clusters, in place, until no two of a cluster are adjacent in the graph `apart`.

    A pair's less attached sample is exchanged with one of a cluster to which it is attached, or of one close in number,
    if this brings no other such pair together. Returns the number of pairs that remain.
    """
    rising = np.argsort(np.where(cluster < 0, clusters, cluster), kind="stable")
    members: list[list[int]] = rising[: clusters * size].reshape(clusters, size).tolist()

    def rivals(sample: int) -> dict[int, list[int]]:
        """Return the samples from which `sample` must be separate, by cluster."""
        found: dict[int, list[int]] = {}
        others = apart.others[apart.ends[sample] : apart.ends[sample + 1]]
        for to, other in zip(cluster[others].tolist(), others.tolist(), strict=True):
            found.setdefault(to, []).append(other)
        return found

    def exchange(sample: int, home: int, there: dict[int, list[int]]) -> bool:
        edges = slice(graph.ends[sample], graph.ends[sample + 1])
        near, which = np.unique(cluster[graph.others[edges]], return_inverse=True)
        near = near[np.argsort(-np.bincount(which, graph.weights[edges], len(near)), kind="stable")].tolist()
        close = [(home + step) % clusters for step in range(1, _TRIED + 1)]
        for to in [*near[:_TRIED], *close]:
            if to in (home, -1) or len(there.get(to, ())) > 1:
                continue
            for other in there.get(to) or sorted(members[to], key=lambda each: (attached[each], each)):
                if set(rivals(other).get(home, ())) <= {sample}:
                    members[to][members[to].index(other)] = sample
                    members[home][members[home].index(sample)] = other
                    cluster[sample], cluster[other] = to, home
                    return True
        return False

    sources = apart.sources
    for _ in range(_ROUNDS):
        attached = _attachment(graph, cluster)
        together = (cluster[sources] == cluster[apart.others]) & (cluster[sources] >= 0)
        conflicted = np.unique(sources[together])
        moved = False
        for sample in conflicted[np.argsort(attached[conflicted], kind="stable")].tolist():
            home, there = int(cluster[sample]), rivals(sample)
            if home in there:
                moved |= exchange(sample, home, there)
        if not moved:
            break
    together = (cluster[sources] == cluster[apart.others]) & (cluster[sources] >= 0)
    return int(np.count_nonzero(together)) // 2
