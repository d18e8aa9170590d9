"""A conversion that cannot succeed ends soon: it runs no code from the files, does not hang, and ends with its rank."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from limits import HANG_MINUTES, HANG_SECONDS

from pipeline.errors import PipelineError
from pipeline.training.universal import convert

OPTIMIZER = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    return folder


def target(source: Path) -> Path:
    return source.parent / "unfinished-universal" / source.name


class Hostile:
    """An object that creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def test_pickle_with_code_is_refused_and_not_run(source):
    mark = source / "mark"
    torch.save({"optimizer_state_dict": Hostile(mark)}, source / OPTIMIZER)
    torch.load(source / OPTIMIZER, weights_only=False)
    assert mark.exists()
    mark.unlink()
    with pytest.raises(PipelineError, match="could not be converted for 1 processes") as error:
        convert(source, target(source), 2, 1, timeout_minutes=HANG_MINUTES)
    assert "weights_only" in str(error.value) or "WeightsUnpickler" in str(error.value)
    assert "continue on 2 processes" in str(error.value)
    assert not mark.exists()


def test_conversion_without_disk_space_does_not_start(source, monkeypatch):
    (source / OPTIMIZER).write_bytes(bytes(100))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=199))
    with pytest.raises(PipelineError, match="make room, or continue on 2 processes"):
        convert(source, target(source), 2, 1, timeout_minutes=HANG_MINUTES)


def test_stalled_conversion_ends_at_the_time_limit(source):
    os.mkfifo(source / OPTIMIZER)  # no process writes to it
    with pytest.raises(PipelineError, match=r"nothing written for 0\.05 minutes"):
        convert(source, target(source), 2, 1, timeout_minutes=0.05)


def test_conversion_ends_when_its_rank_is_killed(source):
    os.mkfifo(source / OPTIMIZER)
    code = (
        f"from pathlib import Path; from pipeline.training.universal import convert; source = Path({str(source)!r})\n"
        f"convert(source, Path({str(target(source))!r}), 2, 1, timeout_minutes={HANG_MINUTES})"
    )
    rank = psutil.Process(subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).pid)
    deadline = time.monotonic() + HANG_SECONDS
    while not (children := rank.children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    (child,) = children
    rank.send_signal(signal.SIGKILL)
    assert not psutil.wait_procs([child], timeout=HANG_SECONDS)[1]
