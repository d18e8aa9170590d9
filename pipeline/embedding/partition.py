"""Equal clusters of samples that a teacher finds alike: a partition of the graph of nearest neighbours.

Batches of such clusters have hard in-batch negatives (B3, arXiv 2505.11293). METIS (Karypis and Kumar, SIAM Journal on
Scientific Computing 20, 1998) partitions the graph. Its parts differ a little in size, and know no pairs that must be
apart; both are mended here by moving and exchanging samples. The same input gives the same clusters.

For N samples with m neighbours each, it needs about 150 N m bytes, and time in proportion to N m, but for the sorting:
a minute of one core for a million samples with 30.
"""

import subprocess
import sys
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from pipeline.data.arrays import array_of
from pipeline.errors import PipelineError

_WEIGHTS = 1000  # METIS needs integers: a weight is a score, scaled to 1 to 1000
_ROUNDS = 4  # of exchanges between clusters
_TRIED = 8  # clusters that an exchange considers, of those with neighbours
_PAIRS = 1 << 24  # compared at a time


@dataclass(frozen=True, eq=False)
class Apart:
    """Says which of N samples should be in different clusters, because one is no negative of the other.

    query, target: int64 (N,), numbers below N of the samples' queries and targets: equal ones have equal numbers.
    right: int64 (P,), rising: for each target that may be right for a sample's query, the sample's number times N plus
        the target's number.
    """

    query: np.ndarray
    target: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, query: np.ndarray, target: np.ndarray, right: np.ndarray) -> "Apart":
        """Number queries and targets, (N,) hashes each.  right: int64 (P, 2), pairs of (sample, that of the target)."""
        queries, targets = (np.unique(each, return_inverse=True)[1].astype(np.int64) for each in (query, target))
        return cls(queries, targets, np.unique(right[:, 0] * len(query) + targets[right[:, 1]]))

    def __call__(self, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Compare samples, two arrays of numbers that are broadcast: True where they should be apart."""
        equal = (self.query[ones] == self.query[others]) | (self.target[ones] == self.target[others])
        right = self._is_right(ones, others) | self._is_right(others, ones)
        return (equal | right) & (ones != others)

    def _is_right(self, samples: np.ndarray, others: np.ndarray) -> np.ndarray:
        keys = samples * len(self.query) + self.target[others]
        if not len(self.right):
            return np.zeros(keys.shape, dtype=bool)
        places = np.searchsorted(self.right, keys)
        return self.right[np.minimum(places, len(self.right) - 1)] == keys


@dataclass(frozen=True, eq=False)
class Graph:
    """An undirected graph as compressed rows: row i has the edges ends[i]:ends[i + 1] to `others`, rising in number.

    ends: int64 (N + 1,).  sources, others, weights: int64 (E,), each edge in both directions.
    """

    ends: np.ndarray
    sources: np.ndarray
    others: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, pairs: np.ndarray, weights: np.ndarray, count: int) -> "Graph":
        """Return the graph over `count` samples of (P, 2) pairs, in any direction; weights of equal ones are added."""
        keys = pairs.min(axis=1) * count + pairs.max(axis=1)
        rising = np.argsort(keys, kind="stable")
        keys, weights = keys[rising], weights[rising]
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        low, high = np.divmod(keys[first], count)
        added = np.add.reduceat(weights, first) if len(first) else weights
        sources, others = np.concatenate([low, high]), np.concatenate([high, low])
        rising = np.lexsort((others, sources))
        ends = np.append(0, np.cumsum(np.bincount(sources, minlength=count)))
        return cls(ends, sources[rising], others[rising], np.concatenate([added, added])[rising])

    def attachment(self, cluster: np.ndarray) -> np.ndarray:
        """Return the weight of each sample's edges within its cluster, int64 (N,)."""
        inside = cluster[self.sources] == cluster[self.others]
        return np.bincount(self.sources[inside], self.weights[inside], len(cluster)).astype(np.int64)


def clusters_of(neighbours: np.ndarray, scores: np.ndarray, apart: Apart, size: int) -> tuple[np.ndarray, int]:
    """Arrange N samples as clusters of `size`, whose members are each other's neighbours.

    neighbours: int64 (N, m), the most similar other samples of each sample; -1: none.  scores: float32 (N, m).
    apart: says which samples should be in different clusters, such as false negatives.
    Returns int64 (N,), the samples' numbers: each run of `size` is a cluster, and the last N mod `size` are in none;
    and the number of pairs of samples in one cluster that should be apart: no exchange of two samples separates them.

    Raises PipelineError if there are fewer than `size` samples.
    """
    count, clusters = len(neighbours), len(neighbours) // size
    if not clusters:
        raise PipelineError(f"{count} samples do not fill a cluster of {size}: set clusters to {count} or less")
    pairs = np.stack([np.repeat(np.arange(count), neighbours.shape[1]), neighbours.reshape(-1)], axis=1)
    known = pairs[:, 1] >= 0
    pairs, values = pairs[known], scores.reshape(-1)[known].astype(np.float64)
    useful = ~apart(pairs[:, 0], pairs[:, 1]) & (pairs[:, 0] != pairs[:, 1])
    pairs, values = pairs[useful], values[useful]
    spread = max(float(np.ptp(values)), 1e-9) if len(values) else 1.0
    weights = 1 + np.rint((_WEIGHTS - 1) * (values - values.min(initial=np.inf)) / spread).astype(np.int64)
    graph = Graph.of(pairs, weights, count)

    cluster = _equal(graph, _parts(graph, clusters), clusters, size)
    rising = np.argsort(np.where(cluster < 0, clusters, cluster), kind="stable")
    members = rising[: clusters * size].reshape(clusters, size)
    left = _separate(graph, apart, cluster, members)
    return np.concatenate([np.sort(members, axis=1).reshape(-1), rising[clusters * size :]]), left


def _parts(graph: Graph, count: int) -> np.ndarray:
    """Return each sample's part of `count` by METIS in a process of its own (metis.py), int64 (N,).

    Raises PipelineError if that process fails or is killed.
    """
    given = BytesIO()
    for array in (graph.ends, graph.others, graph.weights):
        np.save(given, array, allow_pickle=False)
    script = str(Path(__file__).with_name("metis.py"))
    ended = subprocess.run([sys.executable, "-I", script, str(count)], input=given.getvalue(), capture_output=True)
    if ended.returncode:
        raise PipelineError(
            f"METIS ended with status {ended.returncode}: if its memory did not suffice, give the job more memory, or "
            f"mine smaller datasets\n{ended.stderr.decode(errors='replace')[-1000:]}".rstrip()
        )
    return array_of(ended.stdout)


def _equal(graph: Graph, cluster: np.ndarray, clusters: int, size: int) -> np.ndarray:
    """Move samples from larger to smaller clusters. Returns the cluster of each sample, -1 for those in none."""
    count, before = len(cluster), cluster
    # The samples of too large clusters that are least attached to them become free.
    rising = np.lexsort((np.arange(count), graph.attachment(cluster), cluster))
    sizes = np.bincount(cluster, minlength=clusters)
    place = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    cluster = cluster.copy()
    cluster[rising[place < np.repeat(sizes - size, sizes)]] = -1
    room = np.maximum(size - sizes, 0)

    # Each goes to the cluster with room to which it is most attached; the most attached sample comes first.
    possible = (cluster[graph.sources] < 0) & (cluster[graph.others] >= 0)
    possible[possible] = room[cluster[graph.others[possible]]] > 0
    keys = graph.sources[possible] * clusters + cluster[graph.others[possible]]
    keys, edges = np.unique(keys, return_inverse=True)
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


def _separate(graph: Graph, apart: Apart, cluster: np.ndarray, members: np.ndarray) -> int:
    """Exchange samples between clusters, in place, until no two that should be apart are in one cluster.

    cluster: of each sample.  members: (clusters, size), the samples of each cluster.
    A sample is exchanged with the least attached one of a cluster to which it is attached, or of one close in number,
    if this brings no other such pair together. Returns the number of pairs that remain.
    """
    clusters = len(members)

    def exchange(sample: int, attached: np.ndarray) -> bool:
        home = cluster[sample]
        edges = slice(graph.ends[sample], graph.ends[sample + 1])
        near, which = np.unique(cluster[graph.others[edges]], return_inverse=True)
        near = near[np.argsort(-np.bincount(which, graph.weights[edges], len(near)), kind="stable")][:_TRIED]
        there = np.concatenate([near, (home + 1 + np.arange(_TRIED)) % clusters])
        there = there[(there != home) & (there >= 0)]
        rivals = apart(np.array(sample), members[there])
        others = members[home][members[home] != sample]
        for to, rival in zip(there.tolist(), rivals, strict=True):
            if rival.sum() > 1:
                continue
            possible = members[to][rival] if rival.any() else members[to]  # a single rival must leave
            possible = possible[~apart(possible[:, None], others[None]).any(axis=1)]
            if len(possible):
                other = possible[np.lexsort((possible, attached[possible]))[0]]
                members[to][members[to] == other] = sample
                members[home][members[home] == sample] = other
                cluster[sample], cluster[other] = to, home
                return True
        return False

    for _ in range(_ROUNDS):
        attached, moved = graph.attachment(cluster), False
        conflicted = members[_conflicts(apart, members) > 0]
        for sample in conflicted[np.lexsort((conflicted, attached[conflicted]))].tolist():
            if apart(np.array(sample), members[cluster[sample]]).any():
                moved |= exchange(sample, attached)
        if not moved:
            break
    return int(_conflicts(apart, members).sum()) // 2


def _conflicts(apart: Apart, members: np.ndarray) -> np.ndarray:
    """Return (clusters, size) int64, the number of members of its cluster from which each should be apart."""
    height = max(1, _PAIRS // members.shape[1] ** 2)
    blocks = (members[start : start + height] for start in range(0, len(members), height))
    return np.concatenate([apart(block[:, :, None], block[:, None]).sum(axis=2) for block in blocks])
