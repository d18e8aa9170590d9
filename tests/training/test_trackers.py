"""Experiment trackers in their offline modes. Those that are not installed are skipped."""

import json
import os
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.training import trackers
from pipeline.training.trackers import Trackers

CONFIG = {"optimizer.lr": 0.25, "data.datasets": "[]"}
SECRET = "a-secret-of-the-environment"


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", f"{SECRET:x<40}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "run"
    run.mkdir()
    return run


def start(run: Path, name: str, steps: range) -> None:
    opened = Trackers([name], run, CONFIG)
    assert list(opened._open) == [name]
    for step in steps:
        opened.log({"learning/loss": 1 / step, "evaluation/overall@64": 50.0}, step)
    opened.end(failed=False)
    assert list(opened._open) == [name]


def test_mlflow_has_one_run_after_a_resume(run):
    mlflow = pytest.importorskip("mlflow")
    start(run, "mlflow", range(1, 4))
    start(run, "mlflow", range(4, 6))
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("pipeline").experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["optimizer.lr"] == "0.25"
    history = client.get_metric_history(found.info.run_id, "learning/loss")
    assert [(each.step, each.value) for each in history] == [(step, 1 / step) for step in range(1, 6)]
    assert found.data.metrics["evaluation/overall_64"] == 50.0


def test_wandb_writes_its_files_without_secrets(run):
    pytest.importorskip("wandb")
    start(run, "wandb", range(1, 4))
    start(run, "wandb", range(4, 6))
    identity = json.loads((run / "trackers.json").read_text())["wandb"]
    files = [path for path in run.rglob("*.wandb") if path.is_file()]
    assert len(files) == 2 and all(identity in path.name for path in files)
    content = b"".join(path.read_bytes() for path in files)
    assert b"learning/loss" in content and b"optimizer.lr" in content
    for path in run.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


class Failing:
    def __init__(self, run: Path, config: dict) -> None:
        pass

    def log(self, values: dict, step: int) -> None:
        raise OSError(f"https://user:{SECRET}@server: unreachable")


def test_failing_tracker_is_left_out_with_a_warning_that_has_no_secrets(run, monkeypatch, caplog):
    monkeypatch.setitem(trackers._KINDS, "wandb", Failing)
    opened = Trackers(["wandb"], run, CONFIG)
    for step in (1, 2):
        opened.log({"learning/loss": 1.0}, step)
    opened.end(failed=True)
    assert caplog.messages == ["wandb failed (OSError) and gets no more of this start"]


def test_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    trackers.check([])
    with pytest.raises(PipelineError, match="trackers names mlflow, which is not installed: pip install mlflow"):
        trackers.check(["mlflow"])
    assert SECRET not in os.environ.values()
