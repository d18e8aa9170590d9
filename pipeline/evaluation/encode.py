"""Embed a collection's items on all processes."""

import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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

T = TypeVar("T")

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
    pool = ThreadPoolExecutor(_THREADS)
    with bar:

        def begin(round_: int) -> list[Future]:
            number = round_ + rank
            rows = groups[number][1].tolist() if number < len(groups) else []
            return [pool.submit(_prepared, encoder, collection, row) for row in rows]

        following = begin(0)
        try:
            for round_ in range(0, len(groups), world):
                if interrupted and interrupted():
                    return False
                current, following = following, begin(round_ + world)
                vectors = encoder.embed([future.result() for future in current]).float().cpu().numpy()
                if vectors.shape != (len(current), encoder.dimension):
                    raise PipelineError(
                        f"the encoder returned {tuple(vectors.shape)} for {len(current)} items of {encoder.dimension}"
                    )
                parts = gather_on_first(vectors)
                for (dataset, rows), part in zip(groups[round_ : round_ + world], parts, strict=False):
                    if store:
                        # A stored vector is not computed again, so it must be right.
                        names = [collection.names[row] for row in rows]
                        require_unit(part, encoder.name, names.__getitem__)
                        store.append(dataset, rows, part)
                    bar.update(len(rows))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return True


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


def gather_on_first(value: T) -> list[T]:
    """Return the values of all ranks on the first rank, an empty list on the others. Collective."""
    rank, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.gather_object(value, values if rank == 0 else None)
    return values if rank == 0 else []
