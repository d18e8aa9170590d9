"""Experiment trackers beside TensorBoard, if the recipe names them: Weights & Biases, and MLflow.

Their servers and credentials come from their own environment variables (WANDB_MODE, WANDB_API_KEY, WANDB_PROJECT,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME); nothing of them is written or logged. They get the scalars of TensorBoard
and the hyperparameters. Each is called in a thread of its own, because no step must wait for its server. One that
keeps failing is left out with a warning, because it must not stop a run.
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
_FAILED_SECONDS = 3.0  # the same after a failure: the launcher ends all ranks soon after the first one that ended
_FORK_SECONDS = 5.0  # after the beginning of a call, in which forks wait for its end
_MOST_WAITING = 1000  # calls, each with the values of a step or an evaluation, that wait for a tracker
_ATTEMPTS, _PAUSE_SECONDS = 30, 60.0  # of a call that fails; the client may have repeated its requests itself

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_callers: "list[_Caller]" = []  # of this process
_forking = threading.local()  # held: the locks that a thread holds while it forks
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
    """The trackers of one start of a run. `log` never waits.

    timeout_minutes: that other ranks wait in a collective. A start waits for each tracker to begin, but for at most a
    quarter of this.
    """

    def __init__(
        self, names: Sequence[str], run: Path, config: Mapping[str, float | str | bool], timeout_minutes: float
    ) -> None:
        self._callers: list[_Caller] = []
        for name in names:  # in turn: two threads that import the same packages may disturb each other
            self._callers.append(_Caller(name, partial(_KINDS[name], run, config)))
            self._callers[-1].await_begin(min(_BEGIN_SECONDS, 60 * timeout_minutes / 4))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Give a step's values to all trackers, which get them in order."""
        for caller in self._callers:
            caller.log(values, step, time.time())

    def end(self, failed: bool) -> None:
        """Wait until the trackers have all values, but not for long, and warn of what they lack."""
        until = time.monotonic() + (_FAILED_SECONDS if failed else _END_SECONDS)
        for caller in self._callers:
            caller.begin_end(failed)
        for caller in self._callers:
            caller.await_end(until)


class _Caller:
    """Calls one tracker in a thread.  make: creates the tracker, also in the thread.

    calling: held during a call.  called: when the last one began, by the monotonic clock.
    """

    def __init__(self, name: str, make: Callable[[], _Tracker]) -> None:
        self._name, self._make, self._drops = name, make, False
        self._begun, self._ending, self._failed = threading.Event(), threading.Event(), False
        self._given = self._taken = 0
        self._waiting = queue.SimpleQueue[tuple[Mapping[str, float], int, float] | None]()
        self.calling, self.called = threading.RLock(), 0.0  # reentrant: a call may fork itself
        _callers.append(self)
        # A daemon: a server that does not answer must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def await_begin(self, seconds: float) -> None:
        if not self._begun.wait(seconds):
            logger.warning("%s does not answer: the run begins without it, and its values wait", self._name)

    def log(self, values: Mapping[str, float], step: int, now: float) -> None:
        """Drop the values if too many wait: the tracker's server may be away for hours."""
        self._given += 1
        if not self._thread.is_alive():
            return
        if self._waiting.qsize() < _MOST_WAITING:
            self._waiting.put((values, step, now))
        elif not self._drops:
            self._drops = True
            logger.warning(
                "%s is slow or does not answer, and the values of %d calls wait for it: it lacks the next ones",
                self._name,
                _MOST_WAITING,
            )

    def begin_end(self, failed: bool) -> None:
        self._failed = failed
        self._waiting.put(None)
        self._ending.set()

    def await_end(self, until: float) -> None:
        self._thread.join(max(until - time.monotonic(), 0))
        if self._thread.is_alive():
            logger.warning("%s does not answer, and does not know that this start has ended", self._name)
        if lacking := self._given - self._taken:
            logger.warning("%s lacks the values of %d of %d calls of this start", self._name, lacking, self._given)

    def _run(self) -> None:
        try:
            tracker = self._call(self._make)
            self._begun.set()
            while values := self._waiting.get():
                self._repeat(partial(tracker.log, *values))
                self._taken += 1
            self._call(partial(tracker.end, self._failed))
        except Exception as error:
            logger.warning("%s failed (%s) and gets no more of this start", self._name, _named(error))
        self._begun.set()

    def _repeat(self, call: Callable[[], None]) -> None:
        """Repeat a call that fails, because its server may come back. Raises its last error."""
        for attempt in range(1, _ATTEMPTS + 1):
            is_last = attempt == _ATTEMPTS or self._ending.is_set()
            try:
                self._call(call)
                return
            except Exception as error:
                if is_last:
                    raise
                if attempt == 1:
                    logger.warning("%s failed (%s): its values wait, and it is called again", self._name, _named(error))
            self._ending.wait(_PAUSE_SECONDS)

    def _call(self, call: Callable[[], _T]) -> _T:
        self.called = time.monotonic()
        with self.calling:
            return call()


def _named(error: Exception) -> str:
    """Return only its type: a message may contain a URL with a password."""
    return type(error).__name__


def _before_fork() -> None:
    """Let no call run during a fork: a thread that speaks TLS may hold a lock of OpenSSL, which a child would inherit.

    But a call that hangs delays forks only in its first seconds, however many they are.
    """
    _forking.held = []
    for caller in _callers:
        # `called` is that of the call that runs only if the lock is held.
        if caller.calling.acquire(blocking=False) or caller.calling.acquire(
            timeout=max(caller.called + _FORK_SECONDS - time.monotonic(), 0)
        ):
            _forking.held.append(caller.calling)


def _after_fork() -> None:
    for lock in _forking.held:
        lock.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_callers.clear)


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
        self._run.log({**values, "_timestamp": now}, step=step)

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
