"""Embed the captions of datasets on all processes, and write the vectors as tars; see data/text_embeddings.py.

Groups of consecutive samples, across shards, are assigned to ranks in turn, so that all ranks are busy even with fewer
shards than ranks. Each rank reads the samples of its groups. The first rank writes all vectors, which are small: a few
kilobytes, while a caption's image has tens. The groups do not depend on the number of processes.

Finished shards are recorded in PLACE/.text_embeddings: if the command is killed, run it again to continue.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from pipeline.config import Data, EvaluationRun
from pipeline.data.index import INDEX_FILE, Index, Shard, as_json, check_shards
from pipeline.data.sample import BadSample, Item
from pipeline.data.shards import sample_key
from pipeline.data.source import Source
from pipeline.data.text_embeddings import (
    EMBEDDINGS_FILE,
    EmbeddingMetadata,
    Part,
    Stored,
    TextEmbeddings,
    columns_of,
    file_of,
    rounded,
    sample_bytes,
    write_tar,
)
from pipeline.distributed import all_gather_constant, on_first_rank, rank_and_world, start_distributed
from pipeline.errors import PipelineError, printable
from pipeline.evaluation.encode import in_turn, unit_vectors
from pipeline.evaluation.encoder import Encoder
from pipeline.evaluation.encoders import load_encoder
from pipeline.models.files import fetched, fingerprint
from pipeline.progress import progress_bar
from pipeline.storage import lock, objects
from pipeline.storage.atomic import remove_leftovers
from pipeline.storage.documents import DocumentError, parse_json
from pipeline.storage.objects import ObjectError

GROUP = 256  # samples whose captions one rank embeds at a time
_AHEAD = 3  # groups that a rank reads while it embeds one
_READ_BYTES = 16 << 20  # per ranged read, unless a sample is larger
_UPLOADS = 2  # at a time; their tars are in TMPDIR, beside the next one
_SHOWN = 10  # unusable samples that each rank logs
_RECORDS = ".text_embeddings"

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass
class CaptionDataset:
    """A dataset, and the folder `place` for the embeddings of its captions.  parts: finished parts by file."""

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
        )

    def begin(self, made: EmbeddingMetadata, overwrite: bool) -> None:
        """Find the finished parts with the same shards and model, and prepare to write the others.

        Raises PipelineError if the place has other embeddings, unless `overwrite`.
        """
        index_url, finished = objects.join(self.place, EMBEDDINGS_FILE), None
        try:
            if objects.exists(index_url):
                finished = TextEmbeddings.load(self.place)
        except ObjectError:
            if not overwrite:
                raise
        by, parts = (finished.metadata, finished.parts) if finished else self._unfinished(overwrite)
        now = {(shard.sha256, file_of(shard), shard.samples) for shard in self.index.shards}
        same = [part for part in parts if (part.images, part.shard.file, part.shard.samples) in now]
        stale = ""
        if by and _described(by) != _described(made):
            stale, same = f"vectors of {by.model} {_described(by)}, not of {made.model} {_described(made)}", []
        elif len(same) < len(parts):
            stale = f"vectors of other shards than {self.url} has now"
        if stale and not overwrite:
            raise PipelineError(f"{self.place} has {stale}: add --overwrite, or choose another --out")
        there = _in_threads(lambda part: self._is_there(part, made), same)
        self.parts = {part.shard.file: part for part, found in zip(same, there, strict=True) if found}
        if finished and not stale and len(self.parts) == len(self.index.shards):
            return
        # Delete another model's records before writing this model's name.
        kept = {self._record("made"), *map(self._record, self.parts)}
        for url in set(self._records()) - kept:
            objects.delete(url)
        objects.write(self._record("made"), json.dumps(asdict(made)).encode())
        if finished:  # without an index the parts have records already
            _in_threads(self._note, self.parts.values())
        objects.delete(index_url)  # before any tar is overwritten, so that nobody reads a mix of old and new

    def _unfinished(self, overwrite: bool) -> tuple[EmbeddingMetadata | None, list[Part]]:
        """Return the model and recorded parts of an earlier start. A part with a damaged record is embedded again."""
        records = self._records()
        if (url := self._record("made")) not in records:
            return None, []
        records.remove(url)
        parts = [part for part in map(_recorded, records, _in_threads(objects.read, records)) if part]
        try:
            remedy = "add --overwrite, and all is embedded again"
            return parse_json(objects.read(url), url, EmbeddingMetadata, remedy=remedy), parts
        except DocumentError:
            if not overwrite:
                raise
            return None, []

    def _records(self) -> list[str]:
        found = objects.list_under(objects.join(self.place, _RECORDS))
        return [url for url in found if url.endswith(".json")]  # excludes temporary files of a killed process

    def _record(self, name: str) -> str:
        return objects.join(self.place, _RECORDS, f"{name}.json")

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
        parts = [self.parts[file_of(shard)] for shard in self.index.shards]
        if not self._records():  # an earlier start has finished
            return
        hashes = {objects.join(self.place, part.shard.sidecar): part.shard.sidecar_sha256 for part in parts}
        if made.stored != "fp32":
            hashes |= {objects.join(self.place, part.shard.file): part.shard.sha256 for part in parts}
        wrong = [url for url, found in zip(hashes, _in_threads(_sha256, hashes), strict=True) if found != hashes[url]]
        for url in wrong:
            objects.delete(self._record(url.rpartition("/")[2].replace(".idx.npy", ".tar")))
        if wrong:
            raise ObjectError(f"{', '.join(wrong)}: the hash is wrong; start again, and only these are embedded again")
        tars_url = self.tars_url if made.stored == "fp32" and self.tars_url != self.place else ""
        content = TextEmbeddings(made, tuple(parts), tars_url).to_json()
        objects.write(objects.join(self.place, EMBEDDINGS_FILE), content.encode())
        for url in objects.list_under(objects.join(self.place, _RECORDS)):
            objects.delete(url)
        if "://" not in self.place:
            remove_leftovers(Path(self.place), "*_text_embeddings")


def _in_threads(function: Callable[[T], Any], given: Iterable[T]) -> list[Any]:
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
    return f"({made.identity}, width {made.width}, {made.stored}{columns})"


def _sha256(url: str) -> str:
    digest, size = hashlib.sha256(), objects.size(url)
    for start in range(0, size, _READ_BYTES):
        digest.update(objects.read(url, start, min(_READ_BYTES, size - start)))
    return digest.hexdigest()


def open_datasets(shards: list[str], out: str | None) -> list[CaptionDataset]:
    """Open the datasets at these URLs, or below them.

    out: the folder for embeddings, with a subfolder for each of several datasets; default: beside each index.
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
    return [CaptionDataset(place, source, *source.indexes[0]) for place, source in sources.items()]


