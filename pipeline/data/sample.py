"""What one sample is: a query and its target, or one item alone; each item a text with its images or video."""

from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b

IMAGE_MARK = "<image>"
VIDEO_MARK = "<video>"
MMEB_IMAGE_MARK = "<|image_1|>"  # what MMEB's own rows write for it

# The image formats that samples hold, as Pillow names them, with the suffix of their files.
IMAGE_SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif"}
VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "avi", "mov")


@dataclass(frozen=True)
class Item:
    """One thing to embed.

    text: says by `<image>` (`<video>`) where each image (the video) goes.
    images: encoded bytes (PNG, JPEG, ...), in the order of their marks.
    video: encoded bytes, or None.
    """

    text: str
    images: tuple[bytes, ...] = ()
    video: bytes | None = None

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


@dataclass(frozen=True)
class Pair:
    """One training sample: `target` answers `query`; `negatives` look as if they did.

    alternatives: texts that may stand in the place of the target's: an image's other captions, of which
        each step that takes the sample draws one.
    """

    key: str
    dataset: str
    task: str
    query: Item
    target: Item
    negatives: tuple[Item, ...] = ()
    alternatives: tuple[str, ...] = ()

    @property
    def items(self) -> tuple[Item, ...]:
        return (self.query, self.target, *self.negatives)

    @property
    def texts(self) -> tuple[str, ...]:
        """The target's texts, of which one is drawn."""
        return (self.target.text, *self.alternatives)

    def drawn(self, number: int) -> "Pair":
        """The pair with its target's text number `number`, and no others."""
        target = replace(self.target, text=self.texts[number]) if number else self.target
        return replace(self, target=target, alternatives=())


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


class BadSample(Exception):
    """A sample that cannot be used as it was written; it becomes an invalid row, counted and logged."""
