"""The nodes of a job, one process on each: the network between them, and their GPUs."""

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import PipelineError, first_few
from pipeline.jobs import launch
from pipeline.jobs.preflight.check import HANG_SECONDS, Check, check, green, red, skipped, yellow

GB = 1e9
MEET_SECONDS = 120  # imports are slow if all nodes read the same files
SHARE_SECONDS = HANG_SECONDS + 30  # longer than an earlier check takes on another node
_ROUNDS = 5
_SLOW = 1.25e9  # bytes a second: at 10 Gbit/s GPUs wait for each other most of the time
_IN_USE = 0.1  # of a GPU's memory, by other processes
_INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
_NETWORK = "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the interface that connects the nodes (ip addr)"


@dataclass
class Nodes:
    """This node's number and name, the address of the first node, and a store on that which connects all of them.

    The store needs neither NCCL nor gloo, because these are checked.  names: of all nodes, once they are connected.
    """

    node: int = 0
    count: int = 1
    name: str = field(default_factory=socket.gethostname)
    address: str = "127.0.0.1"
    port: int = 0
    names: list[str] = field(default_factory=list)
    store: dist.Store | None = None

    @classmethod
    def of_slurm(cls, environment: Mapping[str, str]) -> "Nodes":
        """From the environment of an srun task, one on each node. PipelineError for any other environment."""
        task = dict(environment)
        launch.init_from_environment(task)
        try:
            rank, count, port = int(task["RANK"]), int(task["WORLD_SIZE"]), int(task["MASTER_PORT"])
            nodes = cls(rank, count, task["SLURMD_NODENAME"], task["MASTER_ADDR"], port)
            alone = task["LOCAL_WORLD_SIZE"] == "1"
        except (KeyError, ValueError) as error:
            raise PipelineError(f"--slurm is only for a task of srun: {error} is not in the environment") from None
        if not alone:
            raise PipelineError("--slurm needs one task on each node: srun --ntasks=$SLURM_NNODES --ntasks-per-node=1")
        return nodes

    def connect(self) -> None:
        """Raises RuntimeError if the first node cannot be reached, PipelineError if other nodes do not connect."""
        deadline, limit = time.monotonic() + MEET_SECONDS, timedelta(seconds=MEET_SECONDS)
        if self.count > 1:
            self.store = dist.TCPStore(
                self.address, self.port, is_master=self.node == 0, wait_for_workers=False, timeout=limit
            )
        self.names = self.share("name", self.name, deadline - time.monotonic())

    def share(self, key: str, value: Any, seconds: float = SHARE_SECONDS) -> list[Any]:
        """Every node's value, of JSON's types, in the order of the nodes. All nodes call it, and return together."""
        if self.store is None:
            return [value]
        self.put(key, value)
        values, late, deadline = [], [], time.monotonic() + seconds
        for node in range(self.count):
            try:
                values.append(self.get(key, node, deadline - time.monotonic()))
            except RuntimeError:
                late.append(self.names[node] if self.names else f"node {node}")
        if late:
            raise PipelineError(f"no answer from {', '.join(late)} within {seconds:.0f} s: see the log of that node")
        return values

    def put(self, key: str, value: Any) -> None:
        assert self.store
        self.store.set(f"{key}/{self.node}", json.dumps(value))

    def get(self, key: str, node: int, seconds: float) -> Any:
        """The value that a node put, or puts within `seconds`; otherwise RuntimeError."""
        assert self.store
        self.store.wait([f"{key}/{node}"], timedelta(seconds=max(seconds, 0.01)))
        return json.loads(self.store.get(f"{key}/{node}"))


@check("nodes meet", seconds=2 * MEET_SECONDS, if_late=_NETWORK)
def meet(nodes: Nodes) -> Check:
    where = f"{nodes.address}:{nodes.port}"
    try:
        nodes.connect()
    except (RuntimeError, PipelineError) as error:
        settings = ", ".join(f"{name}={os.environ.get(name, '')}" for name in _INTERFACES)
        first = str(error).splitlines()[0][:200]
        return red(
            f"{nodes.name}, node {nodes.node} of {nodes.count}, did not reach all at {where} ({settings}): {first}",
            "set MASTER_ADDR to an address of the first node that the others can reach, MASTER_PORT to a free port; "
            + _NETWORK,
        )
    return skipped("one node") if nodes.count == 1 else green(f"{nodes.count} at {where}: {first_few(nodes.names)}")


