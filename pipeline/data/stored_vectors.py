"""Precomputed vectors of a dataset's samples by a frozen model: tars beside the samples' tars, and their index.

    NAME_KIND.tar        for each sample of NAME.tar, in the same order, KEY.KIND.npy: (rows, width), one row for each
                         text or item; no rows if the sample is unusable
    NAME_KIND.idx.npy    a sidecar like that of any shard: the position of each sample, and its CRC-32
    KIND.json            the metadata of the model, the shards, and the tars' sizes and SHA-256

There are two kinds. text_embeddings are those of the captions, `Pair.texts`, by LLM2CLIP's text encoder.
item_embeddings are a teacher's, of all items: the query, the target with each of `Pair.texts`, the other positives, the
negatives.

Vectors are stored in fp16, or in bf16 as uint16 bits, since numpy has no bf16. The tars of captions that LLM2CLIP's own
code wrote (arXiv 2411.04997; its llm2clip/data/extract_embedding.py) are read without conversion: they have a member
KEY.COLUMN, fp32 without a header, for each column of an img2dataset sample's json that contains a caption.
"""

import hashlib
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import FailFast, TypeAdapter

from pipeline.data.arrays import array_of
from pipeline.data.index import (
    Captions,
    Digest,
    Index,
    Positive,
    Shard,
    as_json,
    check_shards,
    checksum_of,
    index_content,
    index_text,
    shard_entry,
    sidecar_dtype,
    validated,
)
from pipeline.data.sample import BadSample, Item, Pair
from pipeline.data.shards import END, members_of, parse_sample, tar_bytes
from pipeline.storage import objects
from pipeline.storage.documents import FIXED
from pipeline.storage.objects import ObjectError

FORMAT = 1
Stored = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class StoreKind:
    """Which vectors of a sample are stored.

    name: in the names of the files.  what, one: the plural and singular of what is embedded, for messages.
    """

    name: str
    what: str
    one: str

    @property
    def index_file(self) -> str:
        return f"{self.name}.json"

    @property
    def suffix(self) -> str:
        return f"_{self.name}.tar"

    @property
    def member(self) -> str:
        return f"{self.name}.npy"

    def file_of(self, shard: Shard) -> str:
        """Return the name of the tar with a shard's vectors."""
        return shard.file.removesuffix(".tar") + self.suffix

    def items(self, pair: Pair) -> list[Item]:
        """Return what is embedded of a pair, in the order of the rows."""
        if self is CAPTIONS:
            return [Item(text) for text in pair.texts]
        query, target, *others = pair.items
        return [query, target, *(replace(target, text=text) for text in pair.alternatives), *others]


CAPTIONS = StoreKind("text_embeddings", "captions", "a caption")
ITEMS = StoreKind("item_embeddings", "items", "an item")
KINDS = (CAPTIONS, ITEMS)


@dataclass(frozen=True)
class EmbeddingMetadata:
    """How vectors were computed.

    model: name of the model.  identity: a hash of its weights and of everything else that affects a vector (see
        Encoder).  width: of the vectors.  instruction: the text before each caption.
    stored: the number format; fp32 means the tars of LLM2CLIP's own code.
    columns: the columns of img2dataset's samples with captions, in the order of the rows; None for our own layout.
    weights: the fingerprint of the model's folder.  max_tokens: the length to which texts were truncated.
    template: the name of the chat template around each caption; None if it is not known.
    query: the text of the queries of img2dataset's samples, if they are embedded.
    """

    __pydantic_config__ = FIXED

    model: str
    identity: str
    width: Positive
    stored: Stored
    instruction: str
    columns: tuple[str, ...] | None
    weights: str | None = None
    max_tokens: Positive | None = None
    template: str | None = None
    query: str | None = None


@dataclass(frozen=True)
class Part:
    """The vectors of one shard.  images: the SHA-256 of that shard.  shard: the vectors' tar and sidecar."""

    __pydantic_config__ = FIXED

    images: Digest
    shard: Shard


_PARTS = TypeAdapter(Annotated[tuple[Part, ...], FailFast()])


