"""Experiment trackers in their offline modes. Those that are not installed are skipped."""

import json
import os
import threading
from pathlib import Path

import pytest
from limits import HANG_MINUTES, HANG_SECONDS

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


def start(run: Path, name: str, steps: range, caplog: pytest.LogCaptureFixture) -> None:
    opened = Trackers([name], run, CONFIG, HANG_MINUTES)
    for step in steps:
        opened.log({"learning/loss": 1 / step, "evaluation/overall@64": 50.0}, step)
    opened.end(failed=False)
    assert not [record for record in caplog.records if record.name == trackers.__name__]


def test_mlflow_has_one_run_after_a_resume(run, caplog):
    mlflow = pytest.importorskip("mlflow")
    start(run, "mlflow", range(1, 4), caplog)
    start(run, "mlflow", range(4, 6), caplog)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("pipeline").experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["optimizer.lr"] == "0.25"
    history = client.get_metric_history(found.info.run_id, "learning/loss")
    assert [(each.step, each.value) for each in history] == [(step, 1 / step) for step in range(1, 6)]
    assert found.data.metrics["evaluation/overall_64"] == 50.0


def test_wandb_writes_its_files_without_secrets(run, caplog):
    pytest.importorskip("wandb")
    start(run, "wandb", range(1, 4), caplog)
    start(run, "wandb", range(4, 6), caplog)
    identity = json.loads((run / "trackers.json").read_text())["wandb"]
    files = [path for path in run.rglob("*.wandb") if path.is_file()]
    assert len(files) == 2 and all(identity in path.name for path in files)
    content = b"".join(path.read_bytes() for path in files)
    assert b"learning/loss" in content and b"optimizer.lr" in content
    for path in run.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


class Fake:
    """A tracker that notes its calls.  answers: it waits for this before each of them."""

    def __init__(self, run: Path, config: dict) -> None:
        self.answers.wait()

    def log(self, values: dict, step: int, now: float) -> None:
        self.answers.wait()
        self.noted.append((step, values["learning/loss"]))

    def end(self, failed: bool) -> None:
        self.noted.append("failed" if failed else "finished")


@pytest.fixture
def fake(monkeypatch) -> type[Fake]:
    fake = type("Fake", (Fake,), {"answers": threading.Event(), "noted": []})
    monkeypatch.setitem(trackers._KINDS, "mlflow", fake)
    return fake


def test_no_step_waits_for_a_tracker_that_does_not_answer(fake, run, monkeypatch, caplog):
    monkeypatch.setattr(trackers, "_BEGIN_SECONDS", 0.01)
    monkeypatch.setattr(trackers, "_END_SECONDS", 0.01)
    monkeypatch.setattr(trackers, "_MOST_WAITING", 3)
    opened = Trackers(["mlflow"], run, CONFIG, HANG_MINUTES)  # none of these would return otherwise
    for step in range(1, 7):
        opened.log({"learning/loss": 1.0}, step)
    opened.end(failed=False)
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "mlflow does not answer",
        "mlflow is slow or does not answer, and the values of 3 calls wait for it",
        "mlflow does not answer, and does not know that this start has ended",
        "mlflow lacks the values of 6 of 6 calls of this start",
    ]
    monkeypatch.setattr(trackers, "_END_SECONDS", HANG_SECONDS)
    fake.answers.set()
    opened.end(failed=False)
    assert fake.noted == [(1, 1.0), (2, 1.0), (3, 1.0), "finished"]
    assert caplog.messages[4:] == ["mlflow lacks the values of 3 of 6 calls of this start"]


def test_start_waits_for_each_tracker_and_less_than_a_collective(fake, run, monkeypatch, caplog):
    """A tracker that hangs takes no time from the next one."""
    monkeypatch.setitem(trackers._KINDS, "wandb", fake)
    waited = []
    monkeypatch.setattr(trackers._Caller, "await_begin", lambda caller, seconds: waited.append(seconds))
    Trackers(["wandb", "mlflow"], run, CONFIG, 0.4)
    Trackers(["wandb"], run, CONFIG, 15)
    assert waited == [6.0, 6.0, 60.0]
    fake.answers.set()


@pytest.mark.parametrize("failed", [False, True])
def test_values_arrive_in_order_before_the_end(failed, fake, run, caplog):
    fake.answers.set()
    opened = Trackers(["mlflow"], run, CONFIG, HANG_MINUTES)
    for step in range(1, 100):
        opened.log({"learning/loss": 1 / step}, step)
    opened.end(failed)
    assert fake.noted == [*((step, 1 / step) for step in range(1, 100)), "failed" if failed else "finished"]
    assert not caplog.messages


def test_ids_of_all_trackers_are_kept(run):
    trackers._keep(run, "wandb", "w1")
    trackers._keep(run, "mlflow", "m1")
    trackers._keep(run, "wandb", "w2")
    assert trackers._ids(run) == {"wandb": "w2", "mlflow": "m1"}


