"""What a run on two processes says of its speed, its profile, and a rank that hangs."""

import gzip
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from launch import ROOT, fork, launch, wait
from limits import HANG_MINUTES

from pipeline.convert.demo import TrainingPairs
from pipeline.convert.sharding import convert
from pipeline.jobs.status import State, Status

STEPS = 5
PHASES = ["first_pass", "loss", "second_pass", "optimizer"]


@pytest.fixture(scope="module")
def recipe(tiny_model, tmp_path_factory) -> list[str]:
    data = tmp_path_factory.mktemp("data") / "pairs"
    convert({str(data): TrainingPairs("Scene-T2I", 0, 40)}, options={}, shard_bytes=200_000)
    fields = ["data.lanes=2", "data.block_samples=8", "data.window_blocks=2", "data.datasets=[]", "data.workers=0"]
    fields += ["batch.global_batch=8", "batch.chunk_tokens=500", f"steps={STEPS}", "checkpoint.every=3"]
    fields += [f"model.path={tiny_model}", f"data.url={data}", "evaluation=null", f"timeout_minutes={HANG_MINUTES}"]
    return ["pipeline/recipes/demo.yaml", *fields]


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "profiled"
    ended = launch(["-m", "pipeline.train", *recipe, f"run={run}", "profile={step: 2, steps: 3}"], world=2)
    assert ended.status == [0, 0], ended.output[-4000:]
    return run


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_speed_has_phases_memory_and_flops(run):
    speed = lines(run / "speed.jsonl")
    assert len(speed) == STEPS
    for line in speed:
        phases = [line[f"seconds/{name}"] for name in ("data", *PHASES)]
        assert min(phases) > 0 and sum(phases) < line["seconds"]
        assert 0.1 < line["peak_memory_gb"] < 100  # of the process: these have no GPU
        assert line["tflops_per_device"] > 0
        assert "mfu" not in line  # of no known device
    assert ["seconds/checkpoint" in line for line in speed] == [False, False, False, True, False]
    assert all("seconds/report" in line for line in speed[1:])
    # The work of a step depends on its items alone, not on time.
    works = [line["tflops_per_device"] * line["seconds"] for line in speed]
    assert all(0.3 < work / other < 3 for work, other in pairwise(works))


def test_metrics_have_no_times(run):
    names = {name for line in lines(run / "metrics.jsonl") for name in line}
    assert not [name for name in names if "second" in name or "flops" in name or "memory" in name]


@pytest.mark.parametrize(("rank", "first", "last"), [(0, 2, 3), (1, 2, 3), (0, 4, 4)])
def test_profile_has_the_phases_of_the_steps_asked_for_but_no_checkpoint(rank, first, last, run):
    path = run / f"profile/step-{first:08d}/rank{rank}.pt.trace.json.gz"
    content = json.loads(gzip.decompress(path.read_bytes()))
    ranges = [event for event in content["traceEvents"] if event.get("cat") == "user_annotation"]
    steps = sorted((event for event in ranges if event["name"].startswith("ProfilerStep#")), key=lambda e: e["ts"])
    assert [event["name"] for event in steps] == [f"ProfilerStep#{n}" for n in range(first, last + 1)]
    assert "checkpoint" not in {event["name"] for event in ranges}
    for step in steps:
        inside = [event for event in ranges if step["ts"] < event["ts"] < step["ts"] + step["dur"]]
        names = [event["name"] for event in sorted(inside, key=lambda e: e["ts"])]
        assert [name for name in names if name in (*PHASES, "data", "report")] == ["data", *PHASES, "report"]
    operators = {event["name"] for event in content["traceEvents"] if event.get("cat") == "cpu_op"}
    assert "aten::mm" in operators
    assert len(list((run / "profile").rglob("*.gz"))) == 4


@pytest.mark.parametrize("how", ["sleep", "stop"])
def test_message_names_the_rank_that_hangs(how, recipe, tmp_path):
    script = str(ROOT / "tests/integration/hanging.py")
    ended = wait(fork([script, "1", "3", how, *recipe, f"run={tmp_path}"], world=2), after_failure=0)
    assert ended.status == [2, None], ended.output[-4000:]
    said = next(line for line in ended.output.splitlines() if line.startswith("error"))
    # A stopped process may have written its last note a moment before, in the step before.
    known = " is in step 3, optimizer, since " if how == "sleep" else " was last seen in step [23], "
    assert re.search(f"timeout_minutes=10: rank 1 on .*{known}", said)
    assert ("it has not written for" in said) == (how == "stop")
    assert ("at sleep_in_the_step (hanging.py:" in said) == (how == "sleep")
    assert (
        ". 1 of 2 ranks wait for it, the furthest in step 3, optimizer, since " in said
        and ", in the collective all_" in said
    )
    assert "WARNING rank 0: waiting for " in ended.output  # before the limit, which NCCL leaves no time for
    assert "waiting for " in (tmp_path / "warnings.jsonl").read_text()
    status = Status.read(tmp_path)
    assert status.state == State.FAILED and "rank 1 on " in status.reason
    if how == "sleep":  # a stopped process writes nothing
        assert "sleep_in_the_step" in (tmp_path / "ranks/rank1.stacks").read_text()
