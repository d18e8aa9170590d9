"""Convert a published checkpoint once, into a cache folder that all processes of a user share."""

import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pipeline import home
from pipeline.errors import PipelineError, disk_errors
from pipeline.storage import lock
from pipeline.storage.atomic import remove_leftovers, replacing

_POLL_SECONDS = 1
_MOST_HOURS = 6  # that another process may take to convert
_RANDOM = random.SystemRandom()  # drawing from the global generator would change the numbers of a seeded program


def converted_once(name: str, size: int, convert: Callable[[Path], None]) -> Path:
    """Return the folder `name` in the cache; `convert` writes it if it is not there yet.

    size: about the bytes of disk that the folder needs. A process that is killed leaves no folder of this name, and the
    next one starts over. Where several processes want it, on one node or on several, one converts and the others wait
    for its lock: a job's first rank, or each node's if nodes do not share the cache.

    Raises PipelineError if the cache cannot be written, if the disk is too small, or after six hours of waiting.
    """
    cache = home.cache_folder()
    target, waiting, begun = cache / name, "", time.monotonic()
    others_first = _seconds_for_others()
    while not target.exists():
        waited = time.monotonic() - begun
        if waited > 3600 * _MOST_HOURS:
            raise PipelineError(f"waited {_MOST_HOURS} hours for {target}: {waiting or 'no process converts it'}")
        busy = lock.in_use(str(cache))
        if not busy and waited >= others_first:
            if not home.is_writable(cache):
                raise _unsuited(target, size, "cannot be written")
            try:
                with lock.held([str(cache)]):
                    _convert(target, size, convert)
                return target
            except lock.InUse as error:
                busy = str(error)
        busy = busy.removesuffix(lock.ADVICE)  # that process may be another job's, and convert another model
        if busy and not waiting and os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"waiting for {target}: {busy}", file=sys.stderr)
        waiting = busy or waiting
        time.sleep(_POLL_SECONDS * _RANDOM.uniform(0.5, 1.5))  # so that processes do not try all at once for ever
    return target


def _convert(target: Path, size: int, convert: Callable[[Path], None]) -> None:
    """Write the folder. This process holds the cache's lock, so what lies beside it is of killed processes."""
    remove_leftovers(target.parent)
    if target.exists():
        return  # another process was faster
    with disk_errors(target):
        if (free := shutil.disk_usage(target.parent).free) < size:
            raise _unsuited(target, size, f"has {free / 1e9:.1f} GB of free space")
        print(f"converting once, to {target}; {home.CACHE} names another cache folder", file=sys.stderr)
        with replacing(target, keep=True) as partial:  # NFS may not have shown a copy that is there
            convert(partial)


def _seconds_for_others() -> float:
    """How long this process leaves it to others to begin: first to a job's first rank, then to each node's."""
    if os.environ.get("RANK", "0") == "0":
        return 0
    return _RANDOM.uniform(5, 10) if os.environ.get("LOCAL_RANK", "0") == "0" else _RANDOM.uniform(20, 40)


def _unsuited(target: Path, size: int, fault: str) -> PipelineError:
    """The error for a cache folder in which a copy of `size` bytes cannot be written."""
    return PipelineError(
        f"{target.name} must be converted once, into {target.parent}, which {fault}: set {home.CACHE} to a folder with "
        f"{size / 1e9:.1f} GB of free space, which all nodes see"
    )
