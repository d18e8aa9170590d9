"""Samples as tokens and tiles; many of them packed into one row without padding."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.data.sample import BadSample, Item, Pair

STAND_IN = Item("")


@dataclass(frozen=True)
class Image:
    """An image as its tiles (n, 3, size, size) uint8, with the (height, width) it had."""

    tiles: np.ndarray
    height: int
    width: int


@dataclass(frozen=True)
class Encoded:
    """One item ready for the model: token ids (T,) int32, a placeholder for each image token, and the images."""

    input_ids: np.ndarray
    images: tuple[Image, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Consecutive pairs of a global batch, as distinct items and where each pair finds its own.

    items: the distinct items by content hash; what occurs twice is embedded once.
    query, target: each pair's items, by hash.  negatives: all pairs' explicit negatives, by hash.
    valid: False for a pair that could not be used; an empty text stands in for its items.
    keys: where each pair came from.  bad: (key, reason) of the invalid ones.
    """

    items: dict[int, Encoded] = field(default_factory=dict)
    query: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    negatives: list[int] = field(default_factory=list)
    valid: list[bool] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)


def encode_pairs(pairs: Iterable[tuple[str, Callable[[], Pair]]], encode: Callable[[Item], Encoded]) -> Batch:
    """Encode pairs, each given as its key and a function that parses it; a `BadSample` becomes an invalid row."""
    batch = Batch()
    for key, parse in pairs:
        try:
            pair = parse()
            encoded = {i.content_hash: encode(i) for i in pair.items if i.content_hash not in batch.items}
            query, target, negatives = pair.query, pair.target, pair.negatives
            batch.valid.append(True)
        except BadSample as reason:
            query = target = STAND_IN
            encoded, negatives = {STAND_IN.content_hash: encode(STAND_IN)}, ()
            batch.valid.append(False)
            batch.bad.append((key, str(reason)))
        batch.items.update(encoded)
        batch.query.append(query.content_hash)
        batch.target.append(target.content_hash)
        batch.negatives.extend(negative.content_hash for negative in negatives)
        batch.keys.append(key)
    return batch


def merge(batches: Iterable[Batch]) -> Batch:
    """Batches end to end."""
    whole = Batch()
    for part in batches:
        whole.items.update(part.items)
        for name in ("query", "target", "negatives", "valid", "keys", "bad"):
            getattr(whole, name).extend(getattr(part, name))
    return whole


@dataclass(frozen=True)
class Packed:
    """Items end to end in one row of T tokens.

    input_ids, position_ids: (T,) int64; positions restart at 0 with each item.
    lengths: tokens of each item, sum T.
    tiles: (n, 3, size, size) uint8.  image_sizes: (height, width) of each image; image_tiles: how many tiles it has.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: tuple[int, ...]
    tiles: torch.Tensor
    image_sizes: tuple[tuple[int, int], ...]
    image_tiles: tuple[int, ...]

    def to(self, device: torch.device) -> "Packed":
        moved = (t.to(device, non_blocking=True) for t in (self.input_ids, self.position_ids, self.tiles))
        input_ids, position_ids, tiles = moved
        return Packed(input_ids, position_ids, self.lengths, tiles, self.image_sizes, self.image_tiles)


def pack(items: Sequence[Encoded]) -> Packed:
    images = [image for item in items for image in item.images]
    return Packed(
        input_ids=torch.from_numpy(np.concatenate([item.input_ids for item in items]).astype(np.int64)),
        position_ids=torch.from_numpy(np.concatenate([np.arange(len(item.input_ids)) for item in items])),
        lengths=tuple(len(item.input_ids) for item in items),
        tiles=torch.from_numpy(np.concatenate([image.tiles for image in images]))
        if images
        else torch.empty(0, 3, 0, 0, dtype=torch.uint8),
        image_sizes=tuple((image.height, image.width) for image in images),
        image_tiles=tuple(len(image.tiles) for image in images),
    )
