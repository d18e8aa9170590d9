"""The order: complete epochs, the same batches at every world size, balanced ranks, direct access to any step."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.data.blocks import BlockStream
from pipeline.data.dataset import Dataset, first_samples
from pipeline.data.order import Order
from pipeline.errors import PipelineError


def scattered_lengths(shard: int, start: int, stop: int) -> np.ndarray:
    return 1 + (shard * 1009 + np.arange(start, stop) * 7919) % 997


@st.composite
def datasets(draw, name: str) -> Dataset:
    shard_samples = draw(st.lists(st.integers(0, 60), min_size=1, max_size=6))
    assume(sum(shard_samples))
    cap = draw(st.none() | st.integers(4, 80))
    lengths = draw(st.none() | st.lists(st.integers(0, 3), min_size=len(shard_samples), max_size=len(shard_samples)))
    weight = draw(st.sampled_from([1.0, 1.0, 0.4, 1.5, 2.0]))
    assume(round(weight * min(cap or 60, sum(shard_samples))))
    return Dataset(name, shard_samples, lengths and [1000 * length for length in lengths], weight, cap)


@st.composite
def orders(draw) -> Order:
    parts = draw(st.none() | st.integers(1, 4))
    lanes, share = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    chosen = tuple(draw(datasets(name)) for name in "abc"[: draw(st.integers(1, 3))])
    quotas = [dataset.quota for dataset in chosen]
    takes = [quota // (lanes * share) for quota in (quotas if parts else [sum(quotas)])]
    assume(min(takes) > 0 and sum(takes) >= (parts or 1))
    return Order(
        chosen,
        global_batch=lanes * share * (parts or 1),
        lanes=lanes,
        block_samples=draw(st.integers(1, 40)),
        window_blocks=draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 2**32 - 1)),
        parts=parts,
        lengths=scattered_lengths,
    )


def one(shard_samples, *sizes, **named) -> Order:
    return Order((Dataset("one", shard_samples),), *sizes, **named)


def inside(pieces: np.ndarray) -> Counter:
    """Count the samples in pieces."""
    return Counter((shard, i) for shard, start, stop in pieces.tolist() for i in range(start, stop))


def rows(samples: np.ndarray) -> list[tuple[int, int]]:
    return [tuple(row) for row in samples.reshape(-1, 2).tolist()]


def epoch_samples(order: Order, epoch: int) -> list[tuple[int, int]]:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return [row for step in steps for row in rows(order.batch(step))]


def lane_takes(stream: BlockStream, epoch: int, lane: int) -> np.ndarray:
    """Return the lane's slices of an epoch, window by window, as a reader gets them: (slices, samples per slice, 2)."""
    windows = range(stream.windows(epoch, lane))
    return np.concatenate([stream.samples_of(epoch, lane, index)[:, :, 1:] for index in windows])


def every_sample(dataset: Dataset, first_shard: int = 0) -> Counter:
    sizes = enumerate(dataset.shard_samples.tolist(), start=first_shard)
    return Counter((shard, i) for shard, size in sizes for i in range(size))


def dataset_of(order: Order, shards: np.ndarray) -> np.ndarray:
    """Return the number of each shard's dataset."""
    return np.searchsorted(np.cumsum([len(dataset.shard_samples) for dataset in order.datasets]), shards, side="right")


# The samples of an epoch


@pytest.mark.slow
@settings(max_examples=50)
@given(orders(), st.integers(0, 3))
def test_epoch_takes_each_dataset_quota_except_remainder(order, epoch):
    seen = Counter(epoch_samples(order, epoch))
    assert seen.total() == order.steps_per_epoch * order.global_batch
    part = order.lanes * order.slice_samples
    for stream in order.streams:
        pieces = stream.pieces(epoch)
        for number in stream.datasets:
            mine = pieces[dataset_of(order, pieces[:, 0]) == number]
            assert (mine[:, 2] - mine[:, 1]).sum() == order.datasets[number].quota
        seen -= inside(pieces)
    assert not seen  # no other samples, and none too often
    left_over_takes = sum(stream.slices for stream in order.streams) - order.steps_per_epoch * order.slices_per_step
    assert 0 <= left_over_takes < order.slices_per_step
    assert all(0 <= stream.samples - stream.slices * part < part for stream in order.streams)


