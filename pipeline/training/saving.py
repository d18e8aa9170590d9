"""Write checkpoints while training continues.

A step stops only until a copy of the states is in CPU memory. A thread of each rank then writes the rank's files, syncs
them to disk and computes their checksums. The first rank's thread waits for the parts of all ranks, makes the
checkpoint whole (see checkpoint.py) and removes old ones. The threads use no collectives, which would mix with those of
training, but the process group's store. So a checkpoint also becomes whole during a long step or an evaluation. If
training fails, a rank waits some minutes for it before it ends: a launcher then kills all others. `Saver.finish` waits
for it.
"""

import copy
import json
import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from pydantic import TypeAdapter

from pipeline.distributed import on_every_rank
from pipeline.errors import PipelineError, disk_errors, is_out_of_memory
from pipeline.jobs import limits
from pipeline.models.pinned import pinned, pinned_bytes
from pipeline.storage.atomic import remove, remove_leftovers, sync_entry
from pipeline.training import checkpoint, manifest
from pipeline.training.manifest import File

_POLL_SECONDS = 0.1
_LATE_SECONDS = 10  # that a failed run waits, at least, for other ranks' parts, which began at the same time
_FAILED_SECONDS = 600  # that a failed run waits, at most, for the checkpoint being written
_HOURS = 12  # that a checkpoint may take, after training has stopped to wait for it
_SPARE = 2  # memory is used for copies if so many times of what they need is available

_Files = TypeAdapter(dict[str, File])

logger = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of one run, one at a time. All ranks create one, and call `begin` and `finish` together.

    As a context, it waits after an error for the checkpoint that is being written, ten minutes at most.

    folder: of all checkpoints.
    conditions: by name, what must not change when the run resumes; see conditions.py. The number of processes is stored
        with them, but may change.
    keep: how many of the newest checkpoints to keep besides the best one.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, folder: Path, conditions: dict, keep: int) -> None:
        self.engine, self.folder, self.conditions, self.keep = engine, folder, conditions, keep
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        assert dist.group.WORLD
        self._store = dist.PrefixStore("checkpoint", dist.group.WORLD.get_group_store())
        self._write = engine.checkpoint_engine.save
        self._copies = _Copies()
        self._files: list[tuple[Any, str]] = []  # states that the thread writes, and their paths
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._part: Future[None] | None = None
        self._left_at = float("inf")

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._left_at = time.monotonic()
        if kind and self._part:
            logger.info("training failed; waiting for the checkpoint that is being written")
            try:
                self._part.result(timeout=_FAILED_SECONDS)
                if self.rank:
                    self._store.wait([self._whole], timedelta(seconds=_FAILED_SECONDS))
            except Exception as lost:  # the error that is already raised counts
                logger.warning("that checkpoint is not whole: %s", lost)
        elif self._part is None:
            self._copies = _Copies()  # frees the memory before the export
        self._pool.shutdown(wait=False)

    def begin(self, step: int, state: dict) -> None:
        """Copy the engine's state after `step` steps, with `state` (plain values), and begin to write it. Collective.

        The checkpoint before must be finished.  Raises PipelineError if this rank cannot write.
        """
        assert self._part is None
        unfinished = self.folder / f"unfinished-{step:08d}"
        with disk_errors(unfinished):
            if self.rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                for left in self.folder.glob("unfinished-*"):
                    remove(left)
                remove_leftovers(self.folder)
            dist.barrier()
            self._copies.reuse()
            with mock.patch.object(self.engine.checkpoint_engine, "save", self._copy):
                self.engine.save_checkpoint(
                    str(self.folder),
                    tag=unfinished.name,
                    client_state=state | {"step": step},
                    save_latest=False,
                    exclude_frozen_parameters=True,  # they are in the initial model
                )
            get_accelerator().synchronize()  # the copies
        self._whole = f"{step}/whole"
        self._part = self._pool.submit(self._run, step, unfinished)

    def raise_failure(self) -> None:
        """Raise the error that ended this rank's writing, if there is one."""
        if self._part and self._part.done():
            self._part.result()

    def finish(self) -> bool:
        """Wait until the checkpoint being written is whole. Returns False if there is none. Collective.

        Raises the error that ended this rank's writing.
        """
        if self._part is None:
            return False
        on_every_rank(self._wait, lambda: 0, lambda _: None)
        if self.rank == 0:
            self._store.delete_key(self._whole)
        self._part = None
        return True

    def _wait(self) -> None:
        assert self._part
        try:
            self._part.result(timeout=3600 * _HOURS)
        except TimeoutError:
            raise PipelineError(
                f"{self.folder}: a checkpoint is not written after {_HOURS} hours: does the file system hang?"
            ) from None

    def _copy(self, state_dict: Any, path: str) -> None:
        """In place of the checkpoint engine's `save`: copy a state for the thread, or write it if memory is short."""
        if self._copies.fit(state_dict):
            try:
                self._files.append((self._copies.of(state_dict), path))
                return
            except Exception as error:  # a driver may pin less memory than there is
                if not is_out_of_memory(error):
                    raise
                logger.warning("training stops while a checkpoint is written: %s", error)
        self._write(state_dict, path)

    def _run(self, step: int, unfinished: Path) -> None:
        """Write this rank's part and, on the first rank, make the checkpoint whole. Runs in the thread."""
        began = time.monotonic()
        try:
            with disk_errors(unfinished):
                files = self._written(unfinished)
        except Exception as error:
            if self.rank:
                with suppress(Exception):  # the first rank may have ended; this error counts
                    self._store.set(f"{step}/{self.rank}", json.dumps(str(error)))
            raise
        if self.rank:
            self._store.set(f"{step}/{self.rank}", _Files.dump_json(files).decode())
            return
        for part in self._parts(step, max(time.monotonic() - began, _LATE_SECONDS)):
            files |= part
        with disk_errors(unfinished):
            self._make_whole(step, unfinished, files)
        self._store.set(self._whole, "")

    def _written(self, unfinished: Path) -> dict[str, File]:
        """Write this rank's files to disk; return their sizes and checksums by name."""
        while self._files:
            self._write(*self._files.pop(0))
        if self.rank == 0:
            kept = self.conditions | {checkpoint.PROCESSES: self.world, checkpoint.MANIFEST: manifest.FORMAT}
            (unfinished / checkpoint.CONDITIONS).write_text(json.dumps(kept))
        ours = [name for name in manifest.names_of(unfinished) if manifest.writer_of(name) == self.rank]

        def sync_ours() -> None:
            for name in ours:
                sync_entry(unfinished / name)

        return manifest.sums(unfinished, ours, meanwhile=sync_ours)

    def _parts(self, step: int, patience: float) -> Iterator[dict[str, File]]:
        """Wait for the other ranks' parts and return their files. Raises PipelineError if one fails.

        patience: seconds to wait for them after training has ended.
        """
        keys = [f"{step}/{rank}" for rank in range(1, self.world)]
        began = time.monotonic()
        while keys and not self._store.check(keys):
            if time.monotonic() > max(began, self._left_at) + patience:
                raise PipelineError("other ranks ended before their parts of the checkpoint were written")
            time.sleep(_POLL_SECONDS)
        for key in keys:
            part = json.loads(self._store.get(key))
            self._store.delete_key(key)
            if isinstance(part, str):
                raise PipelineError(part)
            yield _Files.validate_python(part)

    def _make_whole(self, step: int, unfinished: Path, files: dict[str, File]) -> None:
        """Write the manifest, give the checkpoint its name, point `latest` to it, and remove old checkpoints."""
        whole = self.folder / f"step-{step:08d}"
        manifest.write(unfinished, step, files)
        if whole.exists():
            remove(whole.rename(self.folder / f"unfinished-old-{step:08d}"))
        unfinished.rename(whole)
        sync_entry(self.folder)
        checkpoint.point(whole)
        checkpoints = [path for path in reversed(checkpoint.candidates(self.folder)) if path.is_dir()]
        checkpoint.remove_old(checkpoints, self.keep)


