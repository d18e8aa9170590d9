"""A dataset's index: `index.json` and, beside every shard, a sidecar with one record a sample.

The order of samples needs only `index.json`; a sidecar is read when its shard is first touched, and
says where each sample's bytes are, whether they are intact, and what sets its length in tokens.
"""

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from io import BytesIO

import numpy as np

from pipeline.data import objects
from pipeline.data.objects import ObjectError

FORMAT = 1
INDEX_FILE = "index.json"


@dataclass(frozen=True)
class Shard:
    """One tar beside the index: file name, samples, bytes, SHA-256 (hex) of the tar and of its sidecar."""

    file: str
    samples: int
    bytes: int
    sha256: str
    sidecar_sha256: str

    @property
    def sidecar(self) -> str:
        return self.file.removesuffix(".tar") + ".idx.npy"


@dataclass(frozen=True)
class Index:
    """What a dataset consists of."""

    dataset: str
    shards: tuple[Shard, ...]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def to_json(self) -> str:
        content = {
            "format": FORMAT,
            "dataset": self.dataset,
            "samples": self.samples,
            "bytes": self.bytes,
            "shards": [asdict(shard) for shard in self.shards],
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def load(cls, url: str) -> "Index":
        """Read the index in the folder `url`; ObjectError if missing, malformed or of another format."""
        name = objects.join(url, INDEX_FILE)
        try:
            content = json.loads(objects.read(name))
        except ValueError as error:
            raise ObjectError(f"{name} is no JSON ({error}): make the shards again") from error
        version = content.get("format") if isinstance(content, dict) else None
        if version != FORMAT:
            raise ObjectError(f"{name} has format {version!r}, this version reads format {FORMAT}")
        dataset, entries = _field(name, content, "dataset", str), _field(name, content, "shards", list)
        index = cls(dataset, tuple(_shard(name, number, entry) for number, entry in enumerate(entries)))
        for total in ("samples", "bytes"):
            if _field(name, content, total, int) != getattr(index, total):
                raise ObjectError(f"{name}: {total} is not the sum of its shards: make the shards again")
        return index


def _shard(name: str, number: int, entry: object) -> Shard:
    where = f"{name}, shard {number}"
    shard = Shard(**{field: _field(where, entry, field, kind) for field, kind in Shard.__annotations__.items()})
    if "/" in shard.file or shard.file.startswith("."):
        raise ObjectError(f"{where}: a shard lies beside its index, {shard.file!r} does not")
    return shard


def _field(where: str, content: object, field: str, kind: type):
    value = content.get(field) if isinstance(content, dict) else None
    if type(value) is not kind or (kind is int and value < 0):
        raise ObjectError(f"{where}: {field!r} is missing or no {kind.__name__}: make the shards again")
    return value


def sidecar_dtype(images: int) -> np.dtype:
    """One record of a sidecar, for a shard whose samples have at most `images` images.

    offset, length: of the sample's bytes (tar headers included) in the tar; crc32 is of these bytes.
    query_hash, target_hash: Item.content_hash. negative_chars: of all negatives together.
    image_sizes: (width, height) in pixels of the query's, the target's, then the negatives' images, the rest
    zero; (0, 0) is also an image whose size cannot be read.
    """
    return np.dtype(
        [
            ("offset", "<u8"),
            ("length", "<u4"),
            ("crc32", "<u4"),
            ("query_hash", "<u8"),
            ("target_hash", "<u8"),
            ("query_chars", "<u4"),
            ("target_chars", "<u4"),
            ("negative_chars", "<u4"),
            ("query_images", "u1"),
            ("target_images", "u1"),
            ("negatives", "u1"),
            ("image_sizes", "<u2", (images, 2)),
        ]
    )


def load_sidecar(url: str, shard: Shard) -> np.ndarray:
    """(shard.samples,) records of `sidecar_dtype`. Raises ObjectError if the bytes are not those indexed."""
    name = objects.join(url, shard.sidecar)
    data = objects.read(name)
    if hashlib.sha256(data).hexdigest() != shard.sidecar_sha256:
        raise ObjectError(f"{name} is damaged (its sha256 differs from the index's): delete and upload it again")
    try:
        sidecar = np.load(BytesIO(data), allow_pickle=False)
        known = sidecar.dtype == sidecar_dtype(sidecar.dtype["image_sizes"].shape[0])
    except (ValueError, KeyError, IndexError) as error:
        raise ObjectError(f"{name} is no sidecar of this format ({error}): make the shards again") from error
    if not known or sidecar.shape != (shard.samples,):
        raise ObjectError(f"{name} is no sidecar of {shard.samples} samples: make the shards again")
    return sidecar


def read_samples(url: str, shard: Shard, sidecar: np.ndarray, start: int, stop: int) -> list[bytes]:
    """The bytes of samples start..stop-1 of a shard, by one ranged read.

    Raises ObjectError when a sample's CRC-32 is not the indexed one: damaged bytes must never be taken
    for a bad sample, which training would only mask.
    """
    if start >= stop:
        return []
    name = objects.join(url, shard.file)
    # Python integers: u8 + u4 in numpy would wrap or become float.
    spans = [
        (offset, offset + length)
        for offset, length in zip(
            sidecar["offset"][start:stop].tolist(), sidecar["length"][start:stop].tolist(), strict=True
        )
    ]
    first = spans[0][0]
    block = memoryview(objects.read(name, first, spans[-1][1] - first))
    samples = [bytes(block[begin - first : end - first]) for begin, end in spans]
    for number, (span, sample) in enumerate(zip(spans, samples, strict=True), start):
        if zlib.crc32(sample) != sidecar["crc32"][number]:
            raise ObjectError(
                f"{name} is damaged: bytes {span[0]}-{span[1] - 1} (sample {number}) differ from what was "
                "indexed; delete and upload it again"
            )
    return samples
