"""Mined hard negatives: references to other samples' targets, beside the shards, and how a run reads them.

    NAME.mined.npy    for each sample of NAME.tar, `count` references of `REFERENCE`, the most similar first
    mined.json        how they were mined, the datasets that they refer to, and the files' sizes and SHA-256

A reference has all that is needed to read its sample in one ranged read. No image is stored twice.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import fsum
from typing import Annotated, Literal

import numpy as np
from numpy.lib.recfunctions import repack_fields
from pydantic import FailFast, Field, TypeAdapter

from pipeline.data.index import (
    Count,
    Digest,
    Index,
    Positive,
    Shard,
    as_json,
    check_name,
    checksum_of,
    index_content,
    index_text,
    read_rows,
    read_samples,
    validated,
)
from pipeline.data.once import Once
from pipeline.storage import objects
from pipeline.storage.documents import FIXED
from pipeline.storage.objects import ObjectError

FORMAT = 1
MINED_FILE = "mined.json"
_REMEDY = "mine its negatives again, with overwrite=true"

# dataset, shard, sample: the number in MinedIndex.datasets, of the shard in it, and in the shard.
# A reference with shard -1 is empty.
# score: the similarity to the query.  The other fields are those of the sample's record (see `sidecar_dtype`), text and
# images for the target alone; image_size is that of its first image.
REFERENCE = np.dtype(
    [
        ("dataset", "<u2"),
        ("shard", "<i4"),
        ("sample", "<u4"),
        ("score", "<f4"),
        ("offset", "<u8"),
        ("length", "<u4"),
        ("crc32", "<u4"),
        ("target_hash", "<u8"),
        ("text", "<u4"),
        ("images", "u1"),
        ("image_size", "<u2", (2,)),
    ]
)


# The fields that reading a sample needs: 34 bytes.
USED = ("dataset", "shard", "sample", "offset", "length", "crc32", "target_hash")

Referral = tuple[np.void, tuple[bytes, ...]]  # a reference, and the bytes of its sample in every tar of its shard


def mined_dtype(count: int) -> np.dtype:
    """Return the dtype of NAME.mined.npy's records, one per sample: references, and a checksum.

    The checksum is the CRC-32 of the other bytes, which begins with `MinedIndex.seed`.
    """
    return np.dtype([("negatives", REFERENCE, (count,)), ("checksum", "<u4")])


def mined_file(shard: Shard) -> str:
    return shard.file.removesuffix(".tar") + ".mined.npy"


Ratio = Annotated[float, Field(ge=0, le=2)]


@dataclass(frozen=True)
class MiningMetadata:
    """How negatives were mined.

    model, identity: of the model that embedded the items (see Encoder).  vectors: the SHA-256 of its vectors' indexes.
    The other fields are those of MiningRun.
    """

    __pydantic_config__ = FIXED

    model: str
    identity: str
    vectors: Digest
    count: Positive
    margin: Ratio | None
    absolute_margin: float | None
    skip: Count
    depth: Positive
    choose: Literal["hardest", "sampled"]
    seed: Count
    among: Literal["own", "all"]


@dataclass(frozen=True)
class Referred:
    """A dataset with candidates.  name: its folder below the URL that was mined.  shards: see `content_of`."""

    __pydantic_config__ = FIXED

    name: str
    shards: Digest


def content_of(index: Index) -> str:
    """Return a SHA-256 that changes with any shard, with their order, and with the texts of img2dataset's samples."""
    texts = [index.captions.query, *index.captions.columns] if index.captions else []
    hashed = "".join(shard.sha256 for shard in index.shards) + (json.dumps(texts) if texts else "")
    return hashlib.sha256(hashed.encode()).hexdigest()


@dataclass(frozen=True)
class MinedPart:
    """The mined negatives of one shard.

    shard: the SHA-256 of that shard.  file, size, sha256: of the references.
    queries: samples that were compared with candidates.  mined: references.  referred_bytes: of their samples.
    left_out: candidates that were left out before the ranking, because they are right or equal to the query.
    above_margin, above_absolute_margin: nearest candidates that are likely right, by the first rule that says so.
    score_sum, positive_sum: of the references' and of the queries' own targets' similarities.
    """

    __pydantic_config__ = FIXED

    shard: Digest
    file: str
    size: Count
    sha256: Digest
    queries: Count
    mined: Count
    referred_bytes: Count
    left_out: Count
    above_margin: Count
    above_absolute_margin: Count
    score_sum: float
    positive_sum: float


