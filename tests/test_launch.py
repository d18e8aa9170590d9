"""Slurm's environment of a task as torchrun would have it."""

import pytest

from pipeline import launch

TASK = {
    "SLURM_JOB_ID": "417",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3,1",
    "SLURM_STEP_NODELIST": "localhost,gpu[3-5]",
    "SLURM_PROCID": "10",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "2",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def adopted(**changes: str) -> dict[str, str]:
    environment = TASK | changes
    launch.adopt(environment)
    return environment


def test_a_task_of_srun_is_a_rank():
    assert [adopted()[name] for name in NAMES] == ["10", "12", "2", "3", "localhost"]


def test_what_is_set_already_stays():
    environment = adopted(MASTER_ADDR="ib0.node", MASTER_PORT="1234")
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("ib0.node", "1234")
    of_torchrun = TASK | {"RANK": "3", "WORLD_SIZE": "8"}
    assert adopted(RANK="3", WORLD_SIZE="8") == of_torchrun


def test_outside_of_a_step_nothing_is_said():
    environment = {"SLURM_JOB_ID": "417", "SLURM_NTASKS": "12", "SLURM_PROCID": "0"}
    launch.adopt(environment)
    assert environment == {"SLURM_JOB_ID": "417", "SLURM_NTASKS": "12", "SLURM_PROCID": "0"}


def test_a_node_whose_name_is_no_hosts_is_found_where_srun_runs(monkeypatch):
    monkeypatch.setenv("PATH", "")  # no scontrol
    assert adopted(SLURM_STEP_NODELIST="no-such-node[1-2]")["MASTER_ADDR"] == "10.0.0.7"


def test_jobs_and_steps_and_starts_have_ports_of_their_own():
    starts = {adopted(SLURM_RESTART_COUNT=str(start))["MASTER_PORT"] for start in range(4)}
    assert len(starts) == 4
    ports = {
        int(adopted(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step))["MASTER_PORT"])
        for job in range(417, 517)
        for step in range(10)
    }
    assert len(ports) == 1000
    assert 1024 < min(ports) <= max(ports) < 32768


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("node[003-010,012],other", "node003"),
        ("rack[2,4]-node[07-09]", "rack2-node07"),
        ("gpu-[a,b].local", "gpu-a.local"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes, first):
    assert launch.first_node(nodes) == first
