"""Clusters of neighbours: equal, alike, without pairs that must be apart, and the same for the same input."""

import numpy as np
import pytest

from pipeline.data.dataset import Dataset
from pipeline.data.order import Order
from pipeline.embedding import partition
from pipeline.embedding.partition import Apart, clusters_of
from pipeline.errors import PipelineError

SIZE, NEIGHBOURS = 8, 12


def none_apart(count: int) -> Apart:
    return different(count, np.zeros((0, 2), np.int64))


def different(count: int, right: np.ndarray) -> Apart:
    """All queries and targets differ.  right: pairs of a sample and one whose target may be right for it."""
    return Apart.of(np.arange(count), np.arange(count), right)


def unit_vectors(count: int, topics: int, seed: int = 0) -> np.ndarray:
    """Draw vectors around random topics, (count, 16) float32; samples of a topic are alike."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((topics, 16))[rng.integers(topics, size=count)] + 0.5 * rng.standard_normal(
        (count, 16)
    )
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def nearest(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each sample's nearest others and their similarities, (N, NEIGHBOURS)."""
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -2)
    found = np.argsort(-similar, axis=1, kind="stable")[:, :NEIGHBOURS]
    return found, np.take_along_axis(similar, found, axis=1)


def check_arrangement(numbers: np.ndarray, count: int) -> np.ndarray:
    """Check that each sample is listed once. Returns the clusters, (N // SIZE, SIZE)."""
    assert sorted(numbers.tolist()) == list(range(count))
    return numbers[: count // SIZE * SIZE].reshape(-1, SIZE)


def hardest_negative(vectors: np.ndarray, batches: np.ndarray) -> float:
    """Return the mean over samples of the similarity to the most similar other sample of the batch."""
    similar = vectors[batches] @ vectors[batches].swapaxes(1, 2)
    similar[:, np.arange(batches.shape[1]), np.arange(batches.shape[1])] = -2
    return float(similar.max(axis=2).mean())


@pytest.mark.parametrize("count", [SIZE, 9, 83, 600])
def test_clusters_list_each_sample_once_and_are_repeatable(count):
    given = nearest(unit_vectors(count, 11)) if count > NEIGHBOURS else (np.zeros((count, 0), np.int64),) * 2
    numbers, left = clusters_of(*given, none_apart(count), SIZE)
    check_arrangement(numbers, count)
    assert numbers.dtype == np.int64 and left == 0
    np.testing.assert_array_equal(clusters_of(*given, none_apart(count), SIZE)[0], numbers)


def test_separate_groups_become_the_clusters():
    """Groups of exactly a cluster, each a clique without edges to others, are found whole."""
    group = np.random.default_rng(0).permutation(20 * SIZE) % 20
    neighbours = np.stack([np.setdiff1d(np.flatnonzero(group == group[i]), [i]) for i in range(len(group))])
    numbers, _ = clusters_of(neighbours, np.ones(neighbours.shape, np.float32), none_apart(len(group)), SIZE)
    assert (np.ptp(group[check_arrangement(numbers, len(group))], axis=1) == 0).all()


def test_scores_decide_between_neighbours():
    """Every sample has as many neighbours in its pair of groups; the scores say which of them are its group."""
    group = np.arange(16 * SIZE) // SIZE
    everyone = np.arange(len(group))
    neighbours = np.stack([everyone[(group // 2 == group[i] // 2) & (everyone != i)] for i in range(len(group))])
    scores = np.where(group[neighbours] == group[:, None], 0.9, 0.1).astype(np.float32)
    numbers, _ = clusters_of(neighbours, scores, none_apart(len(group)), SIZE)
    assert (np.ptp(group[check_arrangement(numbers, len(group))], axis=1) == 0).all()


def test_batches_of_neighbours_have_harder_negatives_than_mixed_ones():
    """Over an epoch of batches of 32: the mean over samples of the hardest in-batch negative's similarity."""
    vectors = unit_vectors(1200, 40)
    clusters, _ = clusters_of(*nearest(vectors), none_apart(1200), SIZE)
    sizes = (np.array([700, 500]), None, 1.0, None, None)
    first = np.array([0, 700])

    def hardness(cluster: int | None) -> float:
        order = Order((Dataset("one", *sizes, clusters),), 32, 4, 16, 4, seed=1, cluster=cluster)
        rows = np.stack([order.batch(step) for step in range(order.steps_per_epoch)])
        return hardest_negative(vectors, first[rows[..., 0]] + rows[..., 1])

    mixed, neighbours, best = hardness(None), hardness(SIZE), float(nearest(vectors)[1][:, 0].mean())
    assert mixed < 0.7 and neighbours > 0.85
    assert neighbours > mixed + 0.75 * (best - mixed)


@pytest.mark.parametrize("seed", range(3))
def test_forbidden_pairs_are_separated(seed):
    """Each sample's nearest other one is a false negative: no cluster has both, and clusters remain alike."""
    vectors = unit_vectors(603, 15, seed)
    found, scores = nearest(vectors)
    forbidden = np.stack([np.arange(len(vectors)), found[:, 0]], axis=1)
    numbers, left = clusters_of(found, scores, different(603, forbidden), SIZE)
    clusters = check_arrangement(numbers, len(vectors))
    cluster_of = np.full(len(vectors), -1)
    cluster_of[clusters] = np.arange(len(clusters))[:, None]
    together = (cluster_of[forbidden[:, 0]] == cluster_of[forbidden[:, 1]]) & (cluster_of[forbidden[:, 0]] >= 0)
    assert left == together.sum() == 0
    free, _ = clusters_of(found, scores, none_apart(603), SIZE)
    harder, easy = (hardest_negative(vectors, each[:600].reshape(-1, SIZE)) for each in (free, np.arange(603)))
    assert easy + 0.6 * (harder - easy) < hardest_negative(vectors, clusters) < harder


def test_samples_with_equal_items_are_separated():
    """20 classes, as in a classification dataset: classes, queries, and rights of a class for another one's samples."""
    rng = np.random.default_rng(0)
    target, query = np.arange(400) % 20, rng.permutation(400) // 2
    similar = unit_vectors(400, 5) @ unit_vectors(400, 5).T
    np.fill_diagonal(similar, -2)
    found = np.argsort(-similar, axis=1, kind="stable")[:, :NEIGHBOURS]
    right = np.array([(sample, 7) for sample in range(0, 400, 20)])  # class 7 may be right for class 0
    numbers, left = clusters_of(found, np.take_along_axis(similar, found, 1), Apart.of(query, target, right), SIZE)
    assert left == 0
    for cluster in check_arrangement(numbers, 400):
        assert len(set(target[cluster])) == len(set(query[cluster])) == SIZE
        assert not {0, 7} <= set(target[cluster])


def test_forbidden_pairs_that_cannot_be_separated_are_counted():
    """Nine samples that must all be apart, in two clusters of eight with seven others: at least 5 + 4 share them."""
    others = np.arange(9)
    forbidden = np.array([(a, b) for a in others for b in others])  # both directions, and samples with themselves
    apart = different(16, forbidden)
    numbers, left = clusters_of(np.full((16, 3), -1), np.zeros((16, 3), np.float32), apart, SIZE)
    inside = [int((cluster < 9).sum()) for cluster in check_arrangement(numbers, 16)]
    assert left == sum(n * (n - 1) // 2 for n in inside) >= 10 + 6


def test_samples_without_neighbours_are_in_no_cluster_first():
    """Four of 20 remain; those that the teacher could not read have no neighbours."""
    found, scores = nearest(unit_vectors(20, 2))
    found[[3, 7, 11, 13]] = -1
    found = np.where(np.isin(found, [3, 7, 11, 13]), -1, found)
    numbers, _ = clusters_of(found, scores, none_apart(20), SIZE)
    assert sorted(numbers[16:].tolist()) == [3, 7, 11, 13]


def test_fewer_samples_than_a_cluster_are_refused():
    with pytest.raises(PipelineError, match="7 samples do not fill a cluster of 8: set clusters to 7 or less"):
        clusters_of(np.full((7, 1), -1), np.zeros((7, 1), np.float32), none_apart(7), SIZE)


def test_killed_metis_is_named(monkeypatch):
    """METIS runs in a process of its own, because it holds the interpreter's lock while ranks exchange messages."""
    run = partition.subprocess.run

    def killed(command, **options):
        assert command[2].endswith("metis.py")
        return run([command[0], "-c", "import os; os.kill(os.getpid(), 9)"], **options)

    monkeypatch.setattr(partition.subprocess, "run", killed)
    with pytest.raises(PipelineError, match="METIS ended with status -9: if its memory"):
        clusters_of(*nearest(unit_vectors(64, 4)), none_apart(64), SIZE)
