"""What does the tiled contrastive loss cost, compared with the same formulas over the whole B x B matrix?

    python benchmarks/loss.py [--sizes 4096 16384 32768] [--dim 1024] [--rounds 3]

Forward and backward of B pairs of float32 vectors on one process, at temperature 0.02:

    ClipLoss    two-sided cross entropy as in open_clip's src/open_clip/loss.py on one process, with a matrix per side;
                ours with alpha 0
    LLaVE       formula L of arXiv 2503.04812 over one matrix, which adds alpha s to the negatives without gradient,
                with alpha 9; ours with alpha 9

Each measurement runs in a new process, on the GPU if there is one. Memory is the peak above the level after the
imports, the inputs and a small warm-up: resident memory, or torch's allocations on a GPU. A side that needs more than
the available memory does not fit; the table gives the available memory, and the ratio is a bound. Seconds are medians
over the rounds, in which the sides take turns to be first. If both fit, the losses and the norms of their gradients
must agree to 1e-5.
"""

import argparse
import gc
import math
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.errors import PipelineError
from pipeline.jobs.program import command_line
from pipeline.objectives.contrastive.loss import hardness_weighted_loss

TEMPERATURE, ALPHA = 0.02, 9.0
TOLERANCE = 1e-5
WARM_UP = 64  # rows


def ours_plain(query: Tensor, target: Tensor) -> Tensor:
    return hardness_weighted_loss(query, target, alpha=0, temperature=TEMPERATURE).loss


def ours_weighted(query: Tensor, target: Tensor) -> Tensor:
    return hardness_weighted_loss(query, target, alpha=ALPHA, temperature=TEMPERATURE).loss


def clip_loss(query: Tensor, target: Tensor) -> Tensor:
    forth = query / TEMPERATURE @ target.T
    back = target / TEMPERATURE @ query.T
    labels = torch.arange(len(query), device=query.device)
    return (F.cross_entropy(forth, labels) + F.cross_entropy(back, labels)) / 2


def llave_loss(query: Tensor, target: Tensor) -> Tensor:
    similarity = query @ target.T
    reward = similarity.detach() * ALPHA
    logits = similarity / TEMPERATURE + reward.fill_diagonal_(0)
    labels = torch.arange(len(query), device=query.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


PEERS = {"ClipLoss": (ours_plain, clip_loss), "LLaVE": (ours_weighted, llave_loss)}


@dataclass(frozen=True)
class Measured:
    """bytes: peak memory, or the available memory if not `fits`; the other fields are then meaningless."""

    fits: bool
    bytes: int
    seconds: float = math.nan
    loss: float = math.nan
    gradient_norm: float = math.nan


def pairs(rows: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return unit queries and targets, (rows, dim). Similarities are about 0.6 in pairs, else 0.5 +- 0.5/sqrt(dim).

    Vectors in a cone, like real embeddings, make alpha * s matter, and give a loss whose digits are meaningful.
    """
    generator = torch.Generator(device).manual_seed(0)
    query, own = (torch.randn(rows, dim, device=device, generator=generator) for _ in range(2))
    target = 0.2 * query + math.sqrt(1 - 0.2**2) * own
    cone = torch.randn(dim, device=device, generator=generator)
    query, target = (F.normalize(x.add_(cone), dim=-1) for x in (query, target))
    return query.requires_grad_(), target.requires_grad_()


def measure(loss: Callable[[Tensor, Tensor], Tensor], rows: int, dim: int, device: torch.device) -> Measured:
    """Run one forward and backward pass. Must be called in a new process."""
    small = pairs(WARM_UP, dim, device)
    loss(*small).backward()
    del small
    query, target = pairs(rows, dim, device)
    gc.collect()
    available = limit_memory(device)
    baseline = peak_bytes(device)
    try:
        began = time.perf_counter()
        result = loss(query, target)
        result.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    except RuntimeError as error:  # torch raises no more specific class on the CPU
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        return Measured(False, available)
    norm = math.hypot(*(float(x.grad.norm()) for x in (query, target)))
    return Measured(True, peak_bytes(device) - baseline, seconds, float(result.detach()), norm)


def limit_memory(device: torch.device) -> int:
    """Reset the peak if possible; return the available bytes. Further allocations beyond them fail."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.mem_get_info()[0]
    available = available_bytes()
    # Beyond this limit torch raises; beyond the machine's memory the kernel would kill a process.
    limit = proc_bytes("self/status", "VmData") + available
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return available


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_bytes() -> int:
    """Return the available memory of this machine, less a twentieth for other programs."""
    return proc_bytes("meminfo", "MemAvailable") * 19 // 20


def proc_bytes(file: str, field: str) -> int:
    lines = (line.partition(":") for line in Path("/proc", file).read_text().splitlines())
    return next(int(value.split()[0]) * 1024 for name, _, value in lines if name == field)


def in_new_process(
    loss: Callable[[Tensor, Tensor], Tensor], rows: int, dim: int, device: torch.device, method: str
) -> Measured:
    context = get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, loss, rows, dim, device))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
    if process.exitcode == -signal.SIGKILL:  # by the kernel, since others took memory meanwhile
        return Measured(False, available_bytes())
    raise PipelineError(f"{loss.__name__} at B={rows} ended with status {process.exitcode}; what it printed says why")


