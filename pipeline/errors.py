"""The one exception for what a user can mend, and how every command line shows it."""

import errno
import functools
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline import home, interrupt
from pipeline.jobs import launch

_SHOWN = 80  # characters


class PipelineError(Exception):
    """Something the person at the keyboard can put right; the message says what and how."""


def printable(text: str, keep: str = "") -> str:
    """`text` as a terminal may show it: its control characters, and all that is not seen, as Python writes them.

    What comes from data, a name say, could otherwise move the cursor, colour or hide what is printed. keep: characters
    that stay as they are.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """A value of any length, for a message."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Around what writes to `where`: turn a disk's refusal, also as a library says it, into PipelineError."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not _is_of_full_disk(error):
            raise
        raise PipelineError(_refusal(error, where)) from error


def _is_of_full_disk(error: BaseException) -> bool:
    """Whether a disk took no more, by the error's number, or by what torch and safetensors say."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    return any(words in str(error) for words in _WRITERS) and "PytorchStreamReader" not in str(error)


def _refusal(error: BaseException, where: Path | None) -> str:
    room = ""
    with suppress(OSError, StopIteration, AttributeError):
        there = next(path for path in (where, *where.absolute().parents) if path.is_dir())
        room = f" ({shutil.disk_usage(there).free / 1e6:,.0f} MB free)"
    reason = "the file could not be written to its end"
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
    return (
        f"{where or 'a file'} cannot be written: {reason}{room}. Make room or mend that, then start the same command "
        "again"
    )


_WRITERS = ("PytorchStreamWriter", "inline_container", "iostream error", "No space left on device")


def command_line(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a `main` so that a `PipelineError` ends the process with one clear line and status 2, Ctrl-C with 130.

    Of several ranks the first reports at once. The others, who usually met the same error or only lost the
    connection to the first, wait a moment, so that the launcher ends them before they speak. None of them takes
    leave in order: what waits for a failed rank must not wait for its clean-up.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        rank, lost = 0, False
        try:
            launch.adopt()
            for name in ("RANK", "WORLD_SIZE"):
                if not os.environ.get(name, "0").isdecimal():
                    raise PipelineError(f"{name}={os.environ[name]} in the environment is of no launcher: unset it")
            rank = int(os.environ.get("RANK", 0))
            sys.argv[1:] = map(_with_home, sys.argv[1:])
            with interrupt.handled():
                main()
                return
        except KeyboardInterrupt:
            interrupt.end()
        except Exception as error:
            if interrupt.interrupted():
                interrupt.end()
            alone = os.environ.get("WORLD_SIZE", "1") == "1"
            if isinstance(error, PipelineError):
                message = str(error)
            elif _is_of_full_disk(error):
                message = _refusal(error, Path(error.filename) if getattr(error, "filename", None) else None)
            elif failed := of_failed_worker(error):
                message = failed
            elif not alone and is_of_lost_peer(error):
                message, lost = "the connection to another rank is lost; what that one says is the cause", True
            elif not alone and is_of_late_peer(error):
                message = "another rank did not answer in time (timeout_minutes): does its process or its node hang?"
            elif alone:
                raise
            else:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        if rank or lost:
            time.sleep(5)
        sys.stdout.flush()
        where = f" (rank {rank})" if rank else ""
        print(f"error{where}: {printable(message, keep=chr(10))}", file=sys.stderr, flush=True)
        os._exit(2)

    return wrapped


def _with_home(argument: str) -> str:
    """`~/x`, also in `--out=~/x` and `run=~/x`, which not every shell replaces: no folder is to be called `~`."""
    if not re.match(r"([\w.-]+=)?~[^/]*/", argument):
        return argument
    try:
        return home.expanded(argument)
    except ValueError as error:
        raise PipelineError(str(error)) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


# How torch, cuBLAS, cuDNN and NCCL say it.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")


def of_failed_worker(error: BaseException) -> str:
    """What to say where a data worker has died, which torch raises in whatever a rank is at; empty: it is another."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not text.startswith("DataLoader"):
        return ""
    return (
        f"a data worker failed: {text.splitlines()[0]}; if it ran out of memory (or of /dev/shm), lower data.workers "
        "or data.memory_mb"
    )


def is_of_late_peer(error: BaseException) -> bool:
    """Whether another process did not answer in time, as gloo says it."""
    return "Timed out waiting" in str(error)


def is_of_lost_peer(error: BaseException) -> bool:
    """Whether it says no more than that another process is gone."""
    return any(words in str(error) for words in _LOST_PEER)


# How gloo and NCCL say that another process is gone.
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",
    "Broken pipe",
    "remote process exited",
)
