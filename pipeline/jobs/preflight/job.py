"""Whether the recipe's data, model, batches, memory, disks and checkpoints fit together: the functions of training."""

import os
import re
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from pipeline.config import Recipe, load_ds_config
from pipeline.data.lengths import Lengths
from pipeline.data.sample import BadSample
from pipeline.data.source import Source
from pipeline.errors import PipelineError
from pipeline.evaluation import sets
from pipeline.jobs import limits, status
from pipeline.jobs.preflight.check import Check, check, green, red, skipped, yellow
from pipeline.jobs.preflight.nodes import GB, Nodes
from pipeline.jobs.status import Status
from pipeline.models.files import fetched, survey
from pipeline.models.registry import training_of
from pipeline.storage import lock
from pipeline.training import resume
from pipeline.training.budget import FULL
from pipeline.training.conditions import check as check_conditions
from pipeline.training.conditions import conditions_of_run
from pipeline.training.memory import Plan
from pipeline.training.partitions import check_nodes
from pipeline.training.trainer import plan

_ABSENT = "is not a folder, and not complete in the hub's cache"
_NOT_ESTIMATED = "not estimated for this family, or without model and processes"
_STORE_SECONDS = 20  # without a byte, if the recipe's data.timeout_s is longer
_PROBE_BYTES = 64 << 20
_BATCHES = 4  # in shared memory: two ready, one being combined, one in training
_NCCL_BYTES = 20 << 20  # of shared memory for a rank: about 10 MB for each neighbour
_SEE_SECONDS = 5  # until a file system shows other nodes a new file


@dataclass
class Job:
    """A recipe on `world` processes, and what earlier checks opened: None if that check failed or did not run.

    gpus: on all nodes together.  guessed: `world` was not given.
    """

    recipe: Recipe
    world: int
    gpus: int
    guessed: bool
    source: Source | None = None
    lengths: Lengths | None = None
    plan: Plan | None = None
    zero: dict[str, Any] | None = None

    @property
    def folder(self) -> Path:
        return Path(self.recipe.run)