def _send(sender: Connection, *arguments: object) -> None:
    sender.send(measure(*arguments))


def median(rounds: list[Measured]) -> Measured:
    """Return median seconds and bytes, or the first measurement that did not fit."""
    if missed := [each for each in rounds if not each.fits]:
        return missed[0]
    seconds, size = (statistics.median(getattr(each, name) for each in rounds) for name in ("seconds", "bytes"))
    return Measured(True, int(size), seconds, rounds[0].loss, rounds[0].gradient_norm)


def compare(peer: str, rows: int, dim: int, rounds: int, device: torch.device, method: str = "spawn") -> list[str]:
    """Return a row of the table. Raises PipelineError if ours and theirs disagree.  method: of starting processes."""
    sides = ([], [])
    for number in tqdm(range(rounds), desc=f"B={rows}, {peer}", leave=False):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            if not sides[side] or sides[side][-1].fits:
                sides[side].append(in_new_process(PEERS[peer][side], rows, dim, device, method))
    ours, theirs = map(median, sides)
    agreement = "not compared"
    if ours.fits and theirs.fits:
        off = max(_relative(ours.loss, theirs.loss), _relative(ours.gradient_norm, theirs.gradient_norm))
        if not off <= TOLERANCE:
            raise PipelineError(f"{peer} at B={rows}: ours {ours} and theirs {theirs} differ by {off:.1e}")
        agreement = f"{off:.0e}"
    bound = "" if theirs.fits else "< "
    return [
        *(f"{rows:,}", peer),
        *(f"{side.seconds:.2f}" if side.fits else "does not fit" for side in (ours, theirs)),
        f"{ours.seconds / theirs.seconds:.2f}" if ours.fits and theirs.fits else "",
        *(f"{'' if side.fits else '> '}{side.bytes / 1e6:,.0f}" for side in (ours, theirs)),
        f"{bound}{ours.bytes / theirs.bytes:.3f}" if ours.fits else "",
        agreement,
    ]


def _relative(mine: float, other: float) -> float:
    return abs(mine - other) / abs(other)


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[4096, 16384, 32768], metavar="B", help="pairs (4096 16384 32768)"
    )
    parser.add_argument("--dim", type=int, default=1024, metavar="D", help="of the vectors (1024)")
    parser.add_argument(
        "--rounds", type=int, default=3, choices=range(1, 100), metavar="N", help="of each measurement (3)"
    )
    arguments = parser.parse_args()
    if min(*arguments.sizes, arguments.dim) < 2:
        raise PipelineError("--sizes and --dim are 2 at least")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    table = Table(
        *("B", "beside", "ours, s", "theirs", "ratio", "ours, MB", "theirs", "ratio", "differ by"),
        title=f"{arguments.dim} dimensions, float32, {where}, median of {arguments.rounds} rounds",
    )
    for rows in arguments.sizes:
        for peer in PEERS:
            table.add_row(*compare(peer, rows, arguments.dim, arguments.rounds, device))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
