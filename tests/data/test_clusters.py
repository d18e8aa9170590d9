"""Batches of neighbours: whole clusters in every step, each sample once an epoch, equal ranks, the same at any size."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.data.clusters import ClusterStream
from pipeline.data.dataset import Dataset
from pipeline.data.order import Order
from pipeline.errors import PipelineError


def scattered_lengths(shard: int, start: int, stop: int) -> np.ndarray:
    return 1 + (shard * 1009 + np.arange(start, stop) * 7919) % 997


def dataset(name: str, shard_samples: list[int], seed: int = 0, **named) -> Dataset:
    clusters = np.random.default_rng(seed).permutation(sum(shard_samples)).astype(np.uint32)
    return Dataset(name, np.array(shard_samples), clusters=clusters, **named)


@st.composite
def orders(draw) -> Order:
    cluster, lanes = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    batch = int(np.lcm(cluster, lanes)) * draw(st.integers(1, 3))
    datasets = []
    for name in "abc"[: draw(st.integers(1, 3))]:
        shard_samples = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
        weight, cap = draw(st.sampled_from([1.0, 1.0, 0.4, 1.5, 2.0])), draw(st.none() | st.integers(6, 80))
        assume(min(sum(shard_samples), round(weight * sum(shard_samples)), cap or 6) >= cluster)
        datasets.append(dataset(name, shard_samples, draw(st.integers(0, 9)), weight=weight, cap=cap))
    assume(sum(each.quota // cluster for each in datasets) * cluster >= batch)
    seed = draw(st.integers(0, 2**32 - 1))
    return Order(tuple(datasets), batch, lanes, 8, 2, seed, lengths=scattered_lengths, cluster=cluster)


def stream_of(order: Order) -> ClusterStream:
    (stream,) = order.streams
    assert isinstance(stream, ClusterStream)
    return stream


def numbers(order: Order, rows: np.ndarray) -> np.ndarray:
    """Return the samples' numbers over all datasets, from rows of (shard, sample)."""
    sizes = np.concatenate([each.shard_samples for each in order.datasets])
    assert (rows[:, 1] < sizes[rows[:, 0]]).all()
    return (np.cumsum(sizes) - sizes)[rows[:, 0]] + rows[:, 1]


def epoch_samples(order: Order, epoch: int) -> Counter:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return Counter(n for step in steps for n in numbers(order, order.batch(step)).tolist())


# An epoch


