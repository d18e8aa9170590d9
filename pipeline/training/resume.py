"""Choose the checkpoint to resume from: the newest undamaged one. Damaged ones are logged and renamed, not deleted."""

import logging
import socket
from pathlib import Path

import torch.distributed as dist

from pipeline.distributed import on_first_rank
from pipeline.errors import PipelineError
from pipeline.storage.atomic import sync_entry
from pipeline.training import checkpoint, conditions, manifest
from pipeline.training.manifest import Damaged, Manifest
from pipeline.training.monitor import evaluation_of

_SHOWN = 3  # faults of one checkpoint in a message

logger = logging.getLogger(__name__)


def whole(folder: Path, *, thorough: bool = False, quiet: bool = False) -> Path | None:
    """Return the newest undamaged checkpoint, by file sizes or (thorough) checksums; None if there never was one.

    Logs which newer ones are damaged, unless quiet. Changes no files. Raises PipelineError if all are damaged.
    """
    damaged = {}
    for each in checkpoint.candidates(folder):
        if fault := fault_of(each, thorough=thorough):
            damaged[each] = fault
            continue
        for other, why in () if quiet else damaged.items():
            logger.warning("%s is damaged: %s; the run continues from %s", other, why, each.name)
        return each
    _refuse(folder, damaged)
    return None


def fault_of(path: Path, *, thorough: bool) -> str:
    """Return a checkpoint's faults as text; empty if it is undamaged."""
    try:
        content = contents(path, thorough=thorough)
        return _joined(manifest.faults(path, content, content.files, thorough=thorough))
    except Damaged as error:
        return str(error)


def choose(folder: Path, present: dict) -> Path | None:
    """Return the checkpoint to resume from, checked by all ranks; None if there never was one. Collective.

    Newer ones that are damaged are renamed.  present: the conditions of the run that starts.

    Raises PipelineError on the first rank if all are damaged, and as `conditions.check` does.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    left, damaged = None, {}

    def newest_readable() -> tuple[Path | None, Manifest | None]:
        nonlocal left
        left = checkpoint.candidates(folder) if left is None else left
        while left:
            path = left.pop(0)
            try:
                return path, contents(path)
            except Damaged as error:
                damaged[path] = str(error)
        return None, None

    while True:
        # The first rank decides: on a shared file system other ranks may not yet see the newest checkpoint.
        path, content = on_first_rank(newest_readable)
        if path is None or content is None:
            break
        share = [name for name in content.files if manifest.writer_of(name) % world == rank]
        try:
            found = manifest.faults(path, content, share)
        except PipelineError as error:
            found = dict.fromkeys(share, str(error))
        reports: list = [None] * world
        dist.all_gather_object(reports, (socket.gethostname(), found))
        if not any(found for _, found in reports):
            break

        def verify_on_first_rank(path: Path = path, content: Manifest = content, reports: list = reports) -> None:
            # A node with faulty memory or cache must not cause a good checkpoint to be rejected.
            names = [name for _, found in reports for name in found]
            if ours := manifest.faults(path, content, names):
                damaged[path] = _joined(ours)
                return
            host, faults = next((host, _joined(found)) for host, found in reports if found)
            raise PipelineError(f"{path}: on {host} {faults}; on {socket.gethostname()} the same files are whole")

        on_first_rank(verify_on_first_rank)

    def finalize() -> None:
        if path is None:
            _refuse(folder, damaged)
            return
        conditions.check(path, present)
        for each, why in damaged.items():
            _set_aside(each, why, path)
        checkpoint.point(path)
        if not checkpoint.best(folder):
            for each in reversed(checkpoint.candidates(folder)):  # oldest first, as in the run
                step = checkpoint.step_of(each)
                report = evaluation_of(folder.parent, step)
                if report and not report.collapsed:
                    checkpoint.keep_best(folder, step, report.score, list(report.results))

    on_first_rank(finalize)
    return path


def contents(path: Path, *, thorough: bool = True) -> Manifest:
    """Return a checkpoint's manifest; without one, list DeepSpeed's files if thorough, else none. Raises Damaged."""
    if not path.is_dir():
        raise Damaged("it is not a folder")
    kept = checkpoint.conditions_of(path)
    step = checkpoint.step_of(path)
    if found := manifest.read(path, step):
        return found
    if checkpoint.MANIFEST in kept:
        raise Damaged(f"{manifest.FILE} is missing")
    if not thorough:
        return Manifest(format=manifest.FORMAT, step=step, block=1, files={})
    # A checkpoint of an older version: list the files that DeepSpeed writes.
    world, stage = (kept.get(name) for name in (checkpoint.PROCESSES, checkpoint.STAGE))
    if type(world) is not int or type(stage) is not int:
        raise Damaged(f"{checkpoint.CONDITIONS} does not say by how many processes, and by which ZeRO stage")
    ranks = [f"zero_pp_rank_{rank}_mp_rank_00" for rank in range(world)] if stage else []
    files = [f"{name}_model_states.pt" for name in (ranks if stage == 3 else ["mp_rank_00"])]
    for name in ranks:
        named = [path / f"{prefix}{name}_optim_states.pt" for prefix in ("", "bf16_", "fp16_")]
        files.append(next((file.name for file in named if file.exists()), named[0].name))
    return Manifest(format=manifest.FORMAT, step=step, block=1, files=dict.fromkeys(files))


def _set_aside(path: Path, why: str, used: Path) -> None:
    numbers = ["", *(f"-{number}" for number in range(2, 1000))]
    target = next(new for each in numbers if not (new := path.with_name(f"damaged-{path.name}{each}")).exists())
    path.rename(target)
    sync_entry(path.parent)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    logger.warning(
        f"{path} is damaged: {why}. It is kept as {target.name} ({size / 1e6:,.1f} MB; delete it when not needed), and "
        f"the run continues from {used.name}"
    )


def _refuse(folder: Path, damaged: dict[Path, str]) -> None:
    """Raise PipelineError if there was a checkpoint: the remains of a run must not be overwritten without consent."""
    aside = [path for path in checkpoint.entries(folder) if path.name.startswith("damaged-step-")]
    if damaged or aside:
        reasons = [f"{path.name}: {why}" for path, why in damaged.items()] + [path.name for path in aside]
        raise PipelineError(
            f"{folder} has no whole checkpoint: {'; '.join(reasons)}. Restore one, set run= to another directory, or "
            "move that folder away to start from the beginning"
        )


def _joined(faults: dict[str, str]) -> str:
    texts = sorted(faults.values())
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + more
