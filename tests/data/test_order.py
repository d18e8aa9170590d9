"""The order: every sample once an epoch, the same batches at every world size, any step at once."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.data.order import Order
from pipeline.errors import PipelineError


@st.composite
def orders(draw) -> Order:
    shard_samples = draw(st.lists(st.integers(0, 60), min_size=1, max_size=12))
    lanes = draw(st.integers(1, 12))
    global_batch = lanes * draw(st.integers(1, 8))
    assume(sum(shard_samples) >= global_batch)
    return Order(
        shard_samples=tuple(shard_samples),
        global_batch=global_batch,
        lanes=lanes,
        block_samples=draw(st.integers(1, 40)),
        window_blocks=draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def every_sample(order: Order) -> set[tuple[int, int]]:
    return {(shard, i) for shard, size in enumerate(order.shard_samples.tolist()) for i in range(size)}


def epoch_samples(order: Order, epoch: int) -> list[tuple[int, int]]:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return [tuple(row) for step in steps for row in order.batch(step).tolist()]


def lane_windows(order: Order, epoch: int, lane: int) -> list:
    windows = []
    while True:
        try:
            windows.append(order.window(epoch, lane, len(windows)))
        except IndexError:
            return windows


@settings(deadline=None, max_examples=200)
@given(orders(), st.integers(0, 3))
def test_an_epoch_has_every_sample_once_but_for_n_mod_b(order, epoch):
    seen = epoch_samples(order, epoch)
    assert len(seen) == len(set(seen)) == order.steps_per_epoch * order.global_batch
    unseen = every_sample(order) - set(seen)
    assert set(seen) <= every_sample(order)
    assert len(unseen) == order.samples % order.global_batch


@settings(deadline=None, max_examples=200)
@given(orders(), st.integers(0, 3))
def test_pieces_of_all_windows_partition_every_shard(order, epoch):
    read = []
    for lane in range(order.lanes):
        end = 0
        for window in lane_windows(order, epoch, lane):
            assert window.first == end
            assert len(window.pieces) <= order.window_blocks
            inside = [(shard, i) for shard, start, stop in window.pieces.tolist() for i in range(start, stop)]
            assert sorted(inside) == sorted(map(tuple, window.samples.tolist()))
            assert all(0 < stop - start <= order.block_samples for _, start, stop in window.pieces.tolist())
            assert all(
                order.window_at(epoch, lane, offset) == order.window_at(epoch, lane, window.first)
                for offset in range(end, end + len(inside))
            )
            end += len(inside)
            read += inside
        assert end in (order.samples // order.lanes, order.samples // order.lanes + 1)
    assert len(read) == order.samples
    assert set(read) == every_sample(order)


@settings(deadline=None, max_examples=100)
@given(orders(), st.data())
def test_every_world_size_sees_the_same_batches(order, data):
    step = data.draw(st.integers(0, 3 * order.steps_per_epoch))
    whole = order.batch(step)
    for world in (w for w in range(1, order.lanes + 1) if order.lanes % w == 0):
        shares = [order.batch(step, rank, world) for rank in range(world)]
        assert {len(share) for share in shares} == {order.global_batch // world}
        np.testing.assert_array_equal(np.concatenate(shares), whole)


@settings(deadline=None, max_examples=100)
@given(orders(), st.data())
def test_any_step_equals_that_step_of_a_run_from_the_start(order, data):
    """The run from the start reads lane by lane, window by window, as a reader does."""
    epoch = data.draw(st.integers(0, 2))
    step = data.draw(st.integers(0, order.steps_per_epoch - 1))
    size = order.lane_batch_size
    expected = []
    for lane in range(order.lanes):
        streamed = np.concatenate([window.samples for window in lane_windows(order, epoch, lane)])
        expected.append(streamed[step * size : (step + 1) * size])
    np.testing.assert_array_equal(
        order.batch(epoch * order.steps_per_epoch + step), np.concatenate(expected), strict=True
    )


def test_epochs_and_seeds_differ_and_so_do_the_left_over_samples():
    def order(seed: int) -> Order:
        return Order((100, 60, 87), 48, 4, block_samples=8, window_blocks=4, seed=seed)

    first, second = epoch_samples(order(0), 0), epoch_samples(order(0), 1)
    assert first != second
    assert set(first) != set(second)  # 7 of 247 are left over: other ones
    assert first != epoch_samples(order(1), 0)
    assert first == epoch_samples(order(0), 0)


@pytest.mark.parametrize("block_samples", [1, 64], ids=["blocks alone", "samples alone"])
def test_either_shuffle_changes_with_epoch_and_seed(block_samples):
    def samples(epoch: int, seed: int) -> list:
        return epoch_samples(Order((64,), 32, 1, block_samples, window_blocks=1, seed=seed), epoch)

    assert len({tuple(samples(epoch, seed)) for epoch in range(3) for seed in range(3)}) == 9


def test_neighbours_in_a_shard_are_spread():
    """Windows mix blocks of several shards: a batch is not a run of one shard's samples."""
    order = Order((1000,) * 20, 128, 8, block_samples=50, window_blocks=4, seed=0)
    batch = order.batch(30)
    assert len(np.unique(batch[:, 0])) >= 10
    for lane in range(8):
        samples = order.lane_batch(30, lane)
        assert not (np.diff(samples[:, 1]) == 1).all()


