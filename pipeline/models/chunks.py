"""Many items through a model, in chunks that every rank runs in step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from pipeline.data.collate import Encoded, Packed, pack
from pipeline.errors import PipelineError

UNIT_TOLERANCE = 1e-4  # of a unit vector's length; what bf16 leaves is more, and would favour the longer ones

_DUMMY = Encoded(np.zeros(1, np.int32))


def chunk_tokens_for(padded: bool) -> int:
    """A good `chunk_tokens` where items are only embedded: attention that pads does so less in a small chunk."""
    return 4096 if padded else 16384


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some of the items; `rows` says which. A chunk without rows has a dummy item.

    with_images: some rank's chunk of this number has an image.  padded: see `plan_chunks`.
    """

    rows: torch.Tensor
    items: tuple[Encoded, ...]
    with_images: bool
    padded: bool

    @property
    def packed(self) -> Packed:
        """The items in one row, made at each use: a step's chunks would hold all of its tokens a second time."""
        return pack(self.items)

    @property
    def size(self) -> int:
        """Tokens, as `chunk_tokens` counts them."""
        lengths = [len(item.input_ids) for item in self.items]
        return len(lengths) * max(lengths) if self.padded else sum(lengths)


def plan_chunks(
    items: Sequence[Encoded],
    chunk_tokens: int,
    device: torch.device,
    *,
    padded: bool = True,
    all_with_images: bool = False,
) -> list[Chunk]:
    """Cut items into chunks of at most `chunk_tokens` tokens, the longest first.

    An item longer than that is a chunk by itself.

    All ranks get the same number of chunks, the last ones empty where a rank has fewer items, and agree on which
    chunks run the vision tower: under ZeRO-3 a rank that ran other modules than the rest would hang the job.
    padded: the model's attention pads a chunk's items to its longest (`pads` of a model), and so many tokens count.
    all_with_images: all do.
    """
    lengths = np.array([len(item.input_ids) for item in items])
    cuts: list[list[int]] = []
    size = 0
    for row in np.argsort(-lengths, kind="stable").tolist():
        # Padded, an item takes as much as the chunk's longest, which is its first.
        size += lengths[cuts[-1][0]] if cuts and padded else lengths[row]
        if not cuts or size > chunk_tokens:
            cuts.append([])
            size = lengths[row]
        cuts[-1].append(row)
    images = [all_with_images or any(items[row].images for row in rows) for rows in cuts]
    if dist.is_initialized():
        count = torch.tensor(len(cuts), device=device)
        dist.all_reduce(count, dist.ReduceOp.MAX)
        cuts += [[]] * (int(count) - len(cuts))
        flags = torch.tensor(images + [all_with_images] * (len(cuts) - len(images)), dtype=torch.int32, device=device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        images = flags.bool().tolist()
    return [
        Chunk(
            torch.tensor(rows, dtype=torch.long, device=device),
            tuple(items[row] for row in rows) or (_DUMMY,),
            flag,
            padded,
        )
        for rows, flag in zip(cuts, images, strict=True)
    ]


# What a frozen part that is outside the model makes of a chunk; None where there is nothing for it to see.
Features = Callable[[Chunk], torch.Tensor | None]


def run_chunk(model: Callable[..., torch.Tensor], chunk: Chunk, features: Features | None = None) -> torch.Tensor:
    """The embeddings of a chunk's items, (len(rows), hidden)."""
    packed = chunk.packed.to(chunk.rows.device)
    return model(packed, chunk.with_images, features(chunk) if features else None)[: len(chunk.rows)]


@torch.no_grad()
def embed_chunks(
    model: Callable[..., torch.Tensor], chunks: Sequence[Chunk], count: int, features: Features | None = None
) -> torch.Tensor:
    """All `count` items' embeddings in the items' order, (count, hidden) float32, without a graph."""
    return in_order(chunks, [run_chunk(model, chunk, features) for chunk in chunks], count)


def in_order(chunks: Sequence[Chunk], parts: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """The chunks' embeddings, each (len(rows), hidden), as one (count, hidden) in the items' order."""
    embeddings = parts[0].new_empty(count, parts[0].shape[1])
    for chunk, part in zip(chunks, parts, strict=True):
        embeddings[chunk.rows] = part.detach()
    return embeddings


def require_unit(vectors: torch.Tensor | np.ndarray, model: str, name_of: Callable[[int], str]) -> None:
    """Raise PipelineError for a vector (of n, D, on the CPU) that is no unit vector: for one, a NaN is not.

    To be asked where vectors leave a model, before they are kept or compared.  name_of: a row's item, for the error.
    """
    lengths = np.linalg.norm(np.asarray(vectors), axis=1)
    if (wrong := np.flatnonzero(~(np.abs(lengths - 1) <= UNIT_TOLERANCE))).size:
        raise PipelineError(
            f"{model}: the embedding of {name_of(int(wrong[0]))} has length {lengths[wrong[0]]:.5g}, not 1: check the "
            "model's weights, whether it overflows, and that its vectors are normalised in float32"
        )
