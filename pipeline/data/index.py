"""A dataset's index: `index.json`, and beside it a sidecar for every shard with one record per sample.

The order of samples needs only `index.json`. A sidecar gives the position, the checksum and the token length of each
sample; its records are read block by block, together with the samples.
"""

import hashlib
import json
import re
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
from pydantic import FailFast, Field, ValidationError
from pydantic_core import from_json, to_json

from pipeline.data.arrays import array_bytes, array_of
from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK
from pipeline.errors import printable
from pipeline.storage import objects
from pipeline.storage.documents import FIXED, adapter, explained, no_json
from pipeline.storage.objects import ObjectError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT = 2
INDEX_FILE = "index.json"
_ATTEMPTS = 3  # data that arrives damaged may have been damaged in transit
_MOST_IMAGES = 3 * 255  # per sample: a record has one byte each for the number of query, target and negative images

# Strict numbers: 4.0, "4" and true are errors.
Count = Annotated[int, Field(strict=True, ge=0, le=2**50)]
Positive = Annotated[int, Field(strict=True, ge=1, le=2**31)]
Side = Annotated[int, Field(strict=True, ge=0, le=65535)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, Field(strict=True, ge=0, le=2**50, alias="bytes")]  # "bytes" in the JSON


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, its number of samples, and size and SHA-256 (hex) of the tar and of its sidecar.

    text_bytes, images, videos: totals over all samples; text in UTF-8. Estimates use them without reading the sidecar.
    image_sizes: (width, height) of some images, evenly spaced in the order of area.
    max_images: the most images of one sample; it sets the width of the sidecar's records. tasks: samples of each task.
    """

    __pydantic_config__ = FIXED

    file: str
    samples: Positive
    size: Size
    sha256: Digest
    sidecar_sha256: Digest
    sidecar_bytes: Count
    text_bytes: Count
    images: Count
    videos: Count
    image_sizes: tuple[tuple[Side, Side], ...]
    max_images: Annotated[int, Field(strict=True, ge=0, le=_MOST_IMAGES)]
    tasks: dict[str, Count] = field(hash=False)  # a shard is a key of caches

    @property
    def sidecar(self) -> str:
        return self.file.removesuffix(".tar") + ".idx.npy"


@dataclass(frozen=True)
class Captions:
    """How to read tars in img2dataset's layout as pairs: the image is the query, a caption the target.

    query: the query's text, with one `<image>`. task: the task of all samples.
    columns: the places of the captions: "txt" is the member KEY.txt, any other name a column of KEY.json, with a text
        or a list of texts.
    """

    __pydantic_config__ = FIXED

    query: str
    columns: Annotated[tuple[str, ...], Field(min_length=1)]
    task: str


@dataclass(frozen=True)
class IndexedFile:
    """Size and SHA-256 (hex) of an additional file beside the index."""

    __pydantic_config__ = FIXED

    size: Size
    sha256: Digest

    @classmethod
    def of(cls, content: bytes) -> "IndexedFile":
        return cls(len(content), hashlib.sha256(content).hexdigest())

    def read(self, url: str, remedy: str) -> bytes:
        """Read the file at this URL. Raises ObjectError, which ends with the `remedy`, if it is not as indexed."""

        def read() -> bytes | None:
            data = objects.read(url)
            return data if IndexedFile.of(data) == self else None

        return intact(read, f"{url} is damaged (its sha256 differs from the index's): {remedy}")


@dataclass(frozen=True)
class Index:
    """The content of a dataset.

    captions: None for shards in our own layout.  shards_url: the folder of the tars, if it is not that of the index.
    files: additional files of the dataset by name, such as the rows of a converted evaluation set.
    """

    __pydantic_config__ = FIXED

    dataset: str
    shards: Annotated[tuple[Shard, ...], Field(min_length=1), FailFast()]
    captions: Captions | None = None
    shards_url: str = ""
    files: dict[str, IndexedFile] = field(default_factory=dict)

    @cached_property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def total_bytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    def to_json(self) -> str:
        return index_text(self._content, self._checksum)

    @property
    def _content(self) -> dict[str, Any]:
        head = {"format": FORMAT, "dataset": self.dataset, "samples": self.samples, "bytes": self.total_bytes}
        rest = as_json(self)
        return head | {name: rest[name] for name in ("captions", "shards_url", "files", "shards")}

    @cached_property
    def _checksum(self) -> str:
        return checksum_of(self._content)

    @classmethod
    def load(cls, url: str) -> "Index":
        """Read the index in the folder `url`. Raises ObjectError if it is missing, invalid or of another format."""
        name, remedy = objects.join(url, INDEX_FILE), "make the shards again"
        with index_content(name, FORMAT, remedy) as (content, checksum):
            totals = {total: content.pop(total, None) for total in ("samples", "bytes")}
            index = validated(cls, content)
            check_shards(index.shards)
            if totals != {"samples": index.samples, "bytes": index.total_bytes}:
                raise ValueError(f"its totals {totals} are not those of its shards")
            for file in index.files:
                check_name(file, "file beside it")
            if index.captions:
                query = index.captions.query
                if (query.count(IMAGE_MARK), query.count(VIDEO_MARK)) != (1, 0):
                    raise ValueError(f"captions.query {query!r} must have one {IMAGE_MARK}, and no {VIDEO_MARK}")
            index.__dict__["_checksum"] = checksum  # computing it takes seconds for a million shards
            return index

    def read_file(self, url: str, name: str) -> bytes:
        """Read an additional file of the dataset in the folder `url`. Raises ObjectError if it is not as indexed."""
        if name not in self.files:
            raise ObjectError(f"{objects.join(url, INDEX_FILE)} names no {name}: make the shards again")
        return self.files[name].read(objects.join(url, name), "make the shards again")


def as_json(value: object) -> Any:
    """Return a dataclass as the JSON object that is stored: dictionaries, lists and plain values."""
    return adapter(type(value)).dump_python(value, mode="json", by_alias=True)


def index_text(content: dict[str, Any], checksum: str) -> str:
    """Return the stored text of an index. pydantic writes a million shards in seconds, the json module in minutes."""
    return to_json(content | {"checksum": checksum}, indent=1).decode() + "\n"


@contextmanager
def index_content(name: str, version: int, remedy: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the content of the index `name`, without its format and checksum, and the checksum; both are verified.

    Raises ObjectError, which ends with the `remedy`, if they are wrong, or if the block raises a ValueError.
    """
    why = ""

    def read() -> tuple[dict[str, Any], str] | None:
        nonlocal why
        data = objects.read(name).removeprefix(BOM_UTF8)
        try:
            content = from_json(data, allow_inf_nan=False)
        except ValueError as error:
            why = no_json(data.decode(errors="replace"), error)
            return None
        found = content.get("format") if isinstance(content, dict) else None
        if type(found) is not int or found != version:
            raise ObjectError(
                f"{name} has format {printable(repr(found))}, this version reads format {version}: {remedy}"
            )
        why = "is damaged (its checksum differs)"
        checksum = content.pop("checksum", None)
        is_right = checksum == checksum_of(content)
        del content["format"]
        return (content, checksum) if is_right else None

    found = intact(read, lambda: f"{name} {why}: {remedy}")
    try:
        yield found
    except (ValueError, RecursionError) as error:
        reason = explained(error) if isinstance(error, ValidationError) else printable(str(error))
        raise ObjectError(f"{name} is not a valid index ({reason}): {remedy}") from None


