"""Write checkpoints while training continues.

A thread of each rank copies the states to CPU memory, during the forward and backward passes of the next step: its
optimizer waits for the copy. Then the thread writes the rank's files, syncs them to disk and computes their checksums.
The first rank's thread waits for the parts of all ranks, makes the checkpoint whole (see checkpoint.py) and removes old
ones. The threads use no collectives, which would mix with those of training, but the process group's store. So a
checkpoint also becomes whole during a long step or an evaluation. If training fails, a rank waits some minutes for it
before it ends: a launcher then kills all others. `Saver.finish` waits for it.

If any rank is short of memory for its copy, training stops on all of them until the states are written.
"""

import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pipeline.distributed import on_every_rank
from pipeline.errors import PipelineError, disk_errors
from pipeline.storage.atomic import remove, remove_leftovers, sync_entry
from pipeline.training import checkpoint, manifest
from pipeline.training.alarms import nearly_full
from pipeline.training.copies import Copies
from pipeline.training.manifest import File

_POLL_SECONDS = 0.1
_LATE_SECONDS = 10  # that a failed run waits, at least, for other ranks' parts, which began at the same time
_FAILED_SECONDS = 600  # that a failed run waits, at most, for the checkpoint being written
_HOURS = 12  # that a checkpoint may take, after training has stopped to wait for it

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
        self._copies = Copies(engine.device)
        self._files: list[tuple[Any, str]] = []  # states that the thread writes, and their paths
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._filled: Future[None] | None = None
        self._part: Future[None] | None = None
        # Of all optimizers, because DeepSpeed may use several; it changes no state before the first of them steps.
        self._hook = register_optimizer_step_pre_hook(self._wait_for_copies)
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
            self._copies.free()  # before the export
        self._hook.remove()
        self._pool.shutdown(wait=False)

    def begin(self, step: int, state: dict) -> None:
        """Begin to write the engine's state after `step` steps, with `state`. Collective.

        The checkpoint before must be finished.  Raises PipelineError if this rank cannot write.
        """
        assert self._part is None
        unfinished, states = self.folder / f"unfinished-{step:08d}", list[tuple[Any, str]]()
        with disk_errors(unfinished):
            if self.rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                for left in self.folder.glob("unfinished-*"):
                    remove(left)
                remove_leftovers(self.folder)
            # Other ranks wait for the first one before they create files.
            with mock.patch.object(
                self.engine.checkpoint_engine, "save", lambda state_dict, path: states.append((state_dict, path))
            ):
                self.engine.save_checkpoint(
                    str(self.folder),
                    tag=unfinished.name,
                    client_state=state | {"step": step},
                    save_latest=False,
                    exclude_frozen_parameters=True,  # they are in the initial model
                )
            if copied := self._copied(states, state):
                self._files = copied
            else:
                for each in states:
                    self._write(*each)
        self._whole = f"{step}/whole"
        self._filled = self._pool.submit(self._copies.fill)
        self._part = self._pool.submit(self._run, step, unfinished)

    def _copied(self, states: list[tuple[Any, str]], state: dict) -> list[tuple[Any, str]] | None:
        """Return copies of the states, which `Copies.fill` fills; None if any rank is short of memory. Collective."""
        volatile = [*self.engine.module.buffers()], state  # a forward pass, and the objective, may change these
        copied = self._copies.of(states, volatile)
        fits = torch.tensor(copied is not None, dtype=torch.int32, device=self.engine.device)
        dist.all_reduce(fits, dist.ReduceOp.MIN)
        if fits:
            return copied
        self._copies.free()
        return None

    def _wait_for_copies(self, *_: object) -> None:
        """Before an optimizer changes the states. An error of the copy is raised by `raise_failure`."""
        if self._filled:
            wait([self._filled])

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

    def _run(self, step: int, unfinished: Path) -> None:
        """Write this rank's part and, on the first rank, make the checkpoint whole. Runs in the thread."""
        began = time.monotonic()
        try:
            assert self._filled
            self._filled.result()
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
        if alarm := nearly_full(self.folder, sum(file.bytes for file in files.values())):
            logger.warning(alarm)  # now, when there may be time until the next one

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