class _Copies:
    """Copies states to CPU memory, in buffers that later copies use again: allocating them takes longer than copying.

    Buffers are known by their bytes, and whether they are pinned, for what is on a GPU.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[torch.UntypedStorage]] = defaultdict(list)
        self._used: dict[tuple[int, bool], list[torch.UntypedStorage]] = defaultdict(list)
        self._is_short = False

    def reuse(self) -> None:
        """Allow the buffers of all earlier copies to be overwritten."""
        self._free, self._used = self._used, defaultdict(list)

    def fit(self, state: Any) -> bool:
        """Whether there is enough memory for a copy; otherwise log that, once."""
        storages = {storage._cdata: storage for storage in (each.untyped_storage() for each in _tensors(state))}
        wanted = Counter(map(_buffer_for, storages.values()))
        needed = sum(_allocated(*key) * max(count - len(self._free[key]), 0) for key, count in wanted.items())
        available = limits.available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if needed <= available // _SPARE:
            return True
        if not self._is_short:
            logger.warning(
                "training stops while a checkpoint is written: a copy of %.1f GB would be written in the background if "
                "%d times that were available of the CPU's memory to this process; it is %.1f GB",
                needed / 1e9,
                _SPARE,
                available / 1e9,
            )
            self._is_short = True
        return False

    def of(self, state: Any) -> Any:
        """Return a copy of dicts, lists, tensors and plain values, with the same bytes by torch.save but the device.

        Tensors that share a storage share its copy. Copies from a GPU are complete after a synchronization.
        """
        storages: dict[int, torch.UntypedStorage] = {}
        tensors = {id(tensor): self._copy(tensor, storages) for tensor in _tensors(state)}
        return copy.deepcopy(state, tensors)

    def _copy(self, value: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
        """Return a tensor as torch.load would rebuild it, or one of the parts that it is rebuilt from."""
        if isinstance(value, torch.Tensor):
            rebuild, parts = value.__reduce_ex__(2)[:2]
            return rebuild(*self._copy(parts, storages))
        if isinstance(value, torch.TypedStorage):
            source = value._untyped_storage
            if source._cdata not in storages:
                storages[source._cdata] = self._buffer(source).copy_(source, non_blocking=True)
            return torch.TypedStorage(wrap_storage=storages[source._cdata], dtype=value.dtype, _internal=True)
        return tuple(self._copy(each, storages) for each in value) if isinstance(value, tuple) else value

    def _buffer(self, source: torch.UntypedStorage) -> torch.UntypedStorage:
        key = _buffer_for(source)
        buffer = self._free[key].pop() if self._free[key] else _allocate(*key).untyped_storage()
        self._used[key].append(buffer)
        return buffer


def _buffer_for(source: torch.UntypedStorage) -> tuple[int, bool]:
    return source.nbytes(), source.device.type != "cpu"


def _allocate(size: int, pins: bool) -> torch.Tensor:
    def allocate(pins: bool) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pins)

    return pinned(allocate) if pins else allocate(False)


def _allocated(size: int, pins: bool) -> int:
    """Return the bytes that torch allocates."""
    return pinned_bytes(size) if pins else size


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    """Iterate over the tensors in nested dicts, lists and tuples."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for each in state.values() if isinstance(state, dict) else state:
            yield from _tensors(each)
