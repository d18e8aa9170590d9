"""The phases of a step: ranges in a profiler's trace, seconds in speed.jsonl, and where a rank is for the watchdog.

They are of the process, like torch's profiler: code of any layer marks a phase, and the trainer reads the marks.
"""

import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch.profiler import record_function

_MOST_MARKS = 256  # kept, if nobody reads them; a step has about ten


@dataclass(frozen=True)
class Place:
    """Where this process is. All ranks enter the same phases in the same order.

    count: phases entered or left so far.  step: its number, from 1.  since: Unix time
    in seconds at which it was entered, or returned to.
    """

    count: int
    step: int
    phase: str
    since: float


@dataclass(frozen=True)
class Location:
    """The function that a thread is in, and the collective that it waits in, or ""."""

    code: str
    collective: str

    @classmethod
    def of(cls, frames: Iterable[tuple[FrameType, int]]) -> "Location":
        """Return the location of frames with their lines, the innermost first."""
        code = collective = ""
        for frame, line in frames:
            name = frame.f_code.co_name
            code = code or f"{name} ({Path(frame.f_code.co_filename).name}:{line})"[:99]
            # Calls of collectives are wrapped to be logged.
            if frame.f_globals.get("__name__") == dist.distributed_c10d.__name__ and name != "wrapper":
                collective = collective or name[:50]
        return cls(code, collective)


_place = Place(0, 0, "between phases", time.time())
_failed: Location | None = None
_marks: deque[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = deque(maxlen=_MOST_MARKS)


@contextmanager
def phase(name: str, step: int | None = None) -> Iterator[None]:
    """Mark the code inside as a phase of the current step, or of `step`, which becomes the current one.

    The phase around it continues after it. If the code raises, the place stays, and `failed` says where it raised.
    """
    global _place, _failed
    around = _place.phase
    _place = Place(_place.count + 1, _place.step if step is None else step, name, time.time())
    _failed = None
    with record_function(name):
        began = _now()
        try:
            yield
        except BaseException as error:
            _failed = Location.of(reversed(list(traceback.walk_tb(error.__traceback__))))
            raise
        _marks.append((name, began, _now()))
    _place, _failed = Place(_place.count + 1, _place.step, around, time.time()), None


def place() -> Place:
    """Return where this process is now. Any thread may call it."""
    return _place


def failed() -> Location | None:
    """Return where the current phase raised; None if it did not. What this thread does since then is cleaning up."""
    return _failed


def take_seconds() -> dict[str, float]:
    """Return the seconds of each phase that has ended since the last call, by name.

    On a GPU they are the time between events in the current stream: call it when the work of the phases is done, as it
    is after a result was copied to the CPU; then it waits for nothing.
    """
    seconds: dict[str, float] = {}
    while _marks:
        name, began, ended = _marks.popleft()
        seconds[name] = seconds.get(name, 0.0) + _between(began, ended)
    return seconds


def _now() -> float | torch.cuda.Event:
    if not torch.cuda.is_initialized():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(began: float | torch.cuda.Event, ended: float | torch.cuda.Event) -> float:
    if isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
        ended.synchronize()
        return began.elapsed_time(ended) / 1000
    # The first phase may initialise CUDA; it then has no event at its start.
    return ended - began if isinstance(began, float) and isinstance(ended, float) else 0.0
