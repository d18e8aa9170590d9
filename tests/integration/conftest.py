import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import fork_server

_BUILD = Path(__file__).with_name("build_cpu_adam.py")
_building = pytest.StashKey[subprocess.Popen]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile DeepSpeed's CPU Adam, once per machine, while other tests run.

    Also start the fork server, which imports the modules that ranks need; Slurm starts its ranks without it.
    """
    if not session.config.option.collectonly:
        if any("slurm" not in item.path.parts for item in session.items):
            fork_server()
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(_BUILD.parents[2])}
        session.stash[_building] = subprocess.Popen([sys.executable, _BUILD], **pipes, env=environment)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if building := session.stash.get(_building, None):
        building.send_signal(signal.SIGINT)  # SIGKILL would leave PyTorch's lock file
        building.wait()


@pytest.fixture(scope="session", autouse=True)
def cpu_adam(request: pytest.FixtureRequest) -> None:
    """Wait for the build before any test's time limit starts."""
    building = request.session.stash[_building]
    errors = building.communicate()[1]
    assert building.returncode == 0, errors.decode()[-4000:]


@pytest.fixture(scope="session", autouse=True)
def as_many_threads_as_a_rank_has() -> None:
    """Use one thread: another number rounds sums differently in the last bits."""
    torch.set_num_threads(1)