@pytest.mark.slow
@settings(max_examples=50)
@given(orders())
def test_no_sample_repeats_before_rest_of_its_dataset(order):
    """Over any number of epochs from the start, the counts of any two samples differ by at most one."""
    first_shards = np.cumsum([0] + [len(dataset.shard_samples) for dataset in order.datasets])
    taken = Counter()
    for epoch in range(5):
        for stream in order.streams:
            taken += inside(stream.pieces(epoch))
        for dataset, first_shard in zip(order.datasets, first_shards, strict=False):
            counts = [taken[sample] for sample in every_sample(dataset, int(first_shard))]
            assert sum(counts) == (epoch + 1) * dataset.quota
            assert max(counts) - min(counts) <= 1


def test_weights_and_caps_set_epoch_quota():
    def taken(epoch: int, **settings) -> Counter:
        order = Order((Dataset("one", (60, 40), **settings),), 4, 1, 16, 4, seed=0)
        return inside(order.streams[0].pieces(epoch))

    everything = every_sample(Dataset("one", (60, 40)))
    assert taken(0) == taken(1) == everything
    assert taken(1, weight=2) == everything + everything
    assert taken(1, weight=1.5) > everything
    assert taken(0, cap=40).total() == taken(0, cap=40, weight=3).total() == 40
    assert taken(0, cap=80, weight=0.5).total() == 50
    assert not taken(0, cap=40) & taken(1, cap=40)
    assert taken(0, weight=0.5) + taken(1, weight=0.5) == everything
    assert taken(0, weight=0.5) != taken(2, weight=0.5)  # each pass is shuffled differently
    assert taken(3, cap=200) == everything


@settings(max_examples=50)
@given(orders(), st.integers(0, 3))
def test_windows_cover_epoch_once_in_whole_slices(order, epoch):
    for stream in order.streams:
        read = Counter()
        for lane in range(order.lanes):
            next_take = 0
            for index in range(stream.windows(epoch, lane)):
                window = stream.window(epoch, lane, index)
                dealt = stream.samples_of(epoch, lane, index)
                assert window.first == next_take
                assert dealt.shape[0] > 0 and dealt.shape[1:] == (order.slice_samples, 3)
                assert Counter(rows(dealt[:, :, 1:])) == inside(window.pieces)
                for number, piece in enumerate(window.pieces):
                    assert Counter(rows(dealt[dealt[:, :, 0] == number, 1:])) == inside(piece[None])
                assert all(0 < stop - start <= order.block_samples for _, start, stop in window.pieces.tolist())
                next_take += len(dealt)
                takes = range(window.first, next_take)
                assert {stream.window_at(epoch, lane, take) for take in takes} == {index}
                read += inside(window.pieces)
            assert next_take == stream.slices
        assert read.total() == stream.slices * order.slice_samples * order.lanes
        assert read <= inside(stream.pieces(epoch))


def test_window_size_is_bounded():
    """A reader holds a window in memory: `window_blocks` blocks, and parts of others to fill its last slice."""
    order = one((1000,) * 50, 128, 8, block_samples=30, window_blocks=4, seed=1)
    stream = order.streams[0]
    for lane in range(order.lanes):
        sizes = [len(stream.window(0, lane, index).pieces) for index in range(stream.windows(0, lane))]
        assert max(sizes[:-1]) <= 4 + 2
        assert sizes[-1] <= 4 + 4  # the last window also balances the lanes


def test_window_needs_no_sample_lengths():
    def unknown(shard: int, start: int, stop: int) -> np.ndarray:
        raise AssertionError("not needed")

    order = one((100, 60), 16, 2, 8, 2, 0, lengths=unknown)
    assert len(order.streams[0].window(0, 1, 1).pieces)
    with pytest.raises(AssertionError):
        order.streams[0].samples_of(0, 1, 1)


# Steps


