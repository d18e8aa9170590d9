"""The GPUs of the nodes, and the attention that runs on them."""

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.config import Recipe
from pipeline.jobs.preflight.check import Check, check, green, red, skipped, yellow
from pipeline.jobs.preflight.nodes import Nodes
from pipeline.models.attention import KINDS, Segments, choose
from pipeline.models.loading import DTYPES

GB = 1e9
_IN_USE = 0.1  # of a GPU's memory, by other processes


def gpus_here() -> dict[str, Any]:
    """driver: its version.  gpus: [name, bytes of memory, free bytes] of each GPU."""
    gpus = []
    for number in range(0 if _is_cpu_wanted() else torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        gpus.append([torch.cuda.get_device_name(number), total, free])
    driver = ""
    if gpus and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.split()
        driver = lines[0] if lines else ""
    return {"driver": driver, "gpus": gpus}


@check("GPUs", if_late="a GPU or its driver may be broken, if nvidia-smi hangs, too: exclude that node")
def gpus(found: list[dict[str, Any]], nodes: Nodes, slurm: bool) -> Check:
    """found: gets every node's `gpus_here`."""
    found += nodes.share("gpus", gpus_here())
    return judge(found, nodes.names or [nodes.place.name], meant_for_cpu=not slurm or _is_cpu_wanted())


def judge(found: list[dict[str, Any]], names: list[str], meant_for_cpu: bool) -> Check:
    """Whether the nodes have the same GPUs, and all are free."""
    counts = [len(node["gpus"]) for node in found]
    if not any(counts):
        if meant_for_cpu:
            return skipped("no GPUs: training on the CPU")
        return yellow(
            "no GPUs: training would run on the CPU", "ask Slurm for GPUs (--gres=gpu:N), or set DS_ACCELERATOR=cpu"
        )
    described = [_described(node) for node in found]
    usual, _ = Counter(described).most_common(1)[0]
    if others := [f"{name} has {has}" for name, has in zip(names, described, strict=True) if has != usual]:
        judged = red if len(set(counts)) > 1 else yellow
        return judged(
            f"{usual}; but {', '.join(others[:4])}", "ask for nodes of one kind, or exclude these (--exclude)"
        )
    in_use = [
        f"GPU {number} of {name} has {free / GB:.0f} of {total / GB:.0f} GB free"
        for name, node in zip(names, found, strict=True)
        for number, (_, total, free) in enumerate(node["gpus"])
        if free < (1 - _IN_USE) * total
    ]
    if in_use:
        return yellow("; ".join(in_use[:4]), "another process uses it: see nvidia-smi, and ask for whole nodes")
    return green(usual + (" on each node" if len(found) > 1 else ""))


def _described(node: dict[str, Any]) -> str:
    kinds = Counter((name, f"{total / GB:.0f} GB") for name, total, _ in node["gpus"])
    listed = ", ".join(f"{count} x {name}, {memory}" for (name, memory), count in kinds.items())
    return (listed or "no GPU") + (f", driver {node['driver']}" if node["driver"] else "")


def _is_cpu_wanted() -> bool:
    return os.environ.get("DS_ACCELERATOR") == "cpu"


def device() -> torch.device:
    """The device that training uses on this node."""
    return torch.device("cuda" if torch.cuda.is_available() and not _is_cpu_wanted() else "cpu")


@check("attention", if_late="model.attention=sdpa needs no compiled extensions")
def attention(recipe: Recipe, place: torch.device, slurm: bool) -> Check:
    """Try the attention that training will use: an installed package may not fit this torch."""
    wanted, dtype = recipe.model.attention, DTYPES[recipe.precision]
    assert isinstance(dtype, torch.dtype)  # "auto" is only for evaluation
    if place.type == "cpu" and wanted in ("flash_attn", "varlen") and not (slurm or _is_cpu_wanted()):
        kind = choose(wanted, "cuda", dtype)
        return yellow(f"{kind}, which runs on GPUs only", "there is no GPU here: check again on a node with GPUs")
    kind = choose(wanted, place.type, dtype)
    whole, heads = Segments((3, 5), place), (4, 2, 2)  # two query heads share a key and a value head
    inputs = [torch.randn(1, count, 8, 64, device=place, dtype=dtype, requires_grad=True) for count in heads]

    def tried(kind: str) -> Iterator[torch.Tensor]:
        """The result and gradients of a function of it; then the same for last-token queries only."""
        query, key, value = inputs
        for segments, asking in ((whole, query), (whole.asked_by_last(), query[:, :, whole.last])):
            result, _ = KINDS[kind](torch.nn.Identity(), asking, key, value, None, segments=segments, scaling=0.125)
            yield from (result.float(), *torch.autograd.grad(result.float().square().sum(), inputs))

    pairs = zip(tried("sdpa"), tried(kind), strict=True)
    if not all(torch.allclose(expected, got, atol=0.05, rtol=0.05) for expected, got in pairs):
        return red(f"{kind} gives other results than sdpa", "set model.attention=sdpa, or reinstall it")
    return green(kind)
