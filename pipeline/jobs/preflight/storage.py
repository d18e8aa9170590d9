"""Whether data can be read and the run directory written, how fast, and whether there is enough space."""

import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

from pipeline.config import Recipe
from pipeline.data.sample import BadSample
from pipeline.data.source import Source
from pipeline.evaluation import sets
from pipeline.jobs import limits
from pipeline.jobs.preflight.check import Check, check, green, red, skipped, yellow
from pipeline.jobs.preflight.job import Job
from pipeline.jobs.preflight.machine import GB
from pipeline.jobs.preflight.nodes import Nodes
from pipeline.models.registry import training_of

_STORE_SECONDS = 20  # without a byte, if the recipe's data.timeout_s is longer
_PROBE_BYTES = 64 << 20
_SEE_SECONDS = 5  # until a file system shows other nodes a new file


@check("data", if_late="is the endpoint (AWS_ENDPOINT_URL) overloaded, or the network to it?")
def data(job: Job, nodes: Nodes) -> Check:
    """Credentials, indexes and one block, from a different shard on each node. The rate is that of one read."""
    timeout = min(job.recipe.data.timeout_s, _STORE_SECONDS)
    source = Source.open(job.recipe.data.model_copy(update={"timeout_s": timeout}))
    number = nodes.place.node * len(source.shards) // nodes.place.nodes
    records = source.records(number, 0, min(job.recipe.data.block_samples, source.shards[number][1].samples))
    began = time.perf_counter()
    samples = source.read(number, records)
    rate = sum(map(len, samples)) / (time.perf_counter() - began) / 1e6
    bad = []
    for sample, record in zip(samples, records, strict=True):
        try:
            source.parse(number, record, sample)
        except BadSample as reason:
            bad.append(str(reason))
    if len(bad) == len(samples):
        return red(f"{source.origin(number, 0).shard}: {bad[0]}", "name shards of pairs in data.url and data.datasets")
    job.source = source
    total = sum(index.samples for _, index in source.indexes)
    return green(f"{total:,} samples in {len(source.indexes)} datasets, {len(source.shards)} shards", rate=rate)


@check("evaluation", seconds=30, if_late="large sets take longer; training waits for them", late=yellow)
def evaluation(recipe: Recipe) -> Check:
    if not recipe.evaluation:
        return skipped("the recipe has no evaluation")
    collection = sets.load(recipe.evaluation.urls)
    return green(f"{len(collection.tasks)} sets of {len(collection.items):,} items")


@check("run directory", if_late="the file system hangs: set run= to another")
def run_directory(folder: Path, nodes: Nodes) -> Check:
    """Each node writes to the folder, or above it if it does not exist, after it saw a file of the first node there."""
    probe, problem = nearest(folder) / f".preflight-{secrets.token_hex(4)}", ""
    if nodes.place.node == 0:
        try:
            probe.touch()
        except OSError as error:
            problem = error.strerror or str(error)
    try:
        name, problem = nodes.share("probe", [str(probe), problem])[0]
        probe = Path(name)
        if problem:
            return red(f"{probe.parent}: {problem}", "set run= to a folder that can be written")
        seen = _is_seen(probe)
        nodes.share("seen", seen)  # the first node removes it after that
        if not seen:
            return red(
                f"{probe.parent} is not the same folder as on {nodes.names[0]}",
                "set run= to a folder on a file system that all nodes share",
            )
        return green(str(folder.absolute()), rate=_write_rate(Path(f"{probe}-{nodes.place.node}")))
    except OSError as error:
        return red(f"{probe.parent}: {error.strerror}", "free space there, or set run= to another file system")
    finally:
        if nodes.place.node == 0:
            with suppress(OSError):
                probe.unlink(missing_ok=True)


def _is_seen(probe: Path) -> bool:
    deadline = time.monotonic() + _SEE_SECONDS
    while not probe.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _write_rate(file: Path) -> float:
    """MB/s of one file, including fsync."""
    block = os.urandom(1 << 20)  # random: no file system can compress it
    began = time.perf_counter()
    try:
        with file.open("wb") as opened:
            for _ in range(_PROBE_BYTES // len(block)):
                opened.write(block)
            opened.flush()
            os.fsync(opened.fileno())
        return _PROBE_BYTES / (time.perf_counter() - began) / 1e6
    finally:
        file.unlink(missing_ok=True)


def nearest(folder: Path) -> Path:
    """The folder, or the nearest existing one above it."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


@check("disk space", if_late="the file system hangs: set run= to another")
def disk_space(job: Job) -> Check:
    """The space that checkpoints and models need, less that of existing checkpoints."""
    if not training_of(job.recipe).estimates_memory:
        free = shutil.disk_usage(nearest(job.folder)).free
        return skipped(f"not estimated for {job.recipe.model.family}; {free / GB:,.2f} GB free")
    if job.plan is None or job.zero is None:
        return skipped("without model and processes")
    evaluation = job.recipe.evaluation
    kept = job.recipe.checkpoint.keep + bool(evaluation and evaluation.every)  # one for the best checkpoint
    one, whole = checkpoint_bytes(job), model_bytes(job)
    there = sum(file.stat().st_size for file in (job.folder / "checkpoints").glob("step-*/**/*") if file.is_file())
    # The oldest is deleted after the newest is complete, hence one more.
    needed = max((kept + 1) * one - there, 0) + whole
    free = shutil.disk_usage(nearest(job.folder)).free
    found = f"{free / GB:,.2f} GB free, {needed / GB:,.2f} GB needed: {kept} + 1 checkpoints of {one / GB:,.2f} GB"
    if needed > free:
        return red(
            f"{found}, models of {whole / GB:,.2f} GB", "free space, lower checkpoint.keep, or set run= elsewhere"
        )
    return green(found)


@check("machine", if_late="is the machine overloaded, or its /tmp on a network file system?")
def machine(job: Job, nodes: int) -> Check:
    """Shared memory, and the limits of processes.  nodes: over which the processes are spread."""
    ranks = -(-job.world // nodes)
    if problems := list(limits.too_low(job.recipe, job.world, ranks)):
        return red("; ".join(problems))
    if (free := limits.free_bytes(limits.SHARED)) is None or job.source is None or job.lengths is None:
        return skipped("without data and model" if free is not None else f"there is no {limits.SHARED}")
    least, most = limits.shared_bytes(job.recipe, job.source, job.lengths, job.world, ranks, gpus=job.gpus > 0)
    if most > free:
        found, do = limits.too_little(free, most, ranks).split(": ", 1)
        return red(found, do) if least > free else yellow(found, do)
    return green(f"{free / GB:,.1f} GB of {limits.SHARED} free, about {most / GB:,.2f} GB needed at most")


def checkpoint_bytes(job: Job) -> int:
    """The size of a checkpoint: for each trained parameter the master weight and two moments, in fp32.

    ZeRO 1 and 2 also write the parameter in the precision of training.
    """
    assert job.plan and job.zero
    trained = sum(group.parameters for group in job.plan.groups if group.trained)
    return trained * (12 + (_width(job.recipe) if job.zero["stage"] in (1, 2) else 0))


def model_bytes(job: Job) -> int:
    """The size of the export and, if the run creates or converts its initial model, of that."""
    assert job.plan
    path = job.recipe.model.path
    made = path is None or (Path(path).is_dir() and training_of(job.recipe).converts(path))
    return (2 if made else 1) * sum(group.parameters for group in job.plan.groups) * _width(job.recipe)


def _width(recipe: Recipe) -> int:
    return 2 if recipe.precision == "bf16" else 4
