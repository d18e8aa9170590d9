"""A run with planted faults names each as what it is, in its log, its warnings, TensorBoard and the terminal's view.

Gradients that are not finite: steps are skipped, and after the recipe's patience the run names a good checkpoint.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fault_proxy import FaultProxy
from launch import ROOT, fork, launch, wait
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import watch
from pipeline.convert.demo import TrainingPairs
from pipeline.convert.sharding import convert
from pipeline.jobs.status import State, Status


def test_skipped_step_changes_nothing_under_each_zero_stage(tiny_model, tmp_path):
    out = tmp_path / "out.json"
    ended = launch([str(Path(__file__).with_name("skipped_steps.py")), str(tiny_model), str(out)], world=1)
    assert ended.status == [0], ended.output[-4000:]
    for way, found in json.loads(out.read_text()).items():
        assert found == {"finite": [True, False, True], "summed": [True, False, True], "same": True}, way


def slow_source(run: Path) -> Callable[[int, str, str], None]:
    """Return what makes a proxy answer one read of a shard at a time, each after as long as a step works."""
    lock, free_at = threading.Lock(), 0.0

    def delay(number: int, method: str, path: str) -> None:
        nonlocal free_at
        if method != "GET" or ".tar" not in path:
            return
        with lock:
            work = [line["seconds"] - line["waiting_for_data"] for line in watch.lines(run / "speed.jsonl")]
            free_at = max(free_at, time.monotonic()) + max([0.2, *work[-1:]])
            seconds = free_at - time.monotonic()
        time.sleep(seconds)

    return delay


def test_planted_faults_are_named_as_what_they_are(s3, tiny_model, tmp_path, monkeypatch, capsys):
    """The source of the data is slow, the disk is nearly full, and the loss of one of two ranks is NaN."""
    data, run = "s3://pipeline-tests/planted", tmp_path / "run"
    convert({data: TrainingPairs("Scene-T2I", 0, 40)}, options={}, shard_bytes=200_000)
    fields = ["data.lanes=2", "data.block_samples=4", "data.window_blocks=1", "data.datasets=[]", "data.workers=0"]
    fields += ["batch.global_batch=8", "batch.chunk_tokens=500", "steps=9", "checkpoint.every=4", "evaluation=null"]
    fields += [f"model.path={tiny_model}", f"data.url={data}", "optimizer.patience=2", f"run={run}"]
    script = str(ROOT / "tests/integration/planted.py")
    with FaultProxy(s3.endpoint, slow_source(run)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        ranks = fork([script, "1", "3,5,6,7", "pipeline/recipes/demo.yaml", *fields], world=2)
        ended = wait(ranks, after_failure=0)
    assert ended.status[0] == 2, ended.output[-4000:]
    said = next(line for line in ended.output.splitlines() if line.startswith("error"))
    assert "step 7: loss nan from rank 1, gradient norm inf, and so in 3 steps in a row, from step 5 on" in said
    assert f"the last checkpoint before that is {run}/checkpoints/step-00000004" in said
    status = Status.read(run)
    assert status.state == State.FAILED and "optimizer.patience=2" in status.reason
    losses = [line["loss"] for line in watch.lines(run / "metrics.jsonl")]
    assert [loss is None for loss in losses] == [False, False, True, False, True, True, True]

    warnings = [line["text"] for line in watch.lines(run / "warnings.jsonl")]
    assert [text.partition(":")[0] for text in warnings if "is skipped" in text] == ["step 3", "step 5", "step 6"]
    assert warnings[-1].startswith("the run failed: step 7: loss nan from rank 1")
    assert sum("the source of the data is slow: a rank waits" in text for text in warnings) == 1
    assert sum(f"the disk of {run}/checkpoints has 1e-06 GB left" in text for text in warnings) == 1
    for text in warnings[:-1]:
        assert f"WARNING rank 0: {text}" in ended.output
    events = EventAccumulator(str(run / "tensorboard")).Reload().Tensors("warnings/text_summary")
    assert sorted(event.tensor_proto.string_val[0].decode() for event in events) == sorted(warnings)
    monkeypatch.setattr(watch, "_WARNINGS", len(warnings))
    monkeypatch.setattr(sys, "argv", ["watch", str(run), "--once"])
    monkeypatch.setenv("COLUMNS", "4000")
    watch.main()
    shown = capsys.readouterr().out
    assert all(text in shown for text in warnings)
