"""A dataset and the place of its stored vectors: which of them are finished, and how they are kept.

Finished shards are recorded in PLACE/.KIND, such as .item_embeddings, until the index is written.
"""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from pipeline.config import Data
from pipeline.data.index import INDEX_FILE, Index, Shard, as_json, check_shards
from pipeline.data.source import Source
from pipeline.data.stored_vectors import (
    CAPTIONS,
    EmbeddingMetadata,
    Part,
    Stored,
    StoredVectors,
    StoreKind,
    columns_of,
    query_of,
)
from pipeline.errors import PipelineError
from pipeline.evaluation.encoder import Encoder
from pipeline.models.files import fetched, fingerprint
from pipeline.storage import objects
from pipeline.storage.atomic import remove_leftovers
from pipeline.storage.documents import DocumentError, parse_json
from pipeline.storage.objects import ObjectError

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class EmbeddedDataset:
    """A dataset, and the folder `place` for its stored vectors of this kind.  parts: finished parts by file."""

    kind: StoreKind
    place: str
    source: Source
    url: str
    index: Index
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.index.shards)

    @property
    def tars_url(self) -> str:
        return self.index.shards_url or self.url

    def made(self, encoder: Encoder, stored: Stored) -> EmbeddingMetadata:
        reader = getattr(encoder, "processor", None)  # a user's encoder may have none
        max_tokens = getattr(reader, "max_tokens", None)
        return EmbeddingMetadata(
            encoder.name,
            encoder.identity,
            encoder.dimension,
            stored,
            getattr(reader, "instruction", ""),
            columns_of(self.index),
            weights=fingerprint(str(fetched(encoder.name)), modules=True) if max_tokens else None,
            max_tokens=max_tokens,
            template=getattr(reader, "template", None),
            query=query_of(self.index, self.kind),
        )

    def begin(self, made: EmbeddingMetadata, overwrite: bool) -> None:
        """Find the finished parts with the same shards and model, and prepare to write the others.

        Raises PipelineError if the place has other embeddings, unless `overwrite`.
        """
        index_url, finished = objects.join(self.place, self.kind.index_file), None
        try:
            if objects.exists(index_url):
                finished = StoredVectors.load(self.place, self.kind)
        except ObjectError:
            if not overwrite:
                raise
        by, parts = (finished.metadata, finished.parts) if finished else self._unfinished(overwrite)
        now = {(shard.sha256, self.kind.file_of(shard), shard.samples) for shard in self.index.shards}
        same = [part for part in parts if (part.images, part.shard.file, part.shard.samples) in now]
        stale = ""
        if by and _described(by) != _described(made):
            stale, same = f"vectors of {by.model} {_described(by)}, not of {made.model} {_described(made)}", []
        elif len(same) < len(parts):
            stale = f"vectors of other shards than {self.url} has now"
        if stale and not overwrite:
            raise PipelineError(f"{self.place} has {stale}: add --overwrite, or choose another --out")
        there = in_threads(lambda part: self._is_there(part, made), same)
        self.parts = {part.shard.file: part for part, found in zip(same, there, strict=True) if found}
        if finished and not stale and len(self.parts) == len(self.index.shards):
            self._forget()  # a start that was killed may have left records
            return
        # Delete another model's records before writing this model's name.
        kept = {self._record("made"), *map(self._record, self.parts)}
        for url in set(self._records()) - kept:
            objects.delete(url)
        objects.write(self._record("made"), json.dumps(asdict(made)).encode())
        if finished:  # without an index the parts have records already
            in_threads(self._note, self.parts.values())
        objects.delete(index_url)  # before any tar is overwritten, so that nobody reads a mix of old and new

    def _unfinished(self, overwrite: bool) -> tuple[EmbeddingMetadata | None, list[Part]]:
        """Return the model and recorded parts of an earlier start. A part with a damaged record is embedded again."""
        records = self._records()
        if (url := self._record("made")) not in records:
            return None, []
        records.remove(url)
        parts = [part for part in map(_recorded, records, in_threads(objects.read, records)) if part]
        try:
            remedy = "add --overwrite, and all is embedded again"
            return parse_json(objects.read(url), url, EmbeddingMetadata, remedy=remedy), parts
        except DocumentError:
            if not overwrite:
                raise
            return None, []

    @property
    def _folder(self) -> str:
        return f".{self.kind.name}"

    def _records(self) -> list[str]:
        found = objects.list_under(objects.join(self.place, self._folder))
        return [url for url in found if url.endswith(".json")]  # excludes temporary files of a killed process

    def _forget(self) -> None:
        """Delete all records."""
        in_threads(objects.delete, objects.list_under(objects.join(self.place, self._folder)))

    def _record(self, name: str) -> str:
        return objects.join(self.place, self._folder, f"{name}.json")

    def _note(self, part: Part) -> None:
        objects.write(self._record(part.shard.file), json.dumps(as_json(part)).encode())

    def _is_there(self, part: Part, made: EmbeddingMetadata) -> bool:
        tars = self.tars_url if made.stored == "fp32" else self.place
        sizes = {
            objects.join(tars, part.shard.file): part.shard.size,
            objects.join(self.place, part.shard.sidecar): part.shard.sidecar_bytes,
        }
        return all(objects.exists(url) and objects.size(url) == size for url, size in sizes.items())

    def keep(self, shard: Shard, entry: Shard, sidecar: bytes, tar: Path | None = None) -> None:
        """Upload the embeddings of a shard (tar: None if it exists already), and record them as a finished part."""
        part = Part(shard.sha256, entry)
        if tar:
            objects.write(objects.join(self.place, part.shard.file), tar)
            tar.unlink()
        objects.write(objects.join(self.place, part.shard.sidecar), sidecar)
        self._note(part)
        self.parts[part.shard.file] = part

    def finish(self, made: EmbeddingMetadata) -> None:
        """Verify the hashes of all files, and write the index."""
        parts = [self.parts[self.kind.file_of(shard)] for shard in self.index.shards]
        if not self._records():  # an earlier start has finished
            return
        hashes = {objects.join(self.place, part.shard.sidecar): part.shard.sidecar_sha256 for part in parts}
        if made.stored != "fp32":
            hashes |= {objects.join(self.place, part.shard.file): part.shard.sha256 for part in parts}
        found = in_threads(objects.sha256, hashes)
        wrong = [url for url, sha256 in zip(hashes, found, strict=True) if sha256 != hashes[url]]
        for url in wrong:
            objects.delete(self._record(url.rpartition("/")[2].replace(".idx.npy", ".tar")))
        if wrong:
            raise ObjectError(f"{', '.join(wrong)}: the hash is wrong; start again, and only these are embedded again")
        tars_url = self.tars_url if made.stored == "fp32" and self.tars_url != self.place else ""
        content = StoredVectors(self.kind, made, tuple(parts), tars_url).to_json()
        objects.write(objects.join(self.place, self.kind.index_file), content.encode())
        self._forget()
        if "://" not in self.place:
            remove_leftovers(Path(self.place), f"*_{self.kind.name}")


