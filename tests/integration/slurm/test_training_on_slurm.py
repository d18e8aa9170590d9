"""The job scripts on a real Slurm: a training run is stopped, killed, or moved to other nodes."""

import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from cluster import ROOT, SlurmCluster, SlurmFailure
from limits import HANG_MINUTES, HANG_SECONDS

from pipeline.convert.demo import TrainingPairs
from pipeline.convert.sharding import convert
from pipeline.jobs.status import Status

STEPS = 50
EVERY = 10


@pytest.fixture(scope="module", autouse=True)
def site(tmp_path_factory) -> Iterator[None]:
    file = tmp_path_factory.mktemp("site") / "site.env"
    file.write_text("export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SITE_ENV", str(file))
        yield


@pytest.fixture(scope="module")
def recipe(s3, tiny_model) -> list[str]:
    """Return the demo's recipe with few samples in S3 and an existing model."""
    convert({"s3://pipeline-tests/slurm": TrainingPairs("Scene-T2I", 0, 400)}, options={}, shard_bytes=200_000)
    return [
        f"model.path={tiny_model}",
        "data.url=s3://pipeline-tests/slurm",
        "data.datasets=[]",
        "data.lanes=4",
        "data.block_samples=8",
        "data.window_blocks=2",
        "data.workers=1",
        "batch.global_batch=24",
        "batch.chunk_tokens=500",
        f"steps={STEPS}",
        f"checkpoint.every={EVERY}",
        "evaluation=null",
        "ledger=true",
        f"timeout_minutes={HANG_MINUTES}",
    ]


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory) -> Path:
    """Return the reference run for all others: under torchrun, on two processes."""
    run = tmp_path_factory.mktemp("runs") / "torchrun"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launcher, "-m", "pipeline.train", "pipeline/recipes/demo.yaml", *recipe, f"run={run}"],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return run


@pytest.fixture
def train(slurm, recipe, tmp_path) -> Callable[..., tuple[int, Path]]:
    """Return a function that submits slurm/train_demo.sh and returns the job and its run directory."""

    def train(*overrides: str, name: str = "run", **options: str | int | None) -> tuple[int, Path]:
        run = tmp_path / name
        return slurm.submit(ROOT / "slurm/train_demo.sh", *recipe, f"run={run}", *overrides, **options), run

    return train


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def last_line(slurm: SlurmCluster, job: int) -> str:
    """Return the last line of the job's output that is not from Slurm itself."""
    return [line for line in slurm.output(job).splitlines() if not line.startswith("slurmstepd")][-1]


def wait_for_step(slurm: SlurmCluster, job: int, run: Path, step: int) -> None:
    slurm.wait_until(job, lambda: Status.read(run).step >= step, f"has not made step {step}")


