"""What every format has in common: a source is rows in a fixed order, each a sample to write, or rejected."""

import re
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from pipeline.data.sample import BYTE_ORDER_MARK, BadSample, Pair, Single
from pipeline.data.tiles import decode_image
from pipeline.data.video import sample_frames
from pipeline.errors import PipelineError


class Rejection(Exception):
    """A row that cannot become a sample. cause: one of few, to count by; detail: what of this row, and why.

    The detail becomes one line of at most 300 characters, without addresses in memory: two conversions say the same.
    """

    def __init__(self, cause: str, detail: str) -> None:
        detail = " ".join(re.sub(" at 0x[0-9a-f]+", "", detail).split())[:300]
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail = cause, detail


class Rows(Protocol):
    """The rows of one dataset. They are sent to other processes, and what they return depends on nothing else.

    dataset: its name.
    """

    dataset: str

    def sizes(self) -> np.ndarray:
        """(rows,) int64: bytes that each row takes in a shard, about; shards are cut by them.

        It may look at files' sizes, not at their content. A missing file counts nothing: its row will be rejected.
        """
        ...

    def name(self, number: int) -> str:
        """What a person calls the row in the source: "line 17"."""
        ...

    def sample(self, number: int) -> Pair | Single:
        """Read row `number`; raises Rejection."""
        ...

    def files(self) -> dict[str, bytes]:
        """Further files for the dataset's folder, by name; {} for most formats."""
        ...


@dataclass(frozen=True)
class ImageFolder:
    """Images, and videos, of a source by their paths in it.

    max_side: larger images are scaled down to this many pixels on their longer side, and encoded anew as JPEG of
    `quality`; all others stay as they are, byte by byte.
    """

    folder: Path
    max_side: int | None = None
    quality: int = 90

    def path(self, name: str) -> Path:
        """Where the file is; Rejection if the name leads out of the folder, also by a link."""
        try:
            found = (self.folder / name).resolve()
        except (OSError, ValueError, RuntimeError):  # a name with a NUL, links in a circle
            raise Rejection("missing file", repr(name)) from None
        if not found.is_relative_to(self.folder.resolve()):
            raise Rejection("path leaves the source", name)
        return found

    def size(self, name: str) -> int:
        """Bytes of the file, 0 if there is none that may be read."""
        try:
            return self.path(name).stat().st_size
        except (Rejection, OSError, ValueError):
            return 0

    def read(self, name: str) -> bytes:
        """The image's bytes; Rejection if it is missing, broken or too large to decode."""
        data = self._bytes(name)
        try:
            image = decode_image(data)
        except BadSample as reason:
            raise Rejection("broken image", f"{name}: {reason}") from None
        if self.max_side is None or max(image.size) <= self.max_side:
            return data
        image.thumbnail((self.max_side, self.max_side), Image.Resampling.LANCZOS)
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue()

    def read_video(self, name: str) -> bytes:
        """The video's bytes; Rejection if it is missing or no frame of it can be decoded."""
        data = self._bytes(name)
        try:
            sample_frames(data, 1)
        except BadSample as reason:
            raise Rejection("broken video", f"{name}: {reason}") from None
        return data

    def _bytes(self, name: str) -> bytes:
        path = self.path(name)
        try:
            if not path.is_file():
                raise Rejection("missing file", name)
            return path.read_bytes()
        except OSError as error:
            raise Rejection("unreadable file", f"{name}: {error.strerror}") from None


def checked_text(text: str, mark_count: int, mark: str) -> str:
    """The text, if it is not empty and has as many marks as there are images (or videos); else a Rejection."""
    if not text.replace(BYTE_ORDER_MARK, "").strip():
        raise Rejection("empty text", repr(text))
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        raise Rejection("not UTF-8", repr(text)) from None
    if text.count(mark) != mark_count:
        raise Rejection("marks and files differ", f"{text.count(mark)} {mark} for {mark_count} files in {text!r}")
    return text


def member_bytes(content: int | np.ndarray) -> int | np.ndarray:
    """Bytes that a file of `content` bytes takes in a tar: a header, and blocks of 512."""
    return 512 + -(-content // 512) * 512


def folder(path: Path) -> Path:
    """`path`, if it is a folder; else a PipelineError."""
    if not path.is_dir():
        raise PipelineError(f"{path}: there is no such folder")
    return path