T = TypeVar("T")
Form = TypeVar("Form", bound="DataclassInstance")


def validated(form: type[Form], content: dict[str, Any]) -> Form:
    """Validate the content as a dataclass. Raises ValueError if any member is missing, even one with a default."""
    if missing := [each.name for each in fields(form) if each.name not in content]:
        raise ValueError(f"{missing[0]!r} is missing")
    return adapter(form).validate_python(content)


_NAME = re.compile(r"[^/.\x00-\x1f\x7f-\x9f][^/\x00-\x1f\x7f-\x9f]*")


def check_name(name: str, what: str) -> None:
    """Raise ValueError unless `name` is a plain file name, which cannot leave the folder or control the terminal."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a valid name of a {what}")


def check_shards(shards: Sequence[Shard]) -> None:
    """Raise ValueError if an entry is inconsistent, or if two shards have the same name."""
    for shard in shards:
        check_name(shard.file, "shard")
        if not shard.file.endswith(".tar"):
            raise ValueError(f"{shard.file!r} is not a valid name of a shard: it does not end with .tar")
        header = shard.sidecar_bytes - shard.samples * _record_bytes(shard.max_images)
        if not 0 < header <= 1 << 16:
            raise ValueError(
                f"{shard.file}: a sidecar of {shard.sidecar_bytes} bytes cannot hold {shard.samples} samples with "
                f"at most {shard.max_images} images"
            )
        if shard.images > shard.samples * shard.max_images or shard.videos > 255 * shard.samples:
            raise ValueError(
                f"{shard.file}: {shard.images} images or {shard.videos} videos are too many for {shard.samples} "
                f"samples with at most {shard.max_images} images each"
            )
    if len({shard.file for shard in shards}) < len(shards):
        ((file, _),) = Counter(shard.file for shard in shards).most_common(1)
        raise ValueError(f"two shards are called {file}")


@lru_cache
def _record_bytes(max_images: int) -> int:
    return sidecar_dtype(max_images).itemsize


def checksum_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sidecar_dtype(max_images: int) -> np.dtype:
    """Return the dtype of a sidecar's records, for a shard whose samples have at most `max_images` images.

    offset, length: position of the sample's bytes (tar headers included) in the tar; crc32: of these bytes.
    query_hash, target_hash: Item.content_hash; a Single's item is the query, and its target_hash is 0.
    *_text: UTF-8 bytes; for the target those of its longest text, for the negatives the total.
    negative*, negatives: those of the further positives and of the negatives together.
    image_sizes: (width, height) in pixels of the images of the query, the target, the further positives, then the
        negatives; the rest is zero, and so is the size of an image that cannot be read.
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


