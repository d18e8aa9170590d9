"""The exception for what a user can fix, and messages for what disks, workers and other ranks raise."""

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_SHOWN = 80  # characters
# How torch and safetensors report a full disk; how torch, cuBLAS, cuDNN and NCCL report that memory is exhausted; how
# gloo and NCCL report that another process has ended.
_DISK_FULL = (
    "PytorchStreamWriter",
    "inline_container",
    "iostream error",
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "Read-only file system",
)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",
    "Broken pipe",
    "remote process exited",
)


class PipelineError(Exception):
    """An error that the user can fix; the message says what is wrong and what to do."""


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters and other invisible ones escaped, as Python writes them.

    Text from data, such as a name, could otherwise move the cursor, or colour or hide what is printed.
    keep: characters that are not escaped.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """A value of any length, cut for a message."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def first_few(names: Sequence[str], count: int = 4) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Around code that writes to `where`: turn a disk's error, also as a library reports it, into PipelineError."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not _is_full_disk(error):
            raise
        raise PipelineError(_write_error(error, where)) from error


def disk_message(error: BaseException) -> str:
    """The message for a full or read-only disk; empty for another error."""
    if not _is_full_disk(error):
        return ""
    name = error.filename if isinstance(error, OSError) else None
    return _write_error(error, Path(name) if name else None)


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    return any(words in str(error) for words in _DISK_FULL) and "PytorchStreamReader" not in str(error)


def _write_error(error: BaseException, where: Path | None) -> str:
    room = ""
    if where:
        with suppress(OSError, StopIteration):
            folder = next(path for path in (where, *where.absolute().parents) if path.is_dir())
            room = f" ({shutil.disk_usage(folder).free / 1e6:,.0f} MB free)"
    reason = (
        (error.strerror or str(error)) if isinstance(error, OSError) else "the file could not be written completely"
    )
    return (
        f"{where or 'a file'} cannot be written: {reason}{room}. Free space or correct that, then start the same "
        "command again"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def of_failed_worker(error: BaseException) -> str:
    """The message if a data worker died, which torch raises wherever the rank is; empty for another error."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not text.startswith("DataLoader"):
        return ""
    return (
        f"a data worker failed: {text.splitlines()[0]}; if it ran out of memory (or of /dev/shm), lower data.workers "
        "or data.memory_mb"
    )


def is_of_late_peer(error: BaseException) -> bool:
    """Whether another process did not answer in time, as gloo reports it."""
    return "Timed out waiting" in str(error)


def is_of_lost_peer(error: BaseException) -> bool:
    """Whether the error only says that another process has ended."""
    return any(words in str(error) for words in _LOST_PEER)
