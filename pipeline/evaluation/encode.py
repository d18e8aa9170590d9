"""A collection's items -> embeddings, on all processes."""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.data.sample import BadSample
from pipeline.distributed import rank_and_world
from pipeline.errors import PipelineError
from pipeline.evaluation.encoder import Encoder
from pipeline.evaluation.store import Disk, Memory
from pipeline.evaluation.tasks import Collection
from pipeline.models.chunks import require_unit
from pipeline.progress import progress_bar

GROUP = 256  # items that are packed into chunks together, and by one rank
_DEALT = 16  # to so many groups at a time, or a block of texts would be read by all
_THREADS = 16


def embed_collection(
    encoder: Encoder,
    collection: Collection,
    store: Memory | Disk | None,
    device: torch.device | str = "cpu",
    *,
    interrupted: Callable[[], bool] | None = None,
) -> bool:
    """Embed what the first rank's store lacks; False if interrupted.

    Groups of items are the same at every number of processes, and so are the embeddings, but for what the machine's
    own arithmetic makes of another number of threads. While a group is embedded the next one is read and decoded.
    An item that cannot be used raises PipelineError: a score without it would be of another test.

    store: None on all ranks but the first.  device: where the process group communicates.
    interrupted: asked on all ranks now and then, with the same answer.
    """
    rank, world = rank_and_world()
    _check_same(collection)
    plan = [_plan(collection, store) if store else None]
    if world > 1:
        dist.broadcast_object_list(plan)
    (groups,) = plan
    total = sum(len(rows) for _, rows in groups)
    count = len(collection.items)
    if rank == 0 and total < count:
        print(f"{count - total:,} of {count:,} items are embedded already")
    if not groups:
        return True
    bar = progress_bar(initial=count - total, total=count, desc="embedding", unit="item", disable=rank > 0)
    pool = ThreadPoolExecutor(_THREADS)
    with bar:

        def begin(round_: int) -> list[Future]:
            number = round_ + rank
            rows = groups[number][1] if number < len(groups) else []
            return [pool.submit(_prepared, encoder, collection, row) for row in rows]

        following = begin(0)
        try:
            for round_ in range(0, len(groups), world):
                if interrupted and interrupted():
                    return False
                current, following = following, begin(round_ + world)
                vectors = encoder.embed([future.result() for future in current]).float().to(device)
                if vectors.shape != (len(current), encoder.dimension):
                    raise PipelineError(
                        f"the encoder gives {tuple(vectors.shape)} for {len(current)} items of {encoder.dimension}"
                    )
                for (dataset, rows), part in zip(groups[round_ : round_ + world], _gathered(vectors), strict=False):
                    if store:
                        kept = part[: len(rows)].cpu().numpy()
                        # What is kept once is not embedded again: it must be right.
                        require_unit(kept, encoder.name, lambda place, rows=rows: collection.names[rows[place]])
                        store.append(dataset, rows, kept)
                    bar.update(len(rows))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return True


def _check_same(collection: Collection) -> None:
    """The ranks tell each other which items they mean by their numbers alone."""
    # Names, for keys may differ where each node has a copy of its own.
    digest = hashlib.sha256("\0".join(collection.names).encode(errors="surrogateescape")).hexdigest()
    digests = [digest] * rank_and_world()[1]
    if len(digests) > 1:
        dist.all_gather_object(digests, digest)
    if other := [rank for rank, each in enumerate(digests) if each != digests[0]]:
        raise PipelineError(
            f"rank {other[0]} finds other items in the evaluation sets than the first rank does: do all nodes see the "
            "same files, and is nobody changing them?"
        )


def _plan(collection: Collection, store: Memory | Disk) -> list[tuple[str, np.ndarray]]:
    """Groups of rows that the store lacks, each with the first dataset that needs them.

    A dataset's rows are dealt to its groups like cards: pictures, which come together, keep no rank busy alone.
    """
    groups, planned = [], np.zeros(len(collection.items), bool)
    for task in collection.tasks:
        rows = task.rows
        rows = rows[~planned[rows]]
        planned[rows] = True
        for start in range(0, len(rows), _DEALT * GROUP):
            window = rows[start : start + _DEALT * GROUP]
            hands = -(-len(window) // GROUP)
            for hand in range(hands):
                if len(missing := store.missing(window[hand::hands])):
                    groups.append((task.name, missing))
    return groups


def _prepared(encoder: Encoder, collection: Collection, row: int) -> Any:
    try:
        return encoder.prepare(collection.items[row]())
    except BadSample as reason:
        raise PipelineError(f"evaluation item {collection.names[row]}: {reason}") from None


def _gathered(vectors: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's (n, D), with rows beyond up to the first rank's, which has the most."""
    world = rank_and_world()[1]
    if world == 1:
        return [vectors]
    padded = vectors.new_zeros(GROUP, vectors.shape[1])
    padded[: len(vectors)] = vectors
    parts = [torch.empty_like(padded) for _ in range(world)] if dist.get_rank() == 0 else None
    dist.gather(padded, parts)
    return parts or []
