"""Gradients that are not finite: steps are skipped, and after the recipe's patience the run names a good checkpoint."""

import json
from pathlib import Path

from launch import ROOT, launch

from pipeline.convert.demo import TrainingPairs
from pipeline.convert.sharding import convert
from pipeline.jobs.status import State, Status


def test_skipped_step_changes_nothing_under_each_zero_stage(tiny_model, tmp_path):
    out = tmp_path / "out.json"
    ended = launch([str(Path(__file__).with_name("skipped_steps.py")), str(tiny_model), str(out)], world=1)
    assert ended.status == [0], ended.output[-4000:]
    for way, found in json.loads(out.read_text()).items():
        assert found == {"finite": [True, False, True], "summed": [True, False, True], "same": True}, way


def test_run_skips_a_step_and_ends_after_its_patience_naming_the_last_good_checkpoint(tiny_model, tmp_path):
    data, run = tmp_path / "pairs", tmp_path / "run"
    convert({str(data): TrainingPairs("Scene-T2I", 0, 40)}, options={}, shard_bytes=200_000)
    fields = ["data.lanes=2", "data.block_samples=8", "data.window_blocks=2", "data.datasets=[]", "data.workers=0"]
    fields += ["batch.global_batch=8", "batch.chunk_tokens=500", "steps=9", "checkpoint.every=2", "evaluation=null"]
    fields += [f"model.path={tiny_model}", f"data.url={data}", "optimizer.patience=2", f"run={run}"]
    script = str(ROOT / "tests/integration/planted_nan.py")
    ended = launch([script, "3,5,6,7", "pipeline/recipes/demo.yaml", *fields], world=1)
    assert ended.status == [2], ended.output[-4000:]
    said = next(line for line in ended.output.splitlines() if line.startswith("error"))
    assert "step 7: loss nan, gradient norm inf, and so in 3 steps in a row, from step 5 on" in said
    assert f"the last checkpoint before that is {run}/checkpoints/step-00000004" in said
    status = Status.read(run)
    assert status.state == State.FAILED and "optimizer.patience=2" in status.reason
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [loss is None for loss in losses] == [False, False, True, False, True, True, True]
    warnings = [json.loads(line) for line in (run / "warnings.jsonl").read_text().splitlines()]
    skipped = [(line["step"], line["text"].partition(":")[0]) for line in warnings if "is skipped" in line["text"]]
    assert skipped == [(step, f"step {step}") for step in (3, 5, 6)]
    assert warnings[-1]["text"].startswith("the run failed: step 7: loss nan")
