"""Limits of the machine that can be checked before a run: shared memory, threads, memory.

Containers have 64 MB of /dev/shm by default. A batch that does not fit there kills a data worker, or a rank.
"""

import resource
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pipeline.config import Recipe
from pipeline.data.lengths import Lengths
from pipeline.data.source import Source
from pipeline.errors import PipelineError

SHARED = Path("/dev/shm")
_SHARDS = 1000  # that are sampled
_THREADS = 16  # of a process, about


def require_shared_memory(recipe: Recipe, source: Source, lengths: Lengths, world: int, ranks: int) -> None:
    """Raise PipelineError if half of the ranks' first batch does not fit.  ranks: on this machine.

    Half, because the sizes are estimated, and no run is to be refused wrongly. A worker reports a batch that does not
    fit.
    """
    if not recipe.data.workers:
        return
    least = ranks * (recipe.batch.global_batch // world * pair_bytes(source, lengths)) // 2
    if least > (free := shutil.disk_usage(SHARED).free):
        raise PipelineError(
            f"{SHARED} has {free / 1e6:,.0f} MB free, and {ranks} process{'es' * (ranks > 1)} on this machine need "
            f"about {least / 1e6:,.0f}: give the container more (docker run --shm-size="
            f"{max(1, round(8 * least / 1e9))}g, or --ipc=host), or set data.workers=0, which does not use it"
        )


def pair_bytes(source: Source, lengths: Lengths) -> int:
    """Estimate the bytes of an average pair's image tiles, with one patch per image token."""
    tiling, total = lengths.tiling, 0
    shards = [shard for _, shard in source.shards[:: max(1, len(source.shards) // _SHARDS)]]
    for shard in shards:
        sizes = [tiling.tokens(height, width, anyres=True) for width, height in shard.image_sizes if width and height]
        total += (
            shard.images * sum(sizes) // max(len(sizes), 1) + shard.videos * lengths.video_frames * tiling.frame_patches
        )
    return int(3 * tiling.patch**2 * total) // max(sum(shard.samples for shard in shards), 1)


def raise_open_files() -> None:
    """Raise the limit of open files to its maximum: each batch in transit needs some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # the system's maximum is lower than the hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def too_low(recipe: Recipe, ranks: int) -> Iterator[str]:
    """The limits of this process that are too low for the run, and what to do about each.  ranks: on this machine."""
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


def _cgroup(kind: str) -> int | None:
    """The lowest limit of this process's control groups; None without a known limit."""
    limits = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            version_1 = kind in controllers.split(",")
            root = Path("/sys/fs/cgroup", kind if version_1 else "")
            file = "memory.limit_in_bytes" if version_1 and kind == "memory" else f"{kind}.max"
            group = root / path.strip("/")
            for folder in (group, *group.parents) if version_1 or not controllers else ():
                with suppress(OSError, ValueError):  # no such limit, or "max"
                    limits.append(int((folder / file).read_text()))
    return min(limits, default=None)
