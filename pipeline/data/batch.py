"""A step's pairs: decoded in shares by several workers, put together as one rank's part of the global batch."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.data.collate import Encoded
from pipeline.data.sample import BadSample, Item, Pair
from pipeline.data.shards import sample_key
from pipeline.errors import PipelineError

_STAND_IN = Pair("", "", "", Item(""), Item(""))


@dataclass(frozen=True)
class Origin:
    """Where a sample came from: its shard's URL and its number in it."""

    shard: str
    sample: int

    def __str__(self) -> str:
        return f"{self.shard}#{self.sample}"


@dataclass(frozen=True)
class RawSample:
    """A sample as it lies in its shard. place: its row in the rank's part of the batch."""

    place: int
    origin: Origin
    data: bytes
    parse: Callable[[bytes], Pair]


@dataclass(frozen=True)
class Bad:
    """A sample that could not be used. key: in its shard."""

    origin: Origin
    key: str
    reason: str


@dataclass(frozen=True)
class Row:
    """A pair by its items' keys. place: its row in the rank's part of the batch.  bad: why it has none."""

    place: int
    origin: Origin
    query: int
    target: int
    negatives: tuple[int, ...] = ()
    bad: Bad | None = None


@dataclass
class Share:
    """The rows of a step that one worker decoded, with their distinct items by `Encoded.key`.

    received: bytes that came from the object store since the worker's last share.
    """

    rows: list[Row]
    items: dict[int, Encoded]
    received: int = 0

    def to_shared_memory(self) -> None:
        """Now, not while it is sent: there an error would be lost, and the share waited for. Raises PipelineError."""
        self.state = self.__getstate__()

    # A share goes from process to process with all tiles in one tensor, which torch hands over in shared memory.
    def __getstate__(self) -> tuple:
        if hasattr(self, "state"):
            return self.state
        images = [image.tiles for item in self.items.values() for image in item.images]
        tiles = _shared(images) if images else None
        counted = {
            # The number of its tiles stands for them meanwhile.
            key: replace(item, images=tuple(replace(i, tiles=len(i.tiles)) for i in item.images))  # type: ignore[arg-type]
            for key, item in self.items.items()
        }
        return self.rows, counted, self.received, tiles

    def __setstate__(self, state: tuple) -> None:
        self.rows, counted, self.received, tiles = state
        ends = np.cumsum([image.tiles for item in counted.values() for image in item.images])
        left = iter(() if tiles is None else np.split(tiles.numpy(), ends[:-1]))
        self.items = {
            key: replace(item, images=tuple(replace(image, tiles=next(left)) for image in item.images))
            for key, item in counted.items()
        }


def _shared(tiles: list[np.ndarray]) -> torch.Tensor:
    """The tiles in one tensor, in shared memory from the start, as torch's own collation has it: one copy less."""
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


def encode_rows(samples: Iterable[RawSample], encode: Callable[[Item], Encoded]) -> Share:
    """Parse and encode samples; a `BadSample` becomes an invalid row, for which an empty text stands in.

    Items are told apart by what the model sees. What comes again in the same bytes is not encoded again.
    """
    share, keys = Share([], {}), {}  # content hash -> key
    for sample in samples:
        origin, bad = sample.origin, None
        try:
            pair = sample.parse(sample.data)
            encoded = {i.content_hash: encode(i) for i in pair.items if i.content_hash not in keys}
        except MemoryError:
            raise PipelineError(f"{origin}, key {sample_key(sample.data)}: no memory left to decode it") from None
        except BadSample as reason:
            pair, bad = _STAND_IN, Bad(origin, sample_key(sample.data), str(reason))
            encoded = {item.content_hash: encode(item) for item in pair.items}
        for content, item in encoded.items():
            keys[content] = item.key
            share.items.setdefault(item.key, item)
        query, target, *negatives = (keys[item.content_hash] for item in pair.items)
        share.rows.append(Row(sample.place, origin, query, target, tuple(negatives), bad))
    return share


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch, as distinct items and where each pair finds its own.

    items: the distinct items by `Encoded.key`; what occurs twice is embedded once.
    query, target, negatives: each pair's items, by key; lane after lane, as many of each.
    valid: False for a pair that could not be used; an empty text stands in for its items.
    origins: where each pair came from.  bad: the invalid ones.
    received: bytes that came from the object store meanwhile.
    """

    items: dict[int, Encoded]
    query: list[int]
    target: list[int]
    negatives: list[tuple[int, ...]]
    valid: list[bool]
    origins: list[Origin]
    bad: list[Bad]
    received: int

    @classmethod
    def of(cls, shares: Sequence[Share], received: int = 0) -> "Batch":
        """Put the shares' rows in their places; they do not tell which worker decoded them."""
        rows = sorted((row for share in shares for row in share.rows), key=lambda row: row.place)
        encoded = {key: item for share in shares for key, item in share.items.items()}
        used = dict.fromkeys(key for row in rows for key in (row.query, row.target, *row.negatives))
        return cls(
            items={key: encoded[key] for key in used},
            query=[row.query for row in rows],
            target=[row.target for row in rows],
            negatives=[row.negatives for row in rows],
            valid=[row.bad is None for row in rows],
            origins=[row.origin for row in rows],
            bad=[row.bad for row in rows if row.bad],
            received=received,
        )
