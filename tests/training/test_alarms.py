"""Alarms: planted faults are named as what they are, and the curves of a healthy run raise none."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.training.alarms import Alarms, nearly_full

CURVES = json.loads(Path(__file__).with_name("healthy_curves.json").read_text())
STEPS = len(CURVES["metrics"]["loss"])
SPEED = {"seconds": 1.0, "waiting_for_data": 0.0, "tokens_per_second": 1000.0, "read_mb_per_second": 3.0}
SPEED |= {"read_retries": 0, "slowest_rank": 0, "slowest_rank_seconds": 0.0, "seconds/first_pass": 0.4}
SPEED |= {"seconds/optimizer": 0.1}


def line(kind: str, step: int) -> dict:
    return {name: values[step] for name, values in CURVES[kind].items() if values[step] is not None}


def alarms_of(changes: dict[int, tuple[dict, dict]] | None = None, global_batch: int = CURVES["global_batch"]) -> list:
    """Return the alarms of the recorded run at constant speed, changed from some steps on."""
    alarms, found, now = Alarms(global_batch), [], ({}, {})
    for step in range(STEPS):
        now = (changes or {}).get(step, now)
        found += alarms.of_step({"step": step + 1} | line("metrics", step) | now[0], SPEED | now[1])
    return found


def test_healthy_run_raises_no_alarm():
    """The recorded run: its curves as one start, and its speed in each of its starts, on a machine that others use."""
    assert STEPS > 100
    assert not alarms_of()
    for first, last in pairwise([*CURVES["starts"], STEPS]):
        alarms = Alarms(CURVES["global_batch"])
        for step in range(first, last):
            assert not alarms.of_step({"step": step + 1} | line("metrics", step), line("speed", step))


@pytest.mark.parametrize(
    ("from_step", "metrics", "speed", "said"),
    [
        (90, {"loss": 60.0}, {}, "loss 60 after a median of"),
        (
            90,
            {},
            {"waiting_for_data": 0.8},
            "the source of the data is slow: a rank waits 40% of a step for data, at 3.0 MB/s",
        ),
        (90, {}, {"read_retries": 9}, "2.2 requests per step to the object store are repeated"),
        (
            90,
            {},
            {"slowest_rank": 5, "slowest_rank_seconds": 0.6},
            "rank 5 is slower than the others by 0.6 s in a step of 1 s",
        ),
        (
            90,
            {},
            {"tokens_per_second": 300.0, "seconds": 3.0, "seconds/optimizer": 2.1},
            "throughput fell from 1,000 to 300 tokens/s; optimizer grew most, from 0.1 to 2.1 s a step",
        ),
    ],
    ids=["spike", "slow data", "retries", "slow rank", "throughput"],
)
def test_planted_fault_is_named_once_as_what_it_is(from_step, metrics, speed, said):
    (alarm,) = alarms_of({from_step: (metrics, speed)})
    step, _, text = alarm.partition(": ")
    assert from_step < int(step.removeprefix("step ")) <= from_step + 21
    assert text.startswith(said)


def test_single_slow_steps_and_common_noise_raise_no_alarm():
    slow = {"tokens_per_second": 100.0, "seconds": 10.0, "waiting_for_data": 9.0, "slowest_rank_seconds": 9.0}
    assert not alarms_of({step: ({}, slow if step % 4 == 0 else {}) for step in range(STEPS)})
    different = [({}, {"slowest_rank": step % 3, "slowest_rank_seconds": 0.6}) for step in range(STEPS)]
    assert not alarms_of(dict(enumerate(different)))


def test_dataset_that_stops_learning_is_named():
    """The first dataset's precision rises and then falls; the other one's stays."""
    alarms, found = Alarms(1000), []
    for step in range(1, 41):
        precision = 0.8 if 10 <= step < 20 else 0.4
        metrics = {"step": step, "loss": 1.0, "precision": 0.5, "precision/a": precision, "precision/b": 0.5}
        found += alarms.of_step(metrics | {"share/a": 0.25, "share/b": 0.75}, SPEED)
    (alarm,) = found
    assert alarm.startswith("step 21: dataset a stops learning: its in-batch Precision@1 fell from 80% to 53%")
    assert "learning/precision_at_1/a" in alarm


def test_run_of_one_dataset_that_stops_learning_is_named():
    alarms = Alarms(1000)
    found = [
        alarm
        for step in range(1, 21)
        for alarm in alarms.of_step({"step": step, "loss": 1.0, "precision": 0.9 if step < 10 else 0.1}, SPEED)
    ]
    assert len(found) == 1 and "the model stops learning" in found[0]


def test_disk_without_room_for_another_checkpoint_is_named(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 5_000_000})
    monkeypatch.setattr("pipeline.training.alarms.shutil.disk_usage", lambda folder: usage)
    assert nearly_full(tmp_path, 5_000_000) == ""
    assert "has 0.005 GB left, and a checkpoint takes 0.0061 GB: there is no room" in nearly_full(tmp_path, 6_100_000)
