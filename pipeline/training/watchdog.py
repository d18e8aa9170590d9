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
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType

import torch.distributed as dist

from pipeline.errors import PipelineError, first_few, is_of_late_peer
from pipeline.phases import Place, place

FOLDER = "ranks"  # in the run directory
_SECONDS = 10  # between a rank's notes; shorter if the time limit is
_SILENT = 3  # missing notes after which a process counts as stopped
_STACKS_AFTER, _REPORT_AFTER = 0.5, 0.9  # of the time limit; at the limit NCCL ends the process
_LONG = ("restore", "checkpoint", "evaluation")  # phases of many collectives, which may exceed the limit of one
_SIZE = 512  # bytes of a note at most: written in one piece over the last one, so that a reader never finds half of it

logger = logging.getLogger(__name__)


def record_collectives(run: Path) -> None:
    """Make torch's flight recorder write NCCL's last collectives to RUN/ranks/nccl_rank_N if one of them times out.

    `torchfrtrace RUN/ranks -p nccl_rank_` compares them. Variables that are set
    stay. Call it before the process group starts. torch before 2.13 may know a variable by its older name only.
    """
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

    code: the function that its main thread is in.  collective: that one of its threads waits in, or "".
    written: when, by the file system's clock, in seconds.
    """

    rank: int
    host: str
    place: Place
    code: str
    collective: str
    written: float = 0.0

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
    def read(cls, folder: Path, rank: int) -> "Note | None":
        """Return a rank's note; None if there is none that can be read."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            file = _file(folder, rank)
            written, values = file.stat().st_mtime, json.loads(file.read_text())
            values |= {"place": Place(**values["place"]), "written": written}
            return cls(**values)
        return None


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.json"


def _doing() -> tuple[str, str]:
    """Return the function that the main thread is in, and the collective that a thread waits in, or ""."""
    frames, code, collective = sys._current_frames(), "", ""
    for number, innermost in frames.items():
        if number == threading.main_thread().ident:
            code = f"{innermost.f_code.co_name} ({Path(innermost.f_code.co_filename).name}:{innermost.f_lineno})"[:99]
        frame: FrameType | None = innermost
        while frame and not collective:
            # Their calls are wrapped to be logged.
            if frame.f_globals.get("__name__") == dist.distributed_c10d.__name__ and frame.f_code.co_name != "wrapper":
                collective = frame.f_code.co_name[:50]
            frame = frame.f_back
    return code, collective


class Watchdog:
    """Notes where this rank is while it is entered, and explains a hang.

    After half of the time limit in one phase, the stacks of all threads are written to RUN/ranks/rankN.stacks. Shortly
    before the limit, a rank that waits logs which ranks it waits for: with NCCL the process is ended at the limit. If a
    collective fails because of it, as with gloo, leaving raises a PipelineError that says the same.
    """

    def __init__(self, run: Path, rank: int, world: int, minutes: float) -> None:
        self._folder, self._rank, self._world, self._minutes = run / FOLDER, rank, world, minutes
        self._interval = min(_SECONDS, 60 * minutes / 20)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks = (self._folder / f"rank{self._rank}.stacks").open("wb")
        self._note()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        if error and is_of_late_peer(error):
            raise PipelineError(f"a collective waited timeout_minutes={self._minutes:g}: {self.report()}") from error

    def report(self) -> str:
        """Say which ranks the others wait for, by the notes of all ranks."""
        notes = {rank: Note.read(self._folder, rank) for rank in range(self._world)}
        found = [note for note in notes.values() if note]
        if not found:
            return f"no rank has a note in {self._folder}"
        furthest, newest = max(note.place.count for note in found), max(note.written for note in found)
        silent = {note.rank for note in found if newest - note.written > _SILENT * self._interval}
        waiting = [note for note in found if note.place.count == furthest and note.rank not in silent]
        # Of those in one phase most wait in one collective, for those that are elsewhere.
        calls = Counter(note.collective for note in waiting)
        usual = max(calls, key=lambda name: (bool(name), calls[name]), default="")
        waiting = [note for note in waiting if note.collective == usual]
        said = [f"rank {rank} has no note" for rank, note in notes.items() if not note]
        for note in found:
            if note.rank in silent:
                said.append(f"rank {note.rank} on {note.host} was last seen in {note.where}: its process has stopped")
            elif note not in waiting:
                said.append(f"rank {note.rank} on {note.host} is in {note.where}")
        code = f"; {self._folder}/rank*.stacks say where in the code"
        if not said:
            return f"all ranks are in {waiting[0].where}{code}"
        others = f". {len(waiting)} of {self._world} ranks wait for it in {waiting[0].where}" if waiting else ""
        return f"{first_few(said)}{others}{code}"

    def _note(self) -> Place:
        now = place()
        Note(self._rank, socket.gethostname()[:64], now, *_doing()).write(self._folder)
        return now

    def _watch(self) -> None:
        seen, reported, limit = -1, -1, 60 * self._minutes
        while True:
            now = self._note()
            if now.count != seen:
                seen = now.count
                # By a thread of its own, which also runs while a hanging call holds Python's lock.
                faulthandler.dump_traceback_later(_STACKS_AFTER * limit, file=self._stacks)
            waits = now.phase not in _LONG and time.time() - now.since > _REPORT_AFTER * limit
            if waits and reported != seen and self._leads(now):
                reported = seen
                logger.warning("waiting for %.0f s: %s", time.time() - now.since, self.report())
            if self._end.wait(self._interval):
                return

    def _leads(self, now: Place) -> bool:
        """Whether no lower rank waits, too: then this one reports."""
        own = Note.read(self._folder, self._rank)
        for rank in range(self._rank):
            note = Note.read(self._folder, rank)
            if own and note and note.place.count >= now.count and own.written - note.written < 2 * self._interval:
                return False
        return True
