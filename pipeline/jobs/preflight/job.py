"""Whether the recipe's model, batches, memory and checkpoints fit together, by the functions that training calls."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from pipeline.config import Recipe, load_ds_config
from pipeline.data.lengths import Lengths
from pipeline.data.source import Source
from pipeline.errors import PipelineError
from pipeline.jobs import status
from pipeline.jobs.preflight.check import Check, check, green, red, skipped, yellow
from pipeline.jobs.preflight.machine import GB
from pipeline.jobs.status import Status
from pipeline.models.files import survey
from pipeline.models.registry import training_of
from pipeline.storage import lock
from pipeline.training import resume
from pipeline.training.budget import FULL
from pipeline.training.conditions import check as check_conditions
from pipeline.training.conditions import conditions_of_run
from pipeline.training.memory import Plan
from pipeline.training.trainer import plan

_ABSENT = "is not a folder, and not complete in the hub's cache"


@dataclass
class Job:
    """A recipe on `world` processes, and what earlier checks have opened: None if they did not run, or failed.

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
        try:
            family.check(wanted)
        except (PipelineError, OSError, ValueError):
            if absent:
                return red(f"{absent}, and the hub cannot be reached from here", download)
            raise
    else:
        family.check(wanted)
    job.lengths = family.lengths(recipe)
    if job.source:
        family.check_data(recipe, job.source)
    if not family.estimates_memory:
        return yellow(f"{absent}: the job would download it", download) if absent else green(source)
    shards = [shard for _, shard in job.source.shards] if job.source else []
    mostly_videos = sum(shard.videos for shard in shards) > sum(shard.images for shard in shards)
    plan = Plan.of(recipe, job.world, videos=mostly_videos)
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
        survey(folder)
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
    if not training_of(job.recipe).estimates_memory:
        family = job.recipe.model.family
        return skipped(f"not estimated for {family}; batch.chunk_tokens=auto finds what fits in the first steps")
    if job.plan is None or job.zero is None:
        return skipped("without model and processes")
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
