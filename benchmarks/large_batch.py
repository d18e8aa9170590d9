"""How much memory does LLM2CLIP's second stage take at a global batch of 4,096, on two CPU processes?

    python benchmarks/large_batch.py --work /tmp/large_batch [--batch 4096] [--steps 2]

Draws twice as many JPEGs of 80x64 with captions; pipeline.embed caches the captions' vectors, 512 wide. pipeline.train
trains a small vision tower (4 layers, width 64, 64 pixels) and the adapter on two processes with one decoding process
each, including the export. It runs with the gradient cache in chunks of 128 images; with the graphs of all chunks kept,
as in a step without the cache; and with the gradient cache at an eighth of the batch.

Memory is the proportional set size (Pss in /proc/PID/smaps_rollup, which divides shared pages among processes), read
every quarter of a second: of each rank with its workers, and of all processes with the launcher. For comparison, a
B x B float32 matrix of similarities has B² x 4 bytes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.vision_step import make_dataset, make_text_encoder
from pipeline.data.stored_vectors import CAPTIONS
from pipeline.errors import PipelineError
from pipeline.jobs.program import command_line
from pipeline.models.vision import VisionEncoder

MB = 1e6
EVERY = 0.25  # seconds
WIDTH, HEIGHT = 80, 64
DIMENSION, TEXT_WIDTH = 64, 512
VISION = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 8,
    "hidden_act": "gelu",
}
TOKENS = (64 // 8) ** 2 + 1  # per image
CHUNK, ALL = 128, 1_000_000
PROCESSES = 2


@dataclass(frozen=True)
class Measured:
    """ranks: peak bytes of each, including workers. together: peak bytes of all. seconds: duration of the last step."""

    ranks: list[int]
    together: int
    seconds: float
    loss: float


def train(work: Path, data: Path, batch: int, kept_chunks: int, steps: int) -> Measured:
    run = work / f"run-{batch}-{kept_chunks}-{time.time_ns()}"
    fields = {
        "run": run,
        "steps": steps,
        "precision": "fp32",
        "model.path": work / "tower",
        "model.text_encoder": work / "text_encoder",
        "data.url": data,
        "data.datasets": "[]",
        "data.lanes": 8,
        "data.workers": 1,
        "batch.global_batch": batch,
        "batch.chunk_tokens": CHUNK * TOKENS,
        "batch.kept_chunks": kept_chunks,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    command += ["-m", "pipeline.train", "pipeline/recipes/llm2clip_vision.yaml"]
    command += [f"{name}={value}" for name, value in fields.items()]
    peaks: Counter[int] = Counter()
    together = 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            launcher = psutil.Process(process.pid)
            taken = {rank.pid: sum(map(bytes_of, tree(rank))) for rank in children(launcher)}
            together = max(together, bytes_of(launcher) + sum(taken.values()))
            for pid, size in taken.items():
                peaks[pid] = max(peaks[pid], size)
            time.sleep(EVERY)
    if process.returncode:
        raise PipelineError(f"{' '.join(command)} failed; what it printed says why")
    speed, metrics = (
        json.loads((run / file).read_text().splitlines()[-1]) for file in ("speed.jsonl", "metrics.jsonl")
    )
    ranks = [size for _, size in peaks.most_common(PROCESSES)]
    return Measured(ranks, together, speed["seconds"], metrics["loss"])


def children(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return process.children()
    return []


def tree(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []


def bytes_of(process: psutil.Process) -> int:
    """Return a process's proportional set size, or 0 if it has ended."""
    with suppress(OSError):
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)
    return 0


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for dataset and runs; made if not there")
    parser.add_argument("--batch", type=int, default=4096, metavar="B", help="the global batch (4096)")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="of each run (2)")
    arguments = parser.parse_args()
    work, batch = arguments.work.resolve(), arguments.batch
    if batch % 64:
        raise PipelineError("--batch is a multiple of 64")
    data = work / f"clouds-{2 * batch}"
    if not (work / "tower").is_dir():
        make_text_encoder(work / "text_encoder", TEXT_WIDTH)
        VisionEncoder.build(VISION, DIMENSION, seed=0).save(work / "tower")
    if not (data / CAPTIONS.index_file).exists():
        make_dataset(data, 2 * batch, WIDTH, HEIGHT, work / "text_encoder")
    table = Table(
        *("global batch", "graphs kept", "a rank with its worker, MB", "all, MB", "B x B, MB", "s a step", "loss"),
        title=f"{PROCESSES} processes, chunks of {CHUNK} images",
    )
    for size, kept in ((batch, 0), (batch, ALL), (batch // 8, 0)):
        measured = train(work, data, size, kept, arguments.steps)
        ranks = ", ".join(f"{rank / MB:,.0f}" for rank in measured.ranks)
        cells = [ranks, f"{measured.together / MB:,.0f}", f"{size**2 * 4 / MB:,.0f}", f"{measured.seconds:.1f}"]
        table.add_row(f"{size:,}", "all" if kept else "none", *cells, f"{measured.loss:.4f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
