"""Which process this is, of how many, and where they meet: as torchrun says it, or as Slurm does for srun's tasks.

One task of srun is one rank, with no launcher between: signals reach every rank, and a crash ends the job.
"""

import os
import re
import socket
import subprocess
from collections.abc import MutableMapping

# Below the ports that Linux gives to whoever asks for any (32768 on), above what services use.
_FIRST_PORT, _PORTS = 12000, 16000


def adopt(environment: MutableMapping[str, str] = os.environ) -> None:
    """Where this is a task of srun, describe it as torchrun would: RANK, WORLD_SIZE, LOCAL_RANK and the others.

    What is set already stays: a launcher's variables, or a MASTER_ADDR or MASTER_PORT of the user's.
    """
    if "RANK" in environment or "SLURM_STEP_NUM_TASKS" not in environment:
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
    number += 4001 * int(environment.get("SLURM_RESTART_COUNT", 0))
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + number % _PORTS))


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
        return environment["SLURM_LAUNCH_NODE_IPADDR"]


def _tasks_by_node(counts: str) -> list[int]:
    """8(x2),4 -> [8, 8, 4]"""
    tasks = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        tasks += [int(count)] * int(times or 1)
    return tasks