def test_the_order_is_pinned():
    """Runs resume by this order: if it changes, every run that is under way sees other samples."""
    order = Order((5, 0, 4, 6), global_batch=6, lanes=2, block_samples=3, window_blocks=2, seed=7)
    assert [order.batch(step).tolist() for step in range(4)] == [
        [[0, 4], [3, 5], [3, 4], [2, 2], [3, 1], [3, 2]],
        [[3, 3], [0, 3], [2, 0], [3, 0], [0, 0], [0, 1]],
        [[2, 3], [3, 1], [3, 0], [3, 3], [3, 4], [0, 2]],
        [[3, 2], [0, 3], [0, 0], [0, 1], [3, 5], [2, 2]],
    ]


def test_a_hundred_million_samples_start_at_any_step():
    order = Order(np.full(10_000, 10_000), 1024, 128, block_samples=256, window_blocks=16, seed=3)
    assert order.locate(100_000) == (1, 100_000 - 97_656)
    batch = order.batch(100_000)
    assert len(np.unique(batch, axis=0)) == 1024


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lanes": 6},
            "lanes 6 does not divide global batch 128: lanes could be 1, 2, 4, 8, 16, 32, 64, 128",
        ),
        (
            {"global_batch": 2048},
            "more than the dataset's 1001 samples: it could be at most 1000 with 8 lanes",
        ),
        ({"shard_samples": (5,)}, "the dataset's 5 samples: it could be smaller, with fewer lanes"),
        ({"shard_samples": ()}, "0 samples: are the shards empty"),
        ({"shard_samples": (500, -1)}, "shard 1 has -1 samples"),
        ({"block_samples": 0}, "block_samples is 0: it must be 1 or more"),
        ({"seed": -1}, "seed -1 is not between 0 and 4294967295"),
    ],
)
def test_what_does_not_fit_names_what_would(changes, message):
    fits = {
        "shard_samples": (1001,),
        "global_batch": 128,
        "lanes": 8,
        "block_samples": 16,
        "window_blocks": 2,
        "seed": 0,
    }
    with pytest.raises(PipelineError) as error:
        Order(**(fits | changes))
    assert message in str(error.value)


def test_a_world_that_does_not_divide_the_lanes_is_named_with_those_that_do():
    order = Order((1001,), 128, 8, block_samples=16, window_blocks=2, seed=0)
    order.check_world(4)
    for world in (0, 3, 16):
        with pytest.raises(PipelineError, match="the number of processes could be 1, 2, 4, 8"):
            order.check_world(world)


def test_lanes_and_windows_out_of_range_are_errors():
    order = Order((1001,), 128, 8, block_samples=16, window_blocks=2, seed=0)
    for lane, index in ((-1, 0), (8, 0), (0, -1), (0, 1000)):
        with pytest.raises(IndexError):
            order.window(0, lane, index)
