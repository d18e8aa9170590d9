"""Run many items through a model in chunks, with the same number of chunks on every rank.

The items of a chunk are packed into one row without padding. A frozen part of the model runs outside the engine,
unsharded on every rank; its output for a chunk is cached between a step's two passes, so it runs once per step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Protocol

import numpy as np
import torch
import torch.distributed as dist

from pipeline.data.batch import Encoded, Image
from pipeline.distributed import rank_and_world
from pipeline.errors import PipelineError
from pipeline.models.pinned import pinned

UNIT_TOLERANCE = 1e-4  # of a unit vector's length; bf16 rounding exceeds it, and longer vectors would rank higher

_DUMMY = Encoded(np.zeros(1, np.int32))
_FLAGS = 1024  # chunks whose flags ranks agree on together with the number of chunks


def chunk_tokens_for(padded: bool) -> int:
    """Return a good `chunk_tokens` for inference: smaller if attention pads, which limits the padding."""
    return 4096 if padded else 16384


@dataclass(frozen=True)
class Packed:
    """Items concatenated into one row of T tokens.

    input_ids: (T,) int64.  cpu_ids: input_ids in CPU memory.
    position_ids: (T,) int64, or (3, T) if any item has three axes; they restart at each item.
    lengths: tokens of each item, T in total.  images: in the order of their placeholders.
    tiles_of: number of tiles, or patches, of each item.  skipped, vectors: per item, see `Encoded`.
    made: by name, what `tiles` and `text_vectors` return, if it is prepared ahead.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cpu_ids: torch.Tensor
    lengths: tuple[int, ...]
    images: tuple[Image, ...]
    tiles_of: tuple[int, ...]
    skipped: tuple[int, ...]
    vectors: tuple[np.ndarray | None, ...]
    made: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def positions(self) -> torch.Tensor:
        """`position_ids` for a batch of one row: (1, T) or (3, 1, T)."""
        return self.position_ids.unsqueeze(-2)

    @property
    def tiles(self) -> torch.Tensor:
        """The tiles, of some families patches, of all images: (n, 3, size, size) uint8.

        Unless they are made, each access makes a new copy.
        """
        if "tiles" in self.made:
            return self.made["tiles"]
        if not self.images:
            return torch.empty(0, 3, 0, 0, dtype=torch.uint8)
        return torch.from_numpy(np.concatenate([image.tiles for image in self.images]))

    @property
    def text_vectors(self) -> torch.Tensor | None:
        """(texts, width) the vectors of the items without images, zeros if missing; None if there is none."""
        if "text_vectors" in self.made:
            return self.made["text_vectors"]
        given = [vector for vector, tiles in zip(self.vectors, self.tiles_of, strict=True) if not tiles]
        if (like := next((vector for vector in given if vector is not None), None)) is None:
            return None
        return torch.from_numpy(np.stack([np.zeros_like(like) if vector is None else vector for vector in given]))

    def places(self, *tokens: int) -> torch.Tensor:
        """Return the places of these tokens in the row, (n,) int64 on the device of `input_ids`."""
        # Computed on the CPU: `nonzero` on the device would wait for all queued work.
        return sent(torch.isin(self.cpu_ids, torch.tensor(tokens)).nonzero()[:, 0], self.input_ids.device)

    @property
    def blank_tiles(self) -> list[int]:
        """The places among `tiles` of those that are zeros after normalisation; see `Image.blank`."""
        ends = np.cumsum([len(image.tiles) for image in self.images])
        return [int(end) - 1 for end, image in zip(ends, self.images, strict=True) if image.blank]

    def to(self, device: torch.device) -> "Packed":
        """Copy token and position ids to a device. Tiles stay in CPU memory: they may be encoded already."""
        return replace(self, input_ids=sent(self.input_ids, device), position_ids=sent(self.position_ids, device))


def pack(items: Sequence[Encoded]) -> Packed:
    ids = torch.from_numpy(np.concatenate([item.input_ids for item in items]).astype(np.int64))
    return Packed(
        input_ids=ids,
        position_ids=torch.from_numpy(np.concatenate(_positions(items), axis=-1)),
        cpu_ids=ids,
        lengths=tuple(len(item.input_ids) for item in items),
        images=tuple(image for item in items for image in item.images),
        tiles_of=tuple(sum(len(image.tiles) for image in item.images) for item in items),
        skipped=tuple(item.skipped for item in items),
        vectors=tuple(item.vector for item in items),
    )


