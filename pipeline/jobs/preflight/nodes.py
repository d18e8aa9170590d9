"""One process on each node: they connect, exchange values, and measure the network between them."""

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import PipelineError, first_few
from pipeline.jobs import launch
from pipeline.jobs.preflight.check import HANG_SECONDS, Check, check, green, red, skipped, yellow

MEET_SECONDS = 120  # imports are slow if all nodes read the same files
SHARE_SECONDS = HANG_SECONDS + 30  # longer than an earlier check takes on another node
_ROUNDS = 5
_SLOW = 1.25e9  # bytes a second: at 10 Gbit/s GPUs wait for each other most of the time
_INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
_NETWORK = "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the interface that connects the nodes (ip addr)"


@dataclass(frozen=True)
class Place:
    """This node's number, and the address of the first node."""

    node: int = 0
    nodes: int = 1
    name: str = field(default_factory=socket.gethostname)
    address: str = "127.0.0.1"
    port: int = 0


def slurm_place(environment: Mapping[str, str]) -> Place:
    """From the environment of an srun task, one on each node. PipelineError for any other environment."""
    task = dict(environment)
    launch.init_from_environment(task)
    try:
        place = Place(
            int(task["RANK"]),
            int(task["WORLD_SIZE"]),
            task["SLURMD_NODENAME"],
            task["MASTER_ADDR"],
            int(task["MASTER_PORT"]),
        )
        alone = task["LOCAL_WORLD_SIZE"] == "1"
    except (KeyError, ValueError) as error:
        raise PipelineError(f"--slurm is only for a task of srun: {error} is not in the environment") from None
    if not alone:
        raise PipelineError("--slurm needs one task on each node: srun --ntasks=$SLURM_NNODES --ntasks-per-node=1")
    return place


@dataclass
class Nodes:
    """The nodes, connected by a store on the first one, not by NCCL or gloo, because these are checked.

    names: of all nodes, once they are connected.
    """

    place: Place
    names: list[str] = field(default_factory=list)
    store: dist.Store | None = None

    def connect(self) -> None:
        """Raises RuntimeError if the first node cannot be reached, PipelineError if other nodes do not connect."""
        place, deadline = self.place, time.monotonic() + MEET_SECONDS
        if place.nodes > 1:
            self.store = dist.TCPStore(
                place.address,
                place.port,
                is_master=place.node == 0,
                wait_for_workers=False,
                timeout=timedelta(seconds=MEET_SECONDS),
            )
        self.names = self.share("name", place.name, deadline - time.monotonic())

    def share(self, key: str, value: Any, seconds: float = SHARE_SECONDS) -> list[Any]:
        """Every node's value, of JSON's types, in the order of the nodes. All nodes call it, and return together."""
        if self.store is None:
            return [value]
        self.put(key, value)
        values, late, deadline = [], [], time.monotonic() + seconds
        for node in range(self.place.nodes):
            try:
                values.append(self.get(key, node, deadline - time.monotonic()))
            except RuntimeError:
                late.append(self.names[node] if self.names else f"node {node}")
        if late:
            raise PipelineError(f"no answer from {', '.join(late)} within {seconds:.0f} s: see the log of that node")
        return values

    def put(self, key: str, value: Any) -> None:
        assert self.store
        self.store.set(f"{key}/{self.place.node}", json.dumps(value))

    def get(self, key: str, node: int, seconds: float) -> Any:
        """The value that a node put, or puts within `seconds`; otherwise RuntimeError."""
        assert self.store
        self.store.wait([f"{key}/{node}"], timedelta(seconds=max(seconds, 0.01)))
        return json.loads(self.store.get(f"{key}/{node}"))


@check("nodes meet", seconds=2 * MEET_SECONDS, if_late=_NETWORK)
def meet(nodes: Nodes) -> Check:
    place = nodes.place
    where = f"{place.address}:{place.port}"
    try:
        nodes.connect()
    except (RuntimeError, PipelineError) as error:
        settings = ", ".join(f"{name}={os.environ.get(name, '')}" for name in _INTERFACES)
        first = str(error).splitlines()[0][:200]
        return red(
            f"{place.name}, node {place.node} of {place.nodes}, did not reach all at {where} ({settings}): {first}",
            "set MASTER_ADDR to an address of the first node that the others can reach, MASTER_PORT to a free port; "
            + _NETWORK,
        )
    return skipped("one node") if place.nodes == 1 else green(f"{place.nodes} at {where}: {first_few(nodes.names)}")


@check("all-reduce", seconds=2 * MEET_SECONDS, if_late=_NETWORK)
def all_reduce(nodes: Nodes, device: torch.device) -> Check:
    """NCCL between GPUs, gloo between CPUs; bandwidth as nccl-tests' "busbw", which is independent of the nodes."""
    count = nodes.place.nodes
    if count == 1 or nodes.store is None:
        return skipped("one node")
    size = (256 if device.type == "cuda" else 64) << 20
    backend = "nccl" if device.type == "cuda" else "gloo"
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # a timeout raises; otherwise NCCL would end the process
    # A connection of its own: if it hangs, values can still be exchanged.
    store = dist.PrefixStore("all-reduce", nodes.store.clone())  # type: ignore[attr-defined]  # torch's stubs lack it
    try:
        dist.init_process_group(
            backend, store=store, rank=nodes.place.node, world_size=count, timeout=timedelta(seconds=MEET_SECONDS)
        )
        latency, _ = _time_all_reduce(torch.ones(2, device=device))
        seconds, total = _time_all_reduce(torch.ones(size // 4, device=device))
    except RuntimeError as error:
        return red(f"{backend}: {str(error).splitlines()[0][:200]}", _NETWORK)
    latency, seconds = (max(each) for each in zip(*nodes.share("all-reduce", [latency, seconds]), strict=True))
    if abs(total / count ** (_ROUNDS + 1) - 1) > 1e-3:
        return red(f"{backend} sums {count} nodes wrongly", "run the vendor's nccl-tests on these nodes")
    bandwidth = size / seconds * 2 * (count - 1) / count
    found = f"{backend}: {size >> 20} MiB at {bandwidth / 1e9:.2f} GB/s, 8 bytes in {latency * 1e3:.2f} ms"
    if device.type == "cuda" and bandwidth < _SLOW:
        return yellow(found, f"is there a faster network? NCCL_DEBUG=INFO shows which one is used; {_NETWORK}")
    return green(found)


def _time_all_reduce(tensor: torch.Tensor) -> tuple[float, float]:
    """(seconds of one all-reduce after a first one that connects, an element after all of them)."""
    dist.all_reduce(tensor)
    began = time.perf_counter()
    for _ in range(_ROUNDS):
        dist.all_reduce(tensor)
    total = tensor[-1].item()  # waits for the GPU
    return (time.perf_counter() - began) / _ROUNDS, total
