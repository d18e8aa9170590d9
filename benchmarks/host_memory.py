"""How much CPU memory of a node do loading a model under ZeRO-3 and its export take?

    python benchmarks/host_memory.py --work /tmp/host_memory [--processes 1 2 4] [--stored bf16 fp16]

A LLaVA-OneVision with random weights, in files of 150 MB, is loaded as in training. It has 0.32 B parameters, a tenth
of them in its largest tensor. Every process loads the frozen vision tower; pipeline.training.engine loads the rest with
ds_configs/zero3.json in bf16. Then it is exported, as at the end of a run. The same is repeated on one process with
adapters in the language model, which are merged. Finally an original checkpoint is converted, as the first process does
it. Takes 6 GB of memory and 4 GB of disk.

Every 5 ms, the anonymous memory of all processes (RssAnon in /proc/PID/status) is read and added up. Reported is the
increase since their rendezvous, before they loaded anything. Mapped files do not count: the kernel drops their pages
when it needs memory. The allocator returns freed memory at once (MALLOC_MMAP_THRESHOLD_).

On the CPU, device memory is CPU memory. The last column estimates the CPU memory on a node with GPUs:

    start        all: Python, torch, DeepSpeed, without CUDA
    tower        the peak: the CPU loads it before it moves to the GPU
    partitions   nothing: DeepSpeed creates each whole tensor on the GPU, and keeps a part
    weights      the peak without the partitions, which remain. Weights that are not stored in bf16 are converted on the
                 CPU; this adds all processes' parts of the largest tensor
    engine       the sizes of the buffers in which DeepSpeed's `defragment` collects each process's trained partitions;
                 in this benchmark other memory is freed at the same time. The rest is on the GPU: master weights,
                 accumulated gradients
    export       the increase at the peak, plus the tower, which is copied from the GPU
"""

import argparse
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)  # for the child processes

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import stage3
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from transformers import LlavaOnevisionModel
from transformers import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.config import load_ds_config, load_recipe
from pipeline.distributed import start_distributed
from pipeline.errors import PipelineError
from pipeline.jobs.program import command_line
from pipeline.models.llave import model as llave
from pipeline.models.llave import weights
from pipeline.models.llave.config import LlaveArchitecture
from pipeline.training import engine, partitions
from pipeline.training.export import export

transformers_logging.disable_progress_bar()
MB = 1e6
EVERY = 0.005  # seconds
LIMIT = 600  # seconds
FILE_SIZE = "150MB"
STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ARCHITECTURE = LlaveArchitecture(
    vision={
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "image_size": 384,
        "patch_size": 14,
    },
    text={
        "hidden_size": 1024,
        "intermediate_size": 5376,
        "num_hidden_layers": 14,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
    },
    image_grid_pinpoints=[(384, 384), (384, 768), (768, 384), (768, 768)],
)
START, TOWER, PARTITIONS, WEIGHTS, ENGINE, EXPORT = "start", "tower", "partitions", "weights", "engine", "export"

# Called with a phase's name at its start, and again with the bytes collected in it; with "" at the end of the last one.
Mark = Callable[..., None]
Task = Callable[[Path, Mark], None]


@dataclass(frozen=True)
class Phase:
    """Bytes of all processes together; except in the first phase, relative to the start.

    collected: by DeepSpeed's `defragment`.
    """

    name: str
    before: int
    peak: int
    after: int
    collected: int = 0


