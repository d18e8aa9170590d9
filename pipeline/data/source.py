"""The shards of all datasets of a run in one list, and access to their samples' records and bytes."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import TypeVar

import numpy as np

from pipeline.config import Data, Part
from pipeline.data.batch import Origin
from pipeline.data.dataset import Dataset, first_samples
from pipeline.data.index import INDEX_FILE, Index, Shard
from pipeline.data.lengths import Lengths
from pipeline.data.mined import MINED_FILE, Mined, Referral, with_negatives
from pipeline.data.neighbours import Neighbours, load_neighbours
from pipeline.data.order import Order
from pipeline.data.sample import BadSample, Item, Pair
from pipeline.data.shards import parse_sample
from pipeline.data.stored_vectors import CAPTIONS, ITEMS, EmbeddingMetadata, StoredVectors, StoreKind
from pipeline.data.tars import PLACE, PLACE_AND_HASHES, Tar
from pipeline.errors import PipelineError
from pipeline.storage import objects
from pipeline.storage.objects import ObjectError

T = TypeVar("T")

Stores = tuple[tuple[str, StoredVectors], ...]


@dataclass(frozen=True, eq=False)
class Source:
    """All datasets of a run.

    indexes: (URL, index) of each dataset.  shards: (number of the dataset, shard) of each shard.
    embeddings, teacher: (URL, index) of each dataset's text embeddings and teacher vectors, if the recipe uses them.
    mined: each dataset's mined negatives, likewise.
    neighbours: (URL, index) of each dataset's clusters of neighbours, if its batches are composed of them. Then a
        rank keeps 32 bytes a sample, 16 more for each kind of stored vectors, and 34 for each mined negative.
    """

    data: Data
    indexes: tuple[tuple[str, Index], ...]
    shards: tuple[tuple[int, Shard], ...]
    embeddings: Stores = ()
    teacher: Stores = ()
    mined: tuple[Mined, ...] = ()
    neighbours: tuple[tuple[str, Neighbours], ...] = ()

    @classmethod
    def open(cls, data: Data) -> "Source":
        """Read only the datasets' indexes.

        Raises ObjectError if one is missing, if stored vectors, mined negatives or clusters belong to other shards, if
        vectors come from several models, or if clusters differ in size.
        """
        objects.configure(**data.store())
        urls = [objects.join(data.url, part.name) for part in data.datasets] or [data.url]
        with ThreadPoolExecutor(8) as pool:
            indexes = tuple(zip(urls, pool.map(partial(_index, data), urls), strict=True))
        shards = tuple((number, shard) for number, (_, index) in enumerate(indexes) for shard in index.shards)
        embeddings = _stores(CAPTIONS, data.text_embeddings, data, indexes) if data.text_embeddings else ()
        teacher = _stores(ITEMS, data.teacher, data, indexes) if data.teacher else ()
        mined = _mined(data, indexes) if data.negatives else ()
        clustered = _beside_or_below(data.neighbours, data, indexes) if data.batches == "neighbours" else []
        neighbours = load_neighbours(clustered, indexes) if clustered else ()
        return cls(data, indexes, shards, embeddings, teacher, mined, neighbours)

    @property
    def embedding_metadata(self) -> EmbeddingMetadata | None:
        """The metadata of the text embeddings; None without any."""
        return self.embeddings[0][1].metadata if self.embeddings else None

    @property
    def teacher_metadata(self) -> EmbeddingMetadata | None:
        """The metadata of the teacher vectors; None without any."""
        return self.teacher[0][1].metadata if self.teacher else None

    @property
    def _stores(self) -> list[Stores]:
        """The stores in use, in the order of `tars`."""
        return [stores for stores in (self.embeddings, self.teacher) if stores]

    @property
    def fingerprint(self) -> str:
        """A hash of the content of the datasets and their text embeddings, their order, and the way they are read."""
        texts = [index.to_json() for _, index in self.indexes] + [index.to_json() for _, index in self.embeddings]
        return hashlib.sha256("".join(texts).encode()).hexdigest()

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """By name, a hash of each thing that the batches and the loss depend on; None for what is not used."""
        further = {
            "the teacher vectors' fingerprint": [index.to_json() for _, index in self.teacher],
            "the mined negatives' fingerprint": [mined.index.to_json() for mined in self.mined],
            "the neighbours' fingerprint": [index.to_json() for _, index in self.neighbours],
        }
        return {"the data's fingerprint": self.fingerprint} | {
            name: hashlib.sha256("".join(texts).encode()).hexdigest() if texts else None
            for name, texts in further.items()
        }

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
            records, references = self._of_lengths(shard, start, stop)
            if not data.hard_negatives:  # then further positives, which records count as negatives, are not estimated
                records = records.copy()
                for name in ("negatives", "negative_text", "negative_images"):
                    records[name] = 0
            records = records if references is None else with_negatives(records, references)
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

    def _of_lengths(self, shard: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the records and references of samples start..stop-1 of a shard, with all fields."""
        if not self.neighbours:
            return self.records(shard, start, stop), self.references(shard, start, stop)
        # What is kept of them lacks fields, but the order asks once for every shard, and keeps the lengths.
        number, references = self.shards[shard][0], None
        if self.mined:
            references = self.mined[number].all_references(shard - self._first_shards[number])[start:stop]
        return self.tars(shard)[0].all_records()[start:stop], references

    def _clusters(self, number: int) -> np.ndarray:
        url, neighbours = self.neighbours[number]
        return neighbours.clusters(url, self.indexes[number][1].samples)

    def _with_query_images(self) -> list[bool]:
        """Return for each dataset whether the query of its first sample has an image."""
        return self._of_first_shards(lambda shard: bool(self.records(shard, 0, 1)["query_images"][0]))

    def first_pairs(self) -> list[Pair | None]:
        """Read the first sample of each dataset; None if it is unusable."""

        def first(shard: int) -> Pair | None:
            records = self.records(shard, 0, 1)
            with suppress(BadSample):
                return self.parse(shard, records[0], self.read(shard, records)[0])
            return None

        return self._of_first_shards(first)

    def _of_first_shards(self, function: Callable[[int], T]) -> list[T]:
        """Call the function, in threads, for the number of each dataset's first shard."""
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(function, self._first_shards[:-1]))

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
        """Return the tar of a shard's samples and, if used, those of their text embeddings and teacher vectors."""
        number, info = self.shards[shard]
        url, index = self.indexes[number]
        one_by_one = bool(self.neighbours)
        tars = [Tar(info, index.shards_url or url, url, PLACE_AND_HASHES if one_by_one else ())]
        for stores in self._stores:
            url, stored = stores[number]
            part = stored.parts[shard - self._first_shards[number]]
            tars.append(Tar(part.shard, stored.tars_url or url, url, PLACE if one_by_one else ()))
        return tars

    @cached_property
    def _first_shards(self) -> list[int]:
        """The number of each dataset's first shard."""
        return [0, *accumulate(len(index.shards) for _, index in self.indexes)]

    def records(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Return the sidecar's records of samples start..stop-1 of a shard; see `Tar.records`."""
        return self.tars(shard)[0].records(start, stop)

    def read(self, shard: int, records: np.ndarray) -> list[bytes]:
        """Read the samples of consecutive records of a shard, by one ranged read."""
        return self.tars(shard)[0].read(records)

    def origin(self, shard: int, sample: int) -> Origin:
        return Origin(self.tars(shard)[0].url, sample, self.shards[shard][0])

    def references(self, shard: int, start: int, stop: int) -> np.ndarray | None:
        """Return (n, K) of `REFERENCE`, the mined negatives of samples start..stop-1 of a shard; None without any.

        With batches of neighbours only the fields in `USED`: those of all samples are kept.
        """
        if not self.mined:
            return None
        number = self.shards[shard][0]
        mined, own = self.mined[number], shard - self._first_shards[number]
        return mined.kept_references(own)[start:stop] if self.neighbours else mined.references(own, start, stop)

    def read_referred(self, shard: int, reference: np.void) -> tuple[bytes, ...]:
        """Read the sample that a reference of the shard's samples names: its bytes in every tar, as `tars` has them.

        For each kind of stored vectors, this process keeps 16 bytes a sample of all shards that were referred to.
        """
        mined = self.mined[self.shards[shard][0]]
        number, found = mined.numbers[reference["dataset"]], [mined.read(reference)]
        if number is not None:
            tars = self.tars(self._first_shards[number] + int(reference["shard"]))[1:]
            for tar in tars:  # the reference names the place in the samples' tar only
                found += tar.read(tar.record(int(reference["sample"])))
        return tuple(found)

    def referred_bytes(self, shard: int, references: np.ndarray) -> np.ndarray:
        """Return (n,) int64, the bytes that `read_referred` reads for (n, K) references of the shard's samples.

        A reference does not tell the bytes of stored vectors: the mean of its dataset counts.
        """
        stored = self._stored_bytes[self.shards[shard][0]]
        found = references["length"].astype(np.int64) + stored[references["dataset"]]
        return np.where(references["shard"] >= 0, found, 0).sum(axis=1)

    @cached_property
    def _stored_bytes(self) -> list[np.ndarray]:
        """For each dataset: the mean bytes of a sample's stored vectors in each dataset that its references number."""
        means = [
            sum(stores[number][1].total_bytes // index.samples for stores in self._stores)
            for number, (_, index) in enumerate(self.indexes)
        ]
        return [
            np.array([0 if number is None else means[number] for number in mined.numbers], np.int64)
            for mined in self.mined
        ]

    def parse(self, shard: int, record: np.void, data: bytes, *stored: bytes, mined: Sequence[Referral] = ()) -> Pair:
        """Parse a sample's bytes as a pair of the dataset in `names`; BadSample if they contain no pair.

        stored: its bytes in the further `tars`; without them, the pair has no stored vectors.
        mined: its references and what `read_referred` returned for them; they become further negatives.
        """
        pair = self._pair(shard, data, stored)
        query, target = int(record["query_hash"]), int(record["target_hash"])
        pair = replace(pair, query=pair.query.hashed(query), target=pair.target.hashed(target))
        if not self.data.hard_negatives:
            pair = pair.without_negatives()
        return self._with_mined(pair, shard, mined) if mined else pair

    def _pair(self, shard: int, data: bytes, stored: Sequence[bytes]) -> Pair:
        number = self.shards[shard][0]
        _, index = self.indexes[number]
        pair = _parsed(data, index)
        rows: dict[StoreKind, np.ndarray] = {}
        if stored:
            for place, (stores, vectors) in enumerate(zip(self._stores, stored, strict=True), 1):
                store = stores[number][1]
                try:
                    rows[store.kind] = store.vectors(vectors, pair, data, index.captions)
                except ObjectError as error:
                    raise ObjectError(f"{self.tars(shard)[place].url}: {error}") from None
        return replace(pair, dataset=self.names[number], vectors=rows.get(CAPTIONS), teacher=rows.get(ITEMS))

    def _with_mined(self, pair: Pair, shard: int, mined: Sequence[Referral]) -> Pair:
        """Append mined negatives, except those equal to an answer or a negative that the sample has itself.

        If one cannot be read, the sample is invalid, as with its own negatives.
        """
        known = {item.content_hash for item in pair.items[1:]}
        known |= {replace(pair.target, text=text).content_hash for text in pair.alternatives}
        place = self.mined[self.shards[shard][0]]
        items, rows = list[Item](), list[np.ndarray]()
        for reference, data in mined:
            number, hashed = place.numbers[reference["dataset"]], int(reference["target_hash"])
            if hashed in known:
                continue
            known.add(hashed)
            try:
                if number is None:
                    other = _parsed(data[0], place.places[reference["dataset"]][1])
                else:
                    other = self._pair(self._first_shards[number] + int(reference["shard"]), data[0], data[1:])
            except BadSample as reason:
                raise BadSample(f"its mined negative {place.url_of(reference)}: {reason}") from None
            other = other.drawn(0)
            items.append(other.target.hashed(hashed))
            rows += [] if other.teacher is None else [other.teacher[1]]
        teacher = pair.teacher if pair.teacher is None else np.concatenate([pair.teacher, *(row[None] for row in rows)])
        return replace(pair, negatives=(*pair.negatives, *items), teacher=teacher)

    def check_memory(self, order: Order, world: int) -> None:
        """Raise PipelineError unless `data.memory_mb` holds one window of every lane and stream of a rank."""
        data, needed = self.data, 0.0
        for stream in order.streams:
            indexes = [self.indexes[number][1] for number in stream.datasets]
            total = sum(index.total_bytes for index in indexes)
            total += sum(stores[number][1].total_bytes for stores in self._stores for number in stream.datasets)
            for number in stream.datasets if self.mined else ():
                mined = self.mined[number].index
                total += mined.total("referred_bytes") + mined.total("mined") * int(self._stored_bytes[number].max())
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


def _parsed(data: bytes, index: Index) -> Pair:
    pair = parse_sample(data, index.captions)
    if not isinstance(pair, Pair):
        raise BadSample("an item of an evaluation set, not a pair to train on")
    return pair


def _index(data: Data, url: str) -> Index:
    try:
        return Index.load(url)
    except ObjectError as error:
        if objects.exists(objects.join(url, INDEX_FILE)):
            raise
        one = data.datasets and objects.exists(objects.join(data.url, INDEX_FILE))
        remedy = (
            f"{data.url} is itself a dataset: give data.datasets=[]" if one else "tools/make_shards.py makes shards"
        )
        raise ObjectError(f"{error}; {remedy}") from None


def _beside_or_below(place: str, data: Data, indexes: Sequence[tuple[str, Index]]) -> list[str]:
    """Return the folder for each dataset: its own, or the one of its name below `place`."""
    if place == "beside":
        return [url for url, _ in indexes]
    return [objects.join(place, part.name) for part in data.datasets] or [place]


def _mined(data: Data, indexes: Sequence[tuple[str, Index]]) -> tuple[Mined, ...]:
    """Open each dataset's mined negatives; see `Source.open`."""
    urls = _beside_or_below(data.negatives or "", data, indexes)
    with ThreadPoolExecutor(8) as pool:
        found = tuple(pool.map(partial(Mined.open, indexes=indexes), urls, range(len(urls))))
    for mined in found:
        if None in mined.numbers and (data.teacher or data.text_embeddings):
            other = mined.index.datasets[mined.numbers.index(None)].name
            raise ObjectError(
                f"{objects.join(mined.url, MINED_FILE)} refers to the dataset {other}, whose stored vectors the "
                "run needs: add it to data.datasets, or mine with among=own"
            )
    return found


def _stores(kind: StoreKind, place: str, data: Data, indexes: tuple[tuple[str, Index], ...]) -> Stores:
    """Load (URL, index) of each dataset's stored vectors; see `Source.open`."""
    urls = _beside_or_below(place, data, indexes)
    with ThreadPoolExecutor(8) as pool:
        found = tuple(zip(urls, pool.map(partial(StoredVectors.load, kind=kind), urls), strict=True))
    first_url, first = found[0]
    for (url, stored), (dataset, index) in zip(found, indexes, strict=True):
        stored.check(url, dataset, index)
        ours, theirs = first.metadata, stored.metadata
        if (ours.identity, ours.width) != (theirs.identity, theirs.width):
            raise ObjectError(
                f"the embeddings in {first_url} are from {ours.model} ({ours.identity}), but those in {url} are from "
                f"{theirs.model} ({theirs.identity}): embed all datasets with one model"
            )
    return found
