"""Embeddings of captions by a frozen language model, computed once: tars beside the images', and an index of them.

    NAME_text_embeddings.tar        of each sample of NAME.tar, in its order, KEY.text_embeddings.npy: (texts, width), a
                                    row for each of Pair.texts, and none where the sample is of no use
    NAME_text_embeddings.idx.npy    a sidecar as of any shard: where each sample's bytes are, and their CRC-32
    text_embeddings.json            which model's they are, of which shards, and the tars' sizes and SHA-256

They are stored in fp16, or in bf16, which numpy does not have: as its bits, uint16. The tars of LLM2CLIP's own code
(arXiv 2411.04997; its llm2clip/data/extract_embedding.py) are read as they are: fp32 without a header, KEY.COLUMN for
each column of an img2dataset sample's json that holds a caption.
"""

import hashlib
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import webdataset
from pydantic import FailFast, TypeAdapter

from pipeline.data.index import (
    Captions,
    Digest,
    Index,
    Positive,
    Shard,
    array_of,
    check_shards,
    checksum_of,
    index_content,
    index_text,
    plain,
    sidecar_dtype,
    sidecar_of,
    validated,
)
from pipeline.data.sample import BadSample, Pair
from pipeline.data.shards import END, members_of, parse_sample
from pipeline.storage import objects
from pipeline.storage.documents import FIXED
from pipeline.storage.objects import ObjectError

FORMAT = 1
EMBEDDINGS_FILE = "text_embeddings.json"
SUFFIX = "_text_embeddings.tar"
MEMBER = "text_embeddings.npy"
Stored = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Made:
    """How embeddings were made.

    model: its name.  identity: of its weights and of all else that changes a vector (see Encoder).
    width: of the vectors.  instruction: what stood before each text.
    stored: fp32 are the tars of LLM2CLIP's own code.
    columns: where img2dataset's samples have their captions, in the order of the rows; None for our own layout.
    weights: the fingerprint of the model's folder.  max_tokens: that texts were cut at.
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


@dataclass(frozen=True)
class Part:
    """The embeddings of one shard.  images: the SHA-256 of that shard.  shard: their own tar and sidecar."""

    __pydantic_config__ = FIXED

    images: Digest
    shard: Shard


_PARTS = TypeAdapter(Annotated[tuple[Part, ...], FailFast()])


@dataclass(frozen=True)
class TextEmbeddings:
    """The embeddings of a dataset's captions.

    parts: of its shards, in their order.  tars_url: where the tars are, if not beside this index.
    """

    made: Made
    parts: tuple[Part, ...]
    tars_url: str = ""

    @property
    def total_bytes(self) -> int:
        return sum(part.shard.bytes for part in self.parts)

    def to_json(self) -> str:
        made = {each.name: getattr(self.made, each.name) for each in fields(Made)}
        content = {"format": FORMAT, **made, "tars_url": self.tars_url, "parts": self.parts}
        return index_text(content, checksum_of(plain(content)))

    @classmethod
    def load(cls, url: str) -> "TextEmbeddings":
        """Read the index in the folder `url`; ObjectError if missing, damaged or of another format."""
        with index_content(objects.join(url, EMBEDDINGS_FILE), FORMAT, "embed the shards again") as (content, _):
            tars_url, parts = content.pop("tars_url", None), content.pop("parts", None)
            if not isinstance(tars_url, str):
                raise ValueError(f"tars_url is {tars_url!r}")
            parts = _PARTS.validate_python(parts)
            check_shards([part.shard for part in parts])
            return cls(validated(Made, content), parts, tars_url)

    def check(self, url: str, dataset: str, index: Index) -> None:
        """Raise ObjectError unless these, in the folder `url`, are of the shards that `dataset` has now."""
        name, again = objects.join(url, EMBEDDINGS_FILE), "embed its captions again, with --overwrite"
        if len(self.parts) != len(index.shards):
            raise ObjectError(f"{name} is of {len(self.parts)} shards, and {dataset} has {len(index.shards)}: {again}")
        for part, shard in zip(self.parts, index.shards, strict=True):
            if part.images != shard.sha256 or part.shard.samples != shard.samples:
                raise ObjectError(f"{name} is of another {shard.file} than {dataset} has now: {again}")
        if self.made.columns != columns_of(index):
            raise ObjectError(
                f"{name} is of captions in {_listed(self.made.columns)}, and {dataset} has them in "
                f"{_listed(columns_of(index))}: {again}"
            )

    def vectors(self, data: bytes, pair: Pair, sample: bytes, captions: Captions | None) -> np.ndarray:
        """(texts, width) float32, of each text of a pair, from the bytes that were read for its sample.

        sample, captions: the pair's own bytes and how they were read, which say whose caption is in which column.
        Raises BadSample where no text of the sample was embedded, and ObjectError where it is another sample's.
        """
        if not data:  # of LLM2CLIP's tars, which may lack samples
            raise BadSample(_NONE)
        key, members = members_of(data)
        if self.made.stored == "fp32":
            columns = captions.columns
            if len(pair.texts) < len(columns):  # one is empty, or says the same as another
                columns = texts_by_column(pair, sample, captions).values()
            rows = _by_column(members, columns)
        else:
            try:
                rows = array_of(members[MEMBER])
                wanted = np.dtype("<u2" if self.made.stored == "bf16" else "<f2")
                if rows.ndim != 2 or rows.dtype != wanted:
                    raise ValueError(f"it holds {rows.dtype} {rows.shape}")
            except (KeyError, ValueError) as error:
                raise ObjectError(
                    f"{MEMBER} of sample {key!r} holds no vectors in {self.made.stored} ({error}): embed its shard "
                    "again, with --overwrite"
                ) from None
            if not len(rows):
                raise BadSample(_NONE)
        if key != pair.key or rows.shape != (len(pair.texts), self.made.width):
            raise ObjectError(
                f"the vectors {rows.shape} of sample {key!r} are not those of sample {pair.key!r}, which has "
                f"{len(pair.texts)} texts: embed its shard again, with --overwrite"
            )
        vectors = restored(rows, self.made.stored)
        if not (np.isfinite(vectors).all() and vectors.any(axis=1).all()):
            raise BadSample("a caption's embedding is zero or not finite: embed its shard again, with --overwrite")
        return vectors


_NONE = "its captions have no embeddings"


def columns_of(index: Index) -> tuple[str, ...] | None:
    """Where a dataset's samples have their captions, if they are img2dataset's."""
    return index.captions and index.captions.columns


def _listed(columns: tuple[str, ...] | None) -> str:
    return "our own layout" if columns is None else ", ".join(columns)


def texts_by_column(pair: Pair, sample: bytes, captions: Captions) -> dict[str, str]:
    """Each text of an img2dataset sample's pair, and the first column that has it.

    Raises ObjectError for a column with several texts, of which LLM2CLIP's tars have one vector.
    """
    found: dict[str, str] = {}
    for column in captions.columns:
        texts = ()
        with suppress(BadSample):  # a column that is empty here
            texts = parse_sample(sample, replace(captions, columns=(column,))).texts
        if len(texts) > 1:
            raise ObjectError(
                f"sample {pair.key} has {len(texts)} captions in {column}, of which only one has a vector"
            )
        for text in texts:
            found.setdefault(text, column)
    return found


def _by_column(members: dict[str, bytes], columns: Iterable[str]) -> np.ndarray:
    """(columns, width) float32. webdataset reads names in lower case, and whoever wrote through it may have them so."""
    by_name = {name.lower(): content for name, content in members.items()}
    try:
        return np.stack([np.frombuffer(by_name[column.lower()], "<f4") for column in columns])
    except KeyError as error:
        raise BadSample(f"no embedding of {error.args[0]}") from None
    except ValueError as error:
        raise BadSample(f"embeddings that are not all of one width ({error})") from None


def rounded(vectors: torch.Tensor, stored: Stored) -> np.ndarray:
    """(n, width) float32 as they are stored: to the nearest, of two as near to the even one."""
    if stored == "bf16":
        return vectors.to(torch.bfloat16).view(torch.uint16).numpy()
    return vectors.to(torch.float16).numpy()


def restored(rows: np.ndarray, stored: Stored) -> np.ndarray:
    """Stored rows as float32."""
    return (rows.astype(np.uint32) << 16).view(np.float32) if stored == "bf16" else rows.astype(np.float32)


def sample_bytes(key: str, rows: np.ndarray) -> bytes:
    """The tar member of one sample's stored rows, header included, without the end of an archive."""
    content, buffer = BytesIO(), BytesIO()
    np.save(content, rows, allow_pickle=False)
    # Fixed owner and time: the same vectors give the same bytes.
    with webdataset.TarWriter(buffer, encoder=False, mtime=0, user="pipeline", group="pipeline") as writer:
        writer.write({"__key__": key, MEMBER: content.getvalue()})
        length = writer.tarstream.offset
    return buffer.getvalue()[:length]


