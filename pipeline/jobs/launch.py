"""Which process this is, of how many, and where they meet: as torchrun says it, or as Slurm does for srun's tasks.

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

# Below the ports that Linux gives to whoever asks for any (32768 on), above what services use.
_FIRST_PORT, _PORTS = 12000, 16000


# Slurm's numbers of steps that are none of srun's: of a batch script, of salloc's shell, of what ssh starts.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def adopt(
    environment: MutableMapping[str, str] = os.environ, parents: list[str] | None = None, terminal: bool | None = None
) -> None:
    """Where this is a task of srun, describe it as torchrun would: RANK, WORLD_SIZE, LOCAL_RANK and the others.

    What is set already stays: a launcher's variables, or a MASTER_ADDR or MASTER_PORT of the user's. What another
    process has left there goes: of a step that this is no task of, of a launcher that has not started this.

    parents: the titles of the processes above this one, the nearest first.  terminal: whether it reads from one. Both
        are known by itself for the own environment.
    """
    if parents is None:
        parents = _parents() if environment is os.environ else []
    if terminal is None:
        terminal = environment is os.environ and sys.stdin is not None and sys.stdin.isatty()
    task = _is_task(environment, parents, terminal)
    if task and _slurm_step(parents[:1]) and any(name.startswith("TORCHELASTIC_") for name in environment):
        # There is no launcher between, which would have set them for this process.
        for name in [name for name in environment if name.startswith("TORCHELASTIC_")]:
            del environment[name]
        for name in (*_OF_A_RANK, "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
    if "RANK" in environment:
        return
    for name in _OF_A_RANK:
        environment.pop(name, None)
    if not task:
        return
    tasks = _tasks_by_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    environment |= {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks[int(environment["SLURM_NODEID"])]),
    }
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _address(first_node(environment["SLURM_STEP_NODELIST"]), environment)
    # Jobs and steps on the same nodes differ in it; and a job's next start, should it be taken.
    number = 31 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    number += 4001 * restarts(environment)
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + number % _PORTS))


def restarts(environment: Mapping[str, str] = os.environ) -> int:
    """How often Slurm has started this job again; 0 where it does not say."""
    count = environment.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdecimal() else 0


def _is_task(environment: Mapping[str, str], parents: list[str], terminal: bool) -> bool:
    """Whether this process is a task of the step that the environment describes, or only below one, or in a job."""
    try:
        job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
        count, number = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_PROCID"])
        nodes = _tasks_by_node(environment["SLURM_STEP_TASKS_PER_NODE"]) if environment["SLURM_STEP_NODELIST"] else []
        told = int(environment.get("SLURM_NTASKS", count))  # of a shell in an interactive step, the job's
        local = int(environment["SLURM_LOCALID"]) < nodes[int(environment["SLURM_NODEID"])]
    except (KeyError, ValueError, IndexError):
        return False
    if step >= _FIRST_SPECIAL_STEP or told != count or sum(nodes) != count or number >= count or not local:
        return False
    if (actual := _slurm_step(parents)) and actual != f"{job}.{step}":
        return False  # the variables of a step that a job was submitted from
    # Under `srun --pty` one task is a shell, and the others have ended when it prompts.
    return count == 1 or not (terminal and "SLURM_PTY_PORT" in environment and not _slurm_step(parents[:1]))


def _slurm_step(parents: list[str]) -> str:
    """JOB.STEP as the nearest of Slurm's own processes among these has it in its title; empty without one."""
    for title in parents:
        if found := re.match(r"slurmstepd: \[(\d+\.\w+)\]", title):
            return found.group(1)
    return ""


def _parents() -> list[str]:
    """Empty where there is no /proc; without those outside of a container."""
    titles, pid = [], os.getppid()
    with suppress(OSError, ValueError):
        while pid > 1:
            titles.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return titles


def first_node(nodes: str) -> str:
    """Of a list as Slurm writes it: node[003-010,12],other -> node003."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes).group()
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _address(node: str, environment: MutableMapping[str, str]) -> str:
    """The node's name where it is a host's; otherwise the address that Slurm has for it."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        pass
    try:
        command = ["scontrol", "show", "node", node]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return re.search(r"\bNodeAddr=(\S+)", shown).group(1)
    except (OSError, subprocess.SubprocessError, AttributeError):
        # In a container, say. It is where srun runs, which in a batch job is the first node.
        return environment.get("SLURM_LAUNCH_NODE_IPADDR", node)  # of which a rank that looks for it says more


def _tasks_by_node(counts: str) -> list[int]:
    """8(x2),4 -> [8, 8, 4]"""
    tasks = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        tasks += [int(count)] * int(times or 1)
    return tasks
