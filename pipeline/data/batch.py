"""Items as a model's input, and the pairs of a step.

Workers decode shares of a step's pairs, which are combined into a rank's part of the global batch.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import numpy as np
import torch
from xxhash import xxh3_128_digest

from pipeline.data.sample import BadSample, Item, Pair, hash64
from pipeline.data.shards import sample_key
from pipeline.errors import PipelineError

_STAND_IN = Pair("", "", "", Item(""), Item(""))


@dataclass(frozen=True)
class Image:
    """An image or a video as tiles (n, 3, size, size) uint8, and its height and width in pixels.

    LLaVE's and CLIP's tiles are crops or frames, and the size is the original one. Qwen-VL's tiles are patches: those
    of two frames alternate, and the size is the one resized to.
    blank: it stands for a missing image: its one tile is zeros after normalisation, which no uint8 expresses.
    unrounded: its grid has fewer patches than transformers keeps; see `Tiling.unpadded`.
    """

    tiles: np.ndarray
    height: int
    width: int
    video: bool = False
    blank: bool = False
    unrounded: bool = False


@dataclass(frozen=True)
class Encoded:
    """The input of a model for one item.

    input_ids: (T,) int32, with one placeholder per image token.
    skipped: number of instruction tokens at the beginning, which mean pooling excludes.
    vector: (width,), the text's precomputed embedding by a frozen language model, or None.
    text: the token ids of that language model as bytes. `key` hashes them instead of `vector`, because vectors of the
        same text can differ in their last bits.
    positions: (T,), or (3, T) for rotary embeddings with three axes; None: 0 to T - 1.
    """

    input_ids: np.ndarray
    images: tuple[Image, ...] = ()
    skipped: int = 0
    vector: np.ndarray | None = None
    text: bytes = b""
    positions: np.ndarray | None = None

    @cached_property
    def key(self) -> int:
        """A 64-bit hash of the model's input: equal inputs share it and, in practice, no others."""
        shapes = [self.skipped]
        for image in self.images:
            # The original size affects the model's input only for images of several tiles. Of patches, the resized size
            # says how many are in a row, which a video's positions say.
            sized = not image.video and len(image.tiles) > 1
            size = (image.height, image.width) if sized else (0, 0)
            shapes += [*image.tiles.shape, *size, image.video + 2 * image.blank]
        ids = np.ascontiguousarray(self.input_ids, np.int32).tobytes()
        places = b"" if self.positions is None else np.ascontiguousarray(self.positions, np.int64).tobytes()
        tiles = (xxh3_128_digest(np.ascontiguousarray(image.tiles).data) for image in self.images)
        return hash64(ids, self.text + places, np.array(shapes, np.int64).tobytes(), *tiles)


@dataclass(frozen=True)
class Origin:
    """The location of a sample: its shard's URL, its number in the shard, and the number of its dataset."""

    shard: str
    sample: int
    dataset: int = 0

    def __str__(self) -> str:
        return f"{self.shard}#{self.sample}"


@dataclass(frozen=True)
class RawSample:
    """A sample's bytes in its shard, and how to parse it.  place: its row in the rank's part of the batch."""

    place: int
    origin: Origin
    data: bytes
    parse: Callable[[], Pair]


@dataclass(frozen=True)
class Bad:
    """A sample that cannot be used, with its key in the shard."""

    origin: Origin
    key: str
    reason: str


@dataclass(frozen=True)
class Row:
    """A pair as `Encoded.key` of its items.  place: its row in the rank's part of the batch.  bad: why it is invalid.

    weights, scores, task: see `Pair`.  teacher: (items, width) float32, or None; zeros if the row is invalid.
    """

    place: int
    origin: Origin
    query: int
    target: int
    positives: tuple[int, ...]
    negatives: tuple[int, ...]
    weights: tuple[float, ...]
    scores: tuple[float, ...] | None
    task: str
    teacher: np.ndarray | None
    bad: Bad | None


@dataclass
class Share:
    """The rows of a step that one worker decoded, and their distinct items by `Encoded.key`.

    received, retries: bytes received from the object store, and requests repeated, since the worker's previous share.
    """

    rows: list[Row]
    items: dict[int, Encoded]
    received: int = 0
    retries: int = 0

    def to_shared_memory(self) -> None:
        """Copy the tiles to shared memory. Raises PipelineError if there is no room.

        While the share is being sent, the same error would be lost, and the rank would wait for the share forever.
        """
        self.state = self.__getstate__()

    # Shares are pickled with all tiles in one tensor, which torch passes between processes in shared memory.
    def __getstate__(self) -> tuple:
        if hasattr(self, "state"):
            return self.state
        images = [image.tiles for item in self.items.values() for image in item.images]
        tiles = _shared(images) if images else None
        counted = {
            # In the pickled state, each image has its number of tiles instead of the tiles.
            key: replace(item, images=tuple(replace(i, tiles=len(i.tiles)) for i in item.images))  # type: ignore[arg-type]
            for key, item in self.items.items()
        }
        return self.rows, counted, self.received, self.retries, tiles

    def __setstate__(self, state: tuple) -> None:
        self.rows, self.items, self.received, self.retries, tiles = state
        end = 0
        for image in (image for item in self.items.values() for image in item.images):
            start, end = end, end + cast(int, image.tiles)
            # `__getstate__` made each image anew; to replace them again would take longer.
            object.__setattr__(image, "tiles", tiles[start:end].numpy())