def forked() -> None:
    """Fork, and wait for the child's end."""
    if not (child := os.fork()):
        os._exit(0)
    os.waitpid(child, 0)


def test_fork_waits_for_a_call(fake, run):
    """A thread in a call may hold locks, which a child would inherit."""
    began, ends = threading.Event(), threading.Event()

    def log(self: Fake, values: dict, step: int, now: float) -> None:
        began.set()
        ends.wait()
        self.noted.append(step)

    fake.log = log
    fake.answers.set()
    opened = Trackers(["mlflow"], run, CONFIG, HANG_MINUTES)
    opened.log({}, 1)
    began.wait()
    threading.Timer(0.05, ends.set).start()
    forked()
    assert fake.noted == [1]
    opened.log({}, 2)
    opened.end(failed=False)
    assert fake.noted == [1, 2, "finished"]


def test_no_call_begins_during_a_fork(fake, run):
    fake.answers.set()
    opened = Trackers(["mlflow"], run, CONFIG, HANG_MINUTES)
    trackers._before_fork()
    opened.log({"learning/loss": 1.0}, 1)
    opened._callers[0]._thread.join(0.05)
    assert not fake.noted
    trackers._after_fork()
    opened.end(failed=False)
    assert fake.noted == [(1, 1.0), "finished"]


def test_call_that_hangs_delays_forks_only_once(fake, run, monkeypatch):
    monkeypatch.setattr(trackers, "_BEGIN_SECONDS", 0.01)
    opened = Trackers(["mlflow"], run, CONFIG, HANG_MINUTES)
    monkeypatch.setattr(trackers, "_FORK_SECONDS", 1e6)
    opened._callers[0].called -= 1e6
    forked()  # it would wait for ever otherwise
    fake.answers.set()
    opened.end(failed=False)
    assert fake.noted == ["finished"]


class Failing:
    """A tracker whose first calls fail.  failures: how many."""

    def __init__(self, run: Path, config: dict) -> None:
        pass

    def log(self, values: dict, step: int, now: float) -> None:
        if self.failures:
            type(self).failures -= 1
            raise OSError(f"https://user:{SECRET}@server: unreachable")
        self.noted.append(step)

    def end(self, failed: bool) -> None:
        self.noted.append("end")


@pytest.fixture
def failing(monkeypatch) -> type[Failing]:
    failing = type("Failing", (Failing,), {"failures": 0, "noted": []})
    monkeypatch.setitem(trackers._KINDS, "wandb", failing)
    monkeypatch.setattr(trackers, "_ATTEMPTS", 3)
    return failing


WAITS = "wandb failed (OSError): its values wait, and it is called again"
LEFT_OUT = "wandb failed (OSError) and gets no more of this start"


def test_values_wait_for_a_server_that_comes_back(failing, run, monkeypatch, caplog):
    monkeypatch.setattr(trackers, "_PAUSE_SECONDS", 0.0)
    failing.failures = 2
    opened = Trackers(["wandb"], run, CONFIG, HANG_MINUTES)
    for step in (1, 2):
        opened.log({"learning/loss": 1.0}, step)
    while opened._callers[0]._thread.is_alive() and not failing.noted[1:]:  # at the end it would give up sooner
        opened._callers[0]._thread.join(0.001)
    opened.end(failed=False)
    assert failing.noted == [1, 2, "end"]
    assert caplog.messages == [WAITS]


def test_tracker_that_keeps_failing_is_left_out_with_a_warning_that_has_no_secrets(failing, run, monkeypatch, caplog):
    monkeypatch.setattr(trackers, "_PAUSE_SECONDS", 0.0)
    failing.failures = 3
    opened = Trackers(["wandb"], run, CONFIG, HANG_MINUTES)
    opened.log({"learning/loss": 1.0}, 1)
    opened._callers[0]._thread.join()
    opened.log({"learning/loss": 1.0}, 2)
    opened.end(failed=True)
    assert not failing.noted
    assert caplog.messages == [WAITS, LEFT_OUT, "wandb lacks the values of 2 of 2 calls of this start"]


def test_end_does_not_wait_for_a_pause(failing, run, caplog):
    failing.failures = 3
    opened = Trackers(["wandb"], run, CONFIG, HANG_MINUTES)
    opened.log({"learning/loss": 1.0}, 1)
    while failing.failures == 3:
        opened._callers[0]._thread.join(0.001)
    opened.end(failed=False)
    assert LEFT_OUT in caplog.messages
    assert failing.failures == 1  # it was called once more


def test_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    trackers.check([])
    with pytest.raises(PipelineError, match="trackers names mlflow, which is not installed: pip install mlflow"):
        trackers.check(["mlflow"])
    assert SECRET not in os.environ.values()
