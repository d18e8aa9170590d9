"""Limits of the machine that can be checked before a run: shared and other memory, threads, files.

Containers have 64 MB of /dev/shm by default. A batch that does not fit there kills a data worker, or a rank.
"""

import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from pipeline.config import Recipe
from pipeline.data.lengths import Lengths
from pipeline.data.source import Source
from pipeline.errors import PipelineError

SHARED = Path("/dev/shm")
MORE_SHARED = (
    "give the container more (docker run --shm-size=8g, or --ipc=host), or set data.workers=0, which does not use it"
)
_SHARDS = 1000  # that are sampled
_REFERRING_SHARDS = 16  # of a dataset, whose mined negatives are sampled: each is a read
_FILES, _THREADS = 64, 16  # of a process, about
_TEMPORARY = 64 << 20  # bytes


def require_shared_memory(recipe: Recipe, source: Source, lengths: Lengths, world: int, ranks: int) -> None:
    """Raise PipelineError if half of the ranks' first batch does not fit.  ranks: on this machine.

    Half, because the sizes are estimated, and no run is to be refused wrongly. A worker reports a batch that does not
    fit.
    """
    least = ranks * batch_bytes(recipe, source, lengths, world) // 2
    if (free := free_bytes(SHARED)) is not None and least > free:
        raise PipelineError(
            f"{SHARED} has {free / 1e6:,.0f} MB free, and {ranks} process{'es' * (ranks > 1)} on this machine need "
            f"about {least / 1e6:,.0f}: {MORE_SHARED}"
        )


def batch_bytes(recipe: Recipe, source: Source, lengths: Lengths, world: int) -> int:
    """Estimate the shared memory of a rank's part of a batch, in bytes; 0 without workers, which do not use it."""
    return recipe.batch.global_batch // world * pair_bytes(source, lengths) if recipe.data.workers else 0


def free_bytes(folder: Path) -> int | None:
    """Return the free bytes of a folder's file system; None if the folder cannot be read."""
    with suppress(OSError):
        return shutil.disk_usage(folder).free
    return None


def pair_bytes(source: Source, lengths: Lengths) -> int:
    """Estimate the bytes of an average pair's image tiles, with one patch per image token.

    Mined negatives count with their images, but not with videos, which references do not tell of.
    """
    tiling, total = lengths.tiling, 0
    shards = [shard for _, shard in source.shards[:: max(1, len(source.shards) // _SHARDS)]]
    for shard in shards:
        sizes = [tiling.tokens(height, width, anyres=True) for width, height in shard.image_sizes if width and height]
        total += (
            shard.images * sum(sizes) // max(len(sizes), 1) + shard.videos * lengths.video_frames * tiling.frame_patches
        )
    mean = total / max(sum(shard.samples for shard in shards), 1) + _mined_tokens(source, lengths)
    return int(3 * tiling.patch**2 * mean)


def _mined_tokens(source: Source, lengths: Lengths) -> float:
    """Return the mean number of image tokens of a pair's mined negatives, from the first block of some shards."""
    total, samples = 0.0, 0
    for number, (_, index) in enumerate(source.indexes if source.mined else ()):
        tokens, rows = 0, 0
        for shard in range(0, len(index.shards), -(-len(index.shards) // _REFERRING_SHARDS)):
            count = min(index.shards[shard].samples, source.data.block_samples)
            references = source.mined[number].references(shard, 0, count)
            rows += count
            shown = references[(references["shard"] >= 0) & (references["images"] > 0)]
            images_of = np.column_stack([shown["images"], shown["image_size"]])
            kinds, counts = np.unique(images_of, axis=0, return_counts=True)
            for (images, width, height), times in zip(kinds.tolist(), counts.tolist(), strict=True):
                if width and height:  # else the image is unreadable; each of several images is one tile
                    tokens += times * images * lengths.tiling.tokens(height, width, anyres=images == 1)
        total += tokens / rows * index.samples
        samples += index.samples
    return total / max(samples, 1)


def raise_open_files() -> None:
    """Raise the limit of open files to its maximum: each batch in transit needs some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # the system's maximum is lower than the hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def too_low(recipe: Recipe, world: int, ranks: int) -> Iterator[str]:
    """The limits of this process that are too low for the run, and what to do about each.  ranks: on this machine."""
    files, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[1], _FILES + world + 16 * recipe.data.workers
    if 0 <= files < needed:
        yield f"a process may open {files} files, and about {needed} are needed: raise it (ulimit -Hn {2 * needed})"
    threads = ranks * (1 + recipe.data.workers) * _THREADS
    for limit, most in (("ulimit -u", resource.getrlimit(resource.RLIMIT_NPROC)[0]), ("pids.max", _cgroup("pids"))):
        if most is not None and 0 <= most < threads:
            yield f"{limit} allows {most} threads, and about {threads} are needed: raise it, or lower data.workers"
    memory = recipe.data.memory_mb
    if (most := _cgroup("memory")) is not None and most < ranks * memory << 20:
        yield (
            f"the job may use {most >> 20:,} MiB of memory, and {ranks} times data.memory_mb={memory} do not fit: ask "
            "for more (--mem), or lower data.memory_mb"
        )
    try:
        folder = Path(tempfile.gettempdir())
    except OSError as error:
        yield f"no folder for temporary files can be written: set TMPDIR to a writable one ({error.strerror})"
        return
    if (free := free_bytes(folder)) is not None and free < _TEMPORARY:
        yield f"{folder} has {free / 1e6:,.0f} MB free: free space there, or set TMPDIR to another folder"


def available_memory() -> int:
    """Return how many bytes this process may still use, by the machine's memory and its control groups' limits.

    Memory that caches files counts as available.
    """
    available = []
    with suppress(OSError):
        available.append(_numbers(Path("/proc/meminfo"))["MemAvailable:"] << 10)
    for group, version_1 in _groups("memory"):
        used, total = ("usage_in_bytes", "total_") if version_1 else ("current", "")
        with suppress(OSError, ValueError, KeyError):  # no such limit, or "max"
            limit = int((group / _limit_file("memory", version_1)).read_text())
            counts = _numbers(group / "memory.stat")
            cached = counts[f"{total}active_file"] + counts[f"{total}inactive_file"]
            available.append(limit - int((group / f"memory.{used}").read_text()) + cached)
    return max(min(available, default=0), 0)


def _numbers(file: Path) -> dict[str, int]:
    """Read lines of a name and a number."""
    fields = (line.split() for line in file.read_text().splitlines())
    return {name: int(value) for name, value, *_ in fields}


def _cgroup(kind: str) -> int | None:
    """The lowest limit of this process's control groups; None without a known limit."""
    limits = []
    for group, version_1 in _groups(kind):
        with suppress(OSError, ValueError):  # no such limit, or "max"
            limits.append(int((group / _limit_file(kind, version_1)).read_text()))
    return min(limits, default=None)


def _limit_file(kind: str, version_1: bool) -> str:
    return "memory.limit_in_bytes" if version_1 and kind == "memory" else f"{kind}.max"


def _groups(kind: str) -> Iterator[tuple[Path, bool]]:
    """Iterate over the folders of this process's control groups, and whether they are of version 1."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            version_1 = kind in controllers.split(",")
            group = Path("/sys/fs/cgroup", kind if version_1 else "") / path.strip("/")
            for folder in (group, *group.parents) if version_1 or not controllers else ():
                yield folder, version_1