def _positions(items: Sequence[Encoded]) -> list[np.ndarray]:
    """Return the positions of each item, all with the same number of axes."""
    given = [np.arange(len(item.input_ids)) if item.positions is None else item.positions for item in items]
    axes = max(positions.ndim for positions in given)
    return [each if each.ndim == axes else np.broadcast_to(each, (3, len(each))) for each in given]


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device, unless it is there. Pinned memory makes the copy to a GPU asynchronous."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        pageable = tensor
        tensor = pinned(lambda pins: pageable.pin_memory() if pins else pageable)
    return tensor.to(device, non_blocking=True)


def offloaded(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to CPU memory. From a GPU the copy is asynchronous: the host must not read it, only copy it back.

    A copy back on the same stream runs after it, and torch does not reuse pinned memory before copies of it are done.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu()
    copy = pinned(lambda pins: torch.empty_like(tensor, device="cpu", pin_memory=pins))
    return copy.copy_(tensor, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Chunk:
    """The items at `rows`. A chunk without rows has a dummy item.

    with_images: the chunk with this number has an image on some rank.  padded: see `plan_chunks`.
    take: returns the items in one row for the next pass over this chunk, packed ahead; None if they are not.
    """

    rows: torch.Tensor
    items: tuple[Encoded, ...]
    with_images: bool
    padded: bool
    take: Callable[[], Packed] | None = None

    @property
    def packed(self) -> Packed:
        """The items in one row, packed at each access: a cache would hold all tokens of a step twice."""
        return pack(self.items)

    @property
    def size(self) -> int:
        """Tokens as `chunk_tokens` counts them: with padding if `padded`."""
        lengths = [len(item.input_ids) for item in self.items]
        return len(lengths) * max(lengths) if self.padded else sum(lengths)


@dataclass(frozen=True)
class Ahead:
    """A step's items on this rank, which another thread cuts and packs ahead.

    cuts: the result of `cut`.  take: number of a chunk -> its items in one row, in the order of the step's passes.
    """

    items: Sequence[Encoded]
    cuts: list[list[int]]
    take: Callable[[int], Packed]


def cut(items: Sequence[Encoded], chunk_tokens: int, *, padded: bool) -> list[list[int]]:
    """Cut items into chunks as `plan_chunks` does, on this rank alone. Returns each chunk's items by number."""
    lengths = np.array([len(item.input_ids) for item in items])
    cuts: list[list[int]] = []
    size = 0
    for row in np.argsort(-lengths, kind="stable").tolist():
        # With padding, an item costs as much as the chunk's longest, which is its first.
        size += lengths[cuts[-1][0]] if cuts and padded else lengths[row]
        if not cuts or size > chunk_tokens:
            cuts.append([])
            size = lengths[row]
        cuts[-1].append(row)
    return cuts


def plan_chunks(
    items: Sequence[Encoded],
    chunk_tokens: int,
    device: torch.device,
    *,
    padded: bool = True,
    all_with_images: bool = False,
    ahead: Ahead | None = None,
) -> list[Chunk]:
    """Cut items into chunks of at most `chunk_tokens` tokens, longest first. A longer item is a chunk by itself.

    All ranks get the same number of chunks; the last ones are empty on a rank with fewer items. Ranks agree on which
    chunks run the vision tower: under ZeRO-3, ranks that run different modules hang the job. Collective.

    padded: the model's attention pads items to the longest of their chunk (see `pads`), so padding counts.
    all_with_images: all chunks run the vision tower.
    ahead: the same items, already cut in this way.
    """
    cuts = ahead.cuts if ahead else cut(items, chunk_tokens, padded=padded)
    flags = [all_with_images or any(items[row].images for row in rows) for rows in cuts]
    if rank_and_world()[1] > 1:
        flags = _agreed(flags, all_with_images, device)
    empty = [list[int]()] * (len(flags) - len(cuts))
    lengths = [len(rows) for rows in cuts + empty]
    all_rows = sent(torch.tensor([row for rows in cuts for row in rows], dtype=torch.long), device)
    return [
        Chunk(
            rows,
            tuple(items[row] for row in cuts[number]) if number < len(cuts) else (_DUMMY,),
            flags[number],
            padded,
            partial(ahead.take, number) if ahead and number < len(cuts) else None,
        )
        for number, rows in enumerate(all_rows.split(lengths))
    ]


def _agreed(flags: list[bool], rest: bool, device: torch.device) -> list[bool]:
    """Return, for each chunk of the rank with the most chunks, whether it has a flag on any rank.

    rest: the flag of this rank's missing chunks.
    """
    # The number of chunks travels with the flags of the first ones: one collective, unless there are very many.
    first = [len(flags), *flags[:_FLAGS], *[rest] * (_FLAGS - len(flags))]
    count, *most = _most_of_any_rank(first, device)
    if count > _FLAGS:
        most += _most_of_any_rank(flags[_FLAGS:] + [rest] * (count - max(len(flags), _FLAGS)), device)
    return [bool(flag) for flag in most[:count]]


def _most_of_any_rank(numbers: Sequence[int], device: torch.device) -> list[int]:
    most = sent(torch.tensor(numbers, dtype=torch.int32), device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.tolist()


# A chunk and its packed items -> the features from a frozen part outside the model; None if the chunk has no input for
# that part.
Features = Callable[[Chunk, Packed], torch.Tensor | None]


def run_chunk(model: Callable[..., torch.Tensor], chunk: Chunk, features: Features | None = None) -> torch.Tensor:
    """Return the embeddings of a chunk's items, (len(rows), hidden)."""
    packed = (chunk.take() if chunk.take else chunk.packed).to(chunk.rows.device)
    return model(packed, chunk.with_images, features(chunk, packed) if features else None)[: len(chunk.rows)]


@torch.no_grad()
def embed_chunks(
    model: Callable[..., torch.Tensor], chunks: Sequence[Chunk], count: int, features: Features | None = None
) -> torch.Tensor:
    """Return the embeddings of all `count` items in their order, (count, hidden) float32, without a graph."""
    return in_order(chunks, [run_chunk(model, chunk, features) for chunk in chunks], count)


def in_order(chunks: Sequence[Chunk], parts: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """Merge the chunks' embeddings, each (len(rows), hidden), into one (count, hidden) in the items' order."""
    embeddings = parts[0].new_empty(count, parts[0].shape[1])
    for chunk, part in zip(chunks, parts, strict=True):
        embeddings[chunk.rows] = part.detach()
    return embeddings


def require_unit(vectors: torch.Tensor | np.ndarray, model: str, name_of: Callable[[int], str]) -> None:
    """Raise PipelineError if a row of vectors (n, D), on the CPU, is not a unit vector, for example NaN.

    Call it on a model's output before vectors are stored or compared.  name_of: row -> name of its item, for the error.
    """
    lengths = np.linalg.norm(np.asarray(vectors), axis=1)
    if (wrong := np.flatnonzero(~(np.abs(lengths - 1) <= UNIT_TOLERANCE))).size:
        raise PipelineError(
            f"{model}: the embedding of {name_of(int(wrong[0]))} has length {lengths[wrong[0]]:.5g}, not 1: check the "
            "model's weights, that it does not overflow, and that its vectors are normalised in float32"
        )


class Frozen(Protocol):
    """A vision tower or text encoder whose output is input to the trained parts.

    reads_tiles: whether the tiles are its input, and not the trained parts'.
    """

    reads_tiles: ClassVar[bool]

    @property
    def device(self) -> torch.device: ...

    def features_of(self, chunk: Chunk, packed: Packed) -> torch.Tensor | None:
        """Return the `features` for the model's forward pass; None if the chunk has no input for the frozen part."""


class CachedFeatures:
    """A cache of a step's features by chunk, computed at the first use.

    limit: bytes that stay on the device; the rest is offloaded to CPU memory, on a GPU to pinned memory, of which torch
        allocates powers of two.
    """

    def __init__(self, frozen: Frozen, limit: int) -> None:
        self._frozen, self._room = frozen, limit
        self._cached: dict[int, torch.Tensor | None] = {}

    def __call__(self, chunk: Chunk, packed: Packed) -> torch.Tensor | None:
        if id(chunk) in self._cached:
            cached = self._cached[id(chunk)]
            return None if cached is None else cached.to(self._frozen.device, non_blocking=True)
        features = self._frozen.features_of(chunk, packed)
        size = 0 if features is None else features.nbytes
        fits = size <= self._room
        self._room -= size if fits else 0
        self._cached[id(chunk)] = features if fits or features is None else offloaded(features)
        return features
