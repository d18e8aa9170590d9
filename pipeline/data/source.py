"""The shards of all datasets of a run in one list, and access to their samples' records and bytes."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np

from pipeline.config import Data, Part
from pipeline.data.batch import Origin
from pipeline.data.dataset import Dataset, first_samples
from pipeline.data.index import Index, Shard, load_sidecar, read_records, read_samples
from pipeline.data.lengths import Lengths
from pipeline.data.neighbours import Neighbours
from pipeline.data.order import Order
from pipeline.data.sample import BadSample, Pair
from pipeline.data.shards import parse_sample
from pipeline.data.text_embeddings import EmbeddingMetadata, TextEmbeddings
from pipeline.errors import PipelineError
from pipeline.storage import objects
from pipeline.storage.objects import ObjectError


@dataclass(frozen=True)
class Tar:
    """A tar of samples, or of their text embeddings.  folder: its URL's folder.  sidecars: that of its sidecar.

    whole: read its sidecar once, and keep it: its samples are used one by one.
    """

    shard: Shard
    folder: str
    sidecars: str
    whole: bool = False

    @property
    def url(self) -> str:
        return objects.join(self.folder, self.shard.file)

    def records(self, start: int, stop: int) -> np.ndarray:
        """Return the sidecar's records of samples start..stop-1; recent results are cached."""
        if self.whole:
            return _sidecar(self.sidecars, self.shard)[start:stop]
        return _records(self.sidecars, self.shard, start, stop)

    def read(self, records: np.ndarray) -> list[bytes]:
        """Read the samples of consecutive records, by one ranged read."""
        return read_samples(self.folder, self.shard, records)


