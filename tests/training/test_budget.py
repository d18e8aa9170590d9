"""The budget is found in a few steps, never exceeds the memory on the way, and is restored from a checkpoint."""

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from two_ranks import on_two_ranks

from pipeline import distributed
from pipeline.config import Batch, Recipe, load_recipe
from pipeline.data.batch import Encoded
from pipeline.device import configure_device
from pipeline.distributed import start_distributed
from pipeline.errors import PipelineError
from pipeline.objectives.contrastive.step import Contrastive
from pipeline.training import budget as meters
from pipeline.training.budget import (
    FULL,
    LARGEST_CHUNK,
    MEMORY,
    NOTE,
    Budget,
    Memory,
    Meter,
    out_of_memory_noted,
    record_of,
    restored_budget,
)

GB = 10**9
BOTH = ["chunk_tokens", "kept_chunks"]


class Device:
    """A memory model of a step: resident memory, a constant per step, and memory per token of a graph.

    fills: how full each step's largest chunk is. others: memory that torch's allocator cannot use.
    moments: the part of the resident memory that the first step allocates.
    """

    def __init__(
        self,
        total: float,
        base: float,
        step: float,
        token: float,
        *,
        fills: tuple[float, ...] = (1,),
        others: float = 0,
        moments: float = 0,
    ) -> None:
        self.total, self.base, self.step, self.token = int(total), int(base), step, token
        self.fills, self.others, self.moments = fills, int(others), int(moments)

    def peak(self, budget: Budget, fill: float = 1) -> int:
        return int(self.base + self.step + self.token * fill * budget.chunk_tokens * max(budget.kept_chunks, 1))

    def run(self, budget: Budget) -> list[tuple[int, int]]:
        """Take steps until the budget is fixed; return the (chunk_tokens, kept_chunks) of each."""
        cuts = []
        while not budget.is_fixed:
            fill = self.fills[len(cuts) % len(self.fills)]
            cuts.append((budget.chunk_tokens, budget.kept_chunks))
            absent = 0 if cuts[1:] else self.moments
            peak = max(self.peak(budget, fill) - absent, self.base)
            memory = Memory(self.total - self.others, self.base - absent, peak, self.base)
            # The allocator loses some memory between its blocks.
            assert 1.04 * memory.peak <= memory.total, "out of memory"
            budget.measured(memory, int(fill * budget.chunk_tokens), items=10_000)
            assert len(cuts) < 30
        return cuts


def batch(chunk: int | str, kept: int | str) -> Batch:
    return Batch(global_batch=64, chunk_tokens=chunk, kept_chunks=kept)


@pytest.mark.parametrize("token", [0.1e6, 0.7e6, 3e6, 6e6, 15e6])
@pytest.mark.parametrize(("base", "step"), [(2 * GB, 0), (40 * GB, 2 * GB)])
def test_budget_fills_memory_without_exceeding_the_limit(token, base, step):
    device = Device(80 * GB, base, step, token)
    if device.peak(Budget.of(batch(4096, 0), 4096)) > device.total:
        pytest.skip("no chunk fits")
    budget = Budget.of(batch("auto", "auto"), 4096)
    device.run(budget)
    assert budget.chunk_tokens <= LARGEST_CHUNK
    room = FULL * device.total - device.peak(budget)
    assert room >= 0
    graph = token * budget.chunk_tokens
    # Another graph would not fit, if its estimate includes the step's constant.
    assert room < graph + step or budget.kept_chunks == 0


@pytest.mark.parametrize("seed", range(20))
def test_budget_measured_on_partial_chunks_fits_full_chunks(seed):
    draws = np.random.default_rng(seed)
    fills = tuple(draws.uniform(0.72, 1, size=29).tolist())
    device = Device(80 * GB, draws.uniform(5, 40) * GB, GB, draws.uniform(0.2e6, 4e6), fills=fills, others=5 * GB)
    budget = Budget.of(batch("auto", "auto"), 4096)
    device.run(budget)
    available = device.total - device.others
    room = FULL * available - device.peak(budget)
    assert 0 <= room < device.token * budget.chunk_tokens + 2 * device.step  # no other graph fits


def test_budget_reserves_memory_for_optimizer_moments():
    """Use a 7B model's numbers on eight GPUs, whose longest item takes 27 GB."""
    device, budget = Device(80 * GB, 28 * GB, 0, 6.6e6, moments=7.6 * GB), Budget.of(batch("auto", 0), 4096)
    assert device.run(budget)[1] == (6656, 0)


