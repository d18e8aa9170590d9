"""This process's rank, the number of processes and where they meet: from torchrun's environment, or from srun's.

One task of srun is one rank, with no launcher between: signals reach every rank, and a crash ends the job.
"""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

from pipeline.errors import PipelineError

# Below the ports that Linux assigns by itself (32768 on), above those of services.
_FIRST_PORT, _PORTS = 12000, 16000
# Step numbers from here on are not srun's: a batch script, salloc's shell, what ssh starts.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def init_from_environment(
    environment: MutableMapping[str, str] = os.environ, parents: list[str] | None = None, terminal: bool | None = None
) -> None:
    """If this is a task of srun, set RANK, WORLD_SIZE, LOCAL_RANK and the other variables as torchrun would.

    Variables of a launcher stay, and so does a MASTER_ADDR or MASTER_PORT of the user's. Variables that another process
    left are removed: those of a step that this is no task of, and of a launcher that did not start this process.

    parents: the titles of the processes above this one, the nearest first.  terminal: whether standard input is one.
        Both are found out for the own environment.
    """
    if parents is None:
        parents = _parents() if environment is os.environ else []
    if terminal is None:
        terminal = environment is os.environ and sys.stdin is not None and sys.stdin.isatty()
    task = _is_task(environment, parents, terminal)
    if task and _slurm_step(parents[:1]) and any(name.startswith("TORCHELASTIC_") for name in environment):
        # srun started this process directly, so no launcher set them for it.
        for name in [name for name in environment if name.startswith("TORCHELASTIC_")]:
            del environment[name]
        for name in (*_RANK_VARIABLES, "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
    if "RANK" in environment:
        return
    for name in _RANK_VARIABLES:
        environment.pop(name, None)
    if not task:
        return
    tasks = _tasks_by_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = str(tasks[int(environment["SLURM_NODEID"])])
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _address(first_node(environment["SLURM_STEP_NODELIST"]), environment)
    # Jobs and steps on the same nodes get different ports; so does a job's next start, in case the port is in use.
    number = 31 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    number += 4001 * restarts(environment)
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + number % _PORTS))


def rank_in_environment() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a launcher. Raises PipelineError if they are inconsistent."""
    if "RANK" not in os.environ:
        return 0, 1
    for name, least in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1), ("MASTER_PORT", 0)):
        text = os.environ.get(name, str(least))
        if not text.isdecimal() or int(text) < least:
            raise PipelineError(f"{name}={text} in the environment was not set by a launcher: unset it")
    rank, world = os.environ["RANK"], os.environ.get("WORLD_SIZE", "")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise PipelineError(
            f"RANK={rank} and WORLD_SIZE={world} in the environment were not set by a launcher: unset both, or start "
            "with torchrun or srun"
        )
    return int(rank), int(world)


def restarts(environment: Mapping[str, str] = os.environ) -> int:
    """How often Slurm has requeued this job; 0 if it does not say."""
    count = environment.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdecimal() else 0


def _is_task(environment: Mapping[str, str], parents: list[str], terminal: bool) -> bool:
    """Whether this process is a task of the step in the environment, and not only a process below one, or in a job."""
    try:
        job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
        count, number = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_PROCID"])
        nodes = _tasks_by_node(environment["SLURM_STEP_TASKS_PER_NODE"]) if environment["SLURM_STEP_NODELIST"] else []
        of_job = int(environment.get("SLURM_NTASKS", count))  # differs in a shell of an interactive step
        local = int(environment["SLURM_LOCALID"]) < nodes[int(environment["SLURM_NODEID"])]
    except (KeyError, ValueError, IndexError):
        return False
    if step >= _FIRST_SPECIAL_STEP or of_job != count or sum(nodes) != count or number >= count or not local:
        return False
    if (actual := _slurm_step(parents)) and actual != f"{job}.{step}":
        return False  # the variables are of a step from which a job was submitted
    # Under `srun --pty` one task is a shell, and the others have ended when it prompts.
    return count == 1 or not (terminal and "SLURM_PTY_PORT" in environment and not _slurm_step(parents[:1]))


def _slurm_step(parents: list[str]) -> str:
    """JOB.STEP, from the title of the nearest slurmstepd among these processes; empty without one."""
    for title in parents:
        if found := re.match(r"slurmstepd: \[(\d+\.\w+)\]", title):
            return found[1]
    return ""


def _parents() -> list[str]:
    """Titles of the processes above this one. Empty without /proc; in a container, without those outside of it."""
    titles, pid = [], os.getppid()
    with suppress(OSError, ValueError):
        while pid > 1:
            titles.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return titles


def first_node(nodes: str) -> str:
    """The first of a list as Slurm writes it: node[003-010,12],other -> node003."""
    first = re.split(r",(?![^\[]*\])", nodes, maxsplit=1)[0]  # at a comma that is not in brackets
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _address(node: str, environment: Mapping[str, str]) -> str:
    """The node's name if it can be resolved; otherwise the address that Slurm has for it."""
    with suppress(OSError):
        socket.getaddrinfo(node, None)
        return node
    with suppress(OSError, subprocess.SubprocessError):
        command = ["scontrol", "show", "node", node]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        if found := re.search(r"\bNodeAddr=(\S+)", shown):
            return found[1]
    # Without scontrol, as in a container: the node where srun runs, which in a batch job is the first one. If that is
    # wrong, the other ranks report the address that they do not reach.
    return environment.get("SLURM_LAUNCH_NODE_IPADDR", node)


def _tasks_by_node(counts: str) -> list[int]:
    """8(x2),4 -> [8, 8, 4]"""
    tasks = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        tasks += [int(count)] * int(times or 1)
    return tasks