@check("all-reduce", seconds=2 * MEET_SECONDS, if_late=_NETWORK)
def all_reduce(nodes: Nodes, device: torch.device) -> Check:
    """NCCL between GPUs, gloo between CPUs; bandwidth as nccl-tests' "busbw", which is independent of the nodes."""
    count = nodes.count
    if nodes.store is None:
        return skipped("one node")
    size = (256 if device.type == "cuda" else 64) << 20
    backend = "nccl" if device.type == "cuda" else "gloo"
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # a timeout raises; otherwise NCCL would end the process
    # A connection of its own: if it hangs, values can still be exchanged.
    store = dist.PrefixStore("all-reduce", nodes.store.clone())  # type: ignore[attr-defined]  # torch's stubs lack it
    try:
        limit = timedelta(seconds=MEET_SECONDS)
        dist.init_process_group(backend, store=store, rank=nodes.node, world_size=count, timeout=limit)
        tensor = torch.ones(size // 4, device=device)
        dist.all_reduce(tensor)  # connects
        began = time.perf_counter()
        for _ in range(_ROUNDS):
            dist.all_reduce(tensor)
        total = tensor[-1].item()  # waits for the GPU
        seconds = (time.perf_counter() - began) / _ROUNDS
    except RuntimeError as error:
        return red(f"{backend}: {str(error).splitlines()[0][:200]}", _NETWORK)
    bandwidth = size / max(nodes.share("all-reduce", seconds)) * 2 * (count - 1) / count
    if abs(total / count ** (_ROUNDS + 1) - 1) > 1e-3:
        return red(f"{backend} sums {count} nodes wrongly", "run the vendor's nccl-tests on these nodes")
    found = f"{backend}: {size >> 20} MiB at {bandwidth / 1e9:.2f} GB/s"
    if device.type == "cuda" and bandwidth < _SLOW:
        return yellow(found, f"is there a faster network? NCCL_DEBUG=INFO shows which one is used; {_NETWORK}")
    return green(found)


@check("GPUs", if_late="a GPU or its driver may be broken, if nvidia-smi hangs, too: exclude that node")
def gpus(found: list[list], nodes: Nodes, slurm: bool) -> Check:
    """found: gets [name, bytes of memory, free bytes] of each GPU, for every node."""
    here = []
    for number in range(0 if is_cpu_wanted() else torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        here.append([torch.cuda.get_device_name(number), total, free])
    found += nodes.share("gpus", here)
    return judge(found, nodes.names or [nodes.name], meant_for_cpu=not slurm or is_cpu_wanted())


def judge(found: list[list], names: list[str], meant_for_cpu: bool) -> Check:
    """Check that all nodes have the same GPUs and that these are free."""
    counts = [len(node) for node in found]
    if not any(counts):
        if meant_for_cpu:
            return skipped("no GPUs: training on the CPU")
        return yellow(
            "no GPUs: training would run on the CPU", "ask Slurm for GPUs (--gres=gpu:N), or set DS_ACCELERATOR=cpu"
        )
    kinds = [Counter(f"{name}, {total / GB:.0f} GB" for name, total, _ in node) for node in found]
    described = [", ".join(f"{count} x {kind}" for kind, count in node.items()) or "no GPU" for node in kinds]
    usual, _ = Counter(described).most_common(1)[0]
    if others := [f"{name} has {has}" for name, has in zip(names, described, strict=True) if has != usual]:
        judged = red if len(set(counts)) > 1 else yellow
        return judged(
            f"{usual}; but {', '.join(others[:4])}", "ask for nodes of one kind, or exclude these (--exclude)"
        )
    in_use = [
        f"GPU {number} of {name} has {free / GB:.0f} of {total / GB:.0f} GB free"
        for name, node in zip(names, found, strict=True)
        for number, (_, total, free) in enumerate(node)
        if free < (1 - _IN_USE) * total
    ]
    if in_use:
        return yellow("; ".join(in_use[:4]), "another process uses it: see nvidia-smi, and ask for whole nodes")
    return green(usual + (" on each node" if len(found) > 1 else ""))


def is_cpu_wanted() -> bool:
    return os.environ.get("DS_ACCELERATOR") == "cpu"


def device() -> torch.device:
    """The device that training uses on this node."""
    return torch.device("cuda" if torch.cuda.is_available() and not is_cpu_wanted() else "cpu")
