"""A sample: a query and its target, or a single item. An item is a text with its images or video."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b

import numpy as np

IMAGE_MARK = "<image>"
VIDEO_MARK = "<video>"
MMEB_IMAGE_MARK = "<|image_1|>"  # the mark in MMEB's rows
MEDIA_INSTRUCTION = "Represent the given {}."  # MMEB's, for images or a video without a text

LARGEST_NUMBER = 1e6  # the largest weight or absolute score of a candidate: the loss computes in float32

BYTE_ORDER_MARK = "\ufeff"  # some programs write it before a text

EMPTY_TEXT = "empty text"  # a cause of `text_fault`

# The supported image formats by Pillow's names, with their file suffixes.
IMAGE_SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif"}
PICTURE_ENDINGS = frozenset({*IMAGE_SUFFIXES.values(), "jpeg"})  # of files that users bring, in lower case
VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "avi", "mov")


@dataclass(frozen=True)
class Item:
    """One thing to embed.

    text: with a mark `<image>` (`<video>`) at the place of each image (of the video). White space at its ends is kept.
    images: encoded bytes (PNG, JPEG, ...), in the order of their marks.
    video: encoded bytes, or None.
    vector: (width,) float32, the text's precomputed embedding by a frozen language model, or None.
    instruction: stands before the text, for a text encoder that excludes it from pooling; shards have none.
    """

    text: str
    images: tuple[bytes, ...] = ()
    video: bytes | None = None
    vector: np.ndarray | None = field(default=None, compare=False)
    instruction: str = ""

    @cached_property
    def content_hash(self) -> int:
        """A 64-bit hash of text, images, video and instruction: in practice, only equal items share it."""
        instruction = [self.instruction.encode()] if self.instruction else []
        return hash64(self.text.encode(), *self.images, self.video or b"", *instruction)

    def hashed(self, content_hash: int) -> "Item":
        """Return a copy with a known content hash, so that it is not computed."""
        item = replace(self)
        item.__dict__["content_hash"] = content_hash
        return item


def hash64(*parts: bytes) -> int:
    """Return a 64-bit hash of these parts and of their boundaries."""
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


Draw = Callable[[int], int]  # n -> a pseudorandom number from 0 to n - 1, determined by step and sample
# (content hash, n) -> (n,) pseudorandom numbers in [0, 1), determined by step and content
ContentDraw = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class Pair:
    """One training sample: `target` matches `query`; `negatives` are hard negatives.

    alternatives: texts that can replace the target's text, such as an image's other captions. Each step draws one.
    vectors: (texts, width) float32, the precomputed embeddings of `texts`, or None.
    positives: further items that match the query.  weights: of the target and each of them; default: 1.
    scores: a judge's scores of the target, the positives and the negatives, or None.
    teacher: (rows, width) float32 unit rows of a teacher, or None: the query, each of `texts` as target, the positives,
        the negatives.
    """

    key: str
    dataset: str
    task: str
    query: Item
    target: Item
    negatives: tuple[Item, ...] = ()
    alternatives: tuple[str, ...] = ()
    vectors: np.ndarray | None = field(default=None, compare=False)
    positives: tuple[Item, ...] = ()
    weights: tuple[float, ...] = ()
    scores: tuple[float, ...] | None = None
    teacher: np.ndarray | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.weights:
            object.__setattr__(self, "weights", (1.0,) * (1 + len(self.positives)))
        if len(self.weights) != 1 + len(self.positives):
            raise ValueError(f"{len(self.weights)} weights for a target and {len(self.positives)} further positives")

    @property
    def items(self) -> tuple[Item, ...]:
        return (self.query, self.target, *self.positives, *self.negatives)

    @property
    def texts(self) -> tuple[str, ...]:
        """The target's text and its alternatives."""
        return (self.target.text, *self.alternatives)

    def one_text(self, draw: Draw) -> "Pair":
        """Return the pair with one of its target's texts, drawn uniformly."""
        return self.drawn(draw(len(self.texts)) if self.alternatives else 0)

    def two_texts(self, draw: Draw) -> "Pair":
        """Return a pair of two different texts of an image or video, drawn uniformly; without either, as `one_text`.

        Raises BadSample if there are fewer than two different texts, or if the target has images.
        """
        if not self.query.images and self.query.video is None:
            return self.one_text(draw)
        texts = distinct(self.texts)
        if self.target.images:
            raise BadSample("its target has an image; only captions can be paired")
        if len(texts) < 2:
            raise BadSample("fewer than two different captions to pair")
        query, target = divmod(draw(len(texts) * (len(texts) - 1)), len(texts) - 1)
        target += target >= query
        rows = None
        if self.teacher is not None:
            rows = self.teacher[[1 + self.texts.index(texts[number]) for number in (query, target)]]
        return replace(self.alone(Item(texts[query]), Item(texts[target])), teacher=rows)

    def drawn(self, number: int) -> "Pair":
        """Return the pair with text `number` of its target, and no alternatives."""
        target = replace(self.target, text=self.texts[number]) if number else self.target
        if self.vectors is not None:
            target = replace(target, vector=self.vectors[number]).hashed(target.content_hash)
        teacher = self.teacher
        if teacher is not None:
            teacher = np.concatenate([teacher[:1], teacher[1 + number, None], teacher[1 + len(self.texts) :]])
        return replace(self, target=target, alternatives=(), vectors=None, teacher=teacher)

    def without_negatives(self) -> "Pair":
        """Return the pair without its negatives, and without their scores and the teacher's rows of them."""
        positives = 1 + len(self.positives)
        scores = self.scores and self.scores[:positives]
        teacher = self.teacher
        if teacher is not None:
            teacher = teacher[: 1 + len(self.alternatives) + positives]
        return replace(self, negatives=(), scores=scores, teacher=teacher)

    def alone(self, query: Item, target: Item) -> "Pair":
        """Return a pair of only these two items, with the target's weight."""
        return Pair(self.key, self.dataset, self.task, query, target, weights=self.weights[:1])