@dataclass(frozen=True)
class StoredVectors:
    """The index of a dataset's stored vectors.

    parts: one per shard, in the same order.  tars_url: the folder of the tars, if it is not that of this index.
    """

    kind: StoreKind
    metadata: EmbeddingMetadata
    parts: tuple[Part, ...]
    tars_url: str = ""

    @property
    def total_bytes(self) -> int:
        return sum(part.shard.size for part in self.parts)

    def to_json(self) -> str:
        made, parts = as_json(self.metadata), [as_json(part) for part in self.parts]
        if self.kind is CAPTIONS:
            del made["query"]  # earlier versions' indexes, which stay readable, lack it
        content = {"format": FORMAT, **made, "tars_url": self.tars_url, "parts": parts}
        return index_text(content, checksum_of(content))

    @classmethod
    def load(cls, url: str, kind: StoreKind) -> "StoredVectors":
        """Read the index in the folder `url`. Raises ObjectError if it is missing, damaged or of another format."""
        with index_content(objects.join(url, kind.index_file), FORMAT, "embed the shards again") as (content, _):
            tars_url, parts = content.pop("tars_url", None), content.pop("parts", None)
            if not isinstance(tars_url, str):
                raise ValueError(f"tars_url is {tars_url!r}")
            parts = _PARTS.validate_python(parts)
            check_shards([part.shard for part in parts])
            metadata = validated(EmbeddingMetadata, {"query": None} | content if kind is CAPTIONS else content)
            if metadata.stored == "fp32" and kind is not CAPTIONS:
                raise ValueError("only vectors of captions can be stored in fp32")
            return cls(kind, metadata, parts, tars_url)

    def check(self, url: str, dataset: str, index: Index) -> None:
        """Raise ObjectError unless these vectors, in the folder `url`, belong to the current shards of `dataset`."""
        name, remedy = objects.join(url, self.kind.index_file), f"embed its {self.kind.what} again, with --overwrite"
        if len(self.parts) != len(index.shards):
            raise ObjectError(f"{name} has {len(self.parts)} shards, but {dataset} has {len(index.shards)}: {remedy}")
        for part, shard in zip(self.parts, index.shards, strict=True):
            if part.images != shard.sha256 or part.shard.samples != shard.samples:
                raise ObjectError(f"{name} belongs to another {shard.file} than that of {dataset}: {remedy}")
        if self.metadata.columns != columns_of(index):
            raise ObjectError(
                f"{name} embeds the captions in {_listed(self.metadata.columns)}, but {dataset} has them in "
                f"{_listed(columns_of(index))}: {remedy}"
            )
        if self.metadata.query != (query := query_of(index, self.kind)):
            raise ObjectError(f"{name} embeds the query {self.metadata.query!r}, but {dataset} has {query!r}: {remedy}")

    def vectors(self, data: bytes, pair: Pair, sample: bytes, captions: Captions | None) -> np.ndarray:
        """Parse the vectors of a pair's texts or items, (rows, width) float32, from their bytes in the store.

        sample, captions: the bytes of the pair and how to read them, to find the column of each caption.
        Raises BadSample if nothing of the sample is embedded, ObjectError if the vectors belong to another sample.
        """
        if data and captions and self.metadata.stored == "fp32":
            columns: Iterable[str] = captions.columns
            if len(pair.texts) < len(captions.columns):  # a caption is empty, or equal to another one
                columns = texts_by_column(pair, sample, captions).values()
            key, members = members_of(data)
            rows = _by_column(members, columns)
        else:
            key, rows = self.rows_in(data)
        count = len(self.kind.items(pair))
        if key != pair.key or rows.shape != (count, self.metadata.width):
            raise ObjectError(
                f"the vectors {rows.shape} of sample {key!r} are not those of sample {pair.key!r}, which has "
                f"{count} {'texts' if self.kind is CAPTIONS else 'items'}: {_EMBED}"
            )
        return self.float_rows(rows)

    def rows_in(self, data: bytes) -> tuple[str, np.ndarray]:
        """Return the key and the stored rows in a sample's bytes. Raises the errors of `vectors`."""
        if not data:  # LLM2CLIP's tars may lack samples
            raise BadSample(self._none)
        key, members = members_of(data)
        stored, member = self.metadata.stored, self.kind.member
        try:
            rows = array_of(members[member])
            wanted = np.dtype("<u2" if stored == "bf16" else "<f2")
            if rows.ndim != 2 or rows.dtype != wanted:
                raise ValueError(f"it holds {rows.dtype} {rows.shape}")
        except (KeyError, ValueError) as error:
            raise ObjectError(f"{member} of sample {key!r} holds no vectors in {stored} ({error}): {_EMBED}") from None
        if not len(rows):
            raise BadSample(self._none)
        return key, rows

    def float_rows(self, rows: np.ndarray) -> np.ndarray:
        """Convert stored rows to float32. Those of items are normalised again: rounding changed their length."""
        vectors = restored(rows, self.metadata.stored)
        if not (np.isfinite(vectors).all() and vectors.any(axis=1).all()):
            raise BadSample(f"{self.kind.one}'s embedding is zero or not finite: {_EMBED}")
        if self.kind is CAPTIONS:
            return vectors
        wide = vectors.astype(np.float64)  # so that the order of the sum does not change the float32 result
        return (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32)

    @property
    def _none(self) -> str:
        if self.kind is CAPTIONS:
            return "its captions have no embeddings"
        return f"the teacher has no vectors for it: {self.metadata.model} could not read one of its items"