def test_chunk_size_is_tried_before_cached_graphs():
    device = Device(80 * GB, 20 * GB, 0, 1e6)
    budget = Budget.of(batch("auto", "auto"), 4096)
    assert device.run(budget) == [(4096, 0), (8192, 0), (16384, 0), (16384, 1), (16384, 2), (16384, 3)]
    assert (budget.chunk_tokens, budget.kept_chunks) == (16384, 3)  # 52 GB are free, and one graph takes 16.4


def test_values_set_by_the_recipe_are_not_measured():
    budget = Budget.of(batch(5000, 3), 4096)
    assert budget.is_fixed and (budget.chunk_tokens, budget.kept_chunks) == (5000, 3)
    kept = Budget.of(batch(5000, "auto"), 4096)
    Device(80 * GB, 20 * GB, 0, 1e6).run(kept)
    assert (kept.chunk_tokens, kept.kept_chunks) == (5000, 10)
    chunk = Budget.of(batch("auto", 4), 4096)
    Device(80 * GB, 20 * GB, 0, 1e6).run(chunk)
    assert chunk.kept_chunks == 4 and 0.7 * 52e9 < 4 * chunk.chunk_tokens * 1e6 <= 52e9


def test_batch_smaller_than_a_chunk_does_not_enlarge_chunks():
    budget = Budget.of(batch("auto", 0), 4096)
    budget.measured(Memory(80 * GB, GB, 2 * GB, GB), 1000, 32)
    assert budget.is_fixed and budget.chunk_tokens == 4096
    # If the batch cannot fill a chunk, its graph is cached as long as a batch twice as large would fit.
    unlimited = Budget.of(batch(1_000_000, "auto"), 4096)
    unlimited.measured(Memory(80 * GB, 20 * GB, 40 * GB, 20 * GB), 2000, 32)
    assert unlimited.kept_chunks == 1


def test_all_graphs_are_cached_if_the_whole_batch_fits():
    budget, kept = Budget.of(batch(5000, "auto"), 4096), []
    while not budget.is_fixed:
        budget.measured(Memory(80 * GB, 20 * GB, 21 * GB, 20 * GB), 5000, items=12)
        kept.append(budget.kept_chunks)
        assert len(kept) < 10
    assert kept == [1, 2, 4, 8, 16, 16]


def test_resumed_run_continues_with_restored_budget():
    device, budget = Device(80 * GB, 20 * GB, GB, 2e6), Budget.of(batch("auto", "auto"), 4096)
    for _ in range(3):
        memory = Memory(device.total, device.base, device.peak(budget), device.base)
        budget.measured(memory, budget.chunk_tokens, 10_000)
    again = Budget.of(batch("auto", "auto"), 4096, replace(budget))
    assert device.run(again) == device.run(budget)
    assert again == budget


def test_recipe_values_override_restored_budget():
    saved = Budget(16384, 5, True, True, BOTH, 4096, graph=9)

    def now(chunk: int | str, kept: int | str, before: Budget = saved) -> tuple[int, int, bool, bool]:
        budget = Budget.of(batch(chunk, kept), 4096, before)
        assert budget.graph in (0, before.graph if budget.kept_chunks == before.kept_chunks else 0)
        return budget.chunk_tokens, budget.kept_chunks, budget.chunk_is_fixed, budget.kept_is_fixed

    assert now("auto", "auto") == (16384, 5, True, True)
    assert now(5000, 0) == (5000, 0, True, True)
    assert now(8192, "auto") == (8192, 0, True, False)  # the number of graphs of such chunks that fit is unknown
    assert now(16384, "auto") == (16384, 5, True, True)
    assert now("auto", 2) == (16384, 2, True, True)  # it fitted next to five graphs
    assert now("auto", 8) == (4096, 8, False, True)
    # Values that the recipe had set are not known to be the largest.
    assert now("auto", "auto", Budget(16384, 0, True, True, BOTH[:1], 4096)) == (16384, 0, True, False)
    assert now("auto", "auto", Budget(5000, 5, True, True, BOTH[1:], 4096)) == (4096, 0, False, False)


CONDITIONS = {"seed": 0, "processes": 16, MEMORY: 80 * GB}


