"""Evaluation sets: queries, each with its candidates, from MMEB's files, as they are or converted, or from pairs.

A folder with tasks.json is a collection in the layout of pipeline/data/mmeb.py. One with index.json is shards of
pairs as one trains on: each query then looks for its target among all targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise
from threading import Lock

import numpy as np

from pipeline.data import objects
from pipeline.data.index import INDEX_FILE, Captions, Index, Shard, load_sidecar, read_samples
from pipeline.data.mmeb import META_TASKS, TASKS_FILE, Side, converted_rows, evaluation_rows, read_tasks
from pipeline.data.sample import BadSample, Item, Pair, Single
from pipeline.data.shards import parse_sample
from pipeline.errors import PipelineError

_BLOCK_BYTES = 256 << 10  # of a shard that are read together: one picture, or a hundred texts


@dataclass(frozen=True)
class Task:
    """One dataset. queries: (Q,) rows of the collection's items; candidates: the same for each query, the
    right one first."""

    name: str
    meta_task: str
    in_distribution: bool
    queries: np.ndarray
    candidates: list[np.ndarray]


@dataclass
class Collection:
    """Tasks and the items they are about; an item that several tasks share is there, and embedded, once.

    names: what a person would call each item: its picture's path, else its text.
    """

    tasks: list[Task] = field(default_factory=list)
    items: list[partial[Item]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    _rows: dict[object, int] = field(default_factory=dict)

    @classmethod
    def load(cls, urls: Sequence[str], number: int = 0, count: int = 1) -> "Collection":
        """Of all datasets at `urls` every `count`-th, from the `number`-th on."""
        collection, datasets = cls(), []
        for url in urls:
            if objects.exists(objects.join(url, TASKS_FILE)):
                datasets += [partial(collection._add_mmeb, url, name, *kind) for name, kind in read_tasks(url).items()]
            elif objects.exists(objects.join(url, INDEX_FILE)):
                datasets.append(partial(collection._add_pairs, url))
            else:
                raise PipelineError(f"nothing to evaluate at {url}: it has neither {TASKS_FILE} nor {INDEX_FILE}")
        for add in datasets[number::count]:
            add()
        names = [task.name for task in collection.tasks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise PipelineError(f"two evaluation sets are called {', '.join(sorted(twice))}")
        return collection

    def _add_mmeb(self, url: str, dataset: str, meta_task: str, in_distribution: bool) -> None:
        folder = objects.join(url, dataset)
        converted = objects.exists(objects.join(folder, INDEX_FILE))
        queries, candidates = self._converted_rows(folder) if converted else self._mmeb_rows(url, folder)
        self.tasks.append(Task(dataset, meta_task, in_distribution, np.array(queries), candidates))

    def _mmeb_rows(self, url: str, folder: str) -> tuple[list[int], list[np.ndarray]]:
        def row(side: Side) -> int:
            text, image = side
            return self._row((url, side), image or text, partial(_read_item, url, text, image))

        rows = [(row(query), np.array([row(side) for side in sides])) for query, sides in evaluation_rows(folder)]
        return [query for query, _ in rows], [candidates for _, candidates in rows]

    def _converted_rows(self, folder: str) -> tuple[np.ndarray, list[np.ndarray]]:
        index = Index.load(folder)
        names, queries, candidates = converted_rows(folder, index)
        contents, readers = [], []
        for shard in index.shards:
            records = load_sidecar(folder, shard)
            starts = np.flatnonzero(np.diff(records["offset"].astype(np.int64) // _BLOCK_BYTES, prepend=-1))
            for start, stop in pairwise([*starts.tolist(), len(records)]):
                block = _Block(index.shards_url or folder, shard, records[start:stop])
                contents += block.records["query_hash"].tolist()
                readers += [partial(block.item, number) for number in range(stop - start)]
        items = np.array([self._row(*item) for item in zip(contents, names, readers, strict=True)])
        return items[queries], [items[numbers] for numbers in candidates]

    def _add_pairs(self, url: str) -> None:
        index = Index.load(url)
        pairs = []
        for shard in index.shards:
            for number, data in enumerate(read_samples(index.shards_url or url, shard, load_sidecar(url, shard))):
                pairs.append(_parse(f"{objects.join(url, shard.file)}#{number}", data, index.captions))
        rows = {
            item.content_hash: self._row(item.content_hash, f"{pair.key}: {item.text}", partial(_same, item))
            for pair in pairs
            for item in (pair.query, pair.target)
        }
        right: dict[int, set[int]] = {}
        for pair in pairs:
            right.setdefault(pair.query.content_hash, set()).add(rows[pair.target.content_hash])
        targets = np.unique([rows[pair.target.content_hash] for pair in pairs])
        queries, candidates = [], []
        for query, own in right.items():
            others = np.setdiff1d(targets, list(own))
            for target in sorted(own):
                queries.append(rows[query])
                candidates.append(np.concatenate([[target], others]))
        meta_task = pairs[0].task if pairs[0].task in META_TASKS else "retrieval"
        self.tasks.append(Task(index.dataset, meta_task, True, np.array(queries), candidates))

    def _row(self, key: object, name: str, item: partial[Item]) -> int:
        if key not in self._rows:
            self._rows[key] = len(self.items)
            self.items.append(item)
            self.names.append(name)
        return self._rows[key]


def _parse(key: str, sample: bytes, captions: Captions | None) -> Pair:
    try:
        pair = parse_sample(sample, captions)
    except BadSample as reason:
        raise PipelineError(f"{key} cannot be evaluated: {reason}") from None
    if not isinstance(pair, Pair):
        raise PipelineError(f"{key} is an item of an evaluation set: name the folder above, with its {TASKS_FILE}")
    return pair


def _read_item(url: str, text: str, image: str) -> Item:
    return Item(text, (objects.read(objects.join(url, "images", image)),) if image else ())


def _same(item: Item) -> Item:
    return item


@dataclass(frozen=True, eq=False)
class _Block:
    """Consecutive items of a shard that are read together."""

    url: str
    shard: Shard
    records: np.ndarray
    lock: Lock = field(default_factory=Lock)

    def item(self, number: int) -> Item:
        with self.lock:  # while one thread reads, those that want the block's other items wait
            data = _samples(self)[number]
        single = parse_sample(data)
        if not isinstance(single, Single):
            raise BadSample("a pair, where an item by itself was expected")
        return single.item


@lru_cache(maxsize=64)
def _samples(block: _Block) -> list[bytes]:
    return read_samples(block.url, block.shard, block.records)
