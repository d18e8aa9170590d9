"""Checkpoints that are written while training continues: exact copies, and whole or absent at every moment."""

import io
import logging
import os
import resource
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from two_ranks import on_two_ranks

from pipeline.errors import PipelineError
from pipeline.jobs import limits
from pipeline.training import checkpoint, resume, saving
from pipeline.training.saving import Saver, _Copies

OLD, NEW = "step-00000001", "step-00000002"
_FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def saved(state: object) -> bytes:
    torch.save(state, file := io.BytesIO())
    return file.getvalue()


def state_of_many_kinds() -> dict:
    """Return a state with all that DeepSpeed's states contain."""
    flat = torch.arange(1000.0)
    trained = nn.Parameter(flat[:300].view(20, 15))
    trained.grad = torch.ones(20, 15)  # torch.save leaves it out
    with_attributes = flat[300:700].clone().requires_grad_()
    with_attributes.ds_id = "7"
    return {
        "module": {"a": flat[:300].view(20, 15), "b": flat[300:].view(7, 100).T, "again": flat},
        "parameters": (trained, [with_attributes]),
        "bf16": torch.ones(5, dtype=torch.bfloat16),
        "empty": torch.empty(0),
        "shape": flat.view(10, 100).shape,
        "nested": [{"step": torch.tensor(3.0), "betas": (0.9, 0.999)}] * 2,
    }


def test_copy_is_saved_with_the_same_bytes_and_does_not_change():
    state, copies = state_of_many_kinds(), _Copies()
    before, buffers = saved(state), []
    for _ in range(2):
        copies.reuse()
        kept = copies.of(state)
        tensors = [kept["module"]["again"], *kept["parameters"][1], kept["bf16"], kept["nested"][0]["step"]]
        buffers.append(sorted(tensor.data_ptr() for tensor in tensors))
        state["module"]["again"].add_(1)
        state["nested"][0]["betas"] = None
        with torch.no_grad():
            state["parameters"][1][0].zero_()
        assert saved(kept) == before
        assert saved(state) != before
        state = state_of_many_kinds()
    # One copy of the 1000 numbers, whatever shares them, and the second copy in the memory of the first.
    assert sorted(size for size, _ in copies._used) == [0, 4, 10, 1600, 4000]
    assert all(len(used) == 1 for used in copies._used.values())
    assert buffers[0] == buffers[1]


def test_without_memory_nothing_is_copied_and_that_is_logged_once(monkeypatch, caplog):
    state, copies = {"x": torch.ones(1000), "same": torch.ones(1000)}, _Copies()
    with caplog.at_level(logging.WARNING):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setattr(limits, "available_memory", lambda: 4 * 8000 - 1)
        assert not copies.fit(state)
        assert not copies.fit(state)
        assert caplog.text.count("training stops while a checkpoint is written") == 1
        monkeypatch.setattr(limits, "available_memory", lambda: 4 * 8000)
        assert copies.fit(state)
        copies.of(state)
        copies.reuse()
        monkeypatch.setattr(limits, "available_memory", lambda: 0)
        assert copies.fit(state)  # in the same memory
        copies.of(state)
        assert not copies.fit(state)


def test_pinned_memory_is_counted_as_torch_allocates_it():
    assert [saving._allocated(size, True) for size in (0, 1, 4096, 4097)] == [0, 1, 4096, 8192]
    assert saving._allocated(4097, False) == 4097


def an_engine(stage: int) -> deepspeed.DeepSpeedEngine:
    """Return an engine of ZeRO stage 1 or 2 that has taken a step."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as start_distributed does
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    deepspeed.init_distributed("gloo", verbose=False, auto_mpi_discovery=False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    config = {"train_batch_size": 2, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
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
    """Make the thread wait for the returned event before it writes a file."""
    event, write = threading.Event(), saver._write
    saver._write = lambda *arguments: (event.wait(), write(*arguments))
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


def _same_as_deepspeed(rank: int) -> list[bool]:
    """Whether each file has the bytes that DeepSpeed writes by itself: in the background, and without memory."""
    engine, results = an_engine(1), []
    with shared_folder() as shared:
        for step, memory in ((1, 1 << 50), (2, 0)):
            limits.available_memory = lambda memory=memory: memory
            state = {"bad_samples": 3}
            plain, tag = shared / f"plain{step}", f"unfinished-{step:08d}"
            before = engine.checkpoint_engine.save
            engine.save_checkpoint(str(plain), tag, state | {"step": step}, False, exclude_frozen_parameters=True)
            with Saver(engine, shared / "ours", {}, keep=9) as saver:
                stepped = held(saver)
                if not memory:
                    stepped.set()  # it writes at once
                saver.begin(step, state)
                take_step(engine)
                stepped.set()
                saver.finish()
            assert engine.checkpoint_engine.save == before
            ours, theirs = contents(shared / f"ours/step-{step:08d}"), contents(plain / tag)
            results += [ours[name] == theirs[name] for name in theirs]
            assert ours.keys() - theirs.keys() == {checkpoint.CONDITIONS, "manifest.json"}
            assert resume.whole(shared / "ours", thorough=True) == shared / f"ours/step-{step:08d}"
    return results


def test_checkpoint_has_the_bytes_that_deepspeed_writes():
    for results in on_two_ranks(_same_as_deepspeed):
        assert results == [True] * len(results)
        assert len(results) >= 6


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
    """A rank fails while a checkpoint is written. Then it fails again, and the other one is killed."""
    engine, found = an_engine(2), []
    saving._LATE_SECONDS = 0.1
    with shared_folder() as folder:
        for step, is_killed in ((1, False), (2, True)):
            try:
                with Saver(engine, folder, {checkpoint.STAGE: 2}, keep=1) as saver:
                    written = held(saver)
                    saver.begin(step, {"bad_samples": 0})
                    if not (rank and is_killed):
                        threading.Timer(0.2, written.set).start()
                    if not rank or not is_killed:
                        raise PipelineError("out of memory")
            except PipelineError as error:
                found.append(str(error))
            dist.barrier()
            found.append(resume.whole(folder, thorough=True).name)
            dist.barrier()
            written.set()
    return found


def test_failed_run_leaves_the_checkpoint_that_was_being_written_whole():
    first, second = on_two_ranks(_failing_run)
    assert first == ["out of memory", OLD, "out of memory", OLD]
    assert second == ["out of memory", OLD, OLD]