def record_checksums(records: np.ndarray, seed: int = 0) -> np.ndarray:
    """Compute the correct checksum of each record: (n,) records -> (n,) uint32.  seed: the CRC-32 of what precedes."""
    rows = np.ascontiguousarray(records).tobytes()
    width = records.dtype.itemsize
    sums = [zlib.crc32(rows[start : start + width - 4], seed) for start in range(0, len(rows), width)]
    return np.array(sums, np.uint32)


def sidecar_of(records: np.ndarray, seed: int = 0) -> bytes:
    """Set the checksums of records, whose last field they are, and return the bytes of a sidecar with them."""
    records["checksum"] = record_checksums(records, seed)
    return array_bytes(records)


def shard_entry(file: str, size: int, sha256: str, records: np.ndarray, **totals: Any) -> tuple[Shard, bytes]:
    """Return a tar's entry in the index and its sidecar's bytes. size, sha256: of the tar. totals: the other fields."""
    sidecar = sidecar_of(records)
    sums: dict[str, Any] = {"sidecar_sha256": hashlib.sha256(sidecar).hexdigest(), "sidecar_bytes": len(sidecar)}
    return Shard(file=file, samples=len(records), size=size, sha256=sha256, **sums, **totals), sidecar


def load_sidecar(url: str, shard: Shard) -> np.ndarray:
    """Read all (shard.samples,) records of `sidecar_dtype`. Raises ObjectError if the bytes are not those indexed."""
    name = objects.join(url, shard.sidecar)

    def read() -> bytes | None:
        data = objects.read(name)
        return data if hashlib.sha256(data).hexdigest() == shard.sidecar_sha256 else None

    data = intact(read, f"{name} is damaged (its sha256 differs from the index's): delete and upload it again")
    try:
        records = array_of(data)
        if records.shape != (shard.samples,) or records.dtype != sidecar_dtype(shard.max_images):
            raise ValueError("it holds another array")
    except ValueError:
        raise ObjectError(f"{name} is not a sidecar of {shard.samples} samples: make the shards again") from None
    _check_records(name, shard, records)
    return records


def _check_records(name: str, shard: Shard, records: np.ndarray) -> None:
    """Raise ObjectError unless the samples of consecutive records follow each other in the tar."""
    begins, ends = records["offset"], records["offset"] + records["length"]
    wrong = (begins > shard.size) | (ends > shard.size)
    wrong[1:] |= begins[1:] < ends[:-1]
    if wrong.any():
        record = records[int(wrong.argmax())]
        raise ObjectError(
            f"{name}: its records are inconsistent: a sample of {record['length']} bytes at byte {record['offset']} "
            f"exceeds the tar's {shard.size} bytes, or overlaps the sample before it; make the shards again"
        )


def read_records(url: str, shard: Shard, start: int, stop: int) -> np.ndarray:
    """Read records start..stop-1 of a shard's sidecar by one ranged read. Raises ObjectError if they are damaged."""
    name = objects.join(url, shard.sidecar)
    records = read_rows(name, shard.sidecar_bytes, shard.samples, sidecar_dtype(shard.max_images), start, stop)
    _check_records(name, shard, records)
    return records


def read_rows(name: str, size: int, count: int, dtype: np.dtype, start: int, stop: int, seed: int = 0) -> np.ndarray:
    """Read rows start..stop-1 of the result of `sidecar_of` for `count` records and this seed, by one ranged read.

    name: its URL.  size: its bytes.  dtype: of the records.  Raises ObjectError if the rows are damaged.
    """
    first = size - (count - start) * dtype.itemsize  # a header precedes the records

    def read() -> np.ndarray | None:
        records = np.frombuffer(objects.read(name, first, (stop - start) * dtype.itemsize), dtype)
        return records if (record_checksums(records, seed) == records["checksum"]).all() else None

    return intact(read, f"{name} is damaged (records {start}-{stop - 1}): delete and upload it again")


def read_samples(url: str, shard: Shard, records: np.ndarray) -> list[bytes]:
    """Read the bytes of consecutive samples of a shard, given their records, by one ranged read.

    Raises ObjectError if a CRC-32 differs from the indexed one. Damaged bytes must not count as an invalid sample,
    because training would only mask it.
    """
    if not len(records):
        return []
    name = objects.join(url, shard.file)
    offsets = records["offset"].tolist()  # Python integers: u8 + u4 would overflow or become float in numpy
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


def intact(read: Callable[[], T | None], complaint: str | Callable[[], str]) -> T:
    """Call `read` until its result is not None, which means damaged data. Raises ObjectError after some attempts."""
    for _ in range(_ATTEMPTS):
        if (content := read()) is not None:
            return content
    raise ObjectError(complaint if isinstance(complaint, str) else complaint())
