"""Evaluation sets: queries, each with its candidates, from MMEB's layout or from shards of pairs.

    URL/tasks.json                         {"Scene-VQA": {"task": "vqa", "in_distribution": true}, ...}
    URL/<dataset>/*.parquet                MMEB's rows: qry_text, qry_img_path, tgt_text, tgt_img_path
    URL/images/<path>                      the pictures the rows name

or URL/index.json: shards of pairs as one trains on. Each query then looks for its target among all targets.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow.parquet as parquet

from pipeline.data import objects
from pipeline.data.index import INDEX_FILE, Index, load_sidecar, read_samples
from pipeline.data.sample import IMAGE_MARK, MMEB_IMAGE_MARK, BadSample, Item, Pair
from pipeline.data.shards import parse_sample
from pipeline.errors import PipelineError

META_TASKS = ("classification", "vqa", "retrieval", "grounding")
_COLUMNS = ["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"]


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
    def load(cls, urls: Sequence[str]) -> "Collection":
        collection = cls()
        for url in urls:
            if objects.exists(objects.join(url, "tasks.json")):
                collection._add_mmeb(url)
            elif objects.exists(objects.join(url, INDEX_FILE)):
                collection._add_pairs(url)
            else:
                raise PipelineError(f"nothing to evaluate at {url}: it has neither tasks.json nor {INDEX_FILE}")
        names = [task.name for task in collection.tasks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise PipelineError(f"two evaluation sets are called {', '.join(sorted(twice))}")
        return collection

    def _add_mmeb(self, url: str) -> None:
        name = objects.join(url, "tasks.json")
        try:
            listed = json.loads(objects.read(name))
            kinds = {dataset: (kind["task"], kind["in_distribution"]) for dataset, kind in listed.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PipelineError(f"{name} does not give each dataset's task and in_distribution: {error!r}") from None
        for dataset, (meta_task, in_distribution) in kinds.items():
            if meta_task not in META_TASKS:
                raise PipelineError(f"{name}: {dataset} has task {meta_task!r}; known: {', '.join(META_TASKS)}")
            files = [f for f in objects.list_under(objects.join(url, dataset)) if f.endswith(".parquet")]
            if not files:
                raise PipelineError(f"{objects.join(url, dataset)} holds no .parquet file with MMEB's rows")
            queries, candidates = [], []
            for row in (row for file in files for row in _read_rows(file)):
                queries.append(self._mmeb_row(url, row["qry_text"], row["qry_img_path"]))
                targets = zip(row["tgt_text"], row["tgt_img_path"], strict=True)
                candidates.append(np.array([self._mmeb_row(url, *target) for target in targets]))
            self.tasks.append(Task(dataset, meta_task, in_distribution, np.array(queries), candidates))

    def _mmeb_row(self, url: str, text: str, image: str) -> int:
        text = text.replace(MMEB_IMAGE_MARK, IMAGE_MARK)
        if image and IMAGE_MARK not in text:
            text = f"{IMAGE_MARK}\n{text}"
        return self._row((url, text, image), image or text, partial(_read_item, url, text, image))

    def _add_pairs(self, url: str) -> None:
        index = Index.load(url)
        pairs = [
            _parse(f"{objects.join(url, shard.file)}#{number}", sample)
            for shard in index.shards
            for number, sample in enumerate(read_samples(url, shard, load_sidecar(url, shard), 0, shard.samples))
        ]
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


def _parse(key: str, sample: bytes) -> Pair:
    try:
        return parse_sample(sample)
    except BadSample as reason:
        raise PipelineError(f"{key} cannot be evaluated: {reason}") from None


def _read_rows(file: str) -> list[dict]:
    try:
        return parquet.read_table(io.BytesIO(objects.read(file)), columns=_COLUMNS).to_pylist()
    except (ValueError, KeyError, OSError) as error:
        raise PipelineError(f"{file} does not hold MMEB's rows ({', '.join(_COLUMNS)}): {error}") from None


def _read_item(url: str, text: str, image: str) -> Item:
    return Item(text, (objects.read(objects.join(url, "images", image)),) if image else ())


def _same(item: Item) -> Item:
    return item