def assert_same(run: Path, other: Path) -> None:
    for name in ("metrics.jsonl", "ledger/rank0.jsonl", "ledger/rank1.jsonl"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


def restarts(slurm: SlurmCluster, job: int) -> int:
    return int(slurm.job(job)["Restarts"])


def wait_for_requeue(slurm: SlurmCluster, job: int, before: int = 0) -> None:
    """Wait until the job is requeued. before: how often it had been requeued already."""

    def is_back() -> bool:
        shown = slurm.job(job)
        return shown["JobState"] == "PENDING" and int(shown["Restarts"]) > before

    slurm.wait_until(job, is_back, "was not requeued")


def assert_given_up(slurm: SlurmCluster, job: int, run: Path) -> None:
    """The job failed at the same step in both of its starts; there is no third one."""
    with pytest.raises(SlurmFailure):
        slurm.wait(job, "COMPLETED")
    assert (slurm.job(job)["JobState"], slurm.job(job)["Restarts"]) == ("FAILED", "1")
    status = Status.read(run)
    assert status.failures[0] == status.failures[1]
    assert "Lower optimizer.lr" in status.reason
    assert "failed twice after" in last_line(slurm, job)


def test_interrupted_run_matches_torchrun_run_beside_a_job_that_fails(slurm, train, undisturbed, tmp_path, monkeypatch):
    """Both train on both nodes at once. One is stopped again and again and continues; the other fails permanently."""
    some = random.Random(0)
    job, run = train()
    # Also a job whose programs (here: sleep) ignore the signal before the time limit. Slurm would not requeue it.
    (tmp_path / "asleep.env").write_text("CONTAINER=(bash -c 'sleep 300')\n")
    with monkeypatch.context() as patch:
        patch.setenv("SITE_ENV", str(tmp_path / "asleep.env"))
        late, _ = train(name="late", time=1)

    def near_the_limit(job: int) -> None:
        """Suspend a rank until Slurm sends its signal; Slurm checks time limits only every 30 seconds.

        Then extend the job's limit, which is counted in minutes: a busy machine may need longer.
        """
        rank = slurm.tasks(job)[0][0]
        rank.suspend()
        elapsed = sum(int(n) * 60**i for i, n in enumerate(reversed(slurm.job(job)["RunTime"].split(":"))))
        slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={(elapsed + 50) // 60 + 1}")
        slurm.wait_until(job, lambda: rank.status() != psutil.STATUS_STOPPED, "was not told that its limit is near")
        slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")

    done, preempted = 0, "SIGTERM (preempted, requeued or cancelled)"

    def stop(how: Callable[[int], None], reason: str) -> None:
        nonlocal done
        wait_for_step(slurm, job, run, done + some.randint(1, 5))
        before = restarts(slurm, job)
        how(job)
        wait_for_requeue(slurm, job, before)
        status = Status.read(run)
        assert (status.state, status.reason) == ("stopped", reason)
        assert done < status.step < STEPS
        done = status.step
        assert len(lines(run / "metrics.jsonl")) == done
        assert (run / "checkpoints/latest").read_text() == f"step-{done:08d}\n"

    stop(near_the_limit, "SIGUSR1 (the time limit is near)")
    slurm.release(job)
    hopeless, broken = train("optimizer.weight_decay=1e38", name="broken")
    stop(slurm.requeue, preempted)
    wait_for_requeue(slurm, hopeless)
    for each in (job, hopeless):
        slurm.release(each)

    wait_for_step(slurm, job, run, done + some.randint(1, 5))
    before, failures = restarts(slurm, job), Status.read(run).failures
    if failures:  # on an overloaded machine a check of preflight may time out
        warnings.warn(f"a start failed by itself:\n{slurm.errors(job)}", stacklevel=1)
    slurm.tasks(job)[1][0].kill()
    wait_for_requeue(slurm, job, before)
    status = Status.read(run)
    assert (status.state, len(status.failures)) == ("failed", len(failures) + 1)
    assert "a rank was killed" in last_line(slurm, job)
    done = status.step
    wait_for_requeue(slurm, late)
    slurm.cancel(late)
    assert_given_up(slurm, hopeless, broken)
    slurm.release(job)

    def preempt(job: int) -> None:
        """Preempt the job by one that takes both nodes; during the grace time only the steps get a signal."""
        (tmp_path / "urgent.sh").write_text("#!/bin/sh\n")
        urgent.append(slurm.submit(tmp_path / "urgent.sh", partition="urgent", nodes=2, exclusive=None))

    urgent: list[int] = []
    stop(preempt, preempted)
    slurm.wait(*urgent, "COMPLETED")
    slurm.release(job)
    slurm.wait(job, "COMPLETED")
    assert_same(run, undisturbed)
    assert (run / "export/model.safetensors").exists()
    assert (Status.read(run).state, Status.read(run).step) == ("finished", STEPS)
    assert slurm.job(job)["NodeList"] == slurm.job(hopeless)["NodeList"] == "n[1-2]"
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in slurm.output(job) + slurm.output(hopeless)


def test_job_continues_on_one_node_with_the_same_batches(slurm, train, undisturbed):
    job, run = train(nodes="1-2", ntasks=2)
    wait_for_step(slurm, job, run, EVERY + 5)
    assert slurm.job(job)["NumNodes"] == "2"
    slurm.set_node("n2", "down")
    slurm.wait(job, "PENDING")
    slurm.run("scontrol", "update", f"JobId={job}", "NumTasks=1")  # otherwise it waits for a second node
    slurm.release(job)
    assert slurm.wait(job, "COMPLETED")["NodeList"] == "n1"
    ours, theirs = (lines(folder / "metrics.jsonl") for folder in (run, undisturbed))
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for mine, other in zip(ours, theirs, strict=True):  # each step adds to the difference through the parameters
        assert mine["loss"] == pytest.approx(other["loss"], rel=mine["step"] * 1e-5)
    batches = []
    for folder in (run, undisturbed):
        keys = {step: [] for step in range(1, STEPS + 1)}
        for path in (folder / "ledger").iterdir():
            for line in lines(path):
                keys[line["step"]] += line["keys"]
        batches.append({step: sorted(each) for step, each in keys.items()})
    assert batches[0] == batches[1]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_preflight_failure_ends_the_job_before_training(slurm, train, small_disk, tmp_path):
    jobs = {
        "no-such-bucket": train("data.url=s3://no-such-bucket/train", name="bucket", nodes=1),
        "no-such-model": train(f"model.path={tmp_path}/no-such-model", name="model", nodes=1),
        "disk space": train(f"run={small_disk}/run", name="disk/run"),
    }
    for what, (job, run) in jobs.items():
        with pytest.raises(SlurmFailure):
            slurm.wait(job, "COMPLETED")
        assert slurm.job(job)["JobState"] == "FAILED"
        assert last_line(slurm, job).startswith("error: preflight: ")
        assert what in last_line(slurm, job)
        status = Status.read(run)
        assert status.state == "refused"
        assert status.reason.startswith("preflight: ")
        assert what in status.reason
        assert not (run / "metrics.jsonl").exists()