@dataclass(frozen=True)
class Single:
    """A single item: a query or a candidate of an evaluation set."""

    key: str
    dataset: str
    task: str
    item: Item

    @property
    def items(self) -> tuple[Item, ...]:
        return (self.item,)


def text_fault(text: str, images: int = 0, videos: int = 0) -> tuple[str, str] | None:
    """Return (cause, detail) if a text is invalid for an item with these numbers of images and videos, else None."""
    shown = repr(text[:200])
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can contain
        return "not UTF-8", shown
    if "\0" in text:
        return "NUL character", f"is its file UTF-16? Convert it to UTF-8: {shown}"
    if not any(letter.isprintable() and not letter.isspace() for letter in text):  # zero-width spaces count as empty
        return EMPTY_TEXT, shown
    for mark, files in ((IMAGE_MARK, images), (VIDEO_MARK, videos)):
        if (marks := text.count(mark)) != files:
            return "marks and files differ", f"{marks} {mark} for {files} files in {shown}"
    return None


def distinct(texts: Iterable[str]) -> list[str]:
    """Return the first of those texts that differ at most in the white space at their ends, and no blank text."""
    found: dict[str, str] = {}
    for text in texts:
        found.setdefault(text.strip(), text)
    found.pop("", None)
    return list(found.values())


def mended(text: str, images: int) -> str:
    """Return an item's text with the right image marks, where a row of MMEB has a mark or an image too many.

    Without images, marks and the white space after them are removed. One image without a mark gets one at the front.
    """
    if not images:
        return re.sub(rf"{IMAGE_MARK}\s*", "", text)
    return f"{IMAGE_MARK}\n{text}" if images == 1 and IMAGE_MARK not in text else text


def is_absent(value: object) -> bool:
    """Return whether a value is an empty cell: None, or NaN, which pandas writes."""
    return value is None or (isinstance(value, float) and math.isnan(value))


class BadSample(Exception):
    """A sample that cannot be used; it becomes an invalid row of the batch, counted and logged."""
