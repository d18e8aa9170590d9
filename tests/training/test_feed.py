"""The feed gives the training thread what it would prepare itself, in the same order, and ends with it."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from limits import HANG_SECONDS

from pipeline.data.batch import Encoded, Image
from pipeline.data.plan import Stop
from pipeline.errors import PipelineError
from pipeline.models.chunks import Chunk, Packed, cut, pack, plan_chunks, run_chunk
from pipeline.training import feed as feed_module
from pipeline.training.feed import Feed

CPU = torch.device("cpu")
STEPS = range(3, 7)


@dataclass(frozen=True)
class How:
    chunk_tokens: int = 40
    kept_chunks: int = 2


def items_of(step: int) -> list[Encoded]:
    draws = np.random.default_rng(step)

    def item(number: int) -> Encoded:
        tiles = draws.integers(0, 256, (1 + number % 3, 3, 4, 4), dtype=np.uint8)
        ids = draws.integers(0, 99, draws.integers(1, 30), dtype=np.int32)
        return Encoded(ids, (Image(tiles, 4, 4),) if number % 2 else ())

    return [item(number) for number in range(20)]


def batches() -> Iterator[SimpleNamespace]:
    return (SimpleNamespace(step=step) for step in STEPS)


def feeding(given: Iterator | None = None, stop: Stop | None = None, items: Callable | None = None, **options) -> Feed:
    options = {"padded": False, "passes": 2, "tiles_once": True} | options
    return Feed(given or batches(), STEPS, stop or Stop(), CPU, items or (lambda _, step: items_of(step)), **options)


def chunks_of(ahead, chunk_tokens: int, padded: bool) -> list[Chunk]:
    return plan_chunks(ahead.items, chunk_tokens, CPU, padded=padded, ahead=ahead)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("passes", "tiles_once"), [(1, False), (2, False), (2, True)])
def test_chunks_are_those_that_a_step_plans_and_packs(padded, passes, tiles_once):
    """Also if the chunk size changes between steps, as while the budget is measured."""
    made = []

    def model(packed: Packed, with_images: bool, features: None) -> torch.Tensor:
        made.append(packed)
        return packed.input_ids[: len(packed.lengths), None].float()

    with feeding(padded=padded, passes=passes, tiles_once=tiles_once) as feed:
        for step in STEPS:
            how = How(30 + 10 * step, kept_chunks=step % 3)
            feed.next_cut(how)
            prepared = feed.next()
            assert prepared.batch.step == step
            chunks = chunks_of(prepared.ahead, how.chunk_tokens, padded)
            expected = plan_chunks(items_of(step), how.chunk_tokens, CPU, padded=padded)
            order = [*range(len(chunks)), *(range(how.kept_chunks, len(chunks)) if passes == 2 else ())]
            for place, number in enumerate(order):
                ours, theirs = chunks[number], expected[number]
                assert torch.equal(ours.rows, theirs.rows) and ours.with_images == theirs.with_images
                run_chunk(model, ours)
                run_chunk(model, theirs)
                first, second = made[-2:]
                assert (first.lengths, first.tiles_of) == (second.lengths, second.tiles_of)
                for name in ("input_ids", "position_ids", "cpu_ids", "tiles"):
                    assert torch.equal(getattr(first, name), getattr(second, name)), name
                assert ("tiles" in first.made) == (bool(first.images) and not (tiles_once and place >= len(chunks)))
        assert feed.waited > 0


def test_other_order_of_chunks_is_an_error():
    with feeding() as feed:
        feed.next_cut(How())
        chunks = chunks_of(feed.next().ahead, How().chunk_tokens, False)
        with pytest.raises(RuntimeError, match="chunk 1 is not the one that was packed next"):
            chunks[1].take()


@pytest.mark.parametrize("cuts", [1, 2])
def test_more_passes_than_declared_are_an_error(cuts):
    """Also while the next step's cut is unknown, for which the other thread waits."""
    with feeding(passes=1) as feed:
        for _ in range(cuts):
            feed.next_cut(How())
        chunks = chunks_of(feed.next().ahead, How().chunk_tokens, False)
        for chunk in chunks:
            chunk.take()
        with pytest.raises(RuntimeError, match="chunk 0 is run, but all passes were packed"):
            chunks[0].take()


def test_fewer_passes_than_declared_are_an_error():
    with feeding(passes=2) as feed:
        feed.next_cut(How())
        chunks = chunks_of(feed.next().ahead, How().chunk_tokens, False)
        for chunk in chunks:
            chunk.take()
        feed.next_cut(How())
        with pytest.raises(RuntimeError, match=f"{len(chunks) - How().kept_chunks} packed chunks are left"):
            feed.next()


