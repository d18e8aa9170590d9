"""Says which ranks keep the others waiting: each rank notes in RUN/ranks where it is; the notes explain a hang.

A note is a small file that its rank writes anew every few seconds, so a rank needs no collective, and no other rank, to
say where it is. Ranks read the others' notes only when a collective has timed out, or is about to.
"""

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from pipeline.errors import PipelineError, disk_errors, first_few, is_of_late_peer
from pipeline.jobs import status
from pipeline.phases import Location, Place, failed, place

FOLDER = "ranks"  # in the run directory
_SECONDS = 10  # between a rank's notes; shorter if the time limit is
_SILENT = 3  # missing notes after which a process counts as silent
_STACKS_AFTER, _REPORT_AFTER = 0.5, 0.9  # of the time limit; at the limit NCCL ends the process
_LOCKED = 60.0  # seconds at least for which this thread has not run, before a call is taken to hold Python's lock
_LONG = ("restore", "checkpoint", "evaluation")  # phases of many collectives, which may exceed the limit of one
_SIZE = 512  # bytes of a note at most: written in one piece over the last one, so that a reader never finds half of it

logger = logging.getLogger(__name__)


def record_collectives(run: Path) -> None:
    """Make torch's flight recorder write NCCL's last collectives to RUN/ranks/nccl_rank_N if one of them times out.

    `torchfrtrace RUN/ranks -p nccl_rank_` compares them. Variables that are already set are kept. Call it before the
    process group starts. Versions of torch before 2.13 may know a variable by its older name only, so both are set.
    """
    with disk_errors(run / FOLDER):
        (run / FOLDER).mkdir(parents=True, exist_ok=True)
    prefix = str((run / FOLDER / "nccl_rank_").absolute())
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        os.environ.setdefault(name, prefix)
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        os.environ.setdefault(name, "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


@dataclass(frozen=True)
class Note:
    """A rank's note.

    start: the id of this start of the run; ranks ignore the notes of others.
    code: the function that its main thread is in.  collective: that one of its threads waits in, or "".
    still: seconds for which it has not moved.  written: when, by the file system's clock, in seconds.
    """

    rank: int
    host: str
    start: str
    place: Place
    code: str
    collective: str
    still: float
    written: float = 0.0

    @property
    def waits_in(self) -> tuple[str, str]:
        """The collective; else the code: NCCL's collectives return at once, and the copy of a result waits for them."""
        return self.collective, "" if self.collective else self.code

    @property
    def where(self) -> str:
        since = time.strftime("%H:%M:%S", time.localtime(self.place.since))
        code = f"in the collective {self.collective}" if self.collective else f"at {self.code}"
        return f"step {self.place.step}, {self.place.phase}, since {since}, {code}"

    def write(self, folder: Path) -> None:
        """Errors are ignored: a note must not stop a run."""
        content = json.dumps(asdict(self)).encode().ljust(_SIZE)
        with suppress(OSError):
            file = os.open(_file(folder, self.rank), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.write(file, content)
            finally:
                os.close(file)  # network file systems show it to others then

    @classmethod
    def read(cls, folder: Path, rank: int, start: str) -> "Note | None":
        """Return a rank's note; None if there is none of this start that can be read."""
        # A network file system may know another time of the file before it is opened.
        with suppress(OSError, ValueError, TypeError, KeyError), _file(folder, rank).open() as file:
            values = json.load(file)
            values |= {"place": Place(**values["place"]), "written": os.fstat(file.fileno()).st_mtime}
            note = cls(**values)
            return note if note.start == start else None
        return None


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.json"


def _count(note: Note) -> int:
    return note.place.count


def _doing() -> Location:
    """Return where the main thread is, or where it failed, and a collective that another thread waits in."""
    main = threading.main_thread().ident
    at = {thread: Location.of(traceback.walk_stack(frame)) for thread, frame in sys._current_frames().items()}
    here = at.pop(main)  # type: ignore[arg-type]
    own = failed() or here
    others = (each.collective for each in at.values() if each.collective)
    return Location(own.code, own.collective or next(others, ""))


class Watchdog:
    """Notes where this rank is while it is entered, and explains a hang.

    If the rank has not moved for half of the time limit, the stacks of all threads are written to
    RUN/ranks/rankN.stacks; those of an earlier start are kept as rankN.stacks.before. Shortly before the limit, a rank
    that waits logs which ranks it waits for: with NCCL the process is ended at the limit. If a collective fails because
    of it, as with gloo, leaving raises a PipelineError that says the same.
    """

    def __init__(self, run: Path, rank: int, world: int, minutes: float, start: str | None = None) -> None:
        """start: the id of the start of the run whose notes `report` reads; None is that of this process."""
        self._folder, self._rank, self._world, self._minutes = run / FOLDER, rank, world, minutes
        self._interval, self._start = (
            min(_SECONDS, 60 * minutes / 20),
            (status.start_id() if start is None else start)[-64:],
        )
        self._doing, self._moved, self._polled = Location("", ""), 0.0, time.time()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        path = self._folder / f"rank{self._rank}.stacks"
        with disk_errors(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size:
                path.replace(f"{path}.before")
            self._stacks = path.open("wb")
        self._note()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join(_SECONDS)
        faulthandler.cancel_dump_traceback_later()
        if not (hangs := self._thread.is_alive()):
            self._stacks.close()
        if error and is_of_late_peer(error):
            found = f"the file system of {self._folder} hangs" if hangs else self.report()
            raise PipelineError(f"a collective waited timeout_minutes={self._minutes:g}: {found}") from error

    def report(self) -> str:
        """Say which ranks the others wait for, by the notes of all ranks, the most probable first."""
        notes = {rank: self._read(rank) for rank in range(self._world)}
        found = [note for note in notes.values() if note]
        if not found:
            return f"no rank has a note in {self._folder}"
        newest = max(note.written for note in found)
        alive = [note for note in found if newest - note.written <= _SILENT * self._interval]
        if (first := min(map(_count, found))) < max(map(_count, alive)):
            late = [note for note in alive if _count(note) == first]
        else:  # most wait in one call; of calls with as many ranks, it is a collective
            calls = Counter(note.waits_in for note in alive)
            usual = max(calls, key=lambda call: (calls[call], bool(call[0])))
            late = [note for note in alive if note.waits_in != usual]
        waiting = [note for note in alive if note not in late]
        said = [f"rank {rank} has no note" for rank, note in notes.items() if not note]
        for note in (note for note in found if note not in alive):
            silent = f"it has not written for {newest - note.written:.0f} s: stopped, or its file system hangs"
            said.append(f"rank {note.rank} on {note.host} was last seen in {note.where}: {silent}")
        said += [f"rank {note.rank} on {note.host} is in {note.where}" for note in late]
        where = f"{max(waiting, key=_count).where}; {self._folder}/rank*.stacks say where in the code"
        if not said:
            return f"all ranks are in {where}"
        return f"{first_few(said)}. {len(waiting)} of {self._world} ranks wait for it, the furthest in {where}"

    def _read(self, rank: int) -> Note | None:
        return Note.read(self._folder, rank, self._start)

    def _note(self) -> Note:
        now, doing, time_now = place(), _doing(), time.time()
        if doing != self._doing:
            self._doing, self._moved = doing, self._polled  # it has moved since then
        self._polled = time_now
        since = max(now.since, self._moved) if now.phase in _LONG else now.since
        host, still = socket.gethostname()[:64], time_now - since
        note = Note(self._rank, host, self._start, now, doing.code, doing.collective, still)
        note.write(self._folder)
        return note

    def _watch(self) -> None:
        dumped, reported, limit = False, False, 60 * self._minutes
        while True:
            # For a hanging call that holds Python's lock. It walks the stacks without the lock, which can crash a
            # process that runs: so it waits until this thread has not run for long.
            faulthandler.dump_traceback_later(max(_LOCKED, _STACKS_AFTER * limit), file=self._stacks)
            note = self._note()
            if note.still <= _STACKS_AFTER * limit:
                dumped = reported = False
            elif not dumped:
                dumped = True
                self._write_stacks()
            if note.still > _REPORT_AFTER * limit and not reported and self._leads(note):
                reported = True
                logger.warning("waiting for %.0f s: %s", note.still, self.report())
            if self._end.wait(self._interval):
                return

    def _write_stacks(self) -> None:
        """Only a thread that has Python's lock may walk the others' stacks. It writes without the lock."""
        names, frames = {thread.ident: thread.name for thread in threading.enumerate()}, sys._current_frames().items()
        stacks = (f"{names.get(number)}:\n{''.join(traceback.format_stack(frame))}\n" for number, frame in frames)
        with suppress(OSError):
            self._stacks.write("".join(stacks).encode())
            self._stacks.flush()

    def _leads(self, own: Note) -> bool:
        """Whether no lower rank waits and is about to report: then this one reports."""
        soon = 60 * self._minutes * _REPORT_AFTER - 2 * self._interval
        lower = (self._read(rank) for rank in range(self._rank))
        return not any(note and note.place.count >= own.place.count and note.still > soon for note in lower)
