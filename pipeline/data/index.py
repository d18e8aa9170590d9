"""A dataset's index: `index.json` and, beside it, a sidecar for every shard with one record a sample.

The order of samples needs only `index.json`. A sidecar says where each sample's bytes are, whether they are
intact, and what sets its length in tokens; its records are read by the block, with the samples themselves.
"""

import gc
import hashlib
import json
import os
import re
import sys
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from io import BytesIO
from tokenize import TokenError
from typing import Annotated, TypeVar

import numpy as np
from pydantic import FailFast, Field, ValidationError
from pydantic_core import from_json, to_json

from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK
from pipeline.errors import printable
from pipeline.storage import objects
from pipeline.storage.documents import FIXED, adapter, explained, no_json
from pipeline.storage.objects import ObjectError

FORMAT = 2
INDEX_FILE = "index.json"
_LARGE = 100_000_000  # bytes of an index that takes seconds to read, of a few hundred thousand shards
_ATTEMPTS = 3  # what arrives damaged may have been damaged on its way
_MOST_IMAGES = 3 * 255  # of one sample: a record counts the query's, the target's and the negatives' in a byte each

# A number of an index, which JSON has as one: not 4.0, not "4", not true.
Count = Annotated[int, Field(strict=True, ge=0, le=2**50)]
Positive = Annotated[int, Field(strict=True, ge=1, le=2**31)]
Side = Annotated[int, Field(strict=True, ge=0, le=65535)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, samples, bytes, SHA-256 (hex) of the tar and of its sidecar, whose size is also said.

    For estimates before any sidecar is read: text_bytes (UTF-8), images and videos in all samples together;
    image_sizes, some of the images' (width, height), evenly spaced when they are sorted by area.
    max_images: of one sample; it sets the width of the sidecar's records. tasks: task -> its samples.
    """

    __pydantic_config__ = FIXED

    file: str
    samples: Positive
    bytes: Count
    sha256: Digest
    sidecar_sha256: Digest
    sidecar_bytes: Count
    text_bytes: Count
    images: Count
    videos: Count
    image_sizes: tuple[tuple[Side, Side], ...]
    max_images: Annotated[int, Field(strict=True, ge=0, le=_MOST_IMAGES)]
    tasks: dict[str, Count] = field(hash=False)  # so that a shard can be a key of caches

    @property
    def sidecar(self) -> str:
        return self.file.removesuffix(".tar") + ".idx.npy"


@dataclass(frozen=True)
class Captions:
    """How tars in img2dataset's layout are read as pairs: the image asks, a caption answers.

    query: the query's text, with one `<image>`. columns: where captions are: "txt" is the member KEY.txt, any
    other name a column of KEY.json, a text or a list of texts. task: of all samples.
    """

    __pydantic_config__ = FIXED

    query: str
    columns: Annotated[tuple[str, ...], Field(min_length=1)]
    task: str


@dataclass(frozen=True)
class File:
    """A further file beside the index: its bytes and their SHA-256 (hex)."""

    __pydantic_config__ = FIXED

    bytes: Count
    sha256: Digest

    @classmethod
    def of(cls, content: bytes) -> "File":
        return cls(len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Index:
    """What a dataset consists of.

    captions: None for shards in our own layout.  shards_url: where the tars are, if not beside the index.
    files: by name, what else belongs to the dataset: of a converted evaluation set, its rows.
    """

    __pydantic_config__ = FIXED

    dataset: str
    shards: Annotated[tuple[Shard, ...], Field(min_length=1), FailFast()]
    captions: Captions | None = None
    shards_url: str = ""
    files: dict[str, File] = field(default_factory=dict)

    @cached_property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def total_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def to_json(self) -> str:
        return index_text(self._content, self._checksum)

    @property
    def _content(self) -> dict:
        head = {"format": FORMAT, "dataset": self.dataset, "samples": self.samples, "bytes": self.total_bytes}
        rest = {name: getattr(self, name) for name in ("captions", "shards_url", "files", "shards")}
        return head | rest

    @cached_property
    def _checksum(self) -> str:
        return checksum_of(plain(self._content))

    @classmethod
    def load(cls, url: str) -> "Index":
        """Read the index in the folder `url`; ObjectError if missing, malformed, damaged or of another format."""
        name, again = objects.join(url, INDEX_FILE), "make the shards again"
        with index_content(name, FORMAT, again) as (content, checksum):
            totals = {total: content.pop(total, None) for total in ("samples", "bytes")}
            index = validated(cls, content)
            check_shards(index.shards)
            if totals != {"samples": index.samples, "bytes": index.total_bytes}:
                raise ValueError(f"its totals {totals} are not those of its shards")
            for file in index.files:
                check_name(file, "file beside it")
            marks = index.captions and [index.captions.query.count(mark) for mark in (IMAGE_MARK, VIDEO_MARK)]
            if marks not in (None, [1, 0]):
                raise ValueError(
                    f"captions.query {index.captions.query!r} must have one {IMAGE_MARK}, and no {VIDEO_MARK}"
                )
            index.__dict__["_checksum"] = checksum  # of a million shards it takes seconds
            return index

    def read_file(self, url: str, name: str) -> bytes:
        """The further file `name` of the dataset in the folder `url`. ObjectError if it is not the one indexed."""
        place = objects.join(url, name)
        if name not in self.files:
            raise ObjectError(f"{objects.join(url, INDEX_FILE)} names no {name}: make the shards again")

        def read() -> bytes | None:
            data = objects.read(place)
            return data if File.of(data) == self.files[name] else None

        return intact(read, f"{place} is damaged (its sha256 differs from the index's): make the shards again")


def index_text(content: dict, checksum: str) -> str:
    """An index as it is stored. pydantic writes a million shards in seconds, the json module in minutes."""
    return to_json(content | {"checksum": checksum}, indent=1).decode() + "\n"


def plain(content: dict) -> dict:
    """The same with dataclasses as objects, and tuples as lists, as a reader finds them."""
    return from_json(to_json(content))


@contextmanager
def index_content(name: str, version: int, again: str) -> Iterator[tuple[dict, str]]:
    """What the index `name` holds beside its format and checksum, which are right; and the checksum.

    ObjectError, with what to do `again`, if they are not; and where a ValueError of this context says what is wrong.
    """
    why = ""

    def read() -> tuple[dict, str] | None:
        nonlocal why
        data = objects.read(name).removeprefix(BOM_UTF8)
        if len(data) > _LARGE and os.environ.get("RANK", "0") == "0":
            print(f"reading {printable(name)}, {len(data) / 1e6:.0f} MB", file=sys.stderr, flush=True)
        try:
            content = from_json(data, allow_inf_nan=False)
        except ValueError as error:
            why = no_json(data.decode(errors="replace"), error)
            return None
        found = content.get("format") if isinstance(content, dict) else None
        if type(found) is not int or found != version:
            raise ObjectError(
                f"{name} has format {printable(repr(found))}, this version reads format {version}: {again}"
            )
        why = "is damaged (its checksum differs)"
        checksum = content.pop("checksum", None)
        right = checksum == checksum_of(content)
        del content["format"]
        return (content, checksum) if right else None

    with _no_collection():
        found = intact(read, lambda: f"{name} {why}: {again}")
        try:
            yield found
        except (ValueError, RecursionError) as error:
            reason = explained(error) if isinstance(error, ValidationError) else printable(str(error))
            raise ObjectError(f"{name} is no index of ours ({reason}): {again}") from None


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the garbage collector, which would look through a million new objects again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


Form = TypeVar("Form")


def validated(form: type[Form], content: dict) -> Form:
    """The content, of which all members must be there, as a dataclass; ValueError if it is none."""
    if missing := [each.name for each in fields(form) if each.name not in content]:
        raise ValueError(f"{missing[0]!r} is missing")
    return adapter(form).validate_python(content)


_NAME = re.compile(r"[^/.\x00-\x1f\x7f-\x9f][^/\x00-\x1f\x7f-\x9f]*")


def check_name(name: str, what: str) -> None:
    """ValueError for what is no plain name of a file: it could lead elsewhere, or command the terminal."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a {what}")


