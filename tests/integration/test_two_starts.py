"""A run that a user interrupts at the terminal, and a run that is started twice."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
from launch import fork, launch, wait
from limits import HANG_MINUTES, HANG_SECONDS

from pipeline.convert.demo import TrainingPairs
from pipeline.convert.sharding import convert
from pipeline.jobs.status import Status
from pipeline.storage import lock

ROOT = Path(__file__).parents[2]
STEPS = 500  # more than the tests run


@pytest.fixture(scope="module")
def recipe(tiny_model, tmp_path_factory) -> list[str]:
    data = str(tmp_path_factory.mktemp("data") / "Scene-T2I")
    convert({data: TrainingPairs("Scene-T2I", 0, 90)}, options={}, shard_bytes=200_000)
    return [
        "pipeline/recipes/demo.yaml",
        f"model.path={tiny_model}",
        f"data.url={data}",
        "data.datasets=[]",
        "data.lanes=4",
        "data.block_samples=8",
        "data.window_blocks=2",
        "data.workers=1",
        "batch.global_batch=24",
        "batch.chunk_tokens=500",
        f"steps={STEPS}",
        "evaluation=null",
        f"timeout_minutes={HANG_MINUTES}",
    ]


def command(recipe: list[str], run: Path) -> list[str]:
    return ["-m", "pipeline.train", *recipe, f"run={run}"]


def of_run(run: Path) -> list[psutil.Process]:
    return [each for each in psutil.process_iter(["cmdline"]) if f"run={run}" in (each.info["cmdline"] or [])]


def until_step(run: Path, step: int, ended: Callable[[], object]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while Status.read(run).state != "running" or Status.read(run).step < step:
        assert ended() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_stopped(run: Path, printed: str) -> None:
    status = Status.read(run)
    assert (status.state, status.reason) == ("stopped", "SIGINT (Ctrl-C)"), printed[-4000:]
    assert (run / "checkpoints/latest").read_text() == f"step-{status.step:08d}\n"
    assert "stopped: SIGINT (Ctrl-C); the same command continues from here" in printed
    assert not psutil.wait_procs(of_run(run), timeout=HANG_SECONDS)[1]
    assert not (run / lock.FOLDER).exists()


def test_sigint_ends_the_run_with_a_checkpoint(recipe, tmp_path):
    run = tmp_path / "run"
    (rank,) = fork(command(recipe, run), 1)
    until_step(run, 2, rank.poll)
    os.kill(rank.pid, signal.SIGINT)
    ended = wait([rank])
    assert ended.status == [130]
    assert "Traceback" not in ended.output
    assert_stopped(run, ended.output)


def test_sigint_to_torchrun_ends_the_run_with_a_checkpoint(recipe, tmp_path):
    """torchrun forwards it once, to each rank's process group (not the terminal's), and ends with a traceback."""
    run, printed = tmp_path / "run", tmp_path / "printed"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs ignore SIGINT
    with printed.open("w") as file:
        process = subprocess.Popen(
            [*launcher, *command(recipe, run)],
            env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            **{"cwd": ROOT, "stdout": file, "stderr": file, "preexec_fn": heed},
            process_group=0,
        )
    try:
        until_step(run, 2, process.poll)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=HANG_SECONDS)
        assert_stopped(run, printed.read_text())
        assert 'File "' + str(ROOT / "pipeline") not in printed.read_text()
    finally:
        for each in (process, *of_run(run)):
            each.kill()
        process.wait()


def test_second_start_is_refused_and_the_first_continues(recipe, tmp_path):
    run = tmp_path / "run"
    (first,) = fork(command(recipe, run), 1)
    until_step(run, 1, first.poll)
    ended = launch(command(recipe, run), 1)
    assert ended.status == [2]
    assert f"error: {run} is in use by process {first.pid} on " in ended.output
    assert "Traceback" not in ended.output
    assert Status.read(run).state == "running"
    until_step(run, Status.read(run).step + 1, first.poll)
    first.kill()
    Status("failed").write(run)
    (third,) = fork(command(recipe, run), 1)  # immediately
    until_step(run, 1, third.poll)
    third.kill()
    for rank in (first, third):
        rank.output.close()
