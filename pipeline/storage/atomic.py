"""Replace a file or a folder as a whole: write it under a temporary name beside it, then rename it."""

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path, *, durable: bool = True, keep: bool = False) -> Iterator[Path]:
    """Yield a temporary path for a new file or folder, which becomes `target` when the block ends without an error.

    Readers see the old file or the whole new one. An existing folder is renamed before, and removed afterwards. After
    an error the temporary path is removed, and `target` is unchanged. A killed process leaves it: see
    `remove_leftovers`.

    durable: flush the content and the new name to the disk. Otherwise a crash of the machine may leave an empty file.
    keep: a folder that has appeared at `target` stays, and the new one is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # The host's name, because processes on several nodes may write the same target.
    partial = target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}.partial")
    old = partial.with_suffix(".old.partial")
    try:
        yield partial
        if durable:
            sync(partial)
        if partial.is_dir() and os.path.lexists(target) and not keep:
            target.rename(old)
        try:
            partial.replace(target)
        except OSError as error:  # only the rename itself is sure to see a folder that another node wrote to NFS
            if not keep or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            remove(partial)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(target):
            old.rename(target)
        remove(partial)
        raise
    if durable:
        sync_entry(target.parent)
    remove(old)


def write_file(target: Path, data: bytes, *, durable: bool = True) -> None:
    """Write bytes to `target`, as `replacing` does."""
    with replacing(target, durable=durable) as partial:
        partial.write_bytes(data)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left in `folder` under temporary names of targets that match the pattern `name`."""
    for partial in folder.glob(f".{name}.*.partial"):
        remove(partial)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or a folder with all that it contains, to the disk."""
    for each in (*path.rglob("*"), path) if path.is_dir() else (path,):
        sync_entry(each)


def sync_entry(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
