"""What the nodes have to compute with: GPUs, and the attention that runs on them."""

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
_IN_USE = 0.1  # of a GPU's memory, by others


def gpus_here() -> dict[str, Any]:
    """driver: its version.  gpus: [name, bytes of memory, bytes of it that are free] of each."""
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


@check("GPUs", seconds=40, if_late="nvidia-smi hangs, too, where a GPU or its driver is broken: leave that node out")
def gpus(found: list[dict[str, Any]], nodes: Nodes, slurm: bool) -> Check:
    """found: filled with what every node has (see `gpus_here`)."""
    found += nodes.share("gpus", gpus_here())
    return judge(found, nodes.names or [nodes.place.name], meant_for_cpu=not slurm or _is_cpu_wanted())


def judge(found: list[dict[str, Any]], names: list[str], meant_for_cpu: bool) -> Check:
    """Whether the nodes' GPUs are alike, and free."""
    counts = [len(node["gpus"]) for node in found]
    if not any(counts):
        if meant_for_cpu:
            return skipped("none: on the CPU")
        return yellow(
            "none: training would be on the CPU", "ask Slurm for GPUs (--gres=gpu:N), or set DS_ACCELERATOR=cpu"
        )
    described = [_described(node) for node in found]
    usual, _ = Counter(described).most_common(1)[0]
    if others := [f"{name} has {has}" for name, has in zip(names, described, strict=True) if has != usual]:
        judged = red if len(set(counts)) > 1 else yellow
        return judged(
            f"{usual}; but {', '.join(others[:4])}", "ask for nodes that are alike, or leave these out (--exclude)"
        )
    in_use = [
        f"GPU {number} of {name} has {free / GB:.0f} of {total / GB:.0f} GB free"
        for name, node in zip(names, found, strict=True)
        for number, (_, total, free) in enumerate(node["gpus"])
        if free < (1 - _IN_USE) * total
    ]
    if in_use:
        return yellow("; ".join(in_use[:4]), "somebody else computes there: see nvidia-smi, and ask for whole nodes")
    return green(usual + (" on each node" if len(found) > 1 else ""))


def _described(node: dict[str, Any]) -> str:
    kinds = Counter((name, f"{total / GB:.0f} GB") for name, total, _ in node["gpus"])
    listed = ", ".join(f"{count} x {name}, {memory}" for (name, memory), count in kinds.items())
    return (listed or "no GPU") + (f", driver {node['driver']}" if node["driver"] else "")


def _is_cpu_wanted() -> bool:
    return os.environ.get("DS_ACCELERATOR") == "cpu"


def device() -> torch.device:
    """Where this node trains."""
    return torch.device("cuda" if torch.cuda.is_available() and not _is_cpu_wanted() else "cpu")


@check("attention", seconds=40, if_late="model.attention=sdpa does without compiled extensions")
def attention(recipe: Recipe, place: torch.device, slurm: bool) -> Check:
    """The one that training will take is tried: a package may be there and not fit its torch."""
    wanted, dtype = recipe.model.attention, DTYPES[recipe.precision]
    if place.type == "cpu" and wanted in ("flash_attn", "varlen") and not (slurm or _is_cpu_wanted()):
        kind = choose(wanted, "cuda", dtype)
        return yellow(f"{kind}, which runs on GPUs only", "no GPU here: check again on a node that has some")
    kind = choose(wanted, place.type, dtype)
    whole, inputs = Segments((3, 5), place), []
    for heads in (4, 2, 2):  # two queries share a key and a value
        inputs.append(torch.randn(1, heads, 8, 64, device=place, dtype=dtype, requires_grad=True))

    def tried(kind: str) -> Iterator[torch.Tensor]:
        """The result, and gradients of a function of it; then of the last tokens' queries alone."""
        query, key, value = inputs
        for segments, asking in ((whole, query), (whole.asked_by_last(), query[:, :, whole.last])):
            result, _ = KINDS[kind](None, asking, key, value, None, segments=segments, scaling=0.125)
            yield from (result.float(), *torch.autograd.grad(result.float().square().sum(), inputs))

    pairs = zip(tried("sdpa"), tried(kind), strict=True)
    if not all(torch.allclose(expected, got, atol=0.05, rtol=0.05) for expected, got in pairs):
        return red(f"{kind} computes something else than sdpa does", "set model.attention=sdpa, or install it anew")
    return green(kind)