@settings(max_examples=50)
@given(orders(), st.data())
def test_every_world_size_sees_the_same_batches(order, data):
    step = data.draw(st.integers(0, 3 * order.steps_per_epoch))
    whole = order.batch(step)
    for world in (w for w in range(1, order.lanes + 1) if order.lanes % w == 0):
        shares = [order.batch(step, rank, world) for rank in range(world)]
        assert {len(share) for share in shares} == {order.global_batch // world}
        np.testing.assert_array_equal(np.concatenate(shares), whole)


@pytest.mark.slow
@settings(max_examples=50)
@given(orders(), st.integers(0, 2))
def test_random_access_step_matches_sequential_read(order, epoch):
    """A run from the start reads each stream lane by lane and window by window."""
    unread = {
        (stream.number, lane): iter(lane_takes(stream, epoch, lane))
        for stream in order.streams
        for lane in range(order.lanes)
    }
    for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
        expected = [next(unread[stream, lane]) for lane in range(order.lanes) for stream, _, _ in order.slices(step)]
        np.testing.assert_array_equal(order.batch(step), np.concatenate(expected), strict=True)


@pytest.mark.slow
@settings(max_examples=50)
@given(orders(), st.data())
def test_each_batch_part_comes_from_one_dataset(order, data):
    step = data.draw(st.integers(0, 3 * order.steps_per_epoch))
    assume(order.parts is not None)
    takes = order.slices(step)
    assert len(takes) == order.parts
    found = dataset_of(order, order.batch(step)[:, 0]).reshape(order.lanes, order.parts, order.slice_samples)
    assert (found == np.array([stream for stream, _, _ in takes])[None, :, None]).all()


@pytest.mark.parametrize("seed", range(3))
def test_batches_come_from_one_group_in_proportion_to_its_size(seed):
    grouped = (("a", 150, 1), ("b", 50, 0), ("c", 250, 1), ("d", 150, 0))
    chosen = tuple(Dataset(name, (size // 2, size // 2), group=group) for name, size, group in grouped)
    order = Order(chosen, 40, 4, 8, 4, seed=seed, parts=1, lengths=scattered_lengths)
    assert [stream.datasets for stream in order.streams] == [(0, 2), (1, 3)]
    batches = [dataset_of(order, order.batch(step)[:, 0]) for step in range(order.steps_per_epoch)]
    groups = [{grouped[number][2] for number in batch} for batch in batches]
    assert Counter(map(tuple, groups)) == {(1,): 10, (0,): 5}
    assert groups != sorted(groups, key=tuple) and groups != sorted(groups, key=tuple, reverse=True)  # in any order
    assert all(len(set(batch)) == 2 for batch in batches)  # the datasets of a group are mixed
    everything = (every_sample(dataset, 2 * number) for number, dataset in enumerate(chosen))
    assert Counter(epoch_samples(order, 0)) == sum(everything, Counter())
    for world in (2, 4):
        parts = [order.batch(7, rank, world) for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(parts), order.batch(7))


def test_first_samples_of_shards():
    sizes = np.array([3, 0, 4, 2])
    assert [first_samples(sizes, count).tolist() for count in (1, 3, 5, 9, 50)] == [
        [1, 0, 0, 0],
        [3, 0, 0, 0],
        [3, 0, 2, 0],
        [3, 0, 4, 2],
        [3, 0, 4, 2],
    ]


def test_parts_are_drawn_in_proportion_to_dataset_size():
    chosen = tuple(Dataset(name, (size,)) for name, size in (("a", 400), ("b", 800), ("c", 200)))
    order = Order(chosen, 40, 2, 8, 4, seed=0, parts=2)
    drawn = [stream for step in range(order.steps_per_epoch) for stream, _, _ in order.slices(step)]
    assert Counter(drawn) == {0: 20, 1: 40, 2: 10}
    assert len(set(drawn[:20])) == 3  # not one dataset after another
    assert drawn != [stream for step in range(order.steps_per_epoch, 70) for stream, _, _ in order.slices(step)]


def test_order_differs_by_epoch_and_seed_and_remainder_by_epoch():
    def order(seed: int) -> Order:
        return one((100, 60, 87), 48, 4, block_samples=8, window_blocks=4, seed=seed)

    first, second = epoch_samples(order(0), 0), epoch_samples(order(0), 1)
    assert first != second
    assert set(first) != set(second)  # 7 of 247 samples are left over, and these differ
    assert first != epoch_samples(order(1), 0)
    assert first == epoch_samples(order(0), 0)


@pytest.mark.parametrize("block_samples", [1, 64], ids=["blocks alone", "samples alone"])
def test_block_and_sample_shuffles_change_with_epoch_and_seed(block_samples):
    def samples(epoch: int, seed: int) -> list:
        return epoch_samples(one((64,), 32, 1, block_samples, window_blocks=1, seed=seed), epoch)

    assert len({tuple(samples(epoch, seed)) for epoch in range(3) for seed in range(3)}) == 9


@pytest.mark.parametrize("block_samples", [1, 2, 12], ids=["one by one", "in pairs", "in one block"])
def test_equal_length_samples_are_shuffled_uniformly(block_samples):
    """Over seeds, each of 12 samples is equally often at each position, and with each other sample in one slice."""
    seeds, places, together = 600, np.zeros((12, 12), dtype=np.int64), np.zeros((12, 12), dtype=np.int64)
    for seed in range(seeds):
        order = one((12,), 6, 1, block_samples, window_blocks=12, seed=seed)
        takes = lane_takes(order.streams[0], 0, 0)[..., 1]
        places[takes.reshape(-1), np.arange(12)] += 1
        for take in takes:
            together[np.ix_(take, take)] += 1
    assert np.abs(places - seeds / 12).max() < 5 * np.sqrt(seeds / 12)
    others = together[~np.eye(12, dtype=bool)]
    assert np.abs(others - seeds * 5 / 11).max() < 5 * np.sqrt(seeds / 4)


@pytest.mark.slow
def test_placement_is_uniform_for_every_sample_length():
    seeds, counts = 1600, np.zeros((16, 2, 4, 2), dtype=np.int64)  # shard, lane, take, place
    lanes, takes, places = np.indices((2, 4, 2))
    for seed in range(seeds):
        shards = Dataset("one", [1] * 16, range(100, 1700, 100))
        order = Order((shards,), 4, 2, 1, 4, seed, lengths=lambda shard, start, stop: np.array([100 + 100 * shard]))
        samples = np.stack([lane_takes(order.streams[0], 0, lane) for lane in range(2)])
        counts[samples[..., 0], lanes, takes, places] += 1
    assert np.abs(counts - seeds / 16).max() < 5 * np.sqrt(seeds / 16)


def test_neighbouring_samples_of_shard_are_spread():
    """Windows mix blocks of several shards: a batch is not a run of one shard's samples."""
    order = one((1000,) * 20, 128, 8, block_samples=50, window_blocks=4, seed=0)
    batch = order.batch(30)
    assert len(np.unique(batch[:, 0])) >= 10
    for lane in range(8):
        samples = order.lane_batch(30, lane)
        assert not (np.diff(samples[:, 1]) == 1).all()


def test_alternatives_are_drawn_uniformly_by_step_and_seed():
    order = one((100,), 10, 1, 8, 4, seed=0)
    drawn = [order.draw(step, 0, sample, 3) for step in range(20) for sample in range(60)]
    assert np.abs(np.bincount(drawn, minlength=3) - 400).max() < 60
    keys = ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4))
    assert len({order.draw(*key, 10**9) for key in keys}) == len(keys)
    assert order.draw(1, 2, 3, 10**9) != one((100,), 10, 1, 8, 4, seed=1).draw(1, 2, 3, 10**9)
    assert order.draw(5, 0, 0, 1) == 0


def test_draws_of_step_are_uniform_and_depend_on_step_content_and_seed():
    order = one((100,), 10, 1, 8, 4, seed=0)
    drawn = np.array([order.draw_of_step(step, content, 5) for step in range(20) for content in range(60)])
    assert drawn.min() >= 0 and drawn.max() < 1
    assert np.abs(np.histogram(drawn, 10, (0, 1))[0] - 600).max() < 130  # 5.6 standard deviations of 23
    keys = ((1, 2), (2, 2), (1, 3), (1, 2 << 32), (1, (2 << 32) + 2), (1, 2**64 - 1))
    assert len({order.draw_of_step(*key, 1)[0] for key in keys}) == len(keys)
    assert order.draw_of_step(1, 2, 1) != one((100,), 10, 1, 8, 4, seed=1).draw_of_step(1, 2, 1)


# Balanced ranks


class Mixture:
    """Twenty datasets of very different sizes; one in five has two images per sample, as in MMEB's training set.

    texts: whether a quarter of the datasets has no images.
    """

    def __init__(self, *, texts: bool, block_samples: int = 64) -> None:
        random = np.random.default_rng(0)
        self.datasets, self.tokens = [], []
        for number in range(20):
            count = int(random.integers(60, 400)) * block_samples - int(random.integers(0, block_samples))
            shard_samples = [1000] * (count // 1000) + [count % 1000] * (count % 1000 > 0)
            images = 0 if texts and number % 4 == 3 else 2 if number % 5 == 1 else 1
            tokens = []
            for samples in shard_samples:
                text, image = random.integers(20, 121, samples), random.integers(1200, 3601, (images, samples))
                tokens.append(text + image.sum(axis=0))
            means = [round(shard.mean()) for shard in tokens]
            self.datasets.append(Dataset(str(number), shard_samples, means))
            self.tokens += tokens

    def order(self, lanes: int, window_blocks: int, parts: int | None = None) -> Order:
        def lengths(shard: int, start: int, stop: int) -> np.ndarray:
            return self.tokens[shard][start:stop]

        return Order(tuple(self.datasets), 1024, lanes, 64, window_blocks, seed=1, parts=parts, lengths=lengths)

    def of(self, samples: np.ndarray) -> np.ndarray:
        """Return the number of tokens of each sample, (..., 2) -> (...)."""
        flat = np.concatenate(self.tokens)
        starts = np.cumsum([0] + [len(shard) for shard in self.tokens])
        return flat[starts[samples[..., 0]] + samples[..., 1]]

    def lane_tokens(self, order: Order) -> np.ndarray:
        """Return the tokens of every lane in every step of epoch 0, (steps, lanes)."""
        takes = [
            np.stack([self.of(lane_takes(stream, 0, lane)).sum(axis=1) for lane in range(order.lanes)], axis=1)
            for stream in order.streams
        ]
        steps = range(order.steps_per_epoch)
        return np.stack([sum(takes[stream][take] for stream, _, take in order.slices(step)) for step in steps])


@pytest.fixture(scope="module")
def images() -> Mixture:
    return Mixture(texts=False)


@pytest.fixture(scope="module")
def images_and_texts() -> Mixture:
    return Mixture(texts=True)


@pytest.mark.slow
@pytest.mark.parametrize(("lanes", "worlds"), [(8, [8]), (64, [8, 64])])
@pytest.mark.parametrize(
    ("mixture", "window_blocks", "parts", "most"),
    [
        ("images", 16, None, 1.06),
        ("images", 16, 4, 1.10),
        ("images", 16, 1, 1.10),
        ("images_and_texts", 16, None, 1.05),
        ("images_and_texts", 32, None, 1.04),
        ("images_and_texts", 16, 4, 1.10),
        ("images_and_texts", 16, 1, 1.20),  # a lane with one block of a small dataset cannot be balanced
    ],
)
def test_rank_tokens_stay_close_to_mean(request, mixture, window_blocks, parts, most, lanes, worlds):
    """Check every step of the epoch, including the last ones."""
    mixture = request.getfixturevalue(mixture)
    lane_tokens = mixture.lane_tokens(mixture.order(lanes, window_blocks, parts))
    for world in worlds:
        ranks = lane_tokens.reshape(len(lane_tokens), world, -1).sum(axis=2)
        assert (ranks.max(axis=1) / ranks.mean(axis=1)).max() < most


def test_mixed_batches_have_similar_token_counts(images_and_texts):
    steps = images_and_texts.lane_tokens(images_and_texts.order(64, 16)).sum(axis=1)
    assert steps.max() / steps.mean() < 1.04


def test_position_is_independent_of_sample_length(images_and_texts):
    """Check positions in a slice, lanes, and the halves of the epoch."""
    order = images_and_texts.order(16, 8)
    lanes = [lane_takes(order.streams[0], 0, lane) for lane in range(order.lanes)]
    tokens = images_and_texts.of(np.stack(lanes)).astype(float)  # (lanes, takes, places)
    lanes, takes, places = tokens.shape
    assert places == 64
    deviation = tokens.std() / np.sqrt(lanes * takes)
    assert np.abs(tokens.mean(axis=(0, 1)) - tokens.mean()).max() < 4 * deviation
    assert np.abs(tokens.mean(axis=(1, 2)) / tokens.mean() - 1).max() < 0.01
    halves = [half.mean() / tokens.mean() for half in np.array_split(tokens, 2, axis=1)]
    assert halves == pytest.approx([1, 1], abs=0.01)


def test_windows_mix_different_shards_each_epoch(images):
    """Balancing must not combine the same shards each epoch: two shards rarely share a lane's window again."""

    def meetings(epoch: int) -> set[tuple[int, int]]:
        stream = images.order(8, 8).streams[0]
        windows = [stream.window(epoch, lane, i) for lane in range(8) for i in range(stream.windows(epoch, lane))]
        shards = [np.unique(window.pieces[:, 0]).tolist() for window in windows]
        return {(a, b) for window in shards for a in window for b in window if a < b}

    first, second = meetings(0), meetings(1)
    possible = len(images.tokens) * (len(images.tokens) - 1) / 2
    by_chance = len(first) * len(second) / possible
    assert len(first & second) < 1.5 * by_chance


# The format


def test_order_is_pinned():
    """Runs resume by this order: a change would give every unfinished run different samples."""
    order = one((5, 0, 4, 6), global_batch=6, lanes=2, block_samples=3, window_blocks=2, seed=7)
    assert [order.batch(step).tolist() for step in range(4)] == [
        [[3, 2], [2, 0], [3, 1], [0, 3], [2, 3], [0, 4]],
        [[2, 2], [3, 0], [2, 1], [0, 2], [0, 1], [0, 0]],
        [[3, 4], [3, 3], [3, 5], [0, 0], [0, 1], [0, 2]],
        [[3, 1], [3, 0], [3, 2], [2, 1], [2, 0], [2, 2]],
    ]


def test_order_with_weights_caps_and_lengths_is_pinned():
    order = Order(
        (Dataset("a", (5, 6), (30, 10), weight=1.5, cap=6), Dataset("b", (7,), (20,), weight=0.5)),
        global_batch=4,
        lanes=2,
        block_samples=2,
        window_blocks=2,
        seed=7,
        lengths=scattered_lengths,
    )
    assert [order.batch(step).tolist() for step in range(5)] == [
        [[1, 0], [1, 1], [2, 6], [1, 2]],
        [[2, 3], [2, 2], [1, 3], [0, 2]],
        [[1, 5], [1, 4], [2, 6], [2, 1]],
        [[0, 0], [0, 1], [2, 4], [2, 5]],
        [[1, 3], [0, 2], [2, 2], [2, 3]],
    ]


def test_order_with_parts_is_pinned():
    order = Order(
        (Dataset("a", (5, 4)), Dataset("b", (6,)), Dataset("c", (2,), weight=2)),
        global_batch=4,
        lanes=1,
        block_samples=2,
        window_blocks=2,
        seed=7,
        parts=2,
        lengths=scattered_lengths,
    )
    assert [order.slices(step) for step in range(5)] == [
        [(0, 0, 0), (1, 0, 0)],
        [(2, 0, 0), (0, 0, 1)],
        [(0, 0, 2), (1, 0, 1)],
        [(2, 0, 1), (1, 0, 2)],
        [(0, 1, 0), (0, 1, 1)],
    ]
    assert [order.batch(step).tolist() for step in range(5)] == [
        [[1, 0], [0, 4], [2, 4], [2, 5]],
        [[3, 0], [3, 1], [0, 0], [0, 1]],
        [[0, 2], [1, 2], [2, 3], [2, 2]],
        [[3, 1], [3, 0], [2, 1], [2, 0]],
        [[0, 4], [1, 3], [0, 0], [1, 2]],
    ]


def test_draws_are_pinned():
    order = one((100,), 10, 1, 8, 4, seed=7)
    assert [order.draw(step, 3, 5, 5) for step in range(12)] == [0, 4, 0, 3, 4, 2, 3, 4, 4, 4, 4, 1]
    drawn = order.draw_of_step(3, 0xFEDC_BA98_7654_3210, 3).tolist()
    assert drawn == [0.7785077167522708, 0.007944128708410214, 0.2887552274130627]


def test_order_can_be_pickled():
    order = Order((Dataset("a", (50, 9), (3, 4)), Dataset("b", (30,))), 8, 2, 4, 4, seed=0, parts=2)
    before = order.batch(3)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(order)).batch(3), before)


@pytest.mark.slow
def test_order_of_100_million_samples_starts_at_late_step():
    lengths = np.random.default_rng(0).integers(10, 4000, 5_000)
    halves = tuple(Dataset(name, np.full(5_000, 10_000), lengths) for name in "ab")
    order = Order(halves, 1024, 128, block_samples=64, window_blocks=16, seed=3)
    assert order.locate(100_000) == (1, 100_000 - 97_656)
    batch = order.batch(100_000)
    assert len(np.unique(batch, axis=0)) == 1024


# Errors

FITS = {
    "datasets": (Dataset("one", (1001,)),),
    "global_batch": 128,
    "lanes": 8,
    "block_samples": 16,
    "window_blocks": 2,
    "seed": 0,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 6}, "lanes 6 does not divide global batch 128: lanes could be 1, 2, 4, 8, 16, 32, 64, 128"),
        ({"parts": 3}, "parts 3 does not divide 16, the samples of a lane in a batch: parts could be 1, 2, 4, 8, 16"),
        (
            {"global_batch": 2048},
            "global batch 2048 is more than the 1001 samples of an epoch: "
            "global_batch could be at most 1000 with 8 lanes, or weights larger",
        ),
        (
            {"datasets": (Dataset("one", (5,)),)},
            "global batch 128 is more than the 5 samples of an epoch: global_batch and lanes must be smaller",
        ),
        (
            {"datasets": (Dataset("one", (1001,)), Dataset("two", (100,), cap=40)), "parts": 2},
            "a part of 64 samples is more than the 40 of dataset two in an epoch: "
            "parts could be 4, 8, 16, or global_batch could be at most 80 with 8 lanes, or weights larger",
        ),
        (
            {"datasets": (Dataset("one", (100,)),), "parts": 4},
            "a batch of 4 parts is more than the 3 of 32 samples in an epoch: "
            "global_batch could be at most 96 with 8 lanes, or weights larger",
        ),
        ({"block_samples": 0}, "block_samples is 0: it must be 1 or more"),
        ({"parts": 0}, "parts is 0: it must be 1 or more"),
        ({"seed": -1}, "seed -1 is not between 0 and 4294967295"),
    ],
)
def test_invalid_order_errors_suggest_valid_values(changes, message):
    with pytest.raises(PipelineError) as error:
        Order(**(FITS | changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard_samples": ()}, "dataset one has 0 samples: convert it again"),
        ({"shard_samples": (500, -1)}, "dataset one: shard 1 has -1 samples, but needs at least 0"),
        ({"shard_lengths": (10, -2)}, "dataset one: shard 1 has -2 tokens a sample, but needs at least 0"),
        ({"shard_lengths": (10,)}, "dataset one has 2 shards, but 1 mean lengths"),
        ({"weight": 0.0}, "dataset one: weight is 0.0: it must be more than 0.005"),
        ({"weight": float("nan")}, "weight is nan: it must be more than 0.005"),
        ({"cap": 0}, "dataset one: cap is 0: it must be 1 or more"),
    ],
)
def test_invalid_dataset_error_gives_reason(settings, message):
    with pytest.raises(PipelineError) as error:
        Dataset(**({"name": "one", "shard_samples": (60, 40)} | settings))
    assert message in str(error.value)


def test_invalid_world_size_error_lists_valid_sizes():
    order = Order(**FITS)
    order.check_world(4)
    for world in (0, 3, 16):
        with pytest.raises(PipelineError, match="the number of processes could be 1, 2, 4, 8"):
            order.check_world(world)


def test_out_of_range_lane_or_window_raises_index_error():
    stream = Order(**FITS).streams[0]
    for lane, index in ((-1, 0), (8, 0), (0, -1), (0, stream.windows(0, 0))):
        with pytest.raises(IndexError):
            stream.window(0, lane, index)
