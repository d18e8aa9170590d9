"""Whether the recipe's model, batches, memory and checkpoints go together, by the functions that training asks."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from pipeline.config import ModelSection, Recipe, load_ds_config
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


@dataclass
class Job:
    """A recipe on `world` processes, and what the checks so far have opened; None: not, or they failed.

    gpus: of all nodes together.  guessed: nobody said what `world` is.
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


@check(
    "model", seconds=40, if_late="is the file system with the model slow, or the hub? HF_HUB_OFFLINE=1 does without it"
)
def model(job: Job) -> Check:
    """Its files on this node: configuration, weights, tokenizer and, for the export, image processor."""
    wanted, recipe, family = job.recipe.model, job.recipe, training_of(job.recipe)
    absent = ""
    for name, path in wanted.other_folders.items():
        if not _folder(name, path):
            download = "copy it there, or download it where there is a network (tools/offline.sh)"
            return red(f"{name}={path} is no folder, and not whole in the hub's cache", download)
    if wanted.path:
        folder = _folder("model.path", wanted.path)
        absent = "" if folder else f"{wanted.path} is no folder, and not whole in the hub's cache"
        download = f"where there is a network: hf download {wanted.path} (tools/offline.sh), with the job's HF_HOME"
        if absent and constants.HF_HUB_OFFLINE:
            return red(f"{absent} (HF_HUB_OFFLINE=1)", download)
        try:
            if folder or family.checks_config_alone:
                family.preflight(recipe, str(folder or wanted.path))
        except (PipelineError, OSError, ValueError):
            if absent:
                return red(f"{absent}; nor can the hub be asked for it from here", download)
            raise
    else:
        family.check(wanted)
    if absent and not family.checks_config_alone:
        return yellow(f"{absent}: the job would download it", download)
    job.lengths = family.lengths(recipe)
    if job.source:
        family.check_data(recipe, job.source)
    if not family.estimates_memory:
        return green(_source_of(wanted))
    plan = Plan.of(recipe, job.world, videos=_mostly_videos(job.source))
    trained = sum(group.parameters for group in plan.groups if group.trained)
    every = sum(group.parameters for group in plan.groups)
    job.plan = plan
    if absent:
        return yellow(f"{absent}: the job would download it", download)
    return green(f"{_source_of(wanted)}: {every / 1e6:,.1f} million parameters, {trained / 1e6:,.1f} million trained")


def _source_of(model: ModelSection) -> str:
    return model.path or "random weights"


def _folder(field: str, path: str) -> Path | None:
    """Where the model's files are; None if the hub must be asked. Raises PipelineError if there can be none."""
    folder = Path(path)
    if folder.is_dir():
        survey(folder)
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise PipelineError(f"there is no folder {path}: correct {field}, which every node must see")
    try:
        folder = Path(snapshot_download(path, local_files_only=True))
        survey(folder)
        return folder
    except (LocalEntryNotFoundError, PipelineError):
        return None


def _mostly_videos(source: Source | None) -> bool:
    shards = [shard for _, shard in source.shards] if source else []
    return sum(shard.videos for shard in shards) > sum(shard.images for shard in shards)


@check("processes", seconds=30, if_late="is a dataset of very many shards named? run it again")
def processes(job: Job) -> Check:
    """Whether batch, lanes, sub-batch and processes divide, and the data are enough for a step."""
    recipe, world = job.recipe, job.world
    job.zero = load_ds_config(recipe, world)["zero_optimization"]
    training_of(recipe).check_stage(job.zero["stage"])
    if job.source is None or job.lengths is None:
        return skipped("without data and model")
    order = job.source.order(recipe.batch.global_batch, recipe.seed, job.lengths)
    order.check_world(world)
    job.source.check_memory(order, world)
    steps = recipe.steps or round(recipe.epochs * order.steps_per_epoch)
    if steps < 1:
        return red(
            f"epochs={recipe.epochs} of {order.steps_per_epoch} steps is less than a step", "raise it, or set steps"
        )
    found = (
        f"{world}{' (--world sets it)' if job.guessed else ''}: {recipe.batch.global_batch // world} of "
        f"{recipe.batch.global_batch} pairs and {order.lanes // world} of {order.lanes} lanes each, {steps:,} steps"
    )
    if 0 < job.gpus < world:
        return red(f"{world} processes on {job.gpus} GPUs", "start one a GPU, or ask for more GPUs")
    if world < job.gpus:
        return yellow(found, f"{job.gpus - world} of {job.gpus} GPUs have nothing to do: start one process a GPU")
    return green(found)


@check("memory", seconds=30, if_late="run tools/plan_memory.py")
def memory(job: Job, gpu_bytes: int) -> Check:
    """By tools/plan_memory.py's estimate.  gpu_bytes: of the smallest GPU; 0: there is none."""
    if not training_of(job.recipe).estimates_memory:
        family = job.recipe.model.family
        return skipped(f"not estimated for {family}; batch.chunk_tokens=auto finds what fits in the first steps")
    if job.plan is None or job.zero is None:
        return skipped("without model and processes")
    if not gpu_bytes:
        return skipped("no GPU here; tools/plan_memory.py plans for those of your choice")
    plan, stage = job.plan, job.zero["stage"]
    states = plan.states(stage, job.zero)
    needed = plan.total(plan.budget.chunk_tokens, states)
    found = f"about {needed / GB:.1f} of {gpu_bytes / GB:.1f} GB a GPU, ZeRO {stage}, {job.world} GPUs"
    largest = plan.largest_chunk(FULL * gpu_bytes, states)
    lower = f"lower batch.chunk_tokens to {largest:,}" if largest else (
        "lower model.max_tokens, batch.kept_chunks or batch.features_mb, take more GPUs or a higher ZeRO stage, or "
        "train adapters (model.train.lora)"
    )  # fmt: skip
    if needed > gpu_bytes:
        return red(found, lower)
    # CUDA, NCCL and fragmentation take a few GB besides.
    return yellow(f"{found}: little is left", lower) if needed > FULL * gpu_bytes else green(found)


@check("other jobs", seconds=40, if_late="is Slurm's controller slow? squeue says whether one trains the same run")
def other_jobs(folder: Path) -> Check:
    if job := status.other_job(folder):
        return red(f"job {job} trains {folder}", f"scancel {job}, or set run= to another directory")
    if why := lock.in_use(str(folder)):
        return yellow(why, "or set run= to another directory; a start waits two minutes for a sign that it lives")
    return green(f"none trains {folder}")


@check("earlier starts", seconds=30, if_late="is the file system of the run directory slow?")
def earlier_starts(folder: Path) -> Check:
    """Of this job. Where each ended with the job's script, nothing but this one can say that it was the last."""
    begun = Status.read(folder)
    if why := begun.hopeless:
        return red(f"{why}, at last: {begun.reason}", "mend that, then submit it anew: another job begins without them")
    return green(f"{len(begun.failures)} of {begun.start} failed" if begun.start else "none")


@check("resuming", seconds=30, if_late="is the file system of the run directory slow?")
def resuming(job: Job) -> Check:
    start = resume.whole(job.folder / "checkpoints")
    if start is None:
        return green("starts anew")
    if job.source is None or job.zero is None:
        return skipped(f"{start.name} is there; whether it can be continued is not known without data and processes")
    check_conditions(start, conditions_of_run(job.recipe, job.source, job.zero))
    return green(f"continues from {start.name}")
