"""Checkpoints that are written while training continues: exact copies, and whole or absent at every moment."""

import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from limits import HANG_SECONDS
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from two_ranks import on_two_ranks

from pipeline.errors import PipelineError
from pipeline.jobs import limits
from pipeline.training import checkpoint, resume, saving
from pipeline.training.saving import Saver

OLD, NEW = "step-00000001", "step-00000002"
_LATE_SECONDS = 0.2  # in which a step ends that does not wait for the copy
_FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


class Counter(nn.Module):
    """Counts its calls in a buffer, which so changes in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x


def an_engine(stage: int) -> deepspeed.DeepSpeedEngine:
    """Return an engine of a ZeRO stage that has taken a step. Stage 3 steps in several groups."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as start_distributed does
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    deepspeed.init_distributed("gloo", verbose=False, auto_mpi_discovery=False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), Counter(), nn.Linear(50, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    zero = {"stage": stage} | ({"sub_group_size": 500, "stage3_param_persistence_threshold": 60} if stage == 3 else {})
    config = {"train_batch_size": 2, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    take_step(engine)
    return engine


def take_step(engine: deepspeed.DeepSpeedEngine) -> None:
    engine.backward(engine(torch.ones(1, 40)).square().sum())
    engine.step()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Give both ranks the same temporary folder."""
    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    yield Path(names[0])
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(names[0])


def held(saver: Saver) -> threading.Event:
    """Make the thread wait for the returned event before it copies the states."""
    event, fill = threading.Event(), saver._copies.fill
    saver._copies.fill = lambda: (event.wait(), fill())
    return event


def on_file_operations(thread: str, note: Callable[[], None]) -> Callable[[], None]:
    """Call `note` before each operation on files of threads with this name; return a function that ends this."""
    lock, active = threading.RLock(), True

    def hook(event: str, arguments: tuple) -> None:
        nonlocal active
        if active and event in _FILE_EVENTS and threading.current_thread().name.startswith(thread):
            with lock:
                active = False  # not for the operations of `note`
                note()
                active = True

    def end() -> None:
        nonlocal active
        active = False

    sys.addaudithook(hook)
    return end


def _killed_at_any_operation(rank: int) -> list[str]:
    """Copy the folder before each file operation of a save: a process killed there leaves it so."""
    engine = an_engine(2)
    with shared_folder() as shared:
        folder, copies = shared / "checkpoints", shared / "copies"
        with Saver(engine, folder, {checkpoint.STAGE: 2}, keep=1) as saver:
            saver.begin(1, {"bad_samples": 0})
            saver.finish()
            take_step(engine)
            dist.barrier()
            moments = []

            def note() -> None:
                with suppress_missing():
                    shutil.copytree(folder, copies / str(len(moments)))
                moments.append(len(moments))

            old = contents(folder / OLD) if rank == 0 else {}
            end = on_file_operations("checkpoint", note) if rank == 0 else lambda: None
            saver.begin(2, {"bad_samples": 0})
            take_step(engine)
            saver.finish()
            end()
        if rank:
            return []
        new, found = contents(folder / NEW), []
        assert [path.name for path in folder.glob("*step*")] == [NEW]
        for number in moments:
            whole = resume.whole(copies / str(number), thorough=True)
            assert whole is not None
            assert contents(whole) == (old if whole.name == OLD else new), (number, whole)
            found.append(whole.name)
        return found


@contextmanager
def suppress_missing() -> Iterator[None]:
    """Ignore files that the other rank renamed while a folder was copied: the copy is then of a later moment."""
    try:
        yield
    except shutil.Error as error:
        assert all("No such file" in why for _, _, why in error.args[0])


def test_checkpoint_is_whole_or_absent_at_every_file_operation():
    found, _ = on_two_ranks(_killed_at_any_operation)
    assert len(found) > 15
    assert found == sorted(found)  # first the old one, then the new one
    assert {*found} == {OLD, NEW}


def _same_as_deepspeed(rank: int, stage: int) -> list[bool]:
    """Whether each file has the bytes that DeepSpeed writes by itself, with memory for copies on all ranks or not.

    The copy begins as late as possible: when the next step's optimizer waits for it.
    """
    engine, results, stepped = an_engine(stage), [], threading.Event()
    register_optimizer_step_pre_hook(lambda *_: stepped.set())
    with shared_folder() as shared, Saver(engine, shared / "ours", {}, keep=9) as saver:
        fill, write, writers = saver._copies.fill, saver._write, []
        saver._copies.fill = lambda: (stepped.wait(), time.sleep(_LATE_SECONDS), fill()) if expected else fill()
        saver._write = lambda *arguments: (writers.append(threading.current_thread().name), write(*arguments))
        for step, memory in enumerate(((1 << 50, 1 << 50), (0, 0), (1 << 50, 0), (1 << 50, 1 << 50)), 1):
            limits.available_memory = lambda memory=memory: memory[rank]
            state, expected = {"bad_samples": 3, "of the objective": torch.ones(3)}, all(memory)
            plain, tag = shared / f"plain{step}", f"unfinished-{step:08d}"
            before = engine.checkpoint_engine.save
            engine.save_checkpoint(str(plain), tag, state | {"step": step}, False, exclude_frozen_parameters=True)
            stepped.clear()
            saver._copies.free()
            saver.begin(step, state)
            state["of the objective"].zero_()
            take_step(engine)
            saver.finish()
            # Whether to write in the background is decided for all ranks together.
            results += [name.startswith("checkpoint") == expected for name in writers]
            writers.clear()
            assert engine.checkpoint_engine.save == before
            ours, theirs = contents(shared / f"ours/step-{step:08d}"), contents(plain / tag)
            results += [ours[name] == theirs[name] for name in theirs]
            assert ours.keys() - theirs.keys() == {checkpoint.CONDITIONS, "manifest.json"}
            assert resume.whole(shared / "ours", thorough=True) == shared / f"ours/step-{step:08d}"
    return results


@pytest.mark.parametrize("stage", [1, 3])
def test_checkpoint_has_the_bytes_that_deepspeed_writes(stage):
    for results in on_two_ranks(partial(_same_as_deepspeed, stage=stage)):
        assert results == [True] * len(results)
        assert len(results) >= 4 * 4


def _killed_while_writing(rank: int) -> int:
    """Fork processes that write this rank's files, each killed by the system at a byte of one of them."""
    engine, killed = an_engine(2), 0
    with shared_folder() as folder, Saver(engine, folder, {checkpoint.STAGE: 2}, keep=1) as saver:
        saver.begin(1, {"bad_samples": 0})
        saver.finish()
        take_step(engine)
        dist.barrier()
        released = threading.Event()
        saver._pool.submit(released.wait)
        saver.begin(2, {"bad_samples": 0})  # the thread does nothing until then
        unfinished = folder / f"unfinished-{NEW.removeprefix('step-')}"
        try:
            for _, path in saver._files:
                size = (folder / OLD / Path(path).name).stat().st_size
                for length in (0, size // 3, size // 2, size - 1):
                    if not (child := os.fork()):
                        try:
                            signal.alarm(HANG_SECONDS)
                            saver._copies.fill()
                            saver._write = partial(kill_inside, path, length, saver._write)
                            saver._written(unfinished)
                        finally:
                            os._exit(0)
                    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGXFSZ
                    assert (unfinished / Path(path).name).stat().st_size <= length
                    assert resume.whole(folder, thorough=True).name == OLD
                    killed += 1
        finally:  # also after a failure, for which the saver would wait
            released.set()
        saver.finish()
        assert resume.whole(folder, thorough=True).name == NEW
    return killed


def kill_inside(file: str, length: int, write: Callable[..., None], state: object, path: str) -> None:
    """Write, and let the system kill this process when `file` gets longer than `length` bytes."""
    if path == file:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (length, length))
    write(state, path)


def test_checkpoint_is_absent_if_its_writer_is_killed_inside_a_file():
    assert on_two_ranks(_killed_while_writing) == [8, 4]


def on_full_disk(write: Callable[..., None], *arguments: object) -> None:
    """Write with a limit of the file size: the operating system refuses writes beyond it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        write(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _disk_full_on_one_rank(rank: int) -> list[str]:
    engine, errors = an_engine(2), []
    with shared_folder() as folder:
        with Saver(engine, folder, {checkpoint.STAGE: 2}, keep=1) as saver:
            saver.begin(1, {"bad_samples": 0})
            saver.finish()
        try:
            with Saver(engine, folder, {checkpoint.STAGE: 2}, keep=1) as saver:
                if rank:
                    saver._write = partial(on_full_disk, saver._write)
                saver.begin(2, {"bad_samples": 0})
                take_step(engine)
                saver._part.exception()  # wait
                saver.raise_failure()
        except PipelineError as error:
            errors.append(str(error))
        dist.barrier()
        errors.append(resume.whole(folder, thorough=True).name)
    return errors


def test_full_disk_of_one_rank_is_reported_by_all_and_loses_nothing():
    for said, whole in on_two_ranks(_disk_full_on_one_rank):
        assert "unfinished-00000002 cannot be written: the file could not be written completely" in said
        assert whole == OLD


def _failing_run(rank: int) -> list[object]:
    """The ranks fail before the states are copied. Then one fails again, and the other one is killed."""
    engine, found = an_engine(2), []
    saving._LATE_SECONDS = 0.1
    with shared_folder() as folder:
        for step, is_killed in ((1, False), (2, True)):
            try:
                with Saver(engine, folder, {checkpoint.STAGE: 2}, keep=1) as saver:
                    released = held(saver)
                    saver.begin(step, {"bad_samples": 0})
                    if not (rank and is_killed):
                        threading.Timer(0.2 if rank else 0.5, released.set).start()
                    if not rank or not is_killed:
                        raise PipelineError("out of memory")
            except PipelineError as error:
                found.append(str(error))
            found.append(resume.whole(folder, thorough=True).name)
            dist.barrier()
            released.set()
    return found


def test_failed_run_leaves_the_checkpoint_that_was_being_written_whole():
    first, second = on_two_ranks(_failing_run)
    assert first == ["out of memory", OLD, "out of memory", OLD]
    assert second == ["out of memory", OLD, OLD]