_PARTS = TypeAdapter(Annotated[tuple[MinedPart, ...], FailFast()])
_DATASETS = TypeAdapter(Annotated[tuple[Referred, ...], Field(min_length=1, max_length=1 << 16)])


@dataclass(frozen=True)
class MinedIndex:
    """The mined negatives of a dataset.

    datasets: those that `Reference` numbers.  own: the number of the dataset itself.  parts: one per shard.
    """

    metadata: MiningMetadata
    datasets: tuple[Referred, ...]
    own: int
    parts: tuple[MinedPart, ...]

    def total(self, name: str) -> int:
        """Return the sum of a count of all parts."""
        return sum(getattr(part, name) for part in self.parts)

    def seed(self, shard: Shard) -> int:
        """Return what the checksums of a shard's records begin with: those of another mining or shard are refused."""
        return zlib.crc32(shard.sha256.encode(), self._seed)

    @cached_property
    def _seed(self) -> int:
        return zlib.crc32(replace(self, parts=()).to_json().encode())

    @property
    def mean_score(self) -> float:
        """The mean similarity of the references to their queries."""
        return fsum(part.score_sum for part in self.parts) / max(self.total("mined"), 1)

    @property
    def mean_positive(self) -> float:
        """The mean similarity of the queries to their own targets."""
        return fsum(part.positive_sum for part in self.parts) / max(self.total("queries"), 1)

    def to_json(self) -> str:
        listed = {name: [as_json(each) for each in getattr(self, name)] for name in ("datasets", "parts")}
        content = {"format": FORMAT, **as_json(self.metadata), "own": self.own, **listed}
        return index_text(content, checksum_of(content))

    @classmethod
    def load(cls, url: str) -> "MinedIndex":
        """Read the index in the folder `url`. Raises ObjectError if it is missing, damaged or of another format."""
        with index_content(objects.join(url, MINED_FILE), FORMAT, "mine its negatives again") as (content, _):
            datasets = _DATASETS.validate_python(content.pop("datasets", None))
            parts = _PARTS.validate_python(content.pop("parts", None))
            own = content.pop("own", None)
            if type(own) is not int or not 0 <= own < len(datasets):
                raise ValueError(f"own is {own!r}")
            for part in parts:
                check_name(part.file, "file of mined negatives")
            return cls(validated(MiningMetadata, content), datasets, own, parts)

    def check(self, url: str, dataset: str, index: Index) -> None:
        """Raise ObjectError unless these negatives, in the folder `url`, belong to the current shards of `dataset`."""
        if [part.shard for part in self.parts] != [shard.sha256 for shard in index.shards]:
            raise ObjectError(
                f"{objects.join(url, MINED_FILE)} belongs to other shards than those of {dataset}: {_REMEDY}"
            )
        if self.datasets[self.own].shards != content_of(index):
            raise ObjectError(
                f"{objects.join(url, MINED_FILE)} was mined with other captions or another query than {dataset} has: "
                f"{_REMEDY}"
            )

    def damaged(self, url: str) -> list[MinedPart]:
        """Return the parts whose file in the folder `url` has other bytes. Raises ObjectError if one is missing."""
        with ThreadPoolExecutor(8) as pool:
            hashes = pool.map(objects.sha256, [objects.join(url, part.file) for part in self.parts])
            return [part for part, found in zip(self.parts, hashes, strict=True) if found != part.sha256]

    def references(self, url: str, shard: Shard, number: int, start: int, stop: int) -> np.ndarray:
        """Return (stop - start, count) of `REFERENCE`: those of samples start..stop-1 of the dataset's shard `number`.

        url: the folder of this index.  Raises ObjectError if they are damaged, or those of another mining.
        """
        part, dtype = self.parts[number], mined_dtype(self.metadata.count)
        name = objects.join(url, part.file)
        return read_rows(name, part.size, shard.samples, dtype, start, stop, self.seed(shard))["negatives"]


