"""What ranks' notes say of a hang."""

import ctypes
import os
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from limits import HANG_SECONDS

from pipeline.errors import PipelineError
from pipeline.jobs.status import start_id
from pipeline.phases import Location, Place, phase, place
from pipeline.training import watchdog
from pipeline.training.watchdog import FOLDER, Note, Watchdog, record_collectives

WORLD, MINUTES = 4, 10.0  # so there is a note every ten seconds
WAITING = ("all_reduce (distributed_c10d.py:3000)", "all_reduce")


def note(
    run: Path, rank: int, count: int, code: tuple[str, str] = WAITING, age: float = 0.0, still: float = 600.0
) -> None:
    """Write a rank's note.  count: of phases, two in a step.  age, still: in seconds."""
    (run / FOLDER).mkdir(exist_ok=True)
    where = Place(count, count // 2, ("loss", "optimizer")[count % 2], time.time())
    Note(rank, f"node{rank // 2}", start_id(), where, *code, still).write(run / FOLDER)
    written = time.time() - age
    os.utime(run / FOLDER / f"rank{rank}.json", (written, written))


def report(run: Path, world: int = WORLD) -> str:
    return Watchdog(run, 0, world, MINUTES).report()


def test_late_rank_is_named_with_its_step_and_phase(tmp_path):
    for rank in range(WORLD):
        note(tmp_path, rank, 6 if rank == 2 else 7, ("read (socket.py:5)", "") if rank == 2 else WAITING)
    said = report(tmp_path)
    assert said.startswith("rank 2 on node1 is in step 3, loss, since ")
    assert "at read (socket.py:5). 3 of 4 ranks wait for it, the furthest in step 3, optimizer, since " in said
    assert "in the collective all_reduce; " in said and "rank 0" not in said


def test_stopped_process_is_named_even_if_it_had_arrived(tmp_path):
    for rank in range(WORLD):
        note(tmp_path, rank, 7, age=100.2 if rank == 1 else 5)
    said = report(tmp_path)
    assert said.startswith("rank 1 on node0 was last seen in step 3, optimizer, since ")
    assert ": it has not written for 95 s: stopped, or its file system hangs. 3 of 4 ranks wait" in said


@pytest.mark.parametrize("code", [("sleep (x.py:1)", ""), ("all_gather (distributed_c10d.py:1)", "all_gather")])
def test_rank_in_other_code_than_most_is_named(code, tmp_path):
    for rank in range(WORLD):
        note(tmp_path, rank, 7, code if rank == 3 else WAITING)
    assert report(tmp_path).startswith("rank 3 on node1 is in step 3, optimizer, since ")


def test_of_two_ranks_the_one_outside_a_collective_is_named(tmp_path):
    for rank in range(2):
        note(tmp_path, rank, 7, ("sleep (x.py:1)", "") if rank == 0 else WAITING)
    assert report(tmp_path, 2).startswith("rank 0 on node0 is in step 3, optimizer, since ")


def test_rank_without_a_readable_note_is_named(tmp_path):
    for rank in range(WORLD):
        note(tmp_path, rank, 7)
    (tmp_path / FOLDER / "rank1.json").unlink()
    (tmp_path / FOLDER / "rank2.json").write_text('{"place": 3}')
    assert report(tmp_path).startswith("rank 1 has no note, rank 2 has no note. 2 of 4 ranks wait for it, the ")


def test_hang_of_all_and_of_many_ranks(tmp_path):
    assert report(tmp_path) == f"no rank has a note in {tmp_path}/{FOLDER}"
    for rank in range(WORLD):
        note(tmp_path, rank, 7)
    assert report(tmp_path).startswith("all ranks are in step 3, optimizer, since ")
    for rank in range(64):
        note(tmp_path, rank, 7 if rank < 8 else 6)
    said = report(tmp_path, 64)
    assert "and 52 more. 8 of 64 ranks wait" in said and len(said) < 700


def test_note_is_never_half_written_over_a_longer_one(tmp_path):
    note(tmp_path, 0, 7, ("x" * 99, "y" * 50))
    note(tmp_path, 0, 8, ("x", ""))
    found = Note.read(tmp_path / FOLDER, 0, start_id())
    assert found and found.place.count == 8 and found.code == "x"


def hang_here(seconds: float) -> None:
    time.sleep(seconds)


def test_stacks_are_written_and_the_rank_that_waits_reports(tmp_path, caplog):
    note(tmp_path, 1, 0)  # far behind
    with phase("data", 5):
        pass
    # A limit of half a second: stacks after a quarter, a warning after 0.45.
    with Watchdog(tmp_path, 0, 2, 0.5 / 60), phase("loss"):
        deadline, stacks = time.monotonic() + HANG_SECONDS, tmp_path / FOLDER / "rank0.stacks"
        while time.monotonic() < deadline and not (stacks.stat().st_size and "waiting for" in caplog.text):
            hang_here(0.05)
        here = place()
    assert "rank 1 on node0 " in caplog.text and "rank 0 on" not in caplog.text
    assert "hang_here" in stacks.read_text()
    found = Note.read(tmp_path / FOLDER, 0, start_id())
    assert found and (found.place, found.place.step, found.place.phase) == (here, 5, "loss")


def test_note_says_where_a_rank_failed_while_it_cleans_up(tmp_path):
    (tmp_path / FOLDER).mkdir()
    dog = Watchdog(tmp_path, 0, 1, MINUTES)
    with suppress(ValueError), phase("optimizer", 3):
        dist.all_reduce(torch.zeros(1))  # fails: there is no process group
    note = dog._note()
    assert note.collective == "_get_default_group" and note.code.startswith("_get_default_group (distributed_c10d.py:")
    with suppress(ValueError), phase("loss"):
        raise ValueError  # in no collective, but the cleanup is in one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist.distributed_c10d, "_get_default_group", dog._note)
        with suppress(AttributeError):
            dist.barrier()
    found = Note.read(tmp_path / FOLDER, 0, start_id())
    assert found and (found.place.phase, found.collective) == ("loss", "")
    assert found.code.startswith("test_note_says_where_a_rank_failed")
    with phase("report"):
        assert dog._note().collective == ""  # it went on
    assert dog._note().code.startswith("_doing (watchdog.py:")


def call_that_holds_pythons_lock() -> None:
    ctypes.PyDLL(None).usleep(500_000)


def test_stacks_are_written_while_a_call_holds_pythons_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "_LOCKED", 0.05)
    monkeypatch.setattr(watchdog.Watchdog, "_write_stacks", lambda self: None)
    with Watchdog(tmp_path, 0, 1, 0.1 / 60):
        deadline, stacks = time.monotonic() + HANG_SECONDS, tmp_path / FOLDER / "rank0.stacks"
        while time.monotonic() < deadline and "call_that_holds" not in stacks.read_text():
            call_that_holds_pythons_lock()
    assert "call_that_holds_pythons_lock" in stacks.read_text()