@settings(max_examples=30)
@given(orders(), st.integers(0, 2))
def test_epoch_is_made_of_each_dataset_s_next_clusters(order, epoch):
    stream, size = stream_of(order), order.cluster
    assert order.samples == sum(each.quota // size * size for each in order.datasets)
    assert order.steps_per_epoch == order.samples // order.global_batch
    seen = epoch_samples(order, epoch)
    assert seen.total() == order.steps_per_epoch * order.global_batch
    first = 0
    for each in order.datasets:
        mine = [seen[number] for number in range(first, first + each.samples)]
        assert sum(mine) % size == 0
        assert max(mine) <= -(-(each.quota // size) // (each.samples // size)) + 1  # passes that the epoch is part of
        if each.quota <= each.samples and epoch == 0:
            assert max(mine) <= 1  # one pass: no sample twice
        first += each.samples
    assert stream.samples - order.steps_per_epoch * order.global_batch < order.global_batch


def test_each_epoch_uses_every_sample_once_but_for_other_remainders():
    """101 + 60 samples in clusters of 8 and steps of 16: 5 and 4 remain in no cluster, 8 in no step."""
    order = Order((dataset("a", [60, 41]), dataset("b", [60])), 16, 4, 8, 2, 3, cluster=8)
    assert (order.steps_per_epoch, order.samples) == (9, 152)
    left_out = [set(range(161)) - set(epoch_samples(order, epoch)) for epoch in range(20)]
    assert all(len(each) == 161 - 144 for each in left_out)
    assert all(epoch_samples(order, epoch).most_common(1)[0][1] == 1 for epoch in range(3))
    assert len({frozenset(each) for each in left_out}) == 20
    often = Counter(number for each in left_out for number in each)
    assert max(often.values()) < 12  # of 20 epochs: no sample is left out always


def test_weights_and_caps_continue_with_other_clusters():
    def taken(epoch: int, **named) -> Counter:
        return epoch_samples(Order((dataset("a", [40, 24], **named),), 8, 2, 8, 2, 1, cluster=4), epoch)

    everything = Counter(range(64))
    assert taken(0) == taken(1) == everything
    assert taken(0, weight=2) == everything + everything
    assert taken(0, weight=0.5) + taken(1, weight=0.5) == everything
    assert taken(0, cap=16) + taken(1, cap=16) + taken(2, cap=16) + taken(3, cap=16) == everything
    assert taken(0, cap=16) != taken(4, cap=16)


def test_step_has_whole_clusters_of_all_datasets_in_proportion():
    sizes = {"a": [300, 100], "b": [100], "c": [100, 100, 100]}
    order = Order(tuple(dataset(name, shards) for name, shards in sizes.items()), 40, 4, 8, 2, 3, cluster=5)
    first, cluster_of = 0, {}
    for each in order.datasets:
        for place, number in enumerate(each.clusters.tolist()):
            cluster_of[first + number] = (each.name, place // 5)
        first += each.samples
    together = set()
    for step in range(2 * order.steps_per_epoch):
        found = Counter(cluster_of[number] for number in numbers(order, order.batch(step)).tolist())
        assert set(found.values()) == {5} and len(found) == 8
        counts = Counter(name for name, _ in found)
        assert all(abs(counts[name] - share) < 2 for name, share in (("a", 4), ("b", 1), ("c", 3)))
        together.add(frozenset(found))
    assert len(together) == 2 * order.steps_per_epoch  # other clusters together in each epoch


def test_clusters_meet_others_in_each_epoch():
    order = Order((dataset("a", [1000]), dataset("b", [600])), 40, 4, 8, 2, 3, cluster=5)

    def meetings(epoch: int) -> set[tuple[int, int]]:
        steps = (stream_of(order).clusters(epoch, index)[:, 0].tolist() for index in range(order.steps_per_epoch))
        return {(a, b) for step in steps for a in step for b in step if a < b}

    first, second = meetings(0), meetings(1)
    assert len(first) == 40 * 28
    assert len(first & second) < 1.5 * 40 * 28 * 40 * 28 / (320 * 319 / 2)  # about as often as by chance


def test_remaining_samples_replace_others_of_one_cluster():
    """43 samples in clusters of 8: 3 remain, and one cluster of a pass is drawn from its samples and these 3."""
    order = Order((dataset("a", [43]),), 8, 1, 8, 2, 5, cluster=8)
    clusters = order.datasets[0].clusters.astype(int)
    whole, rest, changed = clusters[:40].reshape(5, 8), set(clusters[40:].tolist()), set()
    for epoch in range(30):
        odd = [each for step in range(5) for each in stream_of(order).clusters(epoch, step) if set(each) & rest]
        found = {tuple(each) for step in range(5) for each in stream_of(order).clusters(epoch, step)}
        kept = found & {tuple(each) for each in whole}
        assert len(kept) == 5 - len(odd) >= 4
        for each in odd:
            (source,) = {tuple(each) for each in whole} - kept
            assert set(each) <= {*source, *rest}
            changed.add(source)
    assert len(changed) == 5


# Steps


@settings(max_examples=30)
@given(orders(), st.data())
def test_every_world_size_sees_the_same_batches_of_whole_clusters(order, data):
    step = data.draw(st.integers(0, 3 * order.steps_per_epoch))
    whole = order.batch(step)
    assert sorted(numbers(order, whole)) == sorted(stream_of(order).clusters(*order.locate(step)).reshape(-1))
    for world in (w for w in range(1, order.lanes + 1) if order.lanes % w == 0):
        shares = [order.batch(step, rank, world) for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(shares), whole)


@settings(max_examples=30)
@given(orders(), st.data())
def test_pieces_are_runs_of_a_lane_s_samples(order, data):
    stream = stream_of(order)
    index, lane = data.draw(st.integers(0, stream.slices - 1)), data.draw(st.integers(0, order.lanes - 1))
    window, rows = stream.window(1, lane, index), stream.samples_of(1, lane, index)
    assert window.first == stream.window_at(1, lane, index) == index and stream.windows(1, lane) == stream.slices
    assert rows.shape == (1, order.slice_samples, 3)
    for number, (shard, start, stop) in enumerate(window.pieces.tolist()):
        mine = rows[0, rows[0, :, 0] == number]
        assert set(mine[:, 1]) == {shard}
        assert sorted(mine[:, 2]) == list(range(start, stop))
    ends = {(shard, stop) for shard, _, stop in window.pieces.tolist()}
    if len({tuple(row) for row in rows[0, :, 1:].tolist()}) == order.slice_samples:  # no sample twice
        assert not ends & {(shard, start) for shard, start, _ in window.pieces.tolist()}


def test_pieces_end_with_their_shard():
    order = Order((dataset("a", [3, 0, 4]), dataset("b", [5])), 12, 1, 8, 2, 0, cluster=1)
    assert stream_of(order).window(0, 0, 0).pieces.tolist() == [[0, 0, 3], [2, 0, 4], [3, 0, 5]]


def test_sample_that_is_twice_in_a_step_is_in_two_pieces():
    order = Order((dataset("a", [8], weight=2),), 16, 1, 8, 2, 0, cluster=4)
    pieces = stream_of(order).window(0, 0, 0).pieces
    assert Counter(i for _, start, stop in pieces.tolist() for i in range(start, stop)) == Counter([*range(8)] * 2)
    assert Counter(order.batch(0)[:, 1].tolist()) == Counter(list(range(8)) * 2)


@pytest.mark.parametrize("lanes", [8, 64])
def test_lanes_of_step_have_about_equally_many_tokens(lanes):
    rng = np.random.default_rng(0)
    tokens = [rng.integers(20, 121, 1500) + images * rng.integers(1200, 3601, 1500) for images in (0, 1, 1, 2)]
    datasets = tuple(
        Dataset(str(n), np.array([1500]), [round(each.mean())], clusters=rng.permutation(1500).astype(np.uint32))
        for n, each in enumerate(tokens)
    )
    order = Order(
        datasets, 1024, lanes, 8, 2, 1, lengths=lambda shard, start, stop: tokens[shard][start:stop], cluster=32
    )
    totals = []
    for step in range(order.steps_per_epoch):
        rows = order.batch(step).reshape(lanes, -1, 2)
        sums = np.array([sum(tokens[shard][sample] for shard, sample in lane) for lane in rows.tolist()])
        assert sums.max() / sums.mean() < 1.06
        totals.append(sums.sum())
    assert max(totals) / np.mean(totals) < 1.12  # steps have about the same number of each dataset's clusters


def test_position_is_independent_of_sample_length():
    tokens = np.repeat([10, 1000], 16)
    means = np.zeros((200, 4, 4))
    for seed in range(200):
        clusters = np.arange(32, dtype=np.uint32)
        order = Order(
            (Dataset("a", np.array([32]), clusters=clusters),), 16, 4, 8, 2, seed, None, lambda *_: tokens, cluster=8
        )
        means[seed] = tokens[order.batch(0)[:, 1]].reshape(4, 4) > 500
    assert np.abs(means.mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(200)


def test_order_of_clusters_is_pinned():
    """Runs resume by this order: a change would give every unfinished run different samples."""
    order = Order(
        (dataset("a", [5, 6], weight=1.5), dataset("b", [7])), 6, 2, 8, 2, 7, lengths=scattered_lengths, cluster=3
    )
    assert [order.batch(step).tolist() for step in range(6)] == [
        [[1, 0], [1, 5], [0, 1], [1, 4], [0, 2], [0, 0]],
        [[0, 4], [0, 3], [1, 2], [0, 0], [0, 2], [1, 1]],
        [[1, 1], [2, 6], [0, 4], [1, 2], [2, 1], [2, 0]],
        [[1, 0], [1, 2], [1, 1], [1, 3], [0, 1], [0, 4]],
        [[2, 2], [2, 1], [1, 0], [2, 4], [0, 1], [1, 5]],
        [[0, 1], [1, 5], [1, 0], [0, 0], [0, 2], [1, 4]],
    ]


def test_order_of_clusters_can_be_pickled():
    order = Order((dataset("a", [50]),), 8, 2, 8, 2, 0, cluster=4)
    before = order.batch(3)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(order)).batch(3), before)


# Errors

FITS = {
    "datasets": (dataset("one", [1001]),),
    "global_batch": 128,
    "lanes": 8,
    "block_samples": 16,
    "window_blocks": 2,
    "seed": 0,
    "cluster": 32,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"global_batch": 80},
            "clusters of 32 samples do not divide global batch 80: global_batch could be 64, 96, or clusters could "
            "have 2, 4, 5, 8, 10, 16, 20, 40, 80 samples",
        ),
        ({"cluster": 0}, "cluster is 0: it must be 1 or more"),
        ({"parts": 1}, "batches of neighbours have no parts"),
        ({"datasets": (Dataset("bare", np.array([500])),)}, "dataset bare has no clusters"),
        (
            {"datasets": (dataset("small", [20, 11]),)},
            "dataset small has 31 samples in an epoch, less than a cluster of 32: remove it from data.datasets",
        ),
        ({"datasets": (dataset("capped", [200], cap=31),)}, "dataset capped has 31 samples in an epoch"),
        (
            {"global_batch": 1024},
            "global batch 1024 is more than the 992 samples of an epoch: "
            "global_batch could be at most 992 with 8 lanes, or weights larger",
        ),
        (
            {"datasets": (dataset("one", [1001]),), "global_batch": 1056, "lanes": 3},
            "global_batch could be at most 960 with 3 lanes",
        ),
    ],
)
def test_invalid_order_errors_suggest_valid_values(changes, message):
    with pytest.raises(PipelineError) as error:
        Order(**(FITS | changes))
    assert message in str(error.value)


@pytest.mark.parametrize("clusters", [[0, 1, 1], [0, 1], [0, 1, 3], [0.0, 1.0, 2.0], [-1, 0, 1], [[0, 1, 2]]])
def test_clusters_must_list_each_sample_once(clusters):
    with pytest.raises(PipelineError, match="dataset one: its clusters do not list each of 3 samples once"):
        Dataset("one", np.array([3]), clusters=np.array(clusters))


def test_out_of_range_lane_or_window_raises_index_error():
    stream = stream_of(Order(**FITS))
    for lane, index in ((-1, 0), (8, 0), (0, -1), (0, stream.windows(0, 0))):
        with pytest.raises(IndexError):
            stream.window(0, lane, index)
