"""The environment of a Slurm task, translated to that of torchrun."""

import pytest

from pipeline.jobs import launch

STEP = "slurmstepd: [417.1] "
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


def initialized(*parents: str, **changes: str) -> dict[str, str]:
    environment = TASK | changes
    launch.init_from_environment(environment, list(parents), terminal="SLURM_PTY_PORT" in changes)
    return environment


def test_srun_task_becomes_a_rank():
    assert [initialized()[name] for name in NAMES] == ["10", "12", "2", "3", "localhost"]


def test_variables_already_set_are_preserved():
    environment = initialized(MASTER_ADDR="ib0.node", MASTER_PORT="1234")
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("ib0.node", "1234")
    of_torchrun = TASK | {"RANK": "3", "WORLD_SIZE": "8"}
    assert initialized(RANK="3", WORLD_SIZE="8") == of_torchrun


SHELL, AGENT = "bash ", "python -m torch.distributed.run --nproc-per-node 8 -m pipeline.train "
ELASTIC = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "gpu1", "TORCHELASTIC_RUN_ID": "x"}


@pytest.mark.parametrize(
    ("changes", "parents"),
    [
        ({"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, []),  # the shell of salloc
        ({"SLURM_STEP_ID": "4294967291"}, []),  # a batch script
        ({"SLURM_NTASKS": "8"}, []),  # the job's, in a step with another number
        ({"SLURM_NTASKS": "1"}, []),  # a job submitted from inside the step
        ({"SLURM_PROCID": "12"}, []),
        ({"SLURM_NODEID": "4"}, []),
        ({"SLURM_LOCALID": "4"}, []),
        ({"SLURM_STEP_NUM_TASKS": "many"}, []),
        ({"SLURM_STEP_NUM_TASKS": "11"}, []),  # but 12 by the tasks per node
        ({"SLURM_STEP_NODELIST": ""}, []),
        ({}, [SHELL, "slurmstepd: [418.batch] ", "slurmd "]),  # belongs to another job
        ({}, ["slurmstepd: [417.batch] "]),
        ({}, [SHELL, "slurmstepd: [417.interactive] "]),
        ({}, ["slurmstepd: [417.2] ", STEP]),
        ({"SLURM_PTY_PORT": "41234"}, [SHELL, STEP]),  # srun --pty bash
    ],
)
def test_process_that_is_not_a_step_task_gets_no_rank(changes, parents):
    for others in ({}, {"WORLD_SIZE": "8", "LOCAL_RANK": "3"}):  # an incomplete launcher environment
        assert not initialized(*parents, **changes, **others).keys() & set(NAMES[:4])


@pytest.mark.parametrize(
    ("changes", "parents"),
    [
        ({"SLURM_NTASKS": "12"}, [STEP, "slurmd "]),
        ({}, [SHELL, STEP]),  # srun bash script.sh
        ({"SLURM_PTY_WIN_COL": "80"}, [SHELL, STEP]),  # in the shell of salloc
        ({}, [SHELL, "apptainer "]),  # in a container, without Slurm's processes
        ({"SLURM_PTY_PORT": "41234"}, [STEP]),  # srun --pty python
        (ELASTIC, [STEP]),  # submitted from inside a rank of torchrun
    ],
)
def test_process_of_a_step_task_gets_its_rank(changes, parents):
    environment = initialized(*parents, **changes)
    assert [environment[name] for name in NAMES] == ["10", "12", "2", "3", "localhost"]
    assert "TORCHELASTIC_RUN_ID" not in environment


def test_ranks_set_below_a_task_are_preserved():
    assert initialized(AGENT, STEP, **ELASTIC) == TASK | ELASTIC
    own = {"RANK": "5", "WORLD_SIZE": "12"}  # set by the user's script
    assert initialized(STEP, **own) == TASK | own


def test_environment_outside_a_step_is_unchanged():
    environment = {"SLURM_JOB_ID": "417", "SLURM_NTASKS": "12", "SLURM_PROCID": "0"}
    launch.init_from_environment(environment)
    assert environment == {"SLURM_JOB_ID": "417", "SLURM_NTASKS": "12", "SLURM_PROCID": "0"}


def test_unresolvable_node_name_falls_back_to_launch_address(monkeypatch):
    monkeypatch.setenv("PATH", "")  # no scontrol
    assert initialized(SLURM_STEP_NODELIST="no-such-node[1-2]")["MASTER_ADDR"] == "10.0.0.7"


def test_missing_slurm_variables_raise_no_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delitem(TASK, "SLURM_LAUNCH_NODE_IPADDR")
    unknown = initialized(SLURM_STEP_NODELIST="no-such-node", SLURM_RESTART_COUNT="")
    assert (unknown["MASTER_ADDR"], unknown["MASTER_PORT"]) == ("no-such-node", initialized()["MASTER_PORT"])


def test_jobs_steps_and_restarts_get_distinct_ports():
    starts = {initialized(SLURM_RESTART_COUNT=str(start))["MASTER_PORT"] for start in range(4)}
    assert len(starts) == 4
    ports = {
        int(initialized(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step))["MASTER_PORT"])
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
def test_first_node_of_a_node_list(nodes, first):
    assert launch.first_node(nodes) == first
