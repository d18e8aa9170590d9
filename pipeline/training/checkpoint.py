"""Atomic checkpoints.

RUN/checkpoints/step-00000100/ is written under another name, synced to disk with its manifest, and renamed; then
`latest` names it (saving.py). Whenever a run is killed, `latest` names a complete checkpoint or does not exist. `best`
names the checkpoint with the highest evaluation score, and the score. resume.py detects later damage. universal.py
converts a checkpoint for another number of processes.
"""

import copyreg
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch.utils.serialization import config as serialization

from pipeline.errors import PipelineError, disk_errors, is_of_late_peer, is_of_lost_peer, is_out_of_memory
from pipeline.storage.atomic import remove, write_file
from pipeline.training import manifest

LATEST, BEST = "latest", "best"
CONDITIONS = "conditions.json"
PROCESSES, STAGE = "the number of processes", "the ZeRO stage"
MANIFEST = "the manifest's format"  # a condition, so that a missing manifest is detected
_NAME = re.compile(r"step-\d{8,}")

# The types in DeepSpeed's files besides tensors and plain values; no others are unpickled.
_DEEPSPEED_TYPES = [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
# Python before 3.11.4 would pickle an enumeration through `getattr`, which must stay forbidden.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


def remove_old(checkpoints: list[Path], keep: int) -> None:
    """Remove all checkpoints, given in the order of their steps, except the last `keep` and the best."""
    for old in checkpoints[:-keep]:
        if old != best(old.parent):
            unfinished = old.with_name(old.name.replace("step", "unfinished"))
            old.rename(unfinished)  # a partly removed checkpoint must not keep its name
            remove(unfinished)


def keep_best(folder: Path, step: int, score: float, by: list[str]) -> None:
    """Mark the checkpoint after `step` steps as the best if its score is higher than that of the marked one.

    by: the datasets whose mean is the score. A mark with other datasets is replaced without a comparison.
    """
    kept = _best(folder)
    if not kept or by != kept["by"] or score > kept["score"]:
        _point(folder, BEST, json.dumps({"checkpoint": f"step-{step:08d}", "score": score, "by": by}))


def best(folder: Path) -> Path | None:
    """Return the checkpoint with the highest score, or None if none has a score."""
    kept = _best(folder)
    return folder / kept["checkpoint"] if kept else None


def _best(folder: Path) -> dict:
    """Return what `keep_best` wrote; empty if that is missing or invalid, or if its checkpoint no longer exists."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        kept = json.loads((folder / BEST).read_text())
        named, by = kept["checkpoint"], kept["by"]
        if _NAME.fullmatch(named) and (folder / named).is_dir() and isinstance(by, list):
            return {"checkpoint": named, "score": float(kept["score"]), "by": by}
    return {}


def _point(folder: Path, pointer: str, text: str) -> None:
    with disk_errors(folder / pointer):
        write_file(folder / pointer, f"{text}\n".encode())


def point(checkpoint: Path) -> None:
    """Make `latest` name a checkpoint."""
    if _pointed(checkpoint.parent) != checkpoint.name:
        _point(checkpoint.parent, LATEST, checkpoint.name)


def entries(folder: Path) -> list[Path]:
    """Return the entries of a folder; none if it does not exist. Raises PipelineError if it cannot be read."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise PipelineError(f"{folder} cannot be read: {error.strerror}") from None


def candidates(folder: Path) -> list[Path]:
    """Return all checkpoints, complete or not, newest first; if `latest` names one, only those up to it."""
    there = {path.name: path for path in entries(folder) if _NAME.fullmatch(path.name)}
    newest = _pointed(folder)
    steps = sorted(there.values(), key=step_of, reverse=True)
    return [path for path in steps if newest not in there or step_of(path) <= step_of(there[newest])]


def _pointed(folder: Path) -> str:
    with suppress(OSError, ValueError):
        return (folder / LATEST).read_text().strip()
    return ""


def step_of(checkpoint: Path) -> int:
    """Return the number of steps that its run had taken."""
    return int(checkpoint.name.removeprefix("step-"))


def conditions_of(checkpoint: Path) -> dict:
    """Return the conditions stored with a checkpoint. Raises manifest.Damaged if they are missing."""
    return manifest.read_json(checkpoint / CONDITIONS)


def load(engine: deepspeed.DeepSpeedEngine, checkpoint: Path) -> dict:
    """Load a checkpoint into the engine. Returns the state saved with it, including `step`. Collective.

    A converted checkpoint (see universal.py) needs {"checkpoint": {"load_universal": true}} in the engine's config, and
    is removed afterwards. Raises PipelineError if DeepSpeed cannot load the checkpoint.
    """
    universal = engine.load_universal_checkpoint()
    try:
        with weights_only(), _universal_load(engine.optimizer) if universal else nullcontext():
            path, state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_module_strict=False)
    except Exception as error:
        if is_of_lost_peer(error) or is_of_late_peer(error) or is_out_of_memory(error):
            raise
        raise PipelineError(
            f"{checkpoint} cannot be loaded ({type(error).__name__}: {(str(error).splitlines() or [''])[0]}), though "
            f"its files are as they were written; if nothing else has changed, rename it: an older one is used instead"
        ) from error
    if path is None:
        raise PipelineError(f"{checkpoint} holds no checkpoint that DeepSpeed can read")
    if universal:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(checkpoint.parent, ignore_errors=True)  # the next save removes anything left
    return state