def test_long_evaluation_that_moves_is_no_hang(tmp_path, monkeypatch):
    now, name = 1000.0, "evaluation"
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(time=lambda: now))
    monkeypatch.setattr(watchdog, "place", lambda: Place(7, 3, name, 0.0))
    dog, still = Watchdog(tmp_path, 0, 2, MINUTES), []
    for now, code in ((1010.0, "encode"), (1900.0, "encode"), (1910.0, "score")):  # noqa: B007
        monkeypatch.setattr(watchdog, "_doing", lambda code=code: Location(code, ""))
        still.append(dog._note().still)
    name = "loss"
    assert [*still, dog._note().still] == [10, 900, 10, 1910]


@pytest.mark.parametrize("dead", [None, 41])
def test_of_many_ranks_the_one_furthest_behind_is_named_first(dead, tmp_path):
    for rank in range(64):
        count = 100 if rank == 40 else 101 + rank % 2
        note(tmp_path, rank, count, ("recv (socket.py:5)", "") if rank == 40 else WAITING, 99 if rank == dead else 0)
    said = report(tmp_path, 64)
    first, *others = said.partition(". ")[0].split("; ")[0].split(", rank ")
    assert others == [] or dead
    assert first.startswith("rank 41 on node20 was last seen in " if dead else "rank 40 on node20 is in step 50, loss")
    assert "rank 40 on node20 is in step 50, loss" in said and " on node0 " not in said
    assert f"{62 if dead else 63} of 64 ranks wait for it, the furthest in step 51, loss" in said


def test_ranks_that_wait_for_a_copy_from_the_gpu_are_not_named(tmp_path):
    for rank in range(8):
        code = ("sum (step.py:9)", "all_reduce") if rank == 5 else ("cpu (step.py:7)", "")
        note(tmp_path, rank, 7, code)
    said = report(tmp_path, 8)
    assert said.startswith("rank 5 on node2 is in step 3, optimizer, ") and "rank 0" not in said
    assert "7 of 8 ranks wait for it" in said and "at cpu (step.py:7); " in said


def test_earlier_start_leaves_its_stacks_but_no_note(tmp_path, monkeypatch):
    note(tmp_path, 0, 7)
    note(tmp_path, 1, 6)
    stacks = tmp_path / FOLDER / "rank0.stacks"
    stacks.write_text("of the hang")
    monkeypatch.setenv("SLURM_JOB_ID", "another")
    for _ in range(2):  # the second start after it has no stacks to keep
        with Watchdog(tmp_path, 0, 2, MINUTES) as dog:
            assert dog.report().startswith("rank 1 has no note. 1 of 2 ranks wait")
    assert stacks.with_name("rank0.stacks.before").read_text() == "of the hang" and stacks.read_text() == ""


def test_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / FOLDER).write_text("a file")
    with pytest.raises(PipelineError, match="cannot be written"), Watchdog(tmp_path, 0, 2, MINUTES):
        pass


def test_only_one_of_the_ranks_that_wait_reports(tmp_path):
    note(tmp_path, 0, 7)
    note(tmp_path, 1, 6)
    note(tmp_path, 2, 7)

    def leads(rank: int) -> bool:
        own = Note.read(tmp_path / FOLDER, rank, start_id())
        assert own
        return Watchdog(tmp_path, rank, 3, MINUTES)._leads(own)

    assert leads(0) and not leads(2)
    note(tmp_path, 0, 7, still=100)  # it has stopped, or it works while the others wait
    assert leads(2)


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (RuntimeError("Timed out waiting 900000ms for recv"), PipelineError, "waited timeout_minutes=10: rank 1 on "),
        (RuntimeError("Connection closed by peer"), RuntimeError, "closed"),
    ],
)
def test_timeout_of_a_collective_names_the_late_rank(error, raised, said, tmp_path):
    note(tmp_path, 1, 0)
    with phase("loss"):
        pass
    with pytest.raises(raised, match=said), Watchdog(tmp_path, 0, 2, MINUTES):
        raise error


def test_flight_recorder_writes_into_the_run(tmp_path, monkeypatch):
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT")
    for name in (*names, "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    record_collectives(tmp_path / "run")
    assert Path(os.environ["TORCH_FR_DUMP_TEMP_FILE"]).parent == tmp_path / "run" / FOLDER
    assert [os.environ[name] for name in names] == ["7", "2000", "1"]