def test_budget_is_restored_only_for_same_processes_and_memory(tmp_path):
    budget = Budget(16384, 5, True, True, BOTH, 4096)
    kept = record_of(budget, CONDITIONS)
    assert restored_budget(tmp_path, kept, CONDITIONS) == budget
    # On CPUs, this is the machine's memory, which varies by some megabytes.
    for memory, holds in ((79.5, True), (84, True), (72, False), (141, False)):
        before = restored_budget(tmp_path, kept, CONDITIONS | {MEMORY: int(memory * GB)})
        assert (before is not None) == holds, memory
    for other in ({"processes": 8}, {"seed": 1}):
        assert restored_budget(tmp_path, kept, CONDITIONS | other) is None
    assert restored_budget(tmp_path, None, CONDITIONS) is None
    # The format of an older checkpoint, and invalid notes.
    assert restored_budget(tmp_path, {"chunk_tokens": 16384, "kept_chunks": 5}, CONDITIONS) is None
    for note in ("[1]", '{"conditions": null}', "{", json.dumps(kept | {"budget": {"tokens": 1}})):
        (tmp_path / NOTE).write_text(note)
        assert restored_budget(tmp_path, kept, CONDITIONS) == budget


def too_much() -> None:
    torch.empty(1 << 50)


def on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def in_cublas() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize("step", [too_much, on_a_gpu, in_cublas])
@pytest.mark.parametrize(
    ("recipe", "cut", "smaller", "advice"),
    [
        (("auto", "auto"), (16384, 5), (16384, 2, True), "start uses batch.chunk_tokens=16384 batch.kept_chunks=2;"),
        (("auto", "auto"), (16384, 1), (8192, 0, False), "start uses batch.chunk_tokens=8192 batch.kept_chunks=0;"),
        (("auto", 4), (6016, 4), (4096, 4, True), "start uses batch.chunk_tokens=4096 batch.kept_chunks=4;"),
        (
            ("auto", "auto"),
            (4096, 1),
            None,
            "a chunk holds only one item of model.max_tokens; batch.activation",
        ),
        ((16384, "auto"), (16384, 1), None, "again with batch.chunk_tokens=8192;"),
        ((16384, 4), (16384, 4), None, "again with batch.kept_chunks=2;"),
        ((16384, 0), (16384, 0), None, "again with batch.chunk_tokens=8192;"),
    ],
)
def test_out_of_memory_names_settings_and_lowers_automatic_budget(tmp_path, step, recipe, cut, smaller, advice):
    budget = Budget.of(batch(*recipe), 4096)
    budget.chunk_tokens, budget.kept_chunks, budget.graph = *cut, 7
    too_large = record_of(budget, CONDITIONS)
    with pytest.raises(PipelineError) as raised, out_of_memory_noted(tmp_path, 12, budget, CONDITIONS):
        step()
    assert f"in step 12 with batch.chunk_tokens={cut[0]} batch.kept_chunks={cut[1]}: " in str(raised.value)
    assert advice in str(raised.value)
    before = restored_budget(tmp_path, too_large, CONDITIONS)
    if smaller is None:
        assert before == budget and not list(tmp_path.iterdir())
        return
    again = Budget.of(batch(*recipe), 4096, before)
    assert (again.chunk_tokens, again.kept_chunks, again.kept_is_fixed) == smaller and again.chunk_is_fixed
    assert again.kept_is_fixed or again.graph == 0
    assert [path.name for path in tmp_path.iterdir()] == ["budget.json"]
    # On another number of GPUs the note does not apply, and the checkpoint's budget does.
    elsewhere = CONDITIONS | {"processes": 32}
    assert restored_budget(tmp_path, record_of(budget, elsewhere), elsewhere) == budget
    assert restored_budget(tmp_path, None, elsewhere) is None


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_run_out_of_memory_restarts_with_smaller_budget(tmp_path, monkeypatch, one_rank, caplog):
    """Run the whole training loop, except for the step itself."""
    # Imported here, because processes that do not run this test also import this module.
    from pipeline.training.trainer import Trainer

    caplog.set_level("INFO", logger="pipeline")
    fields = [f"run={tmp_path}", "evaluation=null", "batch.chunk_tokens=auto", "batch.kept_chunks=auto"]
    recipe = load_recipe("pipeline/recipes/demo.yaml", [*fields, "model.max_tokens=4096"])
    nothing = SimpleNamespace(asked=lambda: 0, steps=nullcontext)
    model, zero = SimpleNamespace(pads=True), {"zero_optimization": {"stage": 3}}
    engine, cuts = SimpleNamespace(device=torch.device("cpu"), module=model, config=zero), []
    engine.checkpoint_engine = SimpleNamespace(save=None)
    engine.basic_optimizer = torch.optim.SGD([torch.zeros(1)])

    def step(_: object, engine: object, batch: object, cut: Budget, *__: object, **___: object) -> None:
        cuts.append((cut.chunk_tokens, cut.kept_chunks))
        torch.empty(1 << 50)

    def trainer(recipe: Recipe = recipe) -> Trainer:
        run = Trainer(recipe, nothing)
        run.steps, run.start, run.conditions, run.engine, run.frozen = 3, None, {"seed": 0}, engine, None
        batch = SimpleNamespace(items={0: Encoded(np.zeros(9, np.int32))})
        run.evaluation = SimpleNamespace(is_due=lambda step: False)
        run.world, run.order, run.source = 1, None, SimpleNamespace(names=())
        run.processor = run.speed = None
        run._stream = lambda steps, stop: (batch for _ in steps)
        return run

    monkeypatch.setattr(Contrastive, "step", step)
    monkeypatch.setattr(get_accelerator(), "total_memory", lambda: 24 * GB)
    run = trainer()
    run.meter = Meter(1)
    conditions = run._conditions_of_budget()
    (tmp_path / NOTE).write_text(json.dumps(record_of(Budget(16384, 3, True, True, BOTH, 4096), conditions)))
    for now, smaller in (("16384 batch.kept_chunks=3", "16384"), ("16384 batch.kept_chunks=1", "8192")):
        with pytest.raises(PipelineError, match=f"in step 1 with .* uses batch.chunk_tokens={smaller} "):
            trainer().train()
        assert f"restored budget: batch.chunk_tokens={now}" in caplog.messages[-1]
    # The note applies to a longest item of 4,096 tokens and to that much memory.
    longer = load_recipe("pipeline/recipes/demo.yaml", [*fields, "model.max_tokens=8192"])
    with pytest.raises(PipelineError, match=r"with batch.chunk_tokens=8192 .* a chunk holds only one item"):
        trainer(longer).train()
    monkeypatch.setattr(get_accelerator(), "total_memory", lambda: 48 * GB)
    with pytest.raises(PipelineError):
        trainer().train()
    assert cuts == [(16384, 3), (16384, 1), (8192, 0), (4096, 0)]