@dataclass(frozen=True, eq=False)
class Mined:
    """The mined negatives of a dataset of a run.

    url: their folder.  shards: of the dataset.
    places: for each of `index.datasets`, the folder of its tars, and its index.
    numbers: their numbers among the run's datasets; None for one that the run does not use itself.
    """

    url: str
    index: MinedIndex
    shards: tuple[Shard, ...]
    places: tuple[tuple[str, Index], ...]
    numbers: tuple[int | None, ...]

    @classmethod
    def open(cls, url: str, number: int, indexes: Sequence[tuple[str, Index]]) -> "Mined":
        """Read the index in the folder `url` for the dataset `number` of the run's (URL, index).

        A dataset that the negatives refer to is found among the run's by its content, or else by its name: at the
        same place relative to dataset `number` as when they were mined. Raises ObjectError if it is not there, if it
        has changed, or if the negatives belong to other shards.
        """
        found, (dataset, own) = MinedIndex.load(url), indexes[number]
        found.check(url, dataset, own)
        contents = [content_of(index) for _, index in indexes]
        places, numbers = [], list[int | None]()
        for each in found.datasets:
            known = number if each.shards == contents[number] else None
            known = contents.index(each.shards) if known is None and each.shards in contents else known
            numbers.append(known)
            place, index = indexes[known] if known is not None else _elsewhere(url, found, dataset, each)
            places.append((index.shards_url or place, index))
        return cls(url, found, own.shards, tuple(places), tuple(numbers))

    def references(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Return (stop - start, count) of `REFERENCE`: those of samples start..stop-1 of the dataset's shard."""
        return _references(self, shard, start, stop)

    def all_references(self, shard: int) -> np.ndarray:
        """Read (samples, count) of `REFERENCE`: those of a whole shard. Only the fields `USED` are kept."""
        found = _whole(self, shard)
        _kept_references.put(_used(found), self, shard)
        return found

    def kept_references(self, shard: int) -> np.ndarray:
        """Return (samples, count), those of a whole shard with the fields `USED`. They are read once, and kept."""
        return _kept_references(self, shard)

    def read(self, reference: np.void) -> bytes:
        """Read the bytes of the sample that is referred to, by one ranged read."""
        folder, index = self.places[reference["dataset"]]
        (data,) = read_samples(folder, index.shards[reference["shard"]], np.array([reference]))
        return data

    def url_of(self, reference: np.void) -> str:
        """Return the location of the sample that is referred to, for messages."""
        folder, index = self.places[reference["dataset"]]
        return f"{objects.join(folder, index.shards[reference['shard']].file)}#{reference['sample']}"


def _whole(mined: Mined, shard: int) -> np.ndarray:
    return mined.index.references(mined.url, mined.shards[shard], shard, 0, mined.shards[shard].samples)


def _used(references: np.ndarray) -> np.ndarray:
    return repack_fields(references[list(USED)])


_kept_references = Once(lambda mined, shard: _used(_whole(mined, shard)))


@lru_cache(maxsize=256)  # a window's are needed for its lengths and for reading
def _references(mined: Mined, shard: int, start: int, stop: int) -> np.ndarray:
    return mined.index.references(mined.url, mined.shards[shard], shard, start, stop)


def _elsewhere(url: str, mined: MinedIndex, dataset: str, wanted: Referred) -> tuple[str, Index]:
    """Load (URL, index) of a dataset outside the run."""
    name, own = objects.join(url, MINED_FILE), mined.datasets[mined.own].name
    remedy = f"mine the negatives of {dataset} again, or with among=own"
    above = dataset.removesuffix(f"/{own}")
    if above == dataset:
        raise ObjectError(
            f"{name} refers to the dataset {wanted.name}, which is not in data.datasets: add it, or {remedy}"
        )
    place = objects.join(above, wanted.name)
    index = Index.load(place)
    if content_of(index) != wanted.shards:
        raise ObjectError(f"{name} refers to other shards or captions than those of {place}: {remedy}")
    return place, index


def with_negatives(records: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Count mined negatives with the samples' own: (n,) records of a sidecar and (n, K) of `REFERENCE` -> (n,) records.

    For `Lengths.of_records`: only the fields that it reads are right. Of a target's images the first one counts, and no
    video: a sidecar does not say whether the query or the target has it.
    """
    count = references.shape[1]
    wide = [(name, "<u4") for name in records.dtype.names or () if name != "image_sizes"]
    slots = records["image_sizes"].shape[1] + count
    result = np.zeros(len(records), [*wide, ("image_sizes", "<u2", (slots, 2))])
    for name, _ in wide:
        result[name] = records[name]
    result["image_sizes"][:, : slots - count] = records["image_sizes"]
    present = references["shard"] >= 0
    result["negatives"] += present.sum(axis=1, dtype=np.uint32)
    result["negative_text"] += (references["text"] * present).sum(axis=1, dtype=np.uint32)
    used = result["query_images"] + result["target_images"] + result["negative_images"]
    for column in range(count):
        rows = np.flatnonzero(present[:, column] & (references["images"][:, column] > 0))
        result["image_sizes"][rows, used[rows]] = references["image_size"][rows, column]
        used[rows] += 1
        result["negative_images"][rows] += 1
    return result