@check("data", if_late="is the endpoint (AWS_ENDPOINT_URL) overloaded, or the network to it?")
def data(job: Job, node: int, nodes: int) -> Check:
    """Credentials, indexes and one block, from a different shard on each node."""
    timeout = min(job.recipe.data.timeout_s, _STORE_SECONDS)
    source = Source.open(job.recipe.data.model_copy(update={"timeout_s": timeout}))
    number = node * len(source.shards) // nodes
    records = source.records(number, 0, min(job.recipe.data.block_samples, source.shards[number][1].samples))
    bad = []
    for sample, record in zip(source.read(number, records), records, strict=True):
        try:
            source.parse(number, record, sample)
        except BadSample as reason:
            bad.append(str(reason))
    if len(bad) == len(records):
        return red(f"{source.origin(number, 0).shard}: {bad[0]}", "name shards of pairs in data.url and data.datasets")
    job.source = source
    total = sum(index.samples for _, index in source.indexes)
    return green(f"{total:,} samples in {len(source.indexes)} datasets, {len(source.shards)} shards")


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
    if nodes.node == 0:
        try:
            probe.touch()
        except OSError as error:
            problem = error.strerror or str(error)
    try:
        name, problem = nodes.share("probe", [str(probe), problem])[0]
        probe = Path(name)
        if problem:
            return red(f"{probe.parent}: {problem}", "set run= to a folder that can be written")
        deadline = time.monotonic() + _SEE_SECONDS
        while not (seen := probe.exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
        nodes.share("seen", seen)  # the first node removes it after that
        if not seen:
            return red(
                f"{probe.parent} is not the same folder as on {nodes.names[0]}",
                "set run= to a folder on a file system that all nodes share",
            )
        own = Path(f"{probe}-{nodes.node}")
        try:
            with own.open("wb") as file:
                file.write(os.urandom(_PROBE_BYTES))  # random: no file system can compress it
                file.flush()
                os.fsync(file.fileno())  # some report a full disk or quota only then
        finally:
            own.unlink(missing_ok=True)
        return green(str(folder.absolute()))
    except OSError as error:
        return red(f"{probe.parent}: {error.strerror}", "free space there, or set run= to another file system")
    finally:
        if nodes.node == 0:
            with suppress(OSError):
                probe.unlink(missing_ok=True)


def nearest(folder: Path) -> Path:
    """The folder, or the nearest existing one above it."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


@check("model", if_late="is the file system with the model slow, or the hub? HF_HUB_OFFLINE=1 avoids the hub")
def model(job: Job) -> Check:
    """Whether this node has its files: configuration, weights, tokenizer and, for the export, image processor."""
    wanted, recipe, family = job.recipe.model, job.recipe, training_of(job.recipe)
    absent, source = "", wanted.path or "random weights"
    for name, path in wanted.other_folders.items():
        if not _folder(name, path):
            download = "copy it there, or download it on a machine with a network (tools/offline.sh)"
            return red(f"{name}={path} {_ABSENT}", download)
    if wanted.path:
        folder = _folder("model.path", wanted.path)
        absent = "" if folder else f"{wanted.path} {_ABSENT}"
        download = f"on a machine with a network: hf download {wanted.path} (tools/offline.sh), with the job's HF_HOME"
        if absent and constants.HF_HUB_OFFLINE:
            return red(f"{absent} (HF_HUB_OFFLINE=1)", download)
        if absent:
            try:
                fetched(wanted.path, weights=False)
            except PipelineError as error:
                return red(str(error), download)
    family.check(wanted)
    job.lengths = family.lengths(recipe)
    if job.source:
        family.check_data(recipe, job.source)
    if not family.estimates_memory:
        return yellow(f"{absent}: the job would download it", download) if absent else green(source)
    shards = [shard for _, shard in job.source.shards] if job.source else []
    mostly_videos = sum(shard.videos for shard in shards) > sum(shard.images for shard in shards)
    plan = Plan.of(recipe, job.world, mostly_videos, job.source)
    trained = sum(group.parameters for group in plan.groups if group.trained)
    every = sum(group.parameters for group in plan.groups)
    job.plan = plan
    if absent:
        return yellow(f"{absent}: the job would download it", download)
    return green(f"{source}: {every / 1e6:,.1f} million parameters, {trained / 1e6:,.1f} million trained")


def _folder(field: str, path: str) -> Path | None:
    """The folder with the model's files; None if they must be downloaded. PipelineError if there is no such model."""
    folder = Path(path)
    if folder.is_dir():
        survey(fetched(path))
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise PipelineError(f"there is no folder {path}: correct {field}; every node must see the folder")
    try:
        folder = Path(snapshot_download(path, local_files_only=True))
        survey(folder)
        return folder
    except (LocalEntryNotFoundError, PipelineError):
        return None


@check("processes", if_late="the datasets may have very many shards: run it again")
def processes(job: Job) -> Check:
    """Whether batch, lanes, sub-batch and processes divide each other, and the data suffice for a step."""
    recipe, world = job.recipe, job.world
    job.zero = load_ds_config(recipe, world)["zero_optimization"]
    training_of(recipe).check_stage(job.zero["stage"])
    if job.source is None or job.lengths is None:
        return skipped("without data and model")
    order, steps = plan(recipe, job.source, job.lengths, world)
    found = (
        f"{world}{' (--world sets it)' if job.guessed else ''}: {recipe.batch.global_batch // world} of "
        f"{recipe.batch.global_batch} pairs and {order.lanes // world} of {order.lanes} lanes each, {steps:,} steps"
    )
    if 0 < job.gpus < world:
        return red(f"{world} processes on {job.gpus} GPUs", "start one process on each GPU, or ask for more GPUs")
    if world < job.gpus:
        return yellow(found, f"{job.gpus - world} of {job.gpus} GPUs are not used: start one process on each GPU")
    return green(found)


@check("memory", if_late="run tools/plan_memory.py")
def memory(job: Job, gpu_bytes: int) -> Check:
    """Memory by the estimate of tools/plan_memory.py.  gpu_bytes: of the smallest GPU; 0 without GPUs."""
    if job.plan is None or job.zero is None:
        return skipped(_NOT_ESTIMATED)
    if not gpu_bytes:
        return skipped("there is no GPU here; tools/plan_memory.py estimates for any GPU")
    plan, stage = job.plan, job.zero["stage"]
    states = plan.states(stage, job.zero)
    needed = plan.total(plan.budget.chunk_tokens, states)
    found = f"about {needed / GB:.1f} of {gpu_bytes / GB:.1f} GB on each GPU, ZeRO {stage}, {job.world} GPUs"
    largest = plan.largest_chunk(FULL * gpu_bytes, states)
    lower = f"lower batch.chunk_tokens to {largest:,}" if largest else (
        "lower model.max_tokens, batch.kept_chunks or batch.features_mb, use more GPUs or a higher ZeRO stage, or "
        "train adapters (model.train.lora)"
    )  # fmt: skip
    if needed > gpu_bytes:
        return red(found, lower)
    # CUDA, NCCL and fragmentation need a few more GB.
    return yellow(f"{found}: little is left", lower) if needed > FULL * gpu_bytes else green(found)


@check("disk space", if_late="the file system hangs: set run= to another")
def disk_space(job: Job) -> Check:
    """The space that checkpoints and models need, less that of existing checkpoints."""
    if job.plan is None or job.zero is None:
        return skipped(_NOT_ESTIMATED)
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
    made = path is None or training_of(job.recipe).converts(path)
    return (2 if made else 1) * sum(group.parameters for group in job.plan.groups) * _width(job.recipe)


def _width(recipe: Recipe) -> int:
    return 2 if recipe.precision == "bf16" else 4


@check("machine", if_late="is the machine overloaded, or its /tmp on a network file system?")
def machine(job: Job, nodes: int) -> Check:
    """Shared memory, the limits of processes, and DeepSpeed's groups.  nodes: over which the processes are spread."""
    ranks = -(-job.world // nodes)
    check_nodes(job.zero or {}, ranks)
    if problems := list(limits.too_low(job.recipe, job.world, ranks)):
        return red("; ".join(problems))
    if job.source is None or job.lengths is None:
        return skipped("without data and model")
    limits.require_shared_memory(job.recipe, job.source, job.lengths, job.world, ranks)
    if (free := limits.free_bytes(limits.SHARED)) is None:
        return green("its limits suffice")
    batch = limits.batch_bytes(job.recipe, job.source, job.lengths, job.world)
    most = ranks * (_BATCHES * batch + (_NCCL_BYTES if job.gpus and ranks > 1 else 0))
    found = f"{free / GB:,.2f} GB of {limits.SHARED} free, {most / GB:,.2f} GB in use at most"
    return yellow(found, limits.MORE_SHARED) if most > free else green(found)


@check("other jobs", if_late="is Slurm's controller slow? squeue shows whether another job trains the same run")
def other_jobs(folder: Path) -> Check:
    if job := status.other_job(folder):
        return red(f"job {job} trains {folder}", f"scancel {job}, or set run= to another directory")
    if why := lock.in_use(str(folder)):
        return yellow(
            why, "or set run= to another directory; a start waits two minutes for that process's next sign of life"
        )
    return green(f"no other job trains {folder}")


@check("earlier starts", if_late="is the file system of the run directory slow?")
def earlier_starts(folder: Path) -> Check:
    """Whether this job failed too often. If each start ended with the whole job, only this check can stop it."""
    begun = Status.read(folder)
    if why := begun.give_up_reason:
        return red(
            f"{why}; last: {begun.reason}", "correct the cause, then submit the job again: a new job has no failures"
        )
    return green(f"{len(begun.failures)} of {begun.start} failed" if begun.start else "none")


@check("resuming", if_late="is the file system of the run directory slow?")
def resuming(job: Job) -> Check:
    start = resume.whole(job.folder / "checkpoints")
    if start is None:
        return green("starts from the beginning")
    if job.source is None or job.zero is None:
        return skipped(f"{start.name} exists; without data and processes it is not checked")
    check_conditions(start, conditions_of_run(job.recipe, job.source, job.zero))
    return green(f"continues from {start.name}")