def test_other_errors_are_raised_unchanged(tmp_path):
    budget = Budget(1, 0, True, True, [], 1)
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_noted(tmp_path, 1, budget, {}):
        raise RuntimeError("shapes do not fit")
    assert not list(tmp_path.iterdir())


def gpu(rank: int) -> SimpleNamespace:
    """Mock an accelerator. The second GPU is smaller, and both torch and other libraries use more of it."""
    return SimpleNamespace(
        device_name=lambda: "cuda",
        current_device_name=lambda: "cpu",  # for the tensors that gloo reduces
        total_memory=lambda: (80 - rank) * GB,
        reset_peak_memory_stats=lambda: None,
        memory_allocated=mock.Mock(side_effect=[(10 + rank) * GB, (15 + rank) * GB]),
        max_memory_allocated=lambda: (30 + 2 * rank) * GB,
    )


def measured_by(rank: int) -> list[int]:
    total, reserved, others = (80 - rank) * GB, 40 * GB, (3 + 2 * rank) * GB
    calls = {"mem_get_info": lambda: (total - reserved - others, total), "memory_reserved": lambda: reserved}
    accelerator = gpu(rank)
    with mock.patch.object(meters, "get_accelerator", lambda: accelerator), mock.patch.multiple(torch.cuda, **calls):
        meter = Meter(local_world=2)
        meter.start()
        memory, largest, items = meter.stop(5000 - rank, 30 + rank)
    assert dist.get_world_size() == 2
    return [meter.total, memory.total, memory.base, memory.peak, memory.rest, largest, items]


def allocator_settings(rank: int) -> str:
    dist.destroy_process_group()
    for name in [name for name in os.environ if name.endswith("ALLOC_CONF")]:
        del os.environ[name]
    if rank == 1:
        os.environ["PYTORCH_ALLOC_CONF"] = "max_split_size_mb:512"
    distributed.configure_device = lambda device: configure_device("cuda")  # as if there were a GPU
    start_distributed(1)
    return torch._C._accelerator_getAllocatorSettings()


@pytest.mark.slow
def test_allocator_uses_expandable_segments_by_default():
    """Use new processes, since torch reads the setting only once; torch and DeepSpeed are already imported."""
    assert on_two_ranks(allocator_settings) == ["expandable_segments:True", "max_split_size_mb:512"]


@pytest.mark.slow
def test_ranks_agree_on_fullest_device_and_exclude_foreign_memory():
    assert on_two_ranks(measured_by) == [[79 * GB, (79 - 5) * GB, 11 * GB, 32 * GB, 16 * GB, 5000, 31]] * 2