def _plain(url: str) -> str:
    """Return the URL in the form that listings use."""
    return url.rstrip("/") if "://" in url else str(Path(url))


@dataclass(frozen=True)
class SampleGroup:
    """Consecutive samples that a rank embeds together.

    samples: the key and the texts of each; no texts if it is unusable.
    prepared: the distinct texts, longest first, as the encoder prepared them.
    unusable: a message for each unusable sample.
    """

    samples: list[tuple[str, tuple[str, ...]]]
    prepared: dict[str, Any]
    unusable: list[str]


def embed_shards(
    model: str, datasets: list[CaptionDataset], stored: Stored, options: EvaluationRun, *, overwrite: bool
) -> None:
    """Embed all captions that have no embeddings yet, and write the indexes. Collective.

    Raises PipelineError if a place has embeddings of other shards or of another model, unless `overwrite`.
    """
    is_first = int(os.environ.get("RANK", 0)) == 0
    with lock.held([dataset.place for dataset in datasets] if is_first else []):
        device = start_distributed(options.timeout_minutes)
        encoder = load_encoder(model, options, device)
        embed_datasets(encoder, datasets, stored, device, overwrite=overwrite)


def embed_datasets(
    encoder: Encoder, datasets: list[CaptionDataset], stored: Stored, device: torch.device, *, overwrite: bool
) -> None:
    """Like `embed_shards`, with a loaded encoder.  device: the one on which the process group communicates."""
    rank, _ = rank_and_world()
    made = [dataset.made(encoder, stored) for dataset in datasets]

    def finished() -> list[set[str]]:
        for dataset, by in zip(datasets, made, strict=True):
            dataset.begin(by, overwrite)
        return [set(dataset.parts) for dataset in datasets]

    whole = _on_first_rank(finished)
    groups = [
        (dataset, number, start, min(start + GROUP, shard.samples))
        for dataset, each in enumerate(datasets)
        for number, shard in enumerate(each.index.shards)
        if file_of(shard) not in whole[dataset]
        for start in range(0, shard.samples, GROUP)
    ]
    total = sum(dataset.samples for dataset in datasets)
    todo = sum(stop - start for _, _, start, stop in groups)
    if rank == 0 and todo < total:
        logger.info("the captions of %s of %s samples are already embedded", f"{total - todo:,}", f"{total:,}")
    pool, unusable = ThreadPoolExecutor(_AHEAD), 0

    def begin(group: tuple[int, int, int, int]) -> Callable[[], SampleGroup]:
        dataset, *samples = group
        return pool.submit(read_group, datasets[dataset].source, encoder, *samples).result

    def embed(group: SampleGroup | None) -> list[bytes]:
        nonlocal unusable
        group = group or SampleGroup([], {}, [])
        for line in group.unusable[: max(_SHOWN - unusable, 0)]:
            logger.warning("no embeddings for %s", printable(line))
        unusable += len(group.unusable)
        return embedded(encoder, group, stored)

    def embedded_samples() -> Iterator[bytes]:
        for _, part in in_turn(groups, begin, embed, ahead=_AHEAD):
            bar.update(len(part))
            yield from part

    bar = progress_bar(initial=total - todo, total=total, desc="embedding", unit="sample", disable=rank > 0)
    shards = dict.fromkeys(group[:2] for group in groups) if rank == 0 else {}
    samples, uploads = embedded_samples(), deque[Future[None]]()
    # On leaving, also after an error, the executor waits for running uploads.
    with bar, tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(_UPLOADS) as uploader:
        try:
            for dataset, number in shards:
                shard, tar = datasets[dataset].index.shards[number], Path(folder, f"{dataset}.{number}.tar")
                entry, sidecar = write_tar(tar, file_of(shard), islice(samples, shard.samples))
                if len(uploads) == _UPLOADS:
                    uploads.popleft().result()
                uploads.append(uploader.submit(datasets[dataset].keep, shard, entry, sidecar, tar))
            deque(samples, maxlen=0)  # the other ranks write nothing, but embed their groups
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for upload in uploads:
        upload.result()

    def finish() -> None:
        for dataset, by in zip(datasets, made, strict=True):
            dataset.finish(by)
            logger.info("%s: captions of %s samples", printable(dataset.place), f"{dataset.samples:,}")

    _on_first_rank(finish)
    if without := int(all_gather_constant(torch.tensor([unusable], device=device)).sum()):
        if rank == 0:
            logger.warning(
                "%s of %s samples could not be used: their captions have no embeddings", f"{without:,}", f"{todo:,}"
            )
        if without == todo:
            raise PipelineError("no sample could be used: give shards of pairs whose targets are texts")


