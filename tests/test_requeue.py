"""What comes of a job after its training ended."""

import json
import subprocess
import sys

import pytest

from pipeline import status
from pipeline.errors import PipelineError
from pipeline.requeue import DONE, FAILED, REQUEUE, decide
from pipeline.status import Status


def write(run, state: str, step: int = 7, reason: str = "", **fields) -> None:
    before = Status.read(run)
    status.note(run, state, step=step, steps=20, reason=reason, failures=fields.get("failures", before.failures))


@pytest.mark.parametrize(
    ("state", "reason", "exit_code", "verdict"),
    [
        ("finished", "", 0, DONE),
        ("stopped", "SIGUSR1 (the time limit is near)", 0, REQUEUE),
        ("stopped", "SIGTERM (preempted, requeued or cancelled)", 0, DONE),
        ("failed", "s3://bucket is gone", 2, REQUEUE),
        ("running", "", 137, REQUEUE),
        ("starting", "", 1, REQUEUE),
        ("finished", "", 139, REQUEUE),  # a crash at the very end
    ],
)
def test_how_it_ended_decides(tmp_path, state, reason, exit_code, verdict):
    write(tmp_path, state, reason=reason)
    message, status = decide(tmp_path, exit_code)
    assert status == verdict
    assert reason in message
    assert message.startswith("error: ") == (verdict == REQUEUE and state != "stopped")


def test_a_second_failure_at_the_same_step_is_the_last(tmp_path):
    for step, verdict in ((7, REQUEUE), (9, REQUEUE), (7, FAILED)):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
        write(tmp_path, "failed", step=step, reason="out of memory")
        message, status = decide(tmp_path, 1)
        assert status == verdict, step
    assert "failed twice after 7 steps" in message
    assert "out of memory" in message


def test_failures_without_a_checkpoint_between_them_end(tmp_path):
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    for step, verdict in ((5, REQUEUE), (9, REQUEUE), (6, FAILED)):
        write(tmp_path, "running", step=step)
        message, status = decide(tmp_path, 137)
        assert status == verdict, step
    assert "3 times" in message
    assert "a rank was killed" in message


def test_what_slurm_ended_is_no_failure(tmp_path):
    write(tmp_path, "starting")
    _, verdict = decide(tmp_path, 143, terminated=True)
    assert verdict == DONE
    assert Status.read(tmp_path).failures == []


def test_what_preflight_found_is_not_tried_again(tmp_path):
    write(tmp_path, "failed", reason="preflight: data: no bucket")
    assert decide(tmp_path, 2) == ("error: preflight: data: no bucket", FAILED)


def test_another_job_begins_without_the_failures_of_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    status.begin(tmp_path)
    write(tmp_path, "failed", reason="out of memory")
    decide(tmp_path, 1)
    status.begin(tmp_path)  # the same job, requeued
    assert Status.read(tmp_path).failures == [status.Failure(7, 0)]
    assert Status.read(tmp_path).reason == "out of memory"
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    status.begin(tmp_path)
    assert (Status.read(tmp_path).failures, Status.read(tmp_path).state) == ([], "starting")


def test_a_run_that_ended_without_a_word_says_so(tmp_path):
    write(tmp_path, "running")
    status.begin(tmp_path)
    assert "without a word" in Status.read(tmp_path).reason


def test_a_failure_is_noted_but_not_that_another_rank_failed(tmp_path):
    with pytest.raises(PipelineError), status.failures_noted(tmp_path):
        raise PipelineError("no index at s3://bucket/train")
    with pytest.raises(RuntimeError), status.failures_noted(tmp_path):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4711")
    content = json.loads((tmp_path / "status.json").read_text())
    assert (content["state"], content["reason"]) == ("failed", "no index at s3://bucket/train")


def test_the_command(tmp_path):
    write(tmp_path, "stopped", reason="SIGUSR1 (the time limit is near)")
    command = [sys.executable, "-m", "pipeline.requeue", "pipeline/recipes/demo.yaml", f"run={tmp_path}"]
    ended = subprocess.run([*command, "--exit-code", "0"], capture_output=True, text=True)
    assert ended.returncode == REQUEUE
    assert "7 of 20 steps are done" in ended.stderr
