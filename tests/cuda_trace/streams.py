"""Stand-ins for CUDA's streams and events. A tensor that another stream makes must be waited for, and be recorded."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


class Stream:
    """queued: its operators so far.  seen: of other streams, how many operators are done before its next one."""

    def __init__(self, device: Any = None) -> None:
        self.queued = 0
        self.seen: dict[Stream, int] = {}

    def record_event(self) -> "Event":
        return Event(self)

    def wait_event(self, event: "Event") -> None:
        self.seen[event.stream] = max(self.seen.get(event.stream, 0), event.queued)


class Event:
    """wait: is called when the host waits for it."""

    wait: Callable[[], None]

    def __init__(self, stream: Stream) -> None:
        self.stream, self.queued = stream, stream.queued

    def synchronize(self) -> None:
        self.wait()


_default = _current = Stream()


@contextmanager
def stand_ins(wait: Callable[[], None]) -> Iterator[None]:
    """Replace torch's streams and events.  wait: is called when the host waits for an event."""
    torch_cuda = {
        "Stream": Stream,
        "stream": _entered,
        "current_stream": lambda device=None: _current,
        "set_device": lambda device: None,
    }
    with ExitStack() as replaced:
        for name, value in torch_cuda.items():
            replaced.enter_context(mock.patch.object(torch.cuda, name, value))
        replaced.enter_context(mock.patch.object(Tensor, "record_stream", _record))
        replaced.enter_context(mock.patch.object(Event, "wait", staticmethod(wait), create=True))
        yield


@contextmanager
def _entered(stream: Stream) -> Iterator[None]:
    global _current
    before, _current = _current, stream
    try:
        yield
    finally:
        _current = before


def _record(x: Tensor, stream: Stream) -> None:
    x.origin["recorded"].add(stream)  # type: ignore[attr-defined]


def made(x: Tensor) -> None:
    """Note that the current stream makes a tensor on the device."""
    _current.queued += 1
    if _current is not _default:
        x.origin = {"stream": _current, "number": _current.queued, "recorded": set()}  # type: ignore[attr-defined]


def viewed(x: Tensor, of: Tensor) -> None:
    """Note that a tensor shares another's memory."""
    if hasattr(of, "origin"):
        x.origin = of.origin  # type: ignore[attr-defined]


def used(x: Tensor, where: str) -> None:
    """Check that the current stream may use a tensor on the device."""
    origin = getattr(x, "origin", None)
    if origin is None or origin["stream"] is _current:
        return
    assert _current.seen.get(origin["stream"], 0) >= origin["number"], f"{where}: used before another stream made it"
    assert _current in origin["recorded"], f"{where}: its memory may be used again by the stream that made it"