def _on_first_rank(work: Callable[[], T]) -> T:
    return on_first_rank(work) if dist.is_initialized() else work()


def read_group(source: Source, encoder: Encoder, number: int, start: int, stop: int) -> SampleGroup:
    """Read the texts of samples start..stop-1 of a shard, with only part of the samples in memory at a time."""
    group, prepared = SampleGroup([], {}, []), dict[str, Any]()
    for record, data in samples_of(source, number, start, stop):
        place = start + len(group.samples)
        key, texts = sample_key(data) or str(place), tuple[str, ...]()
        try:
            pair = source.parse(number, record, data)
            key = pair.key
            if pair.target.images or pair.target.video is not None:
                raise BadSample("the target is not only a text")
            prepared |= {text: encoder.prepare(Item(text)) for text in pair.texts if text not in prepared}
            texts = tuple(pair.texts)
        except BadSample as reason:
            group.unusable.append(f"{source.origin(number, place)}, key {key}: {reason}")
        group.samples.append((key, texts))
    ordered = sorted(prepared, key=lambda text: -len(text))  # stable, so that chunks and vectors are reproducible
    return replace(group, prepared={text: prepared[text] for text in ordered})


def samples_of(source: Source, number: int, start: int, stop: int) -> Iterator[tuple[np.void, bytes]]:
    """Yield (record, bytes) of samples start..stop-1 of a shard, in ranged reads of about _READ_BYTES."""
    records = source.records(number, start, stop)
    pieces = np.cumsum(records["length"].astype(np.int64)) // _READ_BYTES
    for piece in np.split(records, np.flatnonzero(np.diff(pieces)) + 1):
        yield from zip(piece, source.read(number, piece), strict=True)


def embedded(encoder: Encoder, group: SampleGroup, stored: Stored) -> list[bytes]:
    """Embed a group, and return the tar members of its samples. Collective, like `Encoder.embed`."""
    owners = {text: f"a caption of sample {key}" for key, texts in group.samples for text in texts}
    vectors = unit_vectors(encoder, list(group.prepared.values()), [owners[text] for text in group.prepared])
    rows = rounded(torch.from_numpy(vectors), stored)
    places = {text: place for place, text in enumerate(group.prepared)}
    return [sample_bytes(key, rows[[places[text] for text in texts]]) for key, texts in group.samples]
