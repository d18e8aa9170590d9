"""What fits is found in a few steps, never tried beyond what was seen to fit, and survives a checkpoint."""

import pytest

from pipeline.config import Batch
from pipeline.training.budget import FULL, LARGEST_CHUNK, Budget, Memory

GB = 10**9


class Device:
    """Memory as a step takes it: what is resident, something for each step, and so much a token of a graph."""

    def __init__(self, total: float, base: float, step: float, token: float) -> None:
        self.total, self.base, self.step, self.token = int(total), int(base), step, token

    def peak(self, budget: Budget) -> int:
        return int(self.base + self.step + self.token * budget.chunk_tokens * max(budget.kept_chunks, 1))

    def run(self, budget: Budget) -> list[tuple[int, int]]:
        """Steps until all is found: their cuts."""
        cuts = []
        while not budget.is_fixed:
            cuts.append((budget.chunk_tokens, budget.kept_chunks))
            assert self.peak(budget) <= self.total, "out of memory"
            budget.measured(Memory(self.total, self.base, self.peak(budget)), budget.chunk_tokens)
            assert len(cuts) < 30
        return cuts


def batch(chunk: int | str, kept: int | str) -> Batch:
    return Batch(global_batch=64, chunk_tokens=chunk, kept_chunks=kept)


@pytest.mark.parametrize("token", [0.1e6, 0.7e6, 3e6, 6e6, 15e6])
@pytest.mark.parametrize(("base", "step"), [(2 * GB, 0), (40 * GB, 2 * GB)])
def test_memory_is_filled_and_never_exceeded(token, base, step):
    device = Device(80 * GB, base, step, token)
    if device.peak(Budget.of(batch(4096, 0), 4096)) > device.total:
        pytest.skip("no chunk fits")
    budget = Budget.of(batch("auto", "auto"), 4096)
    device.run(budget)
    assert budget.chunk_tokens <= LARGEST_CHUNK
    room = FULL * device.total - device.peak(budget)
    assert room >= 0
    graph = token * budget.chunk_tokens
    # Another graph would not fit, by the estimate that counts what a step takes besides as part of it.
    assert room < graph + step or budget.kept_chunks == 0


def test_the_order_of_trials():
    device = Device(80 * GB, 20 * GB, 0, 1e6)
    budget = Budget.of(batch("auto", "auto"), 4096)
    assert device.run(budget) == [(4096, 0), (8192, 0), (16384, 0), (16384, 1), (16384, 2), (16384, 3)]
    assert (budget.chunk_tokens, budget.kept_chunks) == (16384, 3)  # 52 GB are left, of which one takes 16.4


def test_what_the_recipe_says_is_not_measured():
    budget = Budget.of(batch(5000, 3), 4096)
    assert budget.is_fixed and (budget.chunk_tokens, budget.kept_chunks) == (5000, 3)
    kept = Budget.of(batch(5000, "auto"), 4096)
    Device(80 * GB, 20 * GB, 0, 1e6).run(kept)
    assert (kept.chunk_tokens, kept.kept_chunks) == (5000, 10)
    chunk = Budget.of(batch("auto", 4), 4096)
    Device(80 * GB, 20 * GB, 0, 1e6).run(chunk)
    assert chunk.kept_chunks == 4 and 0.7 * 52e9 < 4 * chunk.chunk_tokens * 1e6 <= 52e9


def test_a_batch_that_does_not_fill_a_chunk_tells_nothing_of_larger_ones():
    budget = Budget.of(batch("auto", 0), 4096)
    budget.measured(Memory(80 * GB, GB, 2 * GB), 1000)
    assert budget.is_fixed and budget.chunk_tokens == 4096


def test_a_continued_run_goes_on_with_what_was_found():
    device, budget = Device(80 * GB, 20 * GB, GB, 2e6), Budget.of(batch("auto", "auto"), 4096)
    for _ in range(3):
        budget.measured(Memory(device.total, device.base, device.peak(budget)), budget.chunk_tokens)
    again = Budget.of(batch("auto", "auto"), 4096, saved=budget.state())
    assert device.run(again) == device.run(budget)
    assert again == budget
    assert Budget.of(batch(5000, 0), 4096, saved=budget.state()).chunk_tokens == 5000