@dataclass(frozen=True, eq=False)
class Source:
    """All datasets of a run.

    indexes: (URL, index) of each dataset.  shards: (number of the dataset, shard) of each shard.
    embeddings: (URL, index) of each dataset's text embeddings, if the recipe uses them.
    neighbours: (URL, index) of each dataset's clusters of neighbours, if its batches are composed of them.
    """

    data: Data
    indexes: tuple[tuple[str, Index], ...]
    shards: tuple[tuple[int, Shard], ...]
    embeddings: tuple[tuple[str, TextEmbeddings], ...] = ()
    neighbours: tuple[tuple[str, Neighbours], ...] = ()

    @classmethod
    def open(cls, data: Data) -> "Source":
        """Read only the datasets' indexes.

        Raises ObjectError if one is missing, if text embeddings or clusters belong to other shards, if text embeddings
        come from several models, or if clusters differ in size.
        """
        objects.configure(**data.store())
        urls = [objects.join(data.url, part.name) for part in data.datasets] or [data.url]
        with ThreadPoolExecutor(8) as pool:
            indexes = tuple(zip(urls, pool.map(Index.load, urls), strict=True))
        shards = tuple((number, shard) for number, (_, index) in enumerate(indexes) for shard in index.shards)
        embeddings = _embeddings(data, indexes) if data.text_embeddings else ()
        neighbours = _neighbours(data, indexes) if data.batches == "neighbours" else ()
        return cls(data, indexes, shards, embeddings, neighbours)

    @property
    def embedding_metadata(self) -> EmbeddingMetadata | None:
        """The metadata of the text embeddings; None without any."""
        return self.embeddings[0][1].metadata if self.embeddings else None

    @property
    def fingerprint(self) -> str:
        """A hash of the datasets' content, their order, and the way they are read."""
        texts = [index.to_json() for _, index in self.indexes] + [index.to_json() for _, index in self.embeddings]
        texts += [index.to_json() for _, index in self.neighbours]
        return hashlib.sha256("".join(texts).encode()).hexdigest()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The datasets' names: those in data.datasets, or else the index's."""
        return tuple(part.name for part in self.data.datasets) or tuple(index.dataset for _, index in self.indexes)

    def order(self, global_batch: int, seed: int, lengths: Lengths) -> Order:
        """Return the order in which a run uses the samples."""
        data = self.data
        datasets = []
        groups = self._with_query_images() if data.batches == "modality" else [None] * len(self.indexes)
        for number, (_, index) in enumerate(self.indexes):
            part = data.datasets[number] if data.datasets else None
            cap = part.cap if part and part.cap else data.cap
            samples = np.array([shard.samples for shard in index.shards])
            datasets.append(
                Dataset(
                    name=self.names[number],
                    shard_samples=first_samples(samples, cap) if cap and data.cap_rows == "first" else samples,
                    shard_lengths=np.array([lengths.of_shard(shard) for shard in index.shards]),
                    weight=part.weight if part else 1.0,
                    cap=cap,
                    group=groups[number],
                    clusters=self._clusters(number) if self.neighbours else None,
                )
            )

        def lengths_of(shard: int, start: int, stop: int) -> np.ndarray:
            records = self.records(shard, start, stop)
            if not data.hard_negatives:
                records = records.copy()
                for name in ("negatives", "negative_text", "negative_images"):
                    records[name] = 0
            return lengths.of_records(records)

        return Order(
            datasets=tuple(datasets),
            global_batch=global_batch,
            lanes=data.lanes,
            block_samples=data.block_samples,
            window_blocks=data.window_blocks,
            seed=seed,
            parts=data.parts,
            lengths=lengths_of,
            cluster=self.neighbours[0][1].size if self.neighbours else None,
        )

    def _clusters(self, number: int) -> np.ndarray:
        url, neighbours = self.neighbours[number]
        return neighbours.clusters(url, self.indexes[number][1].samples)

    def _with_query_images(self) -> list[bool]:
        """Return for each dataset whether the query of its first sample has an image."""
        with ThreadPoolExecutor(8) as pool:
            firsts = pool.map(lambda shard: self.records(shard, 0, 1), self._first_shards[:-1])
            return [bool(records["query_images"][0]) for records in firsts]

    def __len__(self) -> int:
        return sum(shard.samples for _, shard in self.shards)

    def __iter__(self) -> Iterator[Pair]:
        """Yield all samples in stored order, `data.block_samples` per read; a run reads them in its `order`."""
        for number, (_, shard) in enumerate(self.shards):
            for start in range(0, shard.samples, self.data.block_samples):
                records = self.records(number, start, min(start + self.data.block_samples, shard.samples))
                for record, data in zip(records, self.read(number, records), strict=True):
                    yield self.parse(number, record, data)

    def tars(self, shard: int) -> list[Tar]:
        """Return the tar of a shard's samples and, if the recipe uses them, that of their text embeddings."""
        number, info = self.shards[shard]
        url, index = self.indexes[number]
        whole = bool(self.neighbours)
        tars = [Tar(info, index.shards_url or url, url, whole)]
        if self.embeddings:
            url, embeddings = self.embeddings[number]
            part = embeddings.parts[shard - self._first_shards[number]]
            tars.append(Tar(part.shard, embeddings.tars_url or url, url, whole))
        return tars

    @cached_property
    def _first_shards(self) -> list[int]:
        """The number of each dataset's first shard."""
        return [0, *accumulate(len(index.shards) for _, index in self.indexes)]

    def records(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Return the sidecar's records of samples start..stop-1 of a shard."""
        return self.tars(shard)[0].records(start, stop)

    def read(self, shard: int, records: np.ndarray) -> list[bytes]:
        """Read the samples of consecutive records of a shard, by one ranged read."""
        return self.tars(shard)[0].read(records)

    def origin(self, shard: int, sample: int) -> Origin:
        return Origin(self.tars(shard)[0].url, sample)

    def parse(self, shard: int, record: np.void, data: bytes, vectors: bytes | None = None) -> Pair:
        """Parse a sample's bytes as a pair of the dataset in `names`; BadSample if they contain no pair.

        vectors: the bytes of its text embeddings, or None.
        """
        number = self.shards[shard][0]
        _, index = self.indexes[number]
        pair = parse_sample(data, index.captions)
        if not isinstance(pair, Pair):
            raise BadSample("an item of an evaluation set, not a pair to train on")
        rows = None
        if vectors is not None:
            embeddings = self.embeddings[number][1]
            try:
                rows = embeddings.vectors(vectors, pair, data, index.captions)
            except ObjectError as error:
                raise ObjectError(f"{self.tars(shard)[1].url}: {error}") from None
        query, target = int(record["query_hash"]), int(record["target_hash"])
        if not self.data.hard_negatives:
            pair = replace(pair, negatives=())
        pair = replace(pair, query=pair.query.hashed(query), target=pair.target.hashed(target))
        return replace(pair, dataset=self.names[number], vectors=rows)

    def check_memory(self, order: Order, world: int) -> None:
        """Raise PipelineError unless `data.memory_mb` holds one window of every lane and stream of a rank."""
        data, needed = self.data, 0.0
        for stream in order.streams:
            indexes = [self.indexes[number][1] for number in stream.datasets]
            total = sum(index.total_bytes for index in indexes)
            total += sum(self.embeddings[number][1].total_bytes for number in stream.datasets if self.embeddings)
            mean = total / sum(index.samples for index in indexes)
            needed += mean * stream.window_samples * data.lanes / world / 2**20
        if needed > data.memory_mb:
            if self.neighbours:
                held, remedy = f"{order.global_batch // world} samples of a step", "use more processes"
            else:
                windows = len(order.streams) * data.lanes // world
                held = f"{windows} windows of {data.window_blocks} blocks of {data.block_samples} samples"
                remedy = "lower data.window_blocks or data.block_samples"
            raise PipelineError(
                f"data.memory_mb={data.memory_mb} is too little: a rank's {held} take about {needed:.0f} MiB; raise "
                f"it, or {remedy}"
            )


def open_dataset(url: str, *names: str) -> Source:
    """Open the dataset in a folder or at an s3:// URL; with names, open the datasets of these names below it.

    The result has a length, and iterating over it reads the pairs. Raises ObjectError if an index is missing.
    """
    return Source.open(Data(url=url, datasets=[Part(name=name) for name in names]))


def _embeddings(data: Data, indexes: tuple[tuple[str, Index], ...]) -> tuple[tuple[str, TextEmbeddings], ...]:
    """Load (URL, index) of each dataset's text embeddings; see `Source.open`."""
    place = data.text_embeddings or ""
    if place == "beside":
        urls = [url for url, _ in indexes]
    else:
        urls = [objects.join(place, part.name) for part in data.datasets] or [place]
    with ThreadPoolExecutor(8) as pool:
        found = tuple(zip(urls, pool.map(TextEmbeddings.load, urls), strict=True))
    first_url, first = found[0]
    for (url, embeddings), (dataset, index) in zip(found, indexes, strict=True):
        embeddings.check(url, dataset, index)
        ours, theirs = first.metadata, embeddings.metadata
        if (ours.identity, ours.width) != (theirs.identity, theirs.width):
            raise ObjectError(
                f"the embeddings in {first_url} are from {ours.model} ({ours.identity}), but those in {url} are from "
                f"{theirs.model} ({theirs.identity}): embed all datasets with one model"
            )
    return found


def _neighbours(data: Data, indexes: tuple[tuple[str, Index], ...]) -> tuple[tuple[str, Neighbours], ...]:
    """Load (URL, index) of each dataset's clusters of neighbours; see `Source.open`."""
    if data.neighbours == "beside":
        urls = [url for url, _ in indexes]
    else:
        urls = [objects.join(data.neighbours, part.name) for part in data.datasets] or [data.neighbours]
    with ThreadPoolExecutor(8) as pool:
        found = tuple(zip(urls, pool.map(Neighbours.load, urls), strict=True))
    first_url, first = found[0]
    for (url, neighbours), (dataset, index) in zip(found, indexes, strict=True):
        neighbours.check(url, dataset, index)
        if neighbours.size != first.size:
            raise ObjectError(
                f"the clusters in {first_url} have {first.size} samples, but those in {url} have {neighbours.size}: "
                "mine all datasets with clusters of one size"
            )
    return found


_records = lru_cache(maxsize=256)(read_records)  # a window's records are needed twice
_sidecar = lru_cache(maxsize=None)(load_sidecar)
