"""One process of each node: how they meet, what they tell each other, how fast the network between them is."""

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

from pipeline.errors import PipelineError
from pipeline.jobs import launch
from pipeline.jobs.preflight.check import Check, check, green, red, skipped, yellow

MEET_SECONDS = 45  # imports, too, are slow where all nodes read the same files
SHARE_SECONDS = 45  # longer than any check before takes on another node
_SKEW_SECONDS = 5
_ROUNDS = 5
_SLOW = 1.25e9  # bytes a second: GPUs at 10 Gbit/s wait for each other most of the time
_INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
_NETWORK = "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the interface that connects the nodes (ip addr)"


@dataclass(frozen=True)
class Place:
    """This process's among the nodes, and where the first listens."""

    node: int = 0
    nodes: int = 1
    name: str = field(default_factory=socket.gethostname)
    address: str = "127.0.0.1"
    port: int = 0


def slurm_place(environment: Mapping[str, str]) -> Place:
    """By the environment of a task of srun, of which each node has one. Raises PipelineError for any other."""
    environment = dict(environment)
    launch.adopt(environment)
    try:
        place = Place(
            int(environment["RANK"]),
            int(environment["WORLD_SIZE"]),
            environment["SLURMD_NODENAME"],
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
        )
        alone = environment["LOCAL_WORLD_SIZE"] == "1"
    except (KeyError, ValueError) as error:
        raise PipelineError(f"--slurm is for a task of srun, in whose environment there would be {error}") from None
    if not alone:
        raise PipelineError("--slurm takes one task of each node: srun --ntasks=$SLURM_NNODES --ntasks-per-node=1")
    return place


@dataclass
class Nodes:
    """All nodes, as one of them sees them, by a store of the first's (no NCCL, no gloo: these are what is checked).

    names: the nodes', once they have met.
    """

    place: Place
    names: list[str] = field(default_factory=list)
    store: dist.TCPStore | None = None

    @property
    def met(self) -> bool:
        return bool(self.names)

    def connect(self) -> None:
        """Raises RuntimeError if the first node cannot be reached, PipelineError if others do not come."""
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
        """Every node's value, of JSON's types, in the nodes' order. All nodes call it, and leave it together."""
        if self.store is None:
            return [value]
        self.tell(key, value)
        told, late, deadline = [], [], time.monotonic() + seconds
        for node in range(self.place.nodes):
            try:
                told.append(self.hear(key, node, deadline - time.monotonic()))
            except RuntimeError:
                late.append(self.names[node] if self.names else f"node {node}")
        if late:
            raise PipelineError(f"no word from {', '.join(late)} within {seconds:.0f} s: see what is printed there")
        return told

    def tell(self, key: str, value: Any) -> None:
        self.store.set(f"{key}/{self.place.node}", json.dumps(value))

    def hear(self, key: str, node: int, seconds: float) -> Any:
        """What a node told, or will within `seconds`; else RuntimeError."""
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
            f"{place.name}, node {place.node} of {place.nodes}, did not meet all at {where} ({settings}): {first}",
            "let MASTER_ADDR be an address of the first node that the others reach, MASTER_PORT a free port; "
            + _NETWORK,
        )
    return skipped("one node") if place.nodes == 1 else green(f"{place.nodes} at {where}: {_some(nodes.names)}")


@check("clocks", seconds=SHARE_SECONDS + 5, if_late="run it again")
def clocks(nodes: Nodes) -> Check:
    if nodes.place.nodes == 1:
        return skipped("one node")
    nodes.share("ready for the time", None)  # which all leave within milliseconds
    times = nodes.share("time", time.time())
    early, late = times.index(min(times)), times.index(max(times))
    skew = times[late] - times[early]
    if skew > _SKEW_SECONDS:
        return red(
            f"{nodes.names[late]} is {skew:.1f} s ahead of {nodes.names[early]}",
            "have the nodes' clocks set (chrony or ntpd); S3 refuses requests that are 15 minutes off",
        )
    return green(f"within {max(skew, 0.1):.1f} s of each other")


@check("all-reduce", seconds=2 * MEET_SECONDS, if_late=_NETWORK)
def all_reduce(nodes: Nodes, device: torch.device) -> Check:
    """NCCL between GPUs, gloo between CPUs; bandwidth as nccl-tests' "busbw", which more nodes do not change."""
    count = nodes.place.nodes
    if count == 1:
        return skipped("one node")
    size = (256 if device.type == "cuda" else 64) << 20
    backend = "nccl" if device.type == "cuda" else "gloo"
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # what takes too long raises, where NCCL would end the process
    # A connection of its own: whoever hangs in it does not keep us from telling the other nodes.
    store = dist.PrefixStore("all-reduce", nodes.store.clone())
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
        return yellow(found, f"is there a faster network? NCCL_DEBUG=INFO says which is taken; {_NETWORK}")
    return green(found)


def _time_all_reduce(tensor: torch.Tensor) -> tuple[float, float]:
    """Seconds of one, after a first that connects; and an element's sum of sums, in the end."""
    dist.all_reduce(tensor)
    began = time.perf_counter()
    for _ in range(_ROUNDS):
        dist.all_reduce(tensor)
    total = tensor[-1].item()  # a GPU is waited for here
    return (time.perf_counter() - began) / _ROUNDS, total


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