_EMBED = "embed its shard again, with --overwrite"


def columns_of(index: Index) -> tuple[str, ...] | None:
    """Return the caption columns of a dataset in img2dataset's layout; None for our own layout."""
    return index.captions.columns if index.captions else None


def query_of(index: Index, kind: StoreKind) -> str | None:
    """Return the queries' text of a dataset in img2dataset's layout, if this kind of store embeds them."""
    return index.captions.query if index.captions and kind is ITEMS else None


def _listed(columns: tuple[str, ...] | None) -> str:
    return "our own layout" if columns is None else ", ".join(columns)


def texts_by_column(pair: Pair, sample: bytes, captions: Captions) -> dict[str, str]:
    """Map each text of an img2dataset sample's pair to the first column that contains it.

    Raises ObjectError for a column with several texts, since LLM2CLIP's tars have one vector per column.
    """
    found: dict[str, str] = {}
    for column in captions.columns:
        texts: tuple[str, ...] = ()
        with suppress(BadSample):  # the column is empty in this sample
            of_column = parse_sample(sample, replace(captions, columns=(column,)))
            texts = of_column.texts if isinstance(of_column, Pair) else ()
        if len(texts) > 1:
            raise ObjectError(f"sample {pair.key} has {len(texts)} captions in {column}, but only one vector")
        for text in texts:
            found.setdefault(text, column)
    return found


def _by_column(members: dict[str, bytes], columns: Iterable[str]) -> np.ndarray:
    """Return (columns, width) float32. Ignores case in names, because webdataset may have written lower case."""
    by_name = {name.lower(): content for name, content in members.items()}
    try:
        return np.stack([np.frombuffer(by_name[column.lower()], "<f4") for column in columns])
    except KeyError as error:
        raise BadSample(f"no embedding for caption column {error.args[0]}") from None
    except ValueError as error:
        raise BadSample(f"its embeddings differ in width ({error})") from None


def rounded(vectors: torch.Tensor, stored: Stored) -> np.ndarray:
    """Round (n, width) float32 to the stored format (to nearest, ties to even)."""
    if stored == "bf16":
        return vectors.to(torch.bfloat16).view(torch.uint16).numpy()
    return vectors.to(torch.float16).numpy()


def restored(rows: np.ndarray, stored: Stored) -> np.ndarray:
    """Convert stored rows to float32."""
    return (rows.astype(np.uint32) << 16).view(np.float32) if stored == "bf16" else rows.astype(np.float32)


def sample_bytes(key: str, rows: np.ndarray, kind: StoreKind) -> bytes:
    """Return the tar member of a sample's stored rows, with its header and without the end of the archive."""
    content = BytesIO()
    np.save(content, rows, allow_pickle=False)
    return tar_bytes(key, {kind.member: content.getvalue()})


def indexed(file: str, size: int, sha256: str, places: list[tuple[int, int, int]]) -> tuple[Shard, bytes]:
    """Return a tar's entry in the index and the bytes of its sidecar.

    size, sha256: of the tar.  places: (offset, bytes, CRC-32) of each sample in it.
    """
    records = np.zeros(len(places), sidecar_dtype(0))  # the other fields stay 0
    for name, values in zip(("offset", "length", "crc32"), zip(*places, strict=True), strict=True):
        records[name] = values
    nothing = {"text_bytes": 0, "images": 0, "videos": 0, "image_sizes": (), "max_images": 0, "tasks": {}}
    return shard_entry(file, size, sha256, records, **nothing)


def write_tar(path: Path, file: str, samples: Iterable[bytes]) -> tuple[Shard, bytes]:
    """Write results of `sample_bytes`, one after the other. Returns the same as `indexed`, with the name `file`."""
    digest, size, places = hashlib.sha256(), 0, list[tuple[int, int, int]]()
    with path.open("wb") as tar:
        for data in chain(samples, [END]):
            tar.write(data)
            digest.update(data)
            places.append((size, len(data), zlib.crc32(data)))
            size += len(data)
    return indexed(file, size, digest.hexdigest(), places[:-1])