def trained_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return a checkpoint's trained parameters by name, on the CPU, for any ZeRO stage and number of processes.

    They have the precision of training, or float32 under ZeRO-3.
    """
    with weights_only():
        if conditions_of(checkpoint)[STAGE] == 3:
            return get_fp32_state_dict_from_zero_checkpoint(
                str(checkpoint.parent), tag=checkpoint.name, exclude_frozen_parameters=True
            )
        # Below stage 3 every rank has all parameters, and the first one saves them.
        state = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", mmap=True)
        return state["module"]


@contextmanager
def weights_only() -> Iterator[None]:
    """Make torch.load refuse arbitrary pickles, even where DeepSpeed allows them."""
    with (
        mock.patch.dict(os.environ, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}),
        torch.serialization.safe_globals(_DEEPSPEED_TYPES),
    ):
        yield


@contextmanager
def mapped() -> Iterator[None]:
    """Make torch.load map files into memory, so that only the parts in use are read."""
    with mock.patch.object(serialization.load, "mmap", True):
        yield


@contextmanager
def _universal_load(optimizer: deepspeed.runtime.base_optimizer.ZeROOptimizer) -> Iterator[None]:
    """Map files into memory while DeepSpeed loads a universal checkpoint, and work around two faults of DeepSpeed.

    It expects every rank to hold part of every parameter group. Under ZeRO 1 and 2 a rank may hold only the padding of
    a small group: one parameter of the group then acts as if it had an empty state.

    Under ZeRO-3 all partitions share one step counter, so each partition's step would increment it for all others; and
    the counter stays on the CPU, where a fused optimizer does not expect it.
    """
    # The attribute's name depends on stage and precision; DeepSpeed's ZeRO-3 optimizer has neither.
    groups = getattr(optimizer, "bf16_groups", None) or getattr(optimizer, "bit16_groups", [])
    stateless: dict[str, Any] = {
        "_hp_mapping": SimpleNamespace(get_optim_state_keys=list),
        "load_hp_checkpoint_state": lambda *_, **__: None,
    }
    with mapped(), ExitStack() as stack:
        for group in groups:
            if all(parameter._hp_mapping is None for parameter in group):
                stack.enter_context(mock.patch.multiple(group[0], **stateless))
        yield
    for partition, state in optimizer.optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            device = partition.device if optimizer.optimizer.defaults.get("fused") else "cpu"
            state["step"] = state["step"].to(device, copy=True)
