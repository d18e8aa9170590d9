"""What one sample is: a query and its target, or one item alone; each item a text with its images or video."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b

import numpy as np

IMAGE_MARK = "<image>"
VIDEO_MARK = "<video>"
MMEB_IMAGE_MARK = "<|image_1|>"  # what MMEB's own rows write for it

BYTE_ORDER_MARK = "\ufeff"  # which some programs begin a text with, and which is no part of it

# The image formats that samples hold, as Pillow names them, with the suffix of their files.
IMAGE_SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif"}
VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "avi", "mov")


@dataclass(frozen=True)
class Item:
    """One thing to embed.

    text: says by `<image>` (`<video>`) where each image (the video) goes.
    images: encoded bytes (PNG, JPEG, ...), in the order of their marks.
    video: encoded bytes, or None.
    vector: (width,) float32, the text's embedding by a frozen language model, where it was computed beforehand.
    """

    text: str
    images: tuple[bytes, ...] = ()
    video: bytes | None = None
    vector: np.ndarray | None = field(default=None, compare=False)

    @cached_property
    def content_hash(self) -> int:
        """64 bits that two items share when, and in practice only when, their text and bytes are the same."""
        digest = blake2b(digest_size=8)
        for part in (self.text.encode(), *self.images, self.video or b""):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return int.from_bytes(digest.digest(), "little")

    def hashed(self, content_hash: int) -> "Item":
        """The same item, whose content hash is known."""
        item = replace(self)
        item.__dict__["content_hash"] = content_hash
        return item


Draw = Callable[[int], int]  # n -> 0 to n - 1, equally likely; the same at the same step


@dataclass(frozen=True)
class Pair:
    """One training sample: `target` answers `query`; `negatives` look as if they did.

    alternatives: texts that may stand in the place of the target's: an image's other captions, of which
        each step that takes the sample draws one.
    vectors: (texts, width) float32, of each of `texts` its embedding, where they were computed beforehand.
    """

    key: str
    dataset: str
    task: str
    query: Item
    target: Item
    negatives: tuple[Item, ...] = ()
    alternatives: tuple[str, ...] = ()
    vectors: np.ndarray | None = field(default=None, compare=False)

    @property
    def items(self) -> tuple[Item, ...]:
        return (self.query, self.target, *self.negatives)

    @property
    def texts(self) -> tuple[str, ...]:
        """The target's texts, of which one is drawn."""
        return (self.target.text, *self.alternatives)

    def one_text(self, draw: Draw) -> "Pair":
        """The pair with one of its target's texts, all equally likely."""
        return self.drawn(draw(len(self.texts)) if self.alternatives else 0)

    def two_texts(self, draw: Draw) -> "Pair":
        """Of an image with texts two of these, one to find the other, all in turn; a pair of texts as `one_text`.

        Raises BadSample for an image with one text, or none.
        """
        if not self.query.images and self.query.video is None:
            return self.one_text(draw)
        texts = [text for text in dict.fromkeys(text.strip() for text in self.texts) if text]  # as models read them
        if self.target.images or len(texts) < 2:
            raise BadSample("an image without two different captions, of which one is to find the other")
        query, target = divmod(draw(len(texts) * (len(texts) - 1)), len(texts) - 1)
        target += target >= query
        return replace(self, query=Item(texts[query]), target=Item(texts[target]), negatives=(), alternatives=())

    def drawn(self, number: int) -> "Pair":
        """The pair with its target's text number `number`, and no others."""
        target = replace(self.target, text=self.texts[number]) if number else self.target
        if self.vectors is not None:
            target = replace(target, vector=self.vectors[number]).hashed(target.content_hash)
        return replace(self, target=target, alternatives=(), vectors=None)


@dataclass(frozen=True)
class Single:
    """One item by itself: a query or a candidate of an evaluation set."""

    key: str
    dataset: str
    task: str
    item: Item

    @property
    def items(self) -> tuple[Item, ...]:
        return (self.item,)


def text_fault(text: str, images: int = 0, videos: int = 0) -> tuple[str, str] | None:
    """Why a text cannot stand beside so many images and videos: one of few causes, and a detail. None if it can."""
    shown = repr(text[:200])
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        return "not UTF-8", shown
    if "\0" in text:
        return "NUL character", f"is its file UTF-16? Convert it to UTF-8: {shown}"
    if not any(letter.isprintable() and not letter.isspace() for letter in text):  # spaces, also of no width
        return "empty text", shown
    for mark, files in ((IMAGE_MARK, images), (VIDEO_MARK, videos)):
        if (marks := text.count(mark)) != files:
            return "marks and files differ", f"{marks} {mark} for {files} files in {shown}"
    return None


def is_absent(value: object) -> bool:
    """Whether a value is that of an empty cell: None, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


class BadSample(Exception):
    """A sample that cannot be used as it was written; it becomes an invalid row, counted and logged."""