def check_shards(shards: Sequence[Shard]) -> None:
    """ValueError where the entries of shards contradict themselves or each other."""
    for shard in shards:
        check_name(shard.file, "shard")
        if not shard.file.endswith(".tar"):
            raise ValueError(f"{shard.file!r} is no name of a shard: it does not end with .tar")
        header = shard.sidecar_bytes - shard.samples * _record_bytes(shard.max_images)
        if not 0 < header <= 1 << 16:
            raise ValueError(
                f"{shard.file}: a sidecar of {shard.sidecar_bytes} bytes cannot hold {shard.samples} samples with "
                f"{shard.max_images} images at most"
            )
        if shard.images > shard.samples * shard.max_images or shard.videos > 255 * shard.samples:
            raise ValueError(
                f"{shard.file}: {shard.images} images in {shard.samples} samples with at most {shard.max_images} each, "
                f"or {shard.videos} videos in them"
            )
    if len({shard.file for shard in shards}) < len(shards):
        ((file, _),) = Counter(shard.file for shard in shards).most_common(1)
        raise ValueError(f"two shards are called {file}")


@lru_cache
def _record_bytes(max_images: int) -> int:
    return sidecar_dtype(max_images).itemsize


def checksum_of(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sidecar_dtype(max_images: int) -> np.dtype:
    """One record of a sidecar, for a shard whose samples have at most `max_images` images.

    offset, length: of the sample's bytes (tar headers included) in the tar; crc32 is of these bytes.
    query_hash, target_hash: Item.content_hash; of a Single, its item is the query and target_hash 0.
    *_text: UTF-8 bytes, of the target the longest of its texts, of all negatives together.
    image_sizes: (width, height) in pixels of the query's, the target's, then the negatives' images, the rest
    zero; (0, 0) is also an image whose size cannot be read.
    checksum: CRC-32 of the record's other bytes.
    """
    return np.dtype(
        [
            ("offset", "<u8"),
            ("length", "<u4"),
            ("crc32", "<u4"),
            ("query_hash", "<u8"),
            ("target_hash", "<u8"),
            ("query_text", "<u4"),
            ("target_text", "<u4"),
            ("negative_text", "<u4"),
            ("query_images", "u1"),
            ("target_images", "u1"),
            ("negative_images", "u1"),
            ("negatives", "u1"),
            ("videos", "u1"),
            ("image_sizes", "<u2", (max_images, 2)),
            ("checksum", "<u4"),
        ]
    )


def record_checksums(records: np.ndarray) -> np.ndarray:
    """(n,) records -> (n,) uint32, what each record's checksum should be."""
    rows = memoryview(np.ascontiguousarray(records).view(np.uint8))
    width = records.dtype.itemsize
    sums = [zlib.crc32(rows[start : start + width - 4]) for start in range(0, len(rows), width)]
    return np.array(sums, np.uint32)


def sidecar_of(records: np.ndarray) -> bytes:
    """The bytes of a sidecar of these records of `sidecar_dtype`, whose checksums are set here."""
    records["checksum"] = record_checksums(records)
    buffer = BytesIO()
    np.save(buffer, records, allow_pickle=False)
    return buffer.getvalue()


def load_sidecar(url: str, shard: Shard) -> np.ndarray:
    """(shard.samples,) records of `sidecar_dtype`. Raises ObjectError if the bytes are not those indexed."""
    name = objects.join(url, shard.sidecar)

    def read() -> bytes | None:
        data = objects.read(name)
        return data if hashlib.sha256(data).hexdigest() == shard.sidecar_sha256 else None

    data = intact(read, f"{name} is damaged (its sha256 differs from the index's): delete and upload it again")
    dtype = sidecar_dtype(shard.max_images)
    start = len(data) - shard.samples * dtype.itemsize
    if len(data) != shard.sidecar_bytes or not _is_header(data[:start], shard.samples, shard.max_images):
        raise ObjectError(f"{name} is no sidecar of {shard.samples} samples: make the shards again")
    records = np.frombuffer(data, dtype, offset=start)
    _check_records(name, shard, records)
    return records


# What numpy raises of a header that is damaged: it is a piece of Python.
NO_ARRAY = (ValueError, TypeError, EOFError, SyntaxError, TokenError, RecursionError, MemoryError, OverflowError)


def array_of(data: bytes) -> np.ndarray:
    """The array in the bytes of a .npy file; ValueError for anything else. Nothing is allocated for what it claims."""
    file = BytesIO(data)
    try:
        np.lib.format.read_magic(file)
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
        values = np.frombuffer(data[file.tell() :], dtype) if len(data) > file.tell() else np.zeros(0, dtype)
        return values.reshape(shape, order="F" if columns_first else "C")
    except NO_ARRAY as error:
        raise ValueError(f"it holds no array ({error})") from None


@lru_cache
def _is_header(header: bytes, samples: int, max_images: int) -> bool:
    """Whether these bytes say that an array of so many records follows. Nothing is allocated for what they claim."""
    file = BytesIO(header)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            return False
        found = np.lib.format.read_array_header_1_0(file)
    except NO_ARRAY:
        return False
    return found == ((samples,), False, sidecar_dtype(max_images)) and file.tell() == len(header)


def _check_records(name: str, shard: Shard, records: np.ndarray) -> None:
    """ObjectError unless consecutive records lie one after the other in the tar."""
    begins, ends = records["offset"], records["offset"] + records["length"]
    wrong = (begins > shard.bytes) | (ends > shard.bytes)
    wrong[1:] |= begins[1:] < ends[:-1]
    if wrong.any():
        record = records[int(wrong.argmax())]
        raise ObjectError(
            f"{name}: its records make no sense: {record['length']} bytes of a sample at byte {record['offset']} lie "
            f"beyond the tar's {shard.bytes}, or before the end of the sample before it; make the shards again"
        )


def read_records(url: str, shard: Shard, start: int, stop: int) -> np.ndarray:
    """Records start..stop-1 of a shard's sidecar, by one ranged read. ObjectError if they are damaged."""
    name = objects.join(url, shard.sidecar)
    dtype = sidecar_dtype(shard.max_images)
    first = shard.sidecar_bytes - (shard.samples - start) * dtype.itemsize  # a header precedes the records

    def read() -> np.ndarray | None:
        records = np.frombuffer(objects.read(name, first, (stop - start) * dtype.itemsize), dtype)
        return records if (record_checksums(records) == records["checksum"]).all() else None

    records = intact(read, f"{name} is damaged (records {start}-{stop - 1}): delete and upload it again")
    _check_records(name, shard, records)
    return records


def read_samples(url: str, shard: Shard, records: np.ndarray) -> list[bytes]:
    """The bytes of consecutive samples of a shard, given their records, by one ranged read.

    Raises ObjectError when a sample's CRC-32 is not the indexed one: damaged bytes must never be taken
    for a bad sample, which training would only mask.
    """
    if not len(records):
        return []
    name = objects.join(url, shard.file)
    offsets = records["offset"].tolist()  # Python integers: u8 + u4 in numpy would wrap or become float
    ends = [offset + length for offset, length in zip(offsets, records["length"].tolist(), strict=True)]
    first = offsets[0]
    damaged = ""

    def read() -> list[bytes] | None:
        nonlocal damaged
        block = memoryview(objects.read(name, first, ends[-1] - first))
        samples = [bytes(block[begin - first : end - first]) for begin, end in zip(offsets, ends, strict=True)]
        wrong = [i for i, sample in enumerate(samples) if zlib.crc32(sample) != records["crc32"][i]]
        if wrong:
            damaged = f"bytes {offsets[wrong[0]]}-{ends[wrong[0]] - 1}"
        return None if wrong else samples

    return intact(
        read, lambda: f"{name} is damaged: {damaged} differ from what was indexed; delete and upload it again"
    )


Content = TypeVar("Content")


def intact(read: Callable[[], Content | None], complaint: str | Callable[[], str]) -> Content:
    """What `read` returns, tried again while that is None: for "damaged"; in the end an ObjectError."""
    for _ in range(_ATTEMPTS):
        if (content := read()) is not None:
            return content
    raise ObjectError(complaint if isinstance(complaint, str) else complaint())
