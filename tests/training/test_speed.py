"""Phases, their seconds, and what a step's speed is computed from."""

import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from two_ranks import on_two_ranks

from pipeline import phases
from pipeline.config import load_recipe
from pipeline.errors import PipelineError
from pipeline.phases import phase, place, take_seconds
from pipeline.training.profiler import check
from pipeline.training.speed import PEAKS, Speed, peak_tflops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_peak_is_known_by_the_devices_name(name, peak):
    assert peak_tflops(name) == peak


def test_first_row_of_peaks_that_fits_is_the_most_specific():
    rows = list(PEAKS)
    assert not [(a, b) for n, a in enumerate(rows) for b in rows[n + 1 :] if set(b) > set(a)]


def test_phases_are_timed_counted_and_placed():
    take_seconds()
    before = place().count
    for step in (7, 8):
        with phase("data", step):
            time.sleep(0.01)
        around = place().phase
        with phase("loss"):
            assert (place().step, place().phase) == (step, "loss")
        assert (place().step, place().phase) == (step, around) != (step, "loss")
    assert place().count == before + 8
    seconds = take_seconds()
    assert list(seconds) == ["data", "loss"] and seconds["data"] >= 0.02 and seconds["loss"] > 0
    assert take_seconds() == {}


def test_marks_that_nobody_reads_do_not_grow():
    for _ in range(1000):
        with phase("loss"):
            pass
    assert len(phases._marks) < 1000
    take_seconds()


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("peak", [None, 100.0])
def test_flops_of_a_step_make_its_utilisation(peak, one_rank):
    batch = SimpleNamespace(items={1: "an item", 2: "another"}, received=6_000_000, retries=2)
    result = SimpleNamespace(tokens=500, padded=800, logits=3)
    speed = Speed(8, lambda items, logits: 1e13 * len(items) + logits, "fp32")
    speed._peak = peak
    line, sums = speed.of_step(result, batch, time.perf_counter() - 2, 0.5, 3_000_000_000, {"loss": 0.25}, {"a": 3.0})
    assert sums == {"a": 3.0}
    assert (line["padding"], line["read_retries"], line["slowest_rank"]) == (pytest.approx(0.375), 2, 0)
    assert line["seconds"] >= 2
    assert line["tflops_per_device"] * line["seconds"] == pytest.approx(20)
    assert line.get("mfu") == (pytest.approx(line["tflops_per_device"] / peak) if peak else None)
    assert (line["waiting_for_data"], line["peak_memory_gb"], line["seconds/loss"]) == (0.5, pytest.approx(3), 0.25)
    assert line["tokens_per_second"] * line["seconds"] == pytest.approx(500)
    assert line["read_mb_per_second"] * line["seconds"] == pytest.approx(6)


def test_model_of_unknown_flops_has_no_utilisation(one_rank):
    batch, result = SimpleNamespace(items={}, received=0, retries=0), SimpleNamespace(tokens=1, padded=1, logits=0)
    line, _ = Speed(8, None, "bf16").of_step(result, batch, time.perf_counter() - 1, 0, 0, {}, {})
    assert not {"mfu", "tflops_per_device"} & line.keys()


def of_two_ranks(rank: int) -> tuple[dict, dict]:
    batch = SimpleNamespace(items={}, received=1_000_000 * (1 + rank), retries=rank)
    result = SimpleNamespace(tokens=100 + 200 * rank, padded=200 + 200 * rank, logits=0)
    phases = {"data": 0.1, "first_pass": 0.5 + 2 * rank, "loss": 9.0 - 2 * rank}
    return Speed(8, None, "fp32").of_step(result, batch, time.perf_counter() - 1, 0.1, 0, phases, {"n": 2.0 + rank})


def test_slowest_rank_is_the_one_that_the_others_wait_for():
    """The loss waits for the slower rank, so that only phases before it count."""
    for line, sums in on_two_ranks(of_two_ranks):
        assert (line["slowest_rank"], line["read_retries"]) == (1, 1)
        assert line["slowest_rank_seconds"] == pytest.approx(1.0)
        assert line["padding"] == pytest.approx(1 - 400 / 600)
        assert line["heaviest_rank"] == pytest.approx(1.5)
        assert sums == {"n": 5.0}


def test_steps_to_profile_must_be_in_the_run():
    profile = load_recipe("demo.yaml", ["profile.step=98"]).profile
    assert profile and profile.last == 100
    check(profile, 100)
    check(None, 1)
    with pytest.raises(
        PipelineError, match=r"profile asks for steps 98 to 100, but the run has 99: lower profile\.step"
    ):
        check(profile, 99)
    with pytest.raises(PipelineError, match=r"profile\.steps"):
        load_recipe("demo.yaml", ["profile={step: 1, steps: 11}"])
