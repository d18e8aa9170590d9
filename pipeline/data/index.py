"""A dataset's index: `index.json` and, beside it, a sidecar for every shard with one record a sample.

The order of samples needs only `index.json`. A sidecar says where each sample's bytes are, whether they are
intact, and what sets its length in tokens; its records are read by the block, with the samples themselves.
"""

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from io import BytesIO
from typing import TypeVar

import numpy as np

from pipeline.data import objects
from pipeline.data.objects import ObjectError

FORMAT = 2
INDEX_FILE = "index.json"
_ATTEMPTS = 3  # what arrives damaged may have been damaged on its way


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, samples, bytes, SHA-256 (hex) of the tar and of its sidecar, whose size is also said.

    For estimates before any sidecar is read: text_bytes (UTF-8), images and videos in all samples together;
    image_sizes, some of the images' (width, height), evenly spaced when they are sorted by area.
    max_images: of one sample; it sets the width of the sidecar's records. tasks: task -> its samples.
    """

    file: str
    samples: int
    bytes: int
    sha256: str
    sidecar_sha256: str
    sidecar_bytes: int
    text_bytes: int
    images: int
    videos: int
    image_sizes: tuple[tuple[int, int], ...]
    max_images: int
    tasks: dict[str, int] = field(hash=False)  # so that a shard can be a key of caches

    @property
    def sidecar(self) -> str:
        return self.file.removesuffix(".tar") + ".idx.npy"


@dataclass(frozen=True)
class Captions:
    """How tars in img2dataset's layout are read as pairs: the image asks, a caption answers.

    query: the query's text, with one `<image>`. columns: where captions are: "txt" is the member KEY.txt, any
    other name a column of KEY.json, a text or a list of texts. task: of all samples.
    """

    query: str
    columns: tuple[str, ...]
    task: str


@dataclass(frozen=True)
class File:
    """A further file beside the index: its bytes and their SHA-256 (hex)."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> "File":
        return cls(len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Index:
    """What a dataset consists of.

    captions: None for shards in our own layout.  shards_url: where the tars are, if not beside the index.
    files: by name, what else belongs to the dataset: of a converted evaluation set, its rows.
    """

    dataset: str
    shards: tuple[Shard, ...]
    captions: Captions | None = None
    shards_url: str = ""
    files: dict[str, File] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def to_json(self) -> str:
        content = {"format": FORMAT, "dataset": self.dataset, "samples": self.samples, "bytes": self.bytes}
        content |= {"captions": self.captions and asdict(self.captions), "shards_url": self.shards_url}
        content["files"] = {name: asdict(file) for name, file in self.files.items()}
        content["shards"] = [asdict(shard) for shard in self.shards]
        return json.dumps(content | {"checksum": checksum_of(content)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, url: str) -> "Index":
        """Read the index in the folder `url`; ObjectError if missing, malformed, damaged or of another format."""
        name = objects.join(url, INDEX_FILE)

        def read() -> dict | None:
            try:
                content = json.loads(objects.read(name))
            except (ValueError, RecursionError):
                return None
            version = content.get("format") if isinstance(content, dict) else None
            if version != FORMAT:
                raise ObjectError(
                    f"{name} has format {version!r}, this version reads format {FORMAT}: make the shards again"
                )
            return content if content.pop("checksum", None) == checksum_of(content) else None

        content = intact(read, f"{name} is damaged (it is no JSON, or its checksum differs): make the shards again")
        try:
            shards = tuple(shard_of(name, entry) for entry in content["shards"])
            captions = content["captions"]
            if captions is not None:
                captions = Captions(captions["query"], tuple(captions["columns"]), captions["task"])
            files = {file: File(**entry) for file, entry in content["files"].items()}
            return cls(content["dataset"], shards, captions, content["shards_url"], files)
        except (KeyError, TypeError, AttributeError) as error:
            raise ObjectError(f"{name} is no index of ours ({error!r}): make the shards again") from error

    def read_file(self, url: str, name: str) -> bytes:
        """The further file `name` of the dataset in the folder `url`. ObjectError if it is not the one indexed."""
        place = objects.join(url, name)
        if name not in self.files:
            raise ObjectError(f"{objects.join(url, INDEX_FILE)} names no {name}: make the shards again")

        def read() -> bytes | None:
            data = objects.read(place)
            return data if File.of(data) == self.files[name] else None

        return intact(read, f"{place} is damaged (its sha256 differs from the index's): make the shards again")


def shard_of(name: str, entry: dict) -> Shard:
    shard = Shard(**entry | {"image_sizes": tuple(map(tuple, entry["image_sizes"]))})
    if "/" in shard.file or shard.file.startswith("."):
        raise ObjectError(f"{name}: {shard.file!r} is no name of a shard")
    return shard


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
    try:
        sidecar = np.load(BytesIO(data), allow_pickle=False)
    except ValueError as error:
        raise ObjectError(f"{name} is no sidecar ({error}): make the shards again") from error
    if sidecar.dtype != sidecar_dtype(shard.max_images) or sidecar.shape != (shard.samples,):
        raise ObjectError(f"{name} is no sidecar of {shard.samples} samples: make the shards again")
    return sidecar


def read_records(url: str, shard: Shard, start: int, stop: int) -> np.ndarray:
    """Records start..stop-1 of a shard's sidecar, by one ranged read. ObjectError if they are damaged."""
    name = objects.join(url, shard.sidecar)
    dtype = sidecar_dtype(shard.max_images)
    first = shard.sidecar_bytes - (shard.samples - start) * dtype.itemsize  # a header precedes the records

    def read() -> np.ndarray | None:
        records = np.frombuffer(objects.read(name, first, (stop - start) * dtype.itemsize), dtype)
        return records if (record_checksums(records) == records["checksum"]).all() else None

    return intact(read, f"{name} is damaged (records {start}-{stop - 1}): delete and upload it again")


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
