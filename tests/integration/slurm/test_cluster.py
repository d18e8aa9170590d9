"""The behaviour of Slurm that our job scripts rely on."""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress

import psutil
import pytest
from cluster import SlurmCluster, SlurmFailure
from limits import HANG_SECONDS

# Ranks that print the signals that they get, and continue.
PATIENT = """srun --kill-on-bad-exit=1 bash -c '
    for signal in USR1 TERM; do trap "echo rank $SLURM_PROCID has $signal" $signal; done
    echo rank $SLURM_PROCID is there
    while :; do sleep 0.1; done'"""
ONCE_MORE = """
    echo attempt ${SLURM_RESTART_COUNT:-0}
    srun bash -c 'echo rank $SLURM_PROCID is there; [ "$SLURM_RESTART_COUNT" = 1 ] || sleep 300'"""


@pytest.fixture
def submit(slurm, tmp_path) -> Callable[..., int]:
    """Return a function that submits lines of a script as a job with two ranks on two nodes."""

    def submit(script: str, to: SlurmCluster = slurm, **options: str | int | None) -> int:
        path = tmp_path / "job.sh"
        path.write_text(f"#!/bin/bash\n{script}\n")
        return to.submit(path, **{"nodes": 2, "ntasks_per_node": 1, "time": 5} | options)

    return submit


def both_there(slurm: SlurmCluster, job: int) -> None:
    for rank in range(2):
        slurm.wait_output(job, f"rank {rank} is there")


def alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE  # a zombie stays if process 1 does not reap it
    return False


def names(processes: Iterable[psutil.Process]) -> set[str]:
    """Return the processes' names, without those that have ended: a patient rank starts ten `sleep` a second."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found.add(process.name())
    return found


def test_srun_sets_rank_and_node_of_each_task(slurm, submit):
    words = "$SLURM_PROCID of $SLURM_NTASKS, node $SLURM_NODEID, $SLURMD_NODENAME, local $SLURM_LOCALID"
    job = submit(f"srun bash -c 'echo {words}'")
    assert slurm.wait(job, "COMPLETED")["NodeList"] == "n[1-2]"
    assert sorted(slurm.output(job).splitlines()) == ["0 of 2, node 0, n1, local 0", "1 of 2, node 1, n2, local 0"]


def test_two_jobs_share_the_nodes(slurm, submit):
    for job in [submit(PATIENT), submit(PATIENT)]:
        both_there(slurm, job)
        assert slurm.job(job)["JobState"] == "RUNNING"


def test_requeued_job_runs_again_and_keeps_its_output(slurm, submit):
    job = submit(ONCE_MORE)
    both_there(slurm, job)
    slurm.requeue(job)
    slurm.release(job)
    assert slurm.wait(job, "COMPLETED")["Restarts"] == "1"
    attempts = [line for line in slurm.output(job).splitlines() if line.startswith("attempt")]
    assert attempts == ["attempt 0", "attempt 1"]


def test_job_on_a_failed_node_is_requeued(slurm, submit):
    job = submit(ONCE_MORE)
    both_there(slurm, job)
    slurm.set_node("n2", "down")
    slurm.release(job)
    time.sleep(4)
    assert slurm.job(job)["JobState"] == "PENDING"  # the node stays down
    slurm.set_node("n2", "resume")
    assert slurm.wait(job, "COMPLETED")["Restarts"] == "1"


def test_killed_rank_ends_the_step(slurm, submit):
    job = submit(f"{PATIENT}\necho srun ended with $?\nexit 7")
    both_there(slurm, job)
    (first, *_), (second, *children) = (slurm.tasks(job)[rank] for rank in range(2))
    assert second.environ()["SLURM_PROCID"] == "1"
    assert names(children) <= {"sleep"}
    second.kill()
    slurm.wait_output(job, "rank 0 has TERM")
    first.kill()
    with pytest.raises(SlurmFailure, match=r"ExitCode 7:0; its output:(.|\n)*srun ended with 137"):
        slurm.wait(job, "COMPLETED")


def test_closed_cluster_ends_its_daemons_and_jobs(slurm, submit):
    with SlurmCluster() as other:
        job = submit(PATIENT, to=other)
        both_there(other, job)
        assert not slurm.run("squeue", "--noheader")
        other.set_node("n1", "down")
        other.clear()  # the ranks ignore SIGTERM
        job = submit(PATIENT, to=other)
        both_there(other, job)
        processes = [process for rank in other.tasks(job).values() for process in rank]
        processes += [task.parent() for task, *_ in other.tasks(job).values()]
        processes += [psutil.Process(daemon.pid) for daemon in other.daemons.values()]
        assert names(processes) >= {"munged", "slurmctld", "slurmd", "slurmstepd", "bash"}
    deadline = time.monotonic() + HANG_SECONDS
    while any(map(alive, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not other.folder.exists()
    assert slurm.run("sinfo", "--noheader", "--format=%T").split() == ["idle"]
