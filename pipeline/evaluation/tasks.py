"""The tasks of an evaluation and their items. Each item is embedded once, even if several tasks use it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Literal

import numpy as np

from pipeline.data.sample import Item
from pipeline.storage import objects


@dataclass(frozen=True)
class Ranking:
    """An MMEB dataset: each query has its own candidates.

    queries: (Q,) rows of the collection's items.
    candidates: for each query the rows of its candidates, the right one first.
    direction: always empty.
    """

    name: str
    meta_task: str
    in_distribution: bool
    queries: np.ndarray
    candidates: list[np.ndarray]
    direction: str = ""

    @property
    def rows(self) -> np.ndarray:
        """The rows of all items of the task, unique and ascending."""
        seen = np.zeros(1 + max(self.queries.max(), max(each.max() for each in self.candidates)), bool)
        for rows in (self.queries, *self.candidates):
            seen[rows] = True
        return np.flatnonzero(seen)


RetrievalKind = Literal["text-image", "text-video", "classification"]


@dataclass(frozen=True)
class Retrieval:
    """Queries that share their candidates; one or several candidates are right for a query.

    direction: "t2i", "i2t", "t2v" or "v2t"; "" for classification of images.
    queries: (Q,) rows of the collection's items.
    candidates: (C,) rows; or (C, K) rows, if each candidate is the mean of K unit vectors, for a class's prompts.
    right: for each query the numbers, from 0 to C - 1, of its right candidates.
    names: of the classes, if the candidates are classes.
    """

    name: str
    kind: RetrievalKind
    direction: str
    language: str
    queries: np.ndarray
    candidates: np.ndarray
    right: list[np.ndarray]
    names: tuple[str, ...] = ()

    @property
    def rows(self) -> np.ndarray:
        """The rows of all items of the task, unique and ascending."""
        return np.unique(np.concatenate([self.queries, self.candidates.ravel()]))


Task = Ranking | Retrieval


@dataclass
class Collection:
    """Tasks and their items. An item that several tasks use is stored, and embedded, once.

    Texts that differ in the white space at their ends are different items. So are pictures with different bytes, even
    if their pixels are equal (copies with other metadata): comparing pixels needs decoding, which is skipped for
    embeddings on disk.

    items: functions that read the items.  keys: 16 bytes, equal only for equal items.
    names: for display: the path of a picture, or else the text.
    """

    tasks: list[Task] = field(default_factory=list)
    items: list[Callable[[], Item]] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    _rows: dict[bytes, int] = field(default_factory=dict)

    def row(self, key: bytes, name: str, item: Callable[[], Item]) -> int:
        """Return the row of the item with this key; a new item is added."""
        if key not in self._rows:
            self._rows[key] = len(self.items)
            self.items.append(item)
            self.keys.append(key)
            self.names.append(name)
        return self._rows[key]

    def text(self, text: str, instruction: str = "") -> int:
        """Return the row of a text.  instruction: see Item."""
        return self.row(item_key(text, *_parts(instruction)), text, partial(Item, text, instruction=instruction))

    def medium(
        self, text: str, url: str, stamp: str, *, video: bool = False, name: str = "", instruction: str = ""
    ) -> int:
        """Return the row of a picture or video with a text that contains its mark.

        stamp: see `objects.stamps`.  name: default: the URL.  instruction: see Item.
        """
        key = item_key(text, url, stamp, *_parts(instruction))
        return self.row(key, name or url, partial(_read, text, url, video, instruction))


def item_key(*parts: str) -> bytes:
    """Return the key of an item, from its text and, if it has a file, the URL and stamp."""
    digest = blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode(errors="surrogateescape")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.digest()


def content_key(content_hash: int) -> bytes:
    """Return the key of an item with a known `content_hash`."""
    return b"content-" + content_hash.to_bytes(8, "little")


def _parts(instruction: str) -> tuple[str, ...]:
    return ("instruction", instruction) if instruction else ()


def _read(text: str, url: str, video: bool, instruction: str) -> Item:
    data = objects.read(url)
    return Item(text, (), data, instruction=instruction) if video else Item(text, (data,), instruction=instruction)
