"""All targets of some datasets on a node: their vectors in a file that its ranks share, and their samples' records."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.data.index import load_sidecar
from pipeline.data.source import Source
from pipeline.data.teacher import query_and_target_vectors
from pipeline.distributed import gathered, on_every_rank, rank_and_world
from pipeline.errors import PipelineError
from pipeline.progress import progress_bar

# Of a sample: whether it has vectors, and the fields of its record that a reference to its target has.
FACTS = np.dtype(
    [
        ("usable", "?"),
        ("query_hash", "<u8"),
        ("target_hash", "<u8"),
        ("offset", "<u8"),
        ("length", "<u4"),
        ("crc32", "<u4"),
        ("text", "<u4"),
        ("images", "u1"),
        ("image_size", "<u2", (2,)),
    ]
)


@dataclass(frozen=True)
class Targets:
    """The targets of all samples, which are numbered through all datasets and their shards in order.

    firsts: (S + 1,) int64, the number of each shard's first sample, then the number of samples.
    datasets: (S, 2) int64, the number of the dataset of each shard, and that of the shard in the dataset.
    vectors: (N, width) float32, zeros for an unusable sample.  facts: (N,) of `FACTS`.
    """

    firsts: np.ndarray
    datasets: np.ndarray
    vectors: np.ndarray
    facts: np.ndarray

    @cached_property
    def by_query(self) -> tuple[np.ndarray, np.ndarray]:
        """The query hashes of all samples, rising, and the samples' numbers in this order."""
        hashes = np.array(self.facts["query_hash"])
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order

    def of_dataset(self, number: int) -> slice:
        """The samples of a dataset."""
        shards = np.flatnonzero(self.datasets[:, 0] == number)
        return slice(int(self.firsts[shards[0]]), int(self.firsts[shards[-1] + 1]))


@contextmanager
def shared_targets(sources: Sequence[Source], scratch: str | None) -> Iterator[Targets]:
    """Yield the targets of datasets that were opened with their teacher's vectors. Collective.

    Every node reads the stores once: its ranks read the shards in turn. The file, width x 4 bytes a sample, is in the
    folder `scratch` (default: TMPDIR) and has no name once all ranks of the node have opened it, so that it never
    outlives them.

    Raises PipelineError if the folder lacks room, and the errors of reading.
    """
    shards = [(number, shard) for number, source in enumerate(sources) for shard in range(len(source.shards))]
    sizes = [sources[number].shards[shard][1].samples for number, shard in shards]
    firsts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    metadata = sources[0].teacher_metadata
    assert metadata
    count, width = int(firsts[-1]), metadata.width
    with _shared_file(count * (4 * width + FACTS.itemsize), scratch) as (path, hosts):
        vectors = np.memmap(path, np.float32, "r+", 0, (count, width))
        facts = np.memmap(path, FACTS, "r+", 4 * count * width, (count,))
    rank, done = rank_and_world()[0], 0
    ranks = [each for each, host in enumerate(hosts) if host == hosts[rank]]
    mine = range(ranks.index(rank), len(shards), len(ranks))

    def fill() -> None:
        nonlocal done
        for each in mine:
            number, shard = shards[each]
            _fill(sources[number], shard, vectors, facts, int(firsts[each]))
            done += 1

    total = len(shards) * len({*hosts})
    with progress_bar(total=total, desc="reading vectors", unit="shard", disable=rank > 0) as bar:
        on_every_rank(fill, lambda: done, lambda now: bar.update(now - bar.n))
    yield Targets(firsts, np.array(shards, np.int64), vectors, facts)


def _fill(source: Source, shard: int, vectors: np.ndarray, facts: np.ndarray, first: int) -> None:
    """Write the targets of a shard, whose first sample is number `first`."""
    info = source.shards[shard][1]
    records = load_sidecar(source.indexes[0][0], info)
    mine = facts[first : first + len(records)]
    for name in ("query_hash", "target_hash", "offset", "length", "crc32"):
        mine[name] = records[name]
    mine["text"], mine["images"] = records["target_text"], records["target_images"]
    rows = np.flatnonzero(records["target_images"])
    mine["image_size"][rows] = records["image_sizes"][rows, records["query_images"][rows]]
    for part in query_and_target_vectors(source, shard):
        place = slice(first + part.first, first + part.first + len(part.usable))
        vectors[place], facts["usable"][place] = part.target, part.usable


@contextmanager
def _shared_file(size: int, scratch: str | None) -> Iterator[tuple[Path, list[str]]]:
    """Make a file of this size for all ranks of a node. Yields its path, and the host of every rank.

    The file is removed when all have left the block. Collective.
    """
    rank, _ = rank_and_world()
    host, folder = socket.gethostname(), ""
    hosts = gathered(host)
    first = hosts.index(host)
    if rank == first:
        folder = _reserved(size, scratch)
    try:
        path = Path(gathered(folder)[first], "targets")
        if not path.exists():
            raise PipelineError(
                f"{path}, which rank {first} on {host} made, is not there for rank {rank}: set scratch="
            )
        yield path, hosts
        gathered(None)  # all have opened it
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _reserved(size: int, scratch: str | None) -> str:
    """Make a folder with a file `targets` of this size. Its room is reserved: a full disk would kill a later writer."""
    try:
        folder = tempfile.mkdtemp(prefix="mining-", dir=scratch)
    except OSError as error:
        raise PipelineError(f"scratch={scratch}: {error.strerror}: name a folder that exists") from None
    try:
        with Path(folder, "targets").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise PipelineError(
            f"{Path(folder).parent} has no room for the targets' vectors, {size / 1e9:,.1f} GB ({error.strerror}): set "
            "scratch= to a larger folder on a local disk"
        ) from None
    return folder
