"""Experiment trackers beside TensorBoard, if the recipe names them: Weights & Biases, and MLflow.

Their servers and credentials come from their own environment variables (WANDB_MODE, WANDB_API_KEY, WANDB_PROJECT,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME); nothing of them is written or logged. They get the scalars of TensorBoard
and the hyperparameters. A tracker that raises an error is left out with a warning: it must not stop a run. MLflow's
calls wait for its server, by MLFLOW_HTTP_REQUEST_TIMEOUT and MLFLOW_HTTP_REQUEST_MAX_RETRIES.
"""

import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import PipelineError
from pipeline.storage.atomic import write_file

_PROJECT = "pipeline"
_LONGEST = 500  # characters of a parameter in all versions of MLflow
_IDS = "trackers.json"  # in the run directory: the id of its run by tracker, with which a later start continues it

logger = logging.getLogger(__name__)


def check(names: Sequence[str]) -> None:
    """Raise PipelineError for a tracker that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise PipelineError(f"trackers names {name}, which is not installed: pip install {name}, or remove it")


class _Tracker(Protocol):
    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def end(self, failed: bool) -> None: ...


class Trackers:
    """The trackers of one start of a run."""

    def __init__(self, names: Sequence[str], run: Path, config: Mapping[str, float | str | bool]) -> None:
        self._open: dict[str, _Tracker] = {}
        for name in names:
            if made := self._tried(name, partial(_KINDS[name], run, config)):
                self._open[name] = made

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, tracker in list(self._open.items()):
            self._tried(name, partial(tracker.log, values, step))

    def end(self, failed: bool) -> None:
        for name, tracker in list(self._open.items()):
            self._tried(name, partial(tracker.end, failed))

    def _tried(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            # Only its type: a message may contain a URL with a password.
            logger.warning("%s failed (%s) and gets no more of this start", name, type(error).__name__)
            self._open.pop(name, None)
            return None


class _Wandb:
    def __init__(self, run: Path, config: Mapping[str, float | str | bool]) -> None:
        import wandb

        ids = _ids(run)
        identity = ids.get("wandb") or secrets.token_hex(4)
        _keep(run, ids | {"wandb": identity})
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            dir=str(run),
            id=identity,
            name=run.name,
            resume="allow",
            config=dict(config),
            settings=wandb.Settings(console="off", save_code=False, disable_git=True),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def end(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Mlflow:
    def __init__(self, run: Path, config: Mapping[str, float | str | bool]) -> None:
        import mlflow

        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{run.absolute()}/mlflow.db")
        self._entities, self._client = mlflow.entities, mlflow.MlflowClient(tracking_uri=uri)
        ids, name = _ids(run), os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        if "mlflow" not in ids:
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            ids["mlflow"] = self._client.create_run(experiment, run_name=run.name).info.run_id
            _keep(run, ids)
            params = [mlflow.entities.Param(_key(key), str(value)[:_LONGEST]) for key, value in config.items()]
            self._client.log_batch(ids["mlflow"], params=params)
        self._id = ids["mlflow"]
        self._client.update_run(self._id, status="RUNNING")

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(_key(key), value, now, step) for key, value in values.items()]
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


def _keep(run: Path, ids: Mapping[str, str]) -> None:
    write_file(run / _IDS, (json.dumps(ids) + "\n").encode())
