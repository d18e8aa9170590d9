"""The phases of a step: ranges in a profiler's trace, seconds in speed.jsonl, and where a rank is for the watchdog.

They are of the process, like torch's profiler: code of any layer marks a phase, and the trainer reads the marks.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
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


_place = Place(0, 0, "between phases", time.time())
_marks: deque[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = deque(maxlen=_MOST_MARKS)


@contextmanager
def phase(name: str, step: int | None = None) -> Iterator[None]:
    """Mark the code inside as a phase of the current step, or of `step`, which becomes the current one.

    The phase around it continues after it. If the code raises, the place stays: this is where the process failed.
    """
    global _place
    around = _place.phase
    _place = Place(_place.count + 1, _place.step if step is None else step, name, time.time())
    with record_function(name):
        began = _now()
        yield
        _marks.append((name, began, _now()))
    _place = Place(_place.count + 1, _place.step, around, time.time())


def place() -> Place:
    """Return where this process is now. Any thread may call it."""
    return _place


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