def in_threads(function: Callable[[T], R], given: Iterable[T]) -> list[R]:
    """Return the function's results, in order; for requests, whose answers take long."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(function, given))


def _recorded(url: str, data: bytes) -> Part | None:
    with suppress(DocumentError, ValueError):
        part = parse_json(data, url, Part, remedy="")
        check_shards([part.shard])
        return part
    return None


def _described(made: EmbeddingMetadata) -> str:
    """Return the properties in which vectors for the same shard can differ."""
    columns = f", captions in {', '.join(made.columns)}" if made.columns else ""
    query = f", query {made.query!r}" if made.query is not None else ""
    return f"({made.identity}, width {made.width}, {made.stored}{columns}{query})"


def open_datasets(shards: list[str], out: str | None, kind: StoreKind = CAPTIONS) -> list[EmbeddedDataset]:
    """Open the datasets at these URLs, or below them.

    out: the folder for the vectors, with a subfolder for each of several datasets; default: beside each index.
    Raises PipelineError if there is no dataset, or if two would be written to the same place.
    """
    places: dict[str, str] = {}
    for url in map(_plain, shards):
        if objects.exists(objects.join(url, INDEX_FILE)):
            found = {url: url.rpartition("/")[2] if len(shards) > 1 else ""}
        else:
            ending = f"/{INDEX_FILE}"
            urls = [each.removesuffix(ending) for each in objects.list_under(url) if each.endswith(ending)]
            found = {each: each.removeprefix(f"{url}/") for each in urls}
            if not found:
                raise PipelineError(f"--shards {url} has no {INDEX_FILE}, nor does any folder below it")
        for dataset, name in found.items():
            place = objects.join(_plain(out), *filter(None, [name])) if out else dataset
            if place in places.values() and places.get(dataset) != place:
                raise PipelineError(f"two of --shards have the name {name}: use a different --out for each")
            places[dataset] = place
    sources = {place: Source.open(Data(url=url)) for url, place in places.items()}
    return [EmbeddedDataset(kind, place, source, *source.indexes[0]) for place, source in sources.items()]


def _plain(url: str) -> str:
    """Return the URL in the form that listings use."""
    return url.rstrip("/") if "://" in url else str(Path(url))
