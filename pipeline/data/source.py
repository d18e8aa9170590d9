"""All shards of a run's datasets, in one list: what they hold, and their samples' bytes."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from pipeline.config import Data
from pipeline.data import objects
from pipeline.data.batch import Origin
from pipeline.data.index import Index, Shard, read_records, read_samples
from pipeline.data.lengths import Lengths
from pipeline.data.order import Dataset, Order
from pipeline.data.sample import BadSample, Pair
from pipeline.data.shards import parse_sample
from pipeline.errors import PipelineError


@dataclass(frozen=True, eq=False)
class Source:
    """The datasets of a recipe. indexes: (URL, index) of each; shards: (number of the dataset, shard) of each."""

    data: Data
    indexes: tuple[tuple[str, Index], ...]
    shards: tuple[tuple[int, Shard], ...]

    @classmethod
    def open(cls, data: Data) -> "Source":
        """Read the datasets' indexes; nothing else is touched until a sample is needed."""
        objects.configure(**data.store())
        urls = [objects.join(data.url, part.name) for part in data.datasets] or [data.url]
        with ThreadPoolExecutor(8) as pool:
            indexes = tuple(zip(urls, pool.map(Index.load, urls), strict=True))
        shards = tuple((number, shard) for number, (_, index) in enumerate(indexes) for shard in index.shards)
        return cls(data, indexes, shards)

    @property
    def fingerprint(self) -> str:
        """What tells these datasets from any others, in content, in order, and in how they are read."""
        return hashlib.sha256("".join(index.to_json() for _, index in self.indexes).encode()).hexdigest()

    def order(self, global_batch: int, seed: int, lengths: Lengths) -> Order:
        """The order in which a run consumes them."""
        data = self.data
        datasets = []
        for number, (_, index) in enumerate(self.indexes):
            part = data.datasets[number] if data.datasets else None
            datasets.append(
                Dataset(
                    name=part.name if part else index.dataset,
                    shard_samples=np.array([shard.samples for shard in index.shards]),
                    shard_lengths=np.array([lengths.of_shard(shard) for shard in index.shards]),
                    weight=part.weight if part else 1.0,
                    cap=part.cap if part and part.cap else data.cap,
                )
            )
        return Order(
            datasets=tuple(datasets),
            global_batch=global_batch,
            lanes=data.lanes,
            block_samples=data.block_samples,
            window_blocks=data.window_blocks,
            seed=seed,
            parts=data.parts,
            lengths=lambda shard, start, stop: lengths.of_records(self.records(shard, start, stop)),
        )

    def records(self, shard: int, start: int, stop: int) -> np.ndarray:
        """What the sidecar says of samples start..stop-1 of a shard; those of late are remembered."""
        number, info = self.shards[shard]
        return _records(self.indexes[number][0], info, start, stop)

    def read(self, shard: int, records: np.ndarray) -> list[bytes]:
        """The samples of these consecutive records of a shard, by one ranged read."""
        return read_samples(self._tars(shard), self.shards[shard][1], records)

    def origin(self, shard: int, sample: int) -> Origin:
        return Origin(objects.join(self._tars(shard), self.shards[shard][1].file), sample)

    def parse(self, shard: int, data: bytes, record: np.void) -> Pair:
        """A sample's bytes, of which this is the record, as a pair; BadSample if they are none."""
        _, index = self.indexes[self.shards[shard][0]]
        pair = parse_sample(data, index.captions)
        if not isinstance(pair, Pair):
            raise BadSample("an item of an evaluation set, no pair to train on")
        query, target = int(record["query_hash"]), int(record["target_hash"])
        return replace(pair, query=pair.query.hashed(query), target=pair.target.hashed(target))

    def _tars(self, shard: int) -> str:
        url, index = self.indexes[self.shards[shard][0]]
        return index.shards_url or url

    def check_memory(self, order: Order, world: int) -> None:
        """Refuse windows that `data.memory_mb` cannot hold; it must hold one of every lane and stream of a rank."""
        data, needed = self.data, 0.0
        for stream in order.streams:
            indexes = [self.indexes[number][1] for number in stream.datasets]
            mean = sum(index.bytes for index in indexes) / sum(index.samples for index in indexes)
            lane = min(data.window_blocks * data.block_samples, stream.samples // data.lanes)
            needed += mean * lane * data.lanes / world / 2**20
        if needed > data.memory_mb:
            raise PipelineError(
                f"data.memory_mb={data.memory_mb} is too little: a rank's {len(order.streams) * data.lanes // world} "
                f"windows of {data.window_blocks} blocks of {data.block_samples} samples take about {needed:.0f} MiB; "
                "raise it, or lower data.window_blocks or data.block_samples"
            )


_records = lru_cache(maxsize=256)(read_records)  # those of a window are needed twice
