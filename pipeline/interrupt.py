"""Ctrl-C: print one line instead of a traceback, and exit with status 130.

Python runs a signal handler only between its own instructions, so a process that waits in gloo, NCCL or a driver does
not notice the signal. A thread reads the signal at once, and ends the process if it does not end by itself in time.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # the exit status that shells use: 128 + SIGINT

_LEAVE_SECONDS = 5  # for an orderly exit
_ONE_SECOND = 1  # two signals within it count as one: one comes from the terminal, the other from a launcher
_Handler = Callable[[int, FrameType | None], None]

_instead: _Handler | None = None
_interrupted = False


def exit_while_importing() -> None:
    """End at once on Ctrl-C until `handled` begins: nothing has started yet that could be left unfinished."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, lambda number, frame: end())


@contextmanager
def handled() -> Iterator[None]:
    """Inside, the first Ctrl-C raises KeyboardInterrupt, and a second one ends the process at once.

    Does nothing where SIGINT is ignored, as in a background job of a shell.
    """
    global _interrupted
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield
        return
    os.register_at_fork(after_in_child=_forked)
    _interrupted = False
    read, write = os.pipe()
    os.set_blocking(write, False)
    handler, wakeup = signal.signal(signal.SIGINT, _handle), signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    sys.unraisablehook = _unraisable
    threading.Thread(target=_listen, args=(read,), daemon=True).start()
    try:
        yield
    finally:
        sys.unraisablehook = sys.__unraisablehook__
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGINT, handler)
        os.close(write)


@contextmanager
def postponed(note: _Handler) -> Iterator[None]:
    """Inside, the first Ctrl-C calls `note`, and the program stops by itself; a second one ends it at once."""
    global _instead
    _instead = note
    try:
        yield
    finally:
        _instead = None


def interrupted() -> bool:
    """Whether Ctrl-C ended this process: any other error is then a consequence of it."""
    return _interrupted


def end() -> NoReturn:
    """Exit; of several ranks, only the first prints the line."""
    with suppress(Exception):
        sys.stdout.flush()
    if int(os.environ.get("RANK", 0)) == 0:
        _say("interrupted; start the same command to continue")
    os._exit(INTERRUPTED)


def _handle(number: int, frame: FrameType | None) -> None:
    global _interrupted
    if _instead:
        _instead(number, frame)
    elif not _interrupted:  # raise once: a second time would interrupt the orderly exit with a traceback
        _interrupted = True
        raise KeyboardInterrupt


def _unraisable(raised: "sys.UnraisableHookArgs") -> None:
    """A C callback, for example a compiler's, would swallow the exception and print a traceback: exit instead."""
    if issubclass(raised.exc_type, KeyboardInterrupt):
        end()
    sys.__unraisablehook__(raised)


def _listen(read: int) -> None:
    first = 0.0
    # torchrun's second Ctrl-C arrives as SIGTERM. Slurm's SIGTERM asks to stop, which the first signal already did.
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and "SLURM_JOB_ID" not in os.environ
    while numbers := os.read(read, 64):
        is_second = first > 0 and time.monotonic() - first > _ONE_SECOND
        if is_second and under_torchrun and signal.SIGTERM in numbers:
            end()
        if signal.SIGINT not in numbers or signal.getsignal(signal.SIGINT) is not _handle:
            continue  # the program has a handler of its own
        if is_second:
            end()
        if first:
            continue
        first = time.monotonic()
        if _instead is None:
            late = threading.Timer(_LEAVE_SECONDS, end)
            late.daemon = True
            late.start()
        elif int(os.environ.get("RANK", 0)) == 0:
            _say("interrupted: finishing this step, then writing a checkpoint; press Ctrl-C once more to end at once")
    os.close(read)


def _say(line: str) -> None:
    """Write without Python's buffers, whose locks another thread may hold, and on a new line after a progress bar."""
    with suppress(OSError):
        os.write(2, f"\n{line}\n".encode() if os.isatty(2) else f"{line}\n".encode())


def _forked() -> None:
    """Signals of a child process do not go to its parent's thread."""
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)
