"""What does scoring queries against a million candidates cost, compared with plain float32 products?

    python benchmarks/score.py [--candidates 1000000] [--queries 1000] [--dim 1024] [--work DIR]

Random unit vectors in a file under DIR, which is removed afterwards. Each query's similarity to its right candidate is
0.15, about that of the nearest among a million others.

    ours    pipeline.evaluation.metrics: exact similarities, the rank of the right candidate, ties, the hardest wrong
            one
    peer    torch: float32 products in tiles of 8,192 candidates and topk of the 10 best; it gives only these

Each runs in a new process and reads the file with read() into its own memory. The peak is of the resident memory
(VmHWM), including libraries. CPU seconds are more reliable if other programs use the machine. R@1, R@5 and R@10 must be
equal.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.errors import PipelineError
from pipeline.evaluation.metrics import recall_at, scores_of
from pipeline.evaluation.tasks import Retrieval
from pipeline.jobs.program import command_line

SIMILARITY = 0.15
TILE = 8192
RECALLS = (1, 5, 10)

Recalls = tuple[float, ...]


def write(file: Path, candidates: int, queries: int, dim: int) -> None:
    """Write (candidates + queries, dim) float32: the candidates, then the queries. Query i matches `right(i)`."""
    generator = torch.Generator().manual_seed(0)
    wanted, sought = right(candidates, queries), torch.empty(queries, dim)
    with file.open("wb") as opened:
        for start in tqdm(range(0, candidates, TILE), desc="writing", leave=False):
            rows = F.normalize(torch.randn(min(TILE, candidates - start), dim, generator=generator), dim=1)
            here = (wanted >= start) & (wanted < start + len(rows))
            sought[here] = rows[wanted[here] - start]
            rows.numpy().tofile(opened)
        others = torch.randn(queries, dim, generator=generator)
        others = F.normalize(others - (others * sought).sum(dim=1, keepdim=True) * sought, dim=1)
        (SIMILARITY * sought + math.sqrt(1 - SIMILARITY**2) * others).numpy().tofile(opened)


def right(candidates: int, queries: int) -> np.ndarray:
    return np.arange(queries) * candidates // queries


def read(file: Path, dim: int, rows: np.ndarray) -> np.ndarray:
    """Read ascending rows as (n, dim); consecutive rows are read at once."""
    runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    parts = [np.fromfile(file, np.float32, len(run) * dim, offset=int(run[0]) * dim * 4) for run in runs]
    return np.concatenate(parts).reshape(-1, dim) if len(parts) > 1 else parts[0].reshape(-1, dim)


def ours(file: Path, candidates: int, queries: int, dim: int) -> Recalls:
    numbers = np.arange(candidates + queries)
    wanted = list(right(candidates, queries)[:, None])
    task = Retrieval("million", "text-image", "t2i", "en", numbers[candidates:], numbers[:candidates], wanted)
    scores = scores_of(task, lambda rows: read(file, dim, rows))
    return tuple(recall_at(scores, k) for k in RECALLS)


def peer(file: Path, candidates: int, queries: int, dim: int) -> Recalls:
    sought = torch.from_numpy(read(file, dim, np.arange(candidates, candidates + queries)))
    best, places = torch.empty(queries, 0), torch.empty(queries, 0, dtype=torch.long)
    for start in range(0, candidates, TILE):
        rows = torch.from_numpy(read(file, dim, np.arange(start, min(start + TILE, candidates))))
        found, place = (sought @ rows.T).topk(min(max(RECALLS), len(rows)), dim=1)
        best, kept = torch.cat([best, found], dim=1).topk(min(max(RECALLS), best.shape[1] + found.shape[1]), dim=1)
        places = torch.cat([places, place + start], dim=1).gather(1, kept)
    hits = places == torch.from_numpy(right(candidates, queries))[:, None]
    return tuple(float(hits[:, :k].any(dim=1).double().mean()) for k in RECALLS)


def measured(score: Callable[..., Recalls], *arguments: object) -> tuple[Recalls, float, float, int]:
    """Return (recalls, seconds, CPU seconds, peak bytes). Must be called in a new process."""
    began, worked = time.perf_counter(), time.process_time()
    recalls = score(*arguments)
    seconds, work = time.perf_counter() - began, time.process_time() - worked
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return recalls, seconds, work, next(int(value.split()[0]) * 1024 for name, _, value in lines if name == "VmHWM")


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=1_000_000, metavar="C", help="(1000000)")
    parser.add_argument("--queries", type=int, default=1000, metavar="Q", help="(1000), C at most")
    parser.add_argument("--dim", type=int, default=1024, metavar="D", help="of the vectors (1024)")
    parser.add_argument("--work", type=Path, help="folder for the vectors (the system's temporary one)")
    arguments = parser.parse_args()
    sizes = arguments.candidates, arguments.queries, arguments.dim
    if min(sizes) < 2 or arguments.queries > arguments.candidates:
        raise PipelineError("--candidates, --queries and --dim are 2 at least, and queries no more than candidates")
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        file = Path(folder) / "vectors"
        write(file, *sizes)
        results = []
        for score in (ours, peer):
            load = os.getloadavg()[0]
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                results.append((score.__name__, *pool.submit(measured, score, file, *sizes).result(), load))
    table = Table(
        *("", "seconds", "ratio", "CPU seconds", "ratio", "peak, MB", *(f"R@{k}" for k in RECALLS), "load before"),
        title="{:,} candidates, {:,} queries, {:,} dimensions".format(*sizes) + f", {torch.get_num_threads()} threads",
    )
    *_, (_, _, peer_seconds, peer_work, _, _) = results
    for name, recalls, seconds, work, size, load in results:
        table.add_row(
            name,
            *(f"{seconds:.1f}", f"{seconds / peer_seconds:.2f}", f"{work:.1f}", f"{work / peer_work:.2f}"),
            f"{size / 1e6:,.0f}",
            *(f"{100 * recall:.1f}" for recall in recalls),
            f"{load:.1f}",
        )
    Console(width=120).print(table)
    if results[0][1] != results[1][1]:
        raise PipelineError("the two do not find the same")


if __name__ == "__main__":
    main()
