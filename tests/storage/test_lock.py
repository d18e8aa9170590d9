"""Never two holders, and no waiting for dead ones: on one machine, on two, after a requeue; in a folder and on S3."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from limits import HANG_SECONDS

from pipeline import distributed
from pipeline.errors import PipelineError
from pipeline.storage import lock, objects
from pipeline.storage.objects import ObjectError

HOLDER = """
import sys, time
from pipeline.storage import lock
lock.BEAT_SECONDS = 0.1
with lock.held([sys.argv[1]]):
    print("in", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold() -> Iterator[Callable[[str], subprocess.Popen]]:
    """Return a function that starts a process that holds a folder and waits until it does."""
    holders = []

    def hold(folder: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        holders.append(subprocess.Popen([sys.executable, "-c", HOLDER, folder], **pipes, text=True))
        assert holders[-1].stdout.readline() == "in\n", holders[-1].stderr.read()
        return holders[-1]

    yield hold
    for each in holders:
        each.kill()
        each.communicate()


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hurried(monkeypatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 1.0)


def left(folder: str, **changes: object) -> str:
    """Write the lock file of another process to a folder; return its URL."""
    content = {"host": "elsewhere", "pid": 7, "machine": "another", "born": "1", "job": None, "time": time.time()}
    url = objects.join(folder, lock.FOLDER, "elsewhere.7.0")
    objects.write(url, json.dumps(content | changes).encode())
    return url


def test_lock_excludes_other_processes_and_ends_with_its_holder(s3, tmp_path, hold):
    for folder in (str(tmp_path / "run"), f"s3://pipeline-tests/locked/{tmp_path.name}"):
        holder = hold(folder)
        refused = pytest.raises(PipelineError, match=f"{folder} is in use by process {holder.pid} on .*: wait for it")
        with refused, lock.held([folder]):
            pass
        assert f"process {holder.pid}" in lock.in_use(folder)
        holder.send_signal(signal.SIGSTOP)
        with pytest.raises(PipelineError, match="in use"), lock.held([folder]):
            pass
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, even before its parent has reaped it
        assert lock.in_use(folder) == ""
        with lock.held([folder]):
            assert len(objects.list_under(folder)) == 1
        assert objects.list_under(folder) == []
    assert list((tmp_path / "run").iterdir()) == []


def test_lock_of_reused_process_id_is_ignored(tmp_path):
    left(str(tmp_path), pid=os.getppid(), machine=lock._machine(), born="1")
    with lock.held([str(tmp_path)]):
        pass


def test_lock_excludes_second_holder_in_one_process(tmp_path):
    with lock.held([str(tmp_path)]), pytest.raises(PipelineError, match="in use"), lock.held([str(tmp_path)]):
        pass


def test_processes_that_end_may_remove_the_lock_folder_several_times(tmp_path, monkeypatch):
    mkdir, removed = Path.mkdir, []

    def made_and_removed(folder, *args, **kwargs):
        mkdir(folder, *args, **kwargs)
        if folder.name == lock.FOLDER and len(removed) < 4:
            folder.rmdir()
            removed.append(folder)

    monkeypatch.setattr(Path, "mkdir", made_and_removed)
    with lock.held([str(tmp_path)]):
        assert len(removed) == 4 and lock.in_use(str(tmp_path))
    monkeypatch.setattr(lock, "_ATTEMPTS", 4)
    removed.clear()
    with pytest.raises(ObjectError, match="there is no such file"), lock.held([str(tmp_path)]):
        pass


def test_remote_lock_is_valid_while_its_heartbeat_continues(tmp_path, hurried):
    """Its clock does not matter; here it is an hour late."""
    folder, ended = str(tmp_path), threading.Event()

    def beat() -> None:
        while not ended.wait(0.1):
            left(folder, time=time.time() - 3600)

    left(folder)
    beating = threading.Thread(target=beat)
    beating.start()
    with pytest.raises(PipelineError, match="in use by process 7 on elsewhere"), lock.held([folder]):
        pass
    ended.set()
    beating.join()
    with lock.held([folder]):
        assert not Path(folder, lock.FOLDER, "elsewhere.7.0").exists()


def test_stale_locks_of_several_folders_are_awaited_together(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 0.2)
    folders = [str(tmp_path / str(number)) for number in range(9)]
    files = [left(folder) for folder in folders]
    with lock.held(folders):
        assert not any(map(objects.exists, files))
    assert capsys.readouterr().err.count("(and 8 more) exists: is process 7 on elsewhere alive? Waiting") == 1


def test_rendezvous_timeout_exceeds_lock_wait():
    assert 60 * distributed._RENDEZVOUS_MINUTES[0] > lock.SILENCE_SECONDS


def test_unreadable_lock_is_watched_for_a_heartbeat(tmp_path, hurried, capsys, monkeypatch):
    left(str(tmp_path))

    def stale(url: str) -> bytes:
        raise ObjectError("Stale file handle")

    monkeypatch.setattr(objects, "read", stale)
    with lock.held([str(tmp_path)]):
        pass
    assert "Waiting for a heartbeat" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b'{"pid": "x"}', b"\xff"])
def test_invalid_lock_file_is_watched_for_a_heartbeat(tmp_path, hurried, capsys, content):
    objects.write(str(tmp_path / lock.FOLDER / "x"), content)
    with lock.held([str(tmp_path)]):
        pass
    assert "Waiting for a heartbeat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("job", "passes"),
    [
        (["41 a", 0], True),
        (["41 a", 1], False),  # another step of the same start
        (["42 a", 0], False),
        (["41 b", 0], False),  # of another cluster
        (None, False),
    ],
)
def test_requeued_job_does_not_wait_for_its_previous_start(tmp_path, monkeypatch, job, passes):
    for name, value in {"JOB_ID": "41", "RESTART_COUNT": "1", "CLUSTER_NAME": "a"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    left(str(tmp_path), job=job)
    assert (lock.in_use(str(tmp_path)) == "") == passes
    waits = []
    monkeypatch.setattr(lock, "_stamp", lambda url: waits.append(url) or str(len(waits)))  # a sign of life at once
    try:
        with lock.held([str(tmp_path)]):
            assert passes
    except PipelineError as error:
        assert not passes
        assert "in use by process 7 on elsewhere" in str(error)
    assert bool(waits) != passes


def test_in_use_judges_lock_by_its_timestamp(tmp_path):
    url = left(str(tmp_path), time=time.time() - lock.SILENCE_SECONDS - 60)
    assert lock.in_use(str(tmp_path)) == ""
    assert Path(url).exists()
    left(str(tmp_path))
    assert "elsewhere" in lock.in_use(str(tmp_path))


def test_process_whose_lock_is_removed_ends(tmp_path, hold):
    holder = hold(str(tmp_path))
    (file,) = (tmp_path / lock.FOLDER).iterdir()
    file.unlink()
    _, error = holder.communicate(timeout=HANG_SECONDS)
    assert holder.returncode == 2
    assert f"{file} is gone: another process may write there, so this one ends" in error
    assert "Traceback" not in error