def _shared(tiles: list[np.ndarray]) -> torch.Tensor:
    """Concatenate tiles directly into shared memory, like torch's collation, which saves one copy."""
    shape = sum(map(len, tiles)), *tiles[0].shape[1:]
    try:
        storage = torch.UntypedStorage._new_shared(math.prod(shape))
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise PipelineError(
            f"/dev/shm has no room left for {math.prod(shape) / 1e6:,.0f} MB of a batch's images: give the container "
            "more (docker run --shm-size=8g, or --ipc=host), lower data.workers, or set data.workers=0"
        ) from None
    shared = torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
    np.concatenate(tiles, out=shared.numpy())
    return shared


def encode_rows(
    samples: Iterable[RawSample], encode: Callable[[Item], Encoded], teacher_width: int | None = None
) -> Share:
    """Parse and encode samples. A `BadSample` becomes an invalid row with empty texts as its items.

    teacher_width: of the pairs' teacher vectors, if they have any; an invalid row gets zeros.
    Items with equal `content_hash` are encoded once; items with equal `Encoded.key` are stored once.
    """
    share, keys = Share([], {}), {}  # content hash -> key
    for sample in samples:
        origin, bad = sample.origin, None
        try:
            pair = sample.parse()
            encoded = {i.content_hash: encode(i) for i in pair.items if i.content_hash not in keys}
        except MemoryError:
            raise PipelineError(f"{origin}, key {sample_key(sample.data)}: no memory left to decode it") from None
        except BadSample as reason:
            zeros = None if teacher_width is None else np.zeros((2, teacher_width), np.float32)
            pair = replace(_STAND_IN, teacher=zeros)
            bad = Bad(origin, sample_key(sample.data), str(reason))
            encoded = {item.content_hash: encode(item) for item in pair.items}
        for content, item in encoded.items():
            keys[content] = item.key
            share.items.setdefault(item.key, item)
        query, target, *others = (keys[item.content_hash] for item in pair.items)
        count = len(pair.positives)
        share.rows.append(
            Row(
                sample.place,
                origin,
                query,
                target,
                positives=tuple(others[:count]),
                negatives=tuple(others[count:]),
                weights=pair.weights,
                scores=pair.scores,
                task=pair.task,
                teacher=pair.teacher,
                bad=bad,
            )
        )
    return share


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch.

    items: the distinct items by `Encoded.key`; an item that occurs twice is embedded once.
    query, target, positives, negatives: the keys of each pair's items; lane after lane, with equally many pairs per
        lane.
    valid: False for an invalid row, whose items are empty texts.
    origins: the location of each pair.  bad: the invalid samples.
    received, retries: bytes received from the object store for this batch, and requests repeated.
    weights, scores, tasks: see `Pair`.
    teacher: (2 + positives + negatives, width) float32 unit rows of each pair's query, target, positives and negatives,
        zeros for an invalid row; None if the run uses no teacher.
    """

    items: dict[int, Encoded]
    query: list[int]
    target: list[int]
    negatives: list[tuple[int, ...]]
    valid: list[bool]
    origins: list[Origin]
    bad: list[Bad]
    received: int
    positives: list[tuple[int, ...]]
    weights: list[tuple[float, ...]]
    scores: list[tuple[float, ...] | None]
    tasks: list[str]
    teacher: list[np.ndarray] | None = None
    retries: int = 0

    @classmethod
    def of(cls, shares: Sequence[Share], received: int = 0, retries: int = 0) -> "Batch":
        """Combine shares into a batch, which does not depend on how workers divided the rows."""
        rows = sorted((row for share in shares for row in share.rows), key=lambda row: row.place)
        encoded = {key: item for share in shares for key, item in share.items.items()}
        used = dict.fromkeys(key for row in rows for key in (row.query, row.target, *row.positives, *row.negatives))
        teacher = [row.teacher for row in rows if row.teacher is not None]
        return cls(
            items={key: encoded[key] for key in used},
            query=[row.query for row in rows],
            target=[row.target for row in rows],
            negatives=[row.negatives for row in rows],
            valid=[row.bad is None for row in rows],
            origins=[row.origin for row in rows],
            bad=[row.bad for row in rows if row.bad],
            received=received,
            positives=[row.positives for row in rows],
            weights=[row.weights for row in rows],
            scores=[row.scores for row in rows],
            tasks=[row.task for row in rows],
            teacher=teacher if len(teacher) == len(rows) else None,
            retries=retries,
        )
