"""What ranks' notes say of a hang."""

import os
import time
from pathlib import Path

import pytest
from limits import HANG_SECONDS

from pipeline.errors import PipelineError
from pipeline.phases import Place, phase, place
from pipeline.training.watchdog import FOLDER, Note, Watchdog, record_collectives

WORLD, MINUTES = 4, 10.0  # so there is a note every ten seconds
WAITING = ("all_reduce (distributed_c10d.py:3000)", "all_reduce")


def note(run: Path, rank: int, count: int, code: tuple[str, str] = WAITING, age: float = 0.0) -> None:
    """Write a rank's note.  count: of phases, two in a step.  age: in seconds."""
    (run / FOLDER).mkdir(exist_ok=True)
    where = Place(count, count // 2, ("loss", "optimizer")[count % 2], time.time())
    Note(rank, f"node{rank // 2}", where, *code).write(run / FOLDER)
    written = time.time() - age
    os.utime(run / FOLDER / f"rank{rank}.json", (written, written))


def report(run: Path, world: int = WORLD) -> str:
    return Watchdog(run, 0, world, MINUTES).report()


def test_late_rank_is_named_with_its_step_and_phase(tmp_path):
    for rank in range(WORLD):
        note(tmp_path, rank, 6 if rank == 2 else 7, ("read (socket.py:5)", "") if rank == 2 else WAITING)
    said = report(tmp_path)
    assert said.startswith("rank 2 on node1 is in step 3, loss, since ")
    assert "at read (socket.py:5). 3 of 4 ranks wait for it in step 3, optimizer, since " in said
    assert "in the collective all_reduce; " in said and "rank 0" not in said


def test_stopped_process_is_named_even_if_it_had_arrived(tmp_path):
    for rank in range(WORLD):
        note(tmp_path, rank, 7, age=100 if rank == 1 else 5)
    said = report(tmp_path)
    assert said.startswith("rank 1 on node0 was last seen in step 3, optimizer, since ")
    assert "its process has stopped. 3 of 4 ranks wait" in said


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
    assert report(tmp_path).startswith("rank 1 has no note, rank 2 has no note. 2 of 4 ranks wait for it in step 3")


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
    found = Note.read(tmp_path / FOLDER, 0)
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
    assert "rank 1 on node0 " in caplog.text and "rank 0 on" not in caplog.text
    assert "hang_here" in stacks.read_text()
    found = Note.read(tmp_path / FOLDER, 0)
    assert found and (found.place, found.place.step, found.place.phase) == (place(), 5, "loss")


def test_long_evaluation_is_no_hang(tmp_path, caplog):
    note(tmp_path, 1, 0)
    with phase("evaluation"), Watchdog(tmp_path, 0, 2, 0.1 / 60):  # else it may see the phase before
        time.sleep(0.5)
    assert "waiting for" not in caplog.text


def test_only_one_of_the_ranks_that_wait_reports(tmp_path):
    note(tmp_path, 0, 7)
    note(tmp_path, 1, 6)
    note(tmp_path, 2, 7)
    count = Place(7, 3, "optimizer", 0.0)
    leads = [Watchdog(tmp_path, rank, 3, MINUTES)._leads(count) for rank in (0, 2)]
    assert leads == [True, False]
    note(tmp_path, 0, 7, age=100)  # rank 0 has stopped
    assert Watchdog(tmp_path, 2, 3, MINUTES)._leads(count)


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
