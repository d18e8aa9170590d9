"""What an evaluation asks: tasks over items, each of which is embedded once, however many tasks it is in."""

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
    """An MMEB dataset: each query has candidates of its own.

    queries: (Q,) rows of the collection's items; candidates: the same for each query, the right one first.
    direction: there is one alone.
    """

    name: str
    meta_task: str
    in_distribution: bool
    queries: np.ndarray
    candidates: list[np.ndarray]
    direction: str = ""

    @property
    def rows(self) -> np.ndarray:
        """Of all items that the task is about, each once, ascending."""
        seen = np.zeros(1 + max(self.queries.max(), max(each.max() for each in self.candidates)), bool)
        for rows in (self.queries, *self.candidates):
            seen[rows] = True
        return np.flatnonzero(seen)


Kind = Literal["text-image", "text-video", "classification"]


@dataclass(frozen=True)
class Retrieval:
    """Queries that all seek among the same candidates, of which one or several are right.

    direction: "t2i", "i2t", "t2v" or "v2t"; "" of a classification, where images seek their class.
    queries: (Q,) rows of the collection's items.
    candidates: (C,) the same; or (C, K), where a candidate is the mean of K items' unit vectors: of a class's prompts.
    right: for each query the numbers, from 0 to C - 1, of its right candidates.
    names: of the candidates that are no items: the classes.
    """

    name: str
    kind: Kind
    direction: str
    language: str
    queries: np.ndarray
    candidates: np.ndarray
    right: list[np.ndarray]
    names: tuple[str, ...] = ()

    @property
    def rows(self) -> np.ndarray:
        """As of a Ranking."""
        return np.unique(np.concatenate([self.queries, self.candidates.ravel()]))


Task = Ranking | Retrieval


@dataclass
class Collection:
    """Tasks and the items they are about; an item that several tasks share is there, and embedded, once.

    Texts are as models read them, without white space around. Pictures that differ in bytes are different items, also
    where a model makes the same of them (a copy with other metadata): that is known only when they are decoded for this
    model, which those whose embeddings lie on the disk are not.

    items: read when called.  keys: 16 bytes that two items share only if they are the same.
    names: what a person would call each item: its picture's path, else its text.
    """

    tasks: list[Task] = field(default_factory=list)
    items: list[Callable[[], Item]] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    _rows: dict[bytes, int] = field(default_factory=dict)

    def row(self, key: bytes, name: str, item: Callable[[], Item]) -> int:
        """The number of the item with this key, which is added where it is new."""
        if key not in self._rows:
            self._rows[key] = len(self.items)
            self.items.append(item)
            self.keys.append(key)
            self.names.append(name)
        return self._rows[key]

    def text(self, text: str) -> int:
        """The number of a text."""
        text = text.strip()
        return self.row(item_key(text), text, partial(Item, text))

    def picture(self, text: str, url: str, stamp: str, name: str = "") -> int:
        """The number of a picture with a text that has its mark.  stamp: see `objects.stamps`.  name: else the URL."""
        text = text.strip()
        return self.row(item_key(text, url, stamp), name or url, partial(_picture, text, url))

    def video(self, text: str, url: str, stamp: str) -> int:
        """The number of a video with a text that has its mark.  stamp: see `objects.stamps`."""
        text = text.strip()
        return self.row(item_key(text, url, stamp), url, partial(_video, text, url))


def item_key(*parts: str) -> bytes:
    """A key for what a text, and a file by its URL and stamp, make up."""
    digest = blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode(errors="surrogateescape")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.digest()


def content_key(content_hash: int) -> bytes:
    """A key for an item whose `content_hash` is known."""
    return b"content-" + content_hash.to_bytes(8, "little")


def _picture(text: str, url: str) -> Item:
    return Item(text, (objects.read(url),))


def _video(text: str, url: str) -> Item:
    return Item(text, video=objects.read(url))
