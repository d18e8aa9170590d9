"""The decision about a job after its training ended."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.jobs import status
from pipeline.jobs.preflight.job import earlier_starts
from pipeline.jobs.requeue import decide
from pipeline.jobs.status import Failure, Status, Verdict
from pipeline.storage import lock

DONE, FAILED, REQUEUE = Verdict.DONE, Verdict.FAIL, Verdict.REQUEUE


@pytest.fixture(autouse=True)
def job(monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)


def reach(run, state: str, step: int = 7, reason: str = "") -> None:
    status.begin(run)
    if state == "starting":
        return
    status.note(run, "running", step=step, steps=20)
    status.note(run, state, reason=reason)


def add_checkpoint(run, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize(
    ("state", "reason", "exit_code", "verdict"),
    [
        ("finished", "", 0, DONE),
        ("stopped", "SIGUSR1 (the time limit is near)", 0, REQUEUE),
        ("stopped", "SIGTERM (preempted, requeued or cancelled)", 0, REQUEUE),
        ("failed", "s3://bucket is gone", 2, REQUEUE),
        ("refused", "preflight: data: no bucket", 2, FAILED),
        ("running", "", 137, REQUEUE),
        ("starting", "", 1, REQUEUE),
        ("finished", "", 139, REQUEUE),  # a crash during exit
        ("stopped", "SIGINT (Ctrl-C)", 130, FAILED),  # a user interrupted it
    ],
)
def test_final_state_and_exit_code_decide_the_verdict(tmp_path, state, reason, exit_code, verdict):
    reach(tmp_path, state, reason=reason)
    message, status = decide(tmp_path, exit_code)
    assert status == verdict
    assert reason in message
    assert message.startswith("error: ") == (state not in ("stopped",) and exit_code != 0)


def test_second_failure_at_the_same_step_is_final(tmp_path):
    for step, verdict in ((7, REQUEUE), (9, REQUEUE), (7, FAILED)):
        add_checkpoint(tmp_path, step)
        reach(tmp_path, "failed", step=step, reason="out of memory")
        message, status = decide(tmp_path, 1)
        assert status == verdict, step
    assert "failed twice after 7 steps" in message
    assert "out of memory" in message


# Ends of a job's starts: (last step, or None before the first one; whether the job is given up).
@pytest.mark.parametrize(
    "ends",
    [
        [(7, False), (None, False), (7, True)],  # out of memory, no rendezvous, out of memory again
        [(7, False), (None, False), (9, False), (None, True)],  # four failures from one checkpoint
        [(None, False), (None, True)],
        [(7, False), (None, False), (None, True)],
        [(None, False), (0, False), (0, True)],  # before the first step, and in it
        [(0, False), (None, False), (0, True)],
    ],
)
def test_failures_before_the_first_step_are_counted_separately(tmp_path, monkeypatch, ends):
    add_checkpoint(tmp_path, 4)
    for start, (step, over) in enumerate(ends):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
        status.begin(tmp_path)
        if step is not None:
            status.note(tmp_path, "running", step=step, steps=20)
        with pytest.raises(PipelineError), status.failures_noted(tmp_path):
            raise PipelineError("of 2 ranks 1 did not join" if step is None else "out of memory")
        message, verdict = decide(tmp_path, 2)
        assert verdict == (FAILED if over else REQUEUE), message
        assert Status.read(tmp_path).failures[-1].trained == (step is not None)
    if len(ends) < 4:
        assert ("before its first step" in message) == (step is None)


def test_status_of_older_version_is_read(tmp_path):
    old = {"state": "failed", "step": 7, "steps": 20, "reason": "x", "job": "41", "start": 0, "time": ""}
    failures = [{"step": 7, "checkpoint": 4, "told": True}]
    (tmp_path / "status.json").write_text(json.dumps(old | {"failures": failures}))
    assert Status.read(tmp_path).failures == [Failure(7, 4)]


def test_failure_is_preserved_while_another_rank_continues(tmp_path, monkeypatch):
    """For any interleaving of their writes, ranks never write the same file."""
    status.begin(tmp_path)
    status.note(tmp_path, "running", step=3, steps=20)
    seen = Status._read_file(tmp_path)  # the first rank reads it before the others fail

    for rank, why in ((1, "no space left"), (2, "a consequence")):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(PipelineError), status.failures_noted(tmp_path):
            raise PipelineError(why)
    monkeypatch.setenv("RANK", "0")
    replace(seen, step=4).write(tmp_path)
    status.note(tmp_path, "running", step=5)
    kept = Status.read(tmp_path)
    assert (kept.state, kept.reason, kept.step) == ("failed", "no space left", 5)
    with pytest.raises(RuntimeError), status.failures_noted(tmp_path):
        raise RuntimeError("a collective timed out")
    assert Status.read(tmp_path).reason == "no space left"
    assert "no space left" in decide(tmp_path, 2)[0]

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    status.begin(tmp_path)
    status.note(tmp_path, "running", step=6)
    assert Status.read(tmp_path).state == "running"
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_rank_failure_before_rank_0_begins_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(PipelineError), status.failures_noted(tmp_path):
        raise PipelineError("no such file")
    monkeypatch.setenv("RANK", "0")
    status.begin(tmp_path)
    assert (Status.read(tmp_path).state, Status.read(tmp_path).reason) == ("failed", "no such file")
    (left,) = tmp_path.glob("failed-*")
    os.utime(left, (0, 0))  # as if an earlier start with the same id had left it
    Status("failed").write(tmp_path)
    status.begin(tmp_path)
    assert Status.read(tmp_path).state == "starting"


def test_rank_failure_of_another_start_is_ignored(tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1234")
    status.begin(tmp_path)
    status.note(tmp_path, "running", step=3)
    monkeypatch.setenv("MASTER_PORT", "4321")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(PipelineError), status.failures_noted(tmp_path):
        raise PipelineError("no such file")
    assert Status.read(tmp_path).state == "running"


def test_job_refused_by_the_lock_leaves_status_unchanged(tmp_path):
    with lock.held([str(tmp_path)]):
        Status("running", 5, 20).write(tmp_path)
        message, verdict = decide(tmp_path, 2)
        assert verdict == FAILED
        assert f"{tmp_path} is in use by process {os.getpid()}" in message
        assert Status.read(tmp_path).state == "running"


def test_failures_without_a_new_checkpoint_end_the_job(tmp_path):
    for step in (4, 2):
        add_checkpoint(tmp_path, step)
    for step, verdict in ((5, REQUEUE), (9, REQUEUE), (8, REQUEUE), (6, FAILED)):
        reach(tmp_path, "running", step=step)
        message, status = decide(tmp_path, 137)
        assert status == verdict, step
    assert "4 times from the checkpoint after 4 steps" in message
    assert "a rank was killed" in message


def test_termination_by_slurm_is_not_a_failure(tmp_path):
    reach(tmp_path, "running")
    assert decide(tmp_path, 143, terminated=True)[1] == DONE
    kept = Status.read(tmp_path)
    assert (kept.state, kept.failures) == ("stopped", [])
    reach(tmp_path, "stopped", reason="SIGTERM (preempted, requeued or cancelled)")
    assert decide(tmp_path, 0, terminated=True)[1] == DONE
    assert "SIGTERM" in Status.read(tmp_path).reason


def test_preflight_refusal_after_a_restart_is_requeued_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for verdict in (REQUEUE, FAILED):
        reach(tmp_path, "refused", reason="preflight: data: no answer")
        assert decide(tmp_path, 2)[1] == verdict


def test_new_job_starts_without_failures_of_previous_job(tmp_path, monkeypatch):
    reach(tmp_path, "failed", reason="out of memory")
    decide(tmp_path, 1)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    status.begin(tmp_path)
    assert Status.read(tmp_path).failures == [Failure(7, 0)]
    assert Status.read(tmp_path).reason == "out of memory"
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    # The training did not start.
    assert "srun exited with status 1" in decide(tmp_path, 1)[0]
    assert Status.read(tmp_path).failures == [Failure(7, 0, trained=False)]
    monkeypatch.setenv("SLURM_JOB_ID", "43")
    status.begin(tmp_path)
    assert (Status.read(tmp_path).failures, Status.read(tmp_path).state) == ([], "starting")


def test_unreported_end_counts_as_one_failure(tmp_path, monkeypatch):
    reach(tmp_path, "running")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for _ in range(2):  # by preflight and by training
        status.begin(tmp_path)
    kept = Status.read(tmp_path)
    assert (kept.state, kept.start, kept.failures) == ("starting", 1, [Failure(7, 0, told=False)])
    assert "without a report" in kept.reason


def test_job_that_always_ends_unreported_is_finally_refused(tmp_path, monkeypatch):
    """No job script survives to decide, so preflight decides, and `decide` agrees."""
    add_checkpoint(tmp_path, 4)
    for start in range(4):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
        status.begin(tmp_path)
        assert earlier_starts(tmp_path).state == "green"  # for example two power cuts at one step
        status.note(tmp_path, "running", step=7, steps=20)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    status.begin(tmp_path)
    refused = earlier_starts(tmp_path)
    assert refused.state == "red"
    assert "failed 4 times from the checkpoint after 4 steps" in refused.found
    assert "without a report" in refused.found
    status.note(tmp_path, "refused", reason=refused.error)
    assert decide(tmp_path, 2)[1] == FAILED
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    status.begin(tmp_path)
    assert earlier_starts(tmp_path).state == "green"


def test_first_failure_is_recorded_and_not_overwritten(tmp_path):
    with pytest.raises(PipelineError), status.failures_noted(tmp_path):
        raise PipelineError("no index at s3://bucket/train")
    with pytest.raises(RuntimeError), status.failures_noted(tmp_path):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4711")
    status.note(tmp_path, "running", step=9)
    content = json.loads((tmp_path / "status.json").read_text())
    assert (content["state"], content["reason"]) == ("failed", "no index at s3://bucket/train")


def test_requeue_command_returns_verdict_and_reports_steps(tmp_path):
    reach(tmp_path, "stopped", reason="SIGUSR1 (the time limit is near)")
    command = [sys.executable, "-m", "pipeline.jobs.requeue", "pipeline/recipes/demo.yaml", f"run={tmp_path}"]
    ended = subprocess.run([*command, "--exit-code", "0"], capture_output=True, text=True)
    assert ended.returncode == REQUEUE
    assert "7 of 20 steps are done" in ended.stderr


def test_failure_report_on_full_disk_leaves_no_empty_file(tmp_path, monkeypatch):
    """An empty file would hide the first rank's report."""
    monkeypatch.setenv("RANK", "1")

    def full(path: Path, data: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(PipelineError), status.failures_noted(tmp_path):
        raise PipelineError("the cause")
    assert list(tmp_path.iterdir()) == []
