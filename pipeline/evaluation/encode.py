"""A collection's items -> embeddings, on all processes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from pipeline.data.collate import Encoded
from pipeline.data.sample import BadSample, Item
from pipeline.errors import PipelineError
from pipeline.evaluation.tasks import Collection
from pipeline.losses.gather import rank_and_world
from pipeline.models.chunks import Features, embed_chunks, plan_chunks
from pipeline.progress import progress_bar

_GROUP = 512  # items a rank holds decoded at a time


def embed_collection(
    model: Callable[..., torch.Tensor],
    encode: Callable[[Item], Encoded],
    collection: Collection,
    *,
    chunk_tokens: int,
    device: torch.device,
    features: Features | None = None,
    interrupted: Callable[[], bool] | None = None,
) -> torch.Tensor | None:
    """Embeddings of all items, (items, hidden) float32 on every rank.

    `model` may be a ZeRO-3 engine: all ranks run the same number of forward passes. An item that cannot be
    used raises PipelineError: a score without it would be of another test.
    features: of a vision tower that is not part of the model.
    interrupted: asked on all ranks now and then, with the same answer; where it is yes, nothing is returned.
    """
    rank, world = rank_and_world()
    count = len(collection.items)
    groups = -(-count // (_GROUP * world))
    embeddings = None
    bar = progress_bar(total=count, desc="embedding", unit="item", disable=rank > 0)
    with bar, ThreadPoolExecutor(16) as pool:
        for group in range(groups):
            if interrupted and interrupted():
                return None
            first, last = group * _GROUP * world, min((group + 1) * _GROUP * world, count)
            rows = list(range(first + rank, last, world))
            encoded = list(pool.map(lambda row: _encode(encode, collection, row), rows))
            part = embed_chunks(model, plan_chunks(encoded, chunk_tokens, device), len(rows), features)
            if embeddings is None:
                embeddings = part.new_zeros(count, part.shape[1])
            embeddings[rows] = part
            bar.update(last - first)
    if world > 1:
        dist.all_reduce(embeddings)  # every row is zero on all ranks but one
    return embeddings


def _encode(encode: Callable[[Item], Encoded], collection: Collection, row: int) -> Encoded:
    try:
        return encode(collection.items[row]())
    except BadSample as reason:
        raise PipelineError(f"evaluation item {collection.names[row]}: {reason}") from None