def write_models(folder: Path, dtype: torch.dtype) -> None:
    """Save the model in transformers' format as `folder`/model, in several files, and as `folder`/original."""
    made, unfinished = folder / "made", folder / "model.unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(0)
    # Enough words for a tokenizer of the architecture's vocabulary size.
    texts = (" ".join("".join(map(chr, rng.integers(97, 123, 8))) for _ in range(500)) for _ in range(200))
    llave.build(ARCHITECTURE, texts, seed=0, folder=made)
    shutil.copytree(made, unfinished, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model = LlavaOnevisionModel.from_pretrained(made, dtype=dtype)
    model.save_pretrained(unfinished, max_shard_size=FILE_SIZE, save_original_format=False)
    shutil.rmtree(made)
    weights.export_original(unfinished, folder / "original")
    unfinished.rename(folder / "model")


def train(folder: Path, mark: Mark, *overrides: str) -> None:
    """Load and export the model as training does."""
    world = int(os.environ["WORLD_SIZE"])
    fields = [f"model.path={folder}/model", "precision=bf16", "deepspeed=ds_configs/zero3.json"]
    fields += ["model.train.vision_tower=false", f"batch.global_batch={2 * world}", f"data.lanes={world}", *overrides]
    recipe = load_recipe(ROOT / "pipeline/recipes/demo.yaml", fields)
    device = start_distributed(timeout_minutes=1)

    def marked(module: object, name: str, phase: str) -> None:
        """Start a phase on all processes when the function is called."""
        function = getattr(module, name)

        def marking(*arguments: object, **options: object) -> object:
            dist.barrier()
            mark(phase)
            return function(*arguments, **options)

        setattr(module, name, marking)

    def defragment(tensors: list[torch.Tensor]) -> torch.Tensor:
        buffer = collect(tensors)
        mark(ENGINE, buffer.nbytes)
        return buffer

    collect, stage3.defragment = stage3.defragment, defragment
    marked(engine, engine.load_partitioned.__name__, PARTITIONS)
    marked(
        partitions, partitions._stored.__name__, WEIGHTS
    )  # after the partitions exist, the files are listed and read
    marked(deepspeed, deepspeed.initialize.__name__, ENGINE)
    dist.barrier()
    mark(TOWER)
    tower = engine.load_frozen(recipe, recipe.model.path, device)
    whole = engine.build_engine(recipe, load_ds_config(recipe, world), recipe.model.path)
    dist.barrier()
    mark(EXPORT)
    export(whole, tower, recipe, recipe.model.path, folder / "exported")
    dist.barrier()
    mark("")
    time.sleep(0.1)  # measure while everything is still allocated
    del tower, whole


def train_adapters(folder: Path, mark: Mark) -> None:
    train(folder, mark, "model.train.lora.rank=16")


def convert(folder: Path, mark: Mark) -> None:
    shutil.rmtree(folder / "converted", ignore_errors=True)
    mark("conversion")
    weights.resolve(str(folder / "original"), folder / "converted")
    mark("")
    time.sleep(0.1)


def sizes_of(folder: Path) -> dict[str, int]:
    """Return each tensor's bytes in bf16, by name."""
    sizes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            sizes |= {name: 2 * math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return sizes


def measured(task: Task, folder: Path, processes: int) -> list[Phase]:
    """Run a task on that many processes and sample their memory."""
    context = get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    receivers, ranks = [], []
    for rank in range(processes):
        receiver, sender = context.Pipe(duplex=False)
        ranks.append(context.Process(target=_rank, args=(sender, task, folder, rank, processes, port)))
        ranks[-1].start()
        receivers.append(receiver)
        sender.close()
    samples, deadline = [], time.monotonic() + LIMIT
    try:
        while any(rank.is_alive() for rank in ranks):
            samples.append((time.monotonic(), sum(anonymous_bytes(rank.pid) for rank in ranks)))
            if any(rank.exitcode for rank in ranks) or time.monotonic() > deadline:
                raise PipelineError(f"a process failed, or took longer than {LIMIT} s; what it printed says why")
            time.sleep(EVERY)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return phases_of(np.array(samples), [mark for receiver in receivers for mark in _received(receiver)])


def _rank(sender: Connection, task: Task, folder: Path, rank: int, world: int, port: int) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
    task(folder, lambda phase, collected=0: sender.send((time.monotonic(), phase, collected)))
    sender.close()
    os._exit(0)  # as at the end of training


def _received(receiver: Connection) -> list[tuple[float, str, int]]:
    marks = []
    while True:
        try:
            marks.append(receiver.recv())
        except EOFError:
            return marks


def anonymous_bytes(pid: int) -> int:
    """Return a process's anonymous memory, or 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def phases_of(samples: np.ndarray, marks: list[tuple[float, str, int]]) -> list[Phase]:
    """Return the phases. samples: (n, 2) times and bytes. marks: (time, name, bytes collected) from calls of Mark."""
    begins = {}
    for moment, name, _ in sorted(marks):
        begins.setdefault(name, moment)
    places = np.searchsorted(samples[:, 0], list(begins.values()))
    start = int(samples[places[0] - 1, 1])
    held, phases = samples[:, 1] - start, [Phase(START, 0, start, start)]
    for name, first, end in zip(begins, places, places[1:], strict=False):
        collected = sum(size for _, phase, size in marks if phase == name)
        before = int(held[first - 1])
        phases.append(Phase(name, before, int(held[first:end].max()), int(held[end - 1]), collected))
    return phases


def on_host(phase: Phase, sizes: dict[str, int], stored: str) -> int:
    """Return an upper estimate of the phase's CPU memory on a node with GPUs."""
    if phase.name == PARTITIONS:
        return 0
    if phase.name == WEIGHTS:
        return phase.peak - phase.after + (max(sizes.values()) if stored != "bf16" else 0)
    if phase.name == EXPORT:
        return phase.peak - phase.before + sum(size for name, size in sizes.items() if "vision_tower" in name)
    return phase.collected if phase.name == ENGINE else phase.peak


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for the models")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2, 4], choices=range(1, 65), metavar="N", help="(1 2 4)"
    )
    parser.add_argument(
        "--stored",
        nargs="+",
        default=["bf16", "fp16"],
        choices=STORED,
        help="how the files have the weights (bf16 fp16)",
    )
    arguments = parser.parse_args()
    for stored in arguments.stored:
        folder = arguments.work.resolve() / stored
        if not (folder / "model").is_dir():
            print(f"writing the model in {stored}", flush=True)
            write_models(folder, STORED[stored])
        sizes = sizes_of(folder / "model")
        tower = sum(size for name, size in sizes.items() if "vision_tower" in name)
        table = Table(
            *("processes", "phase", "peak", "after", "host's, beside a GPU"),
            title=f"MB of all processes, stored in {stored}; in bf16 the weights are {sum(sizes.values()) / MB:,.0f}, "
            f"the tower {tower / MB:,.0f}, the largest tensor {max(sizes.values()) / MB:,.0f}",
        )
        tasks = [*((train, count) for count in arguments.processes), (train_adapters, 1), (convert, 1)]
        for task, processes in tasks:
            print(f"{task.__name__}, {processes} processes", flush=True)
            for phase in measured(task, folder, processes):
                figures = (phase.peak, phase.after, on_host(phase, sizes, stored))
                table.add_row(str(processes), phase.name, *(f"{figure / MB:,.0f}" for figure in figures))
            table.add_section()
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
