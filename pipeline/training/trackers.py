"""Experiment trackers beside TensorBoard, if the recipe names them: Weights & Biases, and MLflow.

Their servers and credentials come from their own environment variables (WANDB_MODE, WANDB_API_KEY, WANDB_PROJECT,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME); nothing of them is written or logged. They get the scalars of TensorBoard
and the hyperparameters. Each is called in a thread of its own, because no step must wait for its server. One that
raises an error is left out with a warning, because it must not stop a run.
"""

import json
import logging
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, TypeVar

from pipeline.errors import PipelineError
from pipeline.storage.atomic import write_file

_PROJECT = "pipeline"
_LONGEST = 500  # characters of a parameter in all versions of MLflow
_IDS = "trackers.json"  # in the run directory: the id of its run by tracker, with which a later start continues it
_BEGIN_SECONDS = 60.0  # that a start waits for a tracker to begin
_END_SECONDS = 30.0  # that a run waits at its end for all trackers to take what is left
_FORK_SECONDS = 5.0  # that a fork waits for calls to end
_MOST_WAITING = 1000  # calls, of a step each, that wait for a tracker

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_calling: set[int] = set()  # threads in a call of a tracker
_keeping = threading.Lock()  # held while _IDS is written


def check(names: Sequence[str]) -> None:
    """Raise PipelineError for a tracker that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise PipelineError(f"trackers names {name}, which is not installed: pip install {name}, or remove it")


class _Tracker(Protocol):
    def log(self, values: Mapping[str, float], step: int, now: float) -> None:
        """now: Unix time in seconds."""

    def end(self, failed: bool) -> None: ...


class Trackers:
    """The trackers of one start of a run. `log` never waits."""

    def __init__(self, names: Sequence[str], run: Path, config: Mapping[str, float | str | bool]) -> None:
        self._callers: list[_Caller] = []
        until = time.monotonic() + _BEGIN_SECONDS
        for name in names:  # in turn: two threads that import the same packages may disturb each other
            self._callers.append(_Caller(name, partial(_KINDS[name], run, config)))
            self._callers[-1].await_begin(until)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Give a step's values to all trackers, which get them in order."""
        now = time.time()
        for caller in self._callers:
            caller.call_later(lambda tracker: tracker.log(values, step, now))

    def end(self, failed: bool) -> None:
        """Wait until the trackers have all values, but not for long."""
        until = time.monotonic() + _END_SECONDS
        for caller in self._callers:
            caller.end_later(failed, until)
        for caller in self._callers:
            caller.await_end(until)


class _Caller:
    """Calls one tracker in a thread.  make: creates the tracker, also in the thread."""

    def __init__(self, name: str, make: Callable[[], _Tracker]) -> None:
        self._name, self._make, self._dropped, self._begun = name, make, 0, threading.Event()
        self._calls: queue.Queue[Callable[[_Tracker], None] | None] = queue.Queue(_MOST_WAITING)
        # A daemon: a server that does not answer must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def await_begin(self, until: float) -> None:
        if not self._begun.wait(max(until - time.monotonic(), 0)):
            logger.warning("%s does not answer: the run begins without it, and its values wait", self._name)

    def call_later(self, call: Callable[[_Tracker], None]) -> None:
        """Drop the call if too many wait: the tracker's server may be away for hours."""
        if not self._thread.is_alive():
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                logger.warning(
                    "%s is slow or does not answer, and %d steps wait for it: it lacks the values of the next ones",
                    self._name,
                    _MOST_WAITING,
                )

    def end_later(self, failed: bool, until: float) -> None:
        if self._thread.is_alive():
            with suppress(queue.Full):
                self._calls.put(lambda tracker: tracker.end(failed), timeout=max(until - time.monotonic(), 0))
                self._calls.put(None, timeout=max(until - time.monotonic(), 0))

    def await_end(self, until: float) -> None:
        self._thread.join(max(until - time.monotonic(), 0))
        if self._thread.is_alive():
            logger.warning("%s does not answer: it lacks the last values of this start", self._name)

    def _run(self) -> None:
        try:
            tracker = self._called(self._make)
            self._begun.set()
            while call := self._calls.get():
                self._called(partial(call, tracker))
        except Exception as error:
            # Only its type: a message may contain a URL with a password.
            logger.warning("%s failed (%s) and gets no more of this start", self._name, type(error).__name__)
        self._begun.set()

    def _called(self, call: Callable[[], _T]) -> _T:
        thread = threading.get_ident()
        _calling.add(thread)
        try:
            return call()
        finally:
            _calling.discard(thread)


def _before_fork() -> None:
    """Wait for the end of calls: a thread that speaks TLS may hold a lock of OpenSSL, which a child would inherit."""
    deadline = time.monotonic() + _FORK_SECONDS
    while _calling - {threading.get_ident()} and time.monotonic() < deadline:
        time.sleep(0.001)


os.register_at_fork(before=_before_fork, after_in_child=_calling.clear)


class _Wandb:
    def __init__(self, run: Path, config: Mapping[str, float | str | bool]) -> None:
        import wandb

        identity = _ids(run).get("wandb") or secrets.token_hex(4)
        _keep(run, "wandb", identity)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            dir=str(run),
            id=identity,
            name=run.name,
            resume="allow",
            config=dict(config),
            settings=wandb.Settings(console="off", save_code=False, disable_git=True),
        )

    def log(self, values: Mapping[str, float], step: int, now: float) -> None:
        self._run.log(dict(values), step=step)

    def end(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Mlflow:
    def __init__(self, run: Path, config: Mapping[str, float | str | bool]) -> None:
        import mlflow

        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{run.absolute()}/mlflow.db")
        self._entities, self._client = mlflow.entities, mlflow.MlflowClient(tracking_uri=uri)
        self._id, name = _ids(run).get("mlflow"), os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        if self._id is None:
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            self._id = self._client.create_run(experiment, run_name=run.name).info.run_id
            _keep(run, "mlflow", self._id)
            params = [mlflow.entities.Param(_key(key), str(value)[:_LONGEST]) for key, value in config.items()]
            self._client.log_batch(self._id, params=params)
        self._client.update_run(self._id, status="RUNNING")

    def log(self, values: Mapping[str, float], step: int, now: float) -> None:
        time_ms = int(1000 * now)
        metrics = [self._entities.Metric(_key(key), value, time_ms, step) for key, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def end(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


_KINDS: dict[str, Callable[[Path, Mapping[str, float | str | bool]], _Tracker]] = {"wandb": _Wandb, "mlflow": _Mlflow}


def _key(name: str) -> str:
    """Return a name with the characters that MLflow allows."""
    return re.sub(r"[^\w\-. /]", "_", name)


def _ids(run: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):
        return dict(json.loads((run / _IDS).read_text()))
    return {}


def _keep(run: Path, name: str, identity: str) -> None:
    with _keeping:
        write_file(run / _IDS, (json.dumps(_ids(run) | {name: identity}) + "\n").encode())
