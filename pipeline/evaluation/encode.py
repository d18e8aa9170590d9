"""Embed groups of items on all processes, and with that a collection's items."""

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from pipeline.data.sample import BadSample
from pipeline.distributed import rank_and_world
from pipeline.errors import PipelineError
from pipeline.evaluation.encoder import Encoder
from pipeline.evaluation.store import DiskStore, MemoryStore
from pipeline.evaluation.tasks import Collection
from pipeline.models.chunks import require_unit
from pipeline.progress import progress_bar

Group = TypeVar("Group")
Read = TypeVar("Read")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

GROUP = 256  # items that one rank packs into chunks together
_WINDOW = 16  # groups over which rows are interleaved; with more, every rank would read every block of texts
_THREADS = 16


def embed_collection(
    encoder: Encoder,
    collection: Collection,
    store: MemoryStore | DiskStore | None,
    *,
    interrupted: Callable[[], bool] | None = None,
) -> bool:
    """Embed the items that the first rank's store lacks. Returns False if interrupted.

    The groups of items do not depend on the number of processes. Neither do the embeddings, except for rounding that
    depends on the number of threads. While a group is embedded, the next one is read and decoded. An unusable item
    raises PipelineError, because a score without it would not be comparable.

    store: None on all ranks but the first.
    interrupted: called on all ranks between groups; it must return the same on all.
    """
    rank, world = rank_and_world()
    _check_same(collection)
    plan = [_plan(collection, store) if store else []]
    if world > 1:
        dist.broadcast_object_list(plan)
    (groups,) = plan
    total = sum(len(rows) for _, rows in groups)
    count = len(collection.items)
    if rank == 0 and total < count:
        logger.info("%s of %s items are already embedded", f"{count - total:,}", f"{count:,}")
    if not groups:
        return True
    bar = progress_bar(initial=count - total, total=count, desc="embedding", unit="item", disable=rank > 0)
    pool, stopped = ThreadPoolExecutor(_THREADS), False

    def begin(group: tuple[str, np.ndarray]) -> Callable[[], tuple[list[int], list[Any]]]:
        rows = group[1].tolist()
        futures = [pool.submit(_prepared, encoder, collection, row) for row in rows]
        return lambda: (rows, [future.result() for future in futures])

    def embed(read: tuple[list[int], list[Any]] | None) -> np.ndarray:
        rows, prepared = read or ([], [])
        return unit_vectors(encoder, prepared, [collection.names[row] for row in rows])

    def stop() -> bool:
        nonlocal stopped
        stopped = bool(interrupted and interrupted())
        return stopped

    with bar:
        try:
            for (dataset, rows), vectors in in_turn(groups, begin, embed, stop=stop):
                assert store  # this is the first rank
                store.append(dataset, rows, vectors)
                bar.update(len(rows))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return not stopped


def _check_same(collection: Collection) -> None:
    """Raise PipelineError unless all ranks have the same items: they refer to them by number."""
    # Compare names: keys may differ if each node has its own copy of the files.
    digest = hashlib.sha256("\0".join(collection.names).encode(errors="surrogateescape")).hexdigest()
    digests = [digest] * rank_and_world()[1]
    if len(digests) > 1:
        dist.all_gather_object(digests, digest)
    if other := [rank for rank, each in enumerate(digests) if each != digests[0]]:
        raise PipelineError(
            f"rank {other[0]} found other items in the evaluation sets than rank 0: check that all nodes see the same "
            "files, and that nothing changes them"
        )


def _plan(collection: Collection, store: MemoryStore | DiskStore) -> list[tuple[str, np.ndarray]]:
    """Return groups of rows that the store lacks, each with the name of the first dataset that needs them.

    A dataset's rows are interleaved over its groups, so that consecutive pictures are spread over the ranks.
    """
    groups: list[tuple[str, np.ndarray]] = []
    planned = np.zeros(len(collection.items), bool)
    for task in collection.tasks:
        rows = task.rows
        rows = rows[~planned[rows]]
        planned[rows] = True
        for start in range(0, len(rows), _WINDOW * GROUP):
            window = rows[start : start + _WINDOW * GROUP]
            count = -(-len(window) // GROUP)
            for first in range(count):
                if len(missing := store.missing(window[first::count])):
                    groups.append((task.name, missing))
    return groups


def _prepared(encoder: Encoder, collection: Collection, row: int) -> Any:
    try:
        return encoder.prepare(collection.items[row]())
    except BadSample as reason:
        raise PipelineError(f"evaluation item {collection.names[row]}: {reason}") from None


def in_turn(
    groups: Sequence[Group],
    begin: Callable[[Group], Callable[[], Read]],
    embed: Callable[[Read | None], Result],
    *,
    ahead: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Group, Result]]:
    """Embed groups on the ranks in turn; yield each group with its result, in their order, on the first rank.

    Collective: all ranks iterate to the end, the others over nothing.

    begin: starts to read a group in a thread, and returns a function that waits for it.
    embed: returns the result of a group; called on all ranks equally often, with None on a rank without another group.
    ahead: groups that are read while one is embedded.
    stop: called on all ranks between groups; it must return the same on all.
    """
    rank, world = rank_and_world()
    mine, reading = iter(groups[rank::world]), deque[Callable[[], Read]]()
    for begun in range(0, len(groups), world):
        if stop():
            return
        reading += map(begin, islice(mine, ahead + 1 - len(reading)))
        results: list[Any] = [embed(reading.popleft()() if reading else None)]
        if world > 1:
            (own,), results = results, [None] * world
            dist.gather_object(own, results if rank == 0 else None)
        if rank == 0:
            yield from zip(groups[begun : begun + world], results, strict=False)


def unit_vectors(encoder: Encoder, prepared: Sequence[Any], names: Sequence[str]) -> np.ndarray:
    """Embed prepared items as float32 unit rows (n, D). Collective, like `Encoder.embed`.

    Raises PipelineError with an item's name for a vector that is no unit vector: a stored one is not computed again.
    """
    vectors = encoder.embed(prepared).float().cpu().numpy()
    if vectors.shape != (len(prepared), encoder.dimension):
        raise PipelineError(
            f"the encoder returned {tuple(vectors.shape)} for {len(prepared)} items of {encoder.dimension}"
        )
    require_unit(vectors, encoder.name, names.__getitem__)
    return vectors
