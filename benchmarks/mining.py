"""What does it cost to rank a million candidates for mining, compared with plain float32 products and topk?

    python benchmarks/mining.py [--candidates 1000000] [--queries 2000] [--dim 256] [--depth 100] [--work DIR]

Random unit vectors in a file under DIR, which is removed afterwards.

    ours    pipeline.embedding.nearest: the nearest candidates by exact similarities, ties by number
    peer    torch: float32 products in tiles of 16,384 candidates, and topk; its last digits depend on the kernel

Each runs in a new process, which reads the memory-mapped file. The peak is of the resident memory without the pages of
the file. CPU seconds are more reliable if other programs use the machine. "differ" counts queries whose ranks differ:
none is expected but those with nearly equal candidates. On a GPU the products run there.
"""

import argparse
import os
import sys
import tempfile
import time
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

from pipeline.embedding.nearest import Candidates, nearest
from pipeline.jobs.program import command_line

TILE = 16384
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def write(file: Path, rows: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    with file.open("wb") as opened:
        for start in tqdm(range(0, rows, TILE), desc="writing", leave=False):
            part = torch.randn(min(TILE, rows - start), dim, generator=generator)
            F.normalize(part, dim=1).numpy().tofile(opened)


def ours(queries: np.ndarray, vectors: np.ndarray, depth: int) -> np.ndarray:
    return nearest(queries, Candidates(vectors, np.arange(len(vectors))), depth, device=DEVICE)[0]


def peer(queries: np.ndarray, vectors: np.ndarray, depth: int) -> np.ndarray:
    rows = torch.tensor(queries, device=DEVICE)
    scores = torch.empty(len(rows), 0, device=DEVICE)
    numbers = torch.empty(len(rows), 0, dtype=torch.int64, device=DEVICE)
    for start in range(0, len(vectors), TILE):
        tile = torch.tensor(np.asarray(vectors[start : start + TILE]), device=DEVICE)
        near, places = (rows @ tile.T).topk(min(depth, len(tile)), dim=1)
        scores, best = torch.cat([scores, near], dim=1).topk(depth, dim=1)
        numbers = torch.cat([numbers, places + start], dim=1).gather(1, best)
    return numbers.cpu().numpy()


def measured(name: str, file: Path, queries: int, dim: int, depth: int) -> tuple[float, float, float, np.ndarray]:
    """Return seconds, CPU seconds, peak memory in GB, and the ranks."""
    vectors = np.memmap(file, np.float32, "r").reshape(-1, dim)
    sought, candidates = np.array(vectors[:queries]), vectors[queries:]
    globals()[name](sought[:8], candidates[:TILE], depth)  # starts threads and kernels
    started, cpu = time.perf_counter(), time.process_time()
    found = globals()[name](sought, candidates, depth)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = int(status["VmHWM"].split()[0]) - int(status["RssFile"].split()[0])
    return seconds, cpu, kilobytes / 1e6, found


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--depth", type=int, default=100)
    parser.add_argument("--work", metavar="DIR")
    given = parser.parse_args()
    table = Table("", "seconds", "CPU seconds", "peak GB", "differ")
    ranks = {}
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        file = Path(folder, "vectors")
        write(file, given.candidates + given.queries, given.dim)
        for name in ("ours", "peer"):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                work = process.submit(measured, name, file, given.queries, given.dim, given.depth)
                seconds, cpu, peak, ranks[name] = work.result()
            differ = int((ranks[name] != ranks["ours"]).any(axis=1).sum())
            table.add_row(name, f"{seconds:.1f}", f"{cpu:.1f}", f"{peak:.2f}", f"{differ:,}")
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{os.cpu_count()} cores"
    title = f"{given.queries:,} queries, {given.candidates:,} candidates of {given.dim}, {given.depth} ranks, {where}"
    table.title = title
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