def file_of(shard: Shard) -> str:
    """The name of the tar that has the embeddings of a shard."""
    return shard.file.removesuffix(".tar") + SUFFIX


def indexed(file: str, size: int, sha256: str, places: list[tuple[int, int, int]]) -> tuple[Shard, bytes]:
    """A tar's entry in the index and the bytes of its sidecar.

    size, sha256: the tar's.  places: (offset, bytes, CRC-32) of each sample in it.
    """
    records = np.zeros(len(places), sidecar_dtype(0))  # which says no more of vectors
    for name, values in zip(("offset", "length", "crc32"), zip(*places, strict=True), strict=True):
        records[name] = values
    sidecar = sidecar_of(records)
    shard = Shard(
        file=file,
        samples=len(places),
        bytes=size,
        sha256=sha256,
        sidecar_sha256=hashlib.sha256(sidecar).hexdigest(),
        sidecar_bytes=len(sidecar),
        text_bytes=0,
        images=0,
        videos=0,
        image_sizes=(),
        max_images=0,
        tasks={},
    )
    return shard, sidecar


class TarFile:
    """A tar of embeddings that is written sample after sample to a local file."""

    def __init__(self, path: Path) -> None:
        self.path, self._file, self._digest = path, path.open("wb"), hashlib.sha256()
        self._places: list[tuple[int, int, int]] = []
        self._size = 0

    @property
    def samples(self) -> int:
        return len(self._places)

    def add(self, sample: bytes) -> None:
        """Append what `sample_bytes` gave."""
        self._places.append((self._size, len(sample), zlib.crc32(sample)))
        self._write(sample)

    def finish(self, file: str) -> tuple[Shard, bytes]:
        """Close it. Returns its entry in the index, by the name `file`, and the bytes of its sidecar."""
        self._write(END)
        self._file.close()
        return indexed(file, self._size, self._digest.hexdigest(), self._places)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)