def test_step_without_cut_is_an_error():
    with feeding() as feed, pytest.raises(RuntimeError, match="before it was said how its batch is cut"):
        feed.next()


def test_wait_for_a_chunk_has_a_limit(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(feed_module, "_STOP_SECONDS", 0.01)
    monkeypatch.setattr(feed_module, "_CHUNK_SECONDS", 0.05)
    monkeypatch.setattr(feed_module, "pack", lambda items: ended.wait(HANG_SECONDS) and pack(items))
    with feeding() as feed:
        feed.next_cut(How())
        chunks = chunks_of(feed.next().ahead, How().chunk_tokens, False)
        with pytest.raises(PipelineError, match=r"not packed within 0\.05 s"):
            chunks[0].take()
        ended.set()


def test_end_of_the_thread_is_noticed(monkeypatch):
    monkeypatch.setattr(feed_module, "_STOP_SECONDS", 0.01)
    stop = Stop()
    with feeding(stop=stop) as feed:
        stop.set()
        feed.next_cut(How())
        with pytest.raises(RuntimeError, match="than were prepared"):
            feed.next()


def test_next_steps_first_chunks_are_packed_before_this_step_ends_and_no_more(monkeypatch):
    packed = []
    monkeypatch.setattr(feed_module, "pack", lambda items: packed.append(len(items)) or pack(items))
    counts = [len(cut(items_of(step), 40, padded=False)) for step in STEPS]
    with feeding(passes=1) as feed:
        for _ in STEPS:
            feed.next_cut(How())
        taken = 0
        for count in counts:
            chunks = chunks_of(feed.next().ahead, 40, False)
            for chunk in chunks:
                assert len(packed) <= taken + feed_module._AHEAD + 1
                chunk.take()
                taken += 1
            assert taken in (count, *np.cumsum(counts))
            if taken < sum(counts):
                until(lambda before=taken: len(packed) > before)  # a chunk of the next step, before it is asked for
        assert taken == len(packed) == sum(counts)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + HANG_SECONDS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("error", [PipelineError("no such shard"), MemoryError(), KeyboardInterrupt()])
def test_error_of_the_data_is_raised_when_its_step_begins(error):
    def failing() -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(step=3)
        raise error

    with feeding(failing(), passes=1) as feed:
        feed.next_cut(How()), feed.next_cut(How())
        for chunk in chunks_of(feed.next().ahead, 40, False):
            chunk.take()
        with pytest.raises(type(error)) as caught:
            feed.next()
        assert caught.value is error


def test_error_while_packing_is_raised_where_the_chunk_is_used(monkeypatch):
    def fail(items):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(feed_module, "pack", fail)
    with feeding() as feed:
        feed.next_cut(How())
        chunks = chunks_of(feed.next().ahead, 40, False)
        with pytest.raises(torch.OutOfMemoryError):
            chunks[0].take()


@pytest.mark.parametrize("where", ["a batch", "a cut", "room"])
def test_thread_ends_wherever_it_waits_and_not_before(where, monkeypatch):
    monkeypatch.setattr(feed_module, "_STOP_SECONDS", 0.001)
    stop = Stop()

    def waiting() -> Iterator[SimpleNamespace]:
        until(stop.is_set)
        raise PipelineError("the batches are no longer wanted")
        yield

    with feeding(waiting() if where == "a batch" else None, stop) as feed:
        if where == "room":
            feed.next_cut(How())
            until(lambda: feed._ready.qsize() == feed_module._AHEAD)
        thread = feed._thread
        thread.join(0.05)
        assert thread.is_alive() and thread.daemon and thread is not threading.current_thread()
    thread.join(HANG_SECONDS)
    assert not thread.is_alive() and stop.is_set()


def test_training_thread_leaves_a_thread_that_hangs(monkeypatch):
    monkeypatch.setattr(feed_module, "_LEAVE_SECONDS", 0.1)
    let_go = queue.SimpleQueue()

    def hanging() -> Iterator[SimpleNamespace]:
        let_go.get(timeout=HANG_SECONDS)
        yield SimpleNamespace(step=3)

    with feeding(hanging()) as feed:
        pass
    assert feed._thread.is_alive()
    let_go.put(None)
    feed._thread.join(HANG_SECONDS)
    assert not feed._thread.is_alive()
