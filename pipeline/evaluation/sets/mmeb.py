"""Load MMEB's datasets, as on the hub or converted, and other sets in the same layout (pipeline/data/mmeb.py)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from threading import Lock

import numpy as np

from pipeline.data.index import INDEX_FILE, Index, Shard, load_sidecar, read_samples
from pipeline.data.mmeb import (
    IMAGE_FOLDERS,
    META_TASKS,
    MMEB_TASKS,
    TASKS_FILE,
    Side,
    converted_rows,
    evaluation_rows,
    read_tasks,
)
from pipeline.data.sample import BadSample, Item, Single
from pipeline.data.shards import parse_sample
from pipeline.errors import PipelineError
from pipeline.evaluation.tasks import Collection, Ranking, content_key
from pipeline.storage import objects
from pipeline.storage.documents import note_unread

GROUPS = ("mmeb", "mmeb/ind", "mmeb/ood", *(f"mmeb/{name}" for name in (*META_TASKS, *MMEB_TASKS)))
Find = Callable[[str], tuple[str, str]]  # a picture's path in the rows -> URL and stamp; PipelineError if it is missing
_BLOCK_BYTES = 256 << 10  # read from a shard at once: about one picture, or a hundred texts


def datasets(url: str, group: str | None = None, *, apart: bool = False) -> dict[str, Callable[[Collection], None]]:
    """Return, by name, a function for each dataset of the group at `url` that adds it to a collection.

    group: one of GROUPS; None: all datasets in tasks.json, or the MMEB datasets that exist. Raises PipelineError if
        there are none.
    apart: queries have their instructions apart from their texts; see `evaluation_rows`.
    """
    listed = objects.exists(objects.join(url, TASKS_FILE))
    known = read_tasks(url) if listed else MMEB_TASKS
    there = {}
    for name, (meta_task, in_distribution) in known.items():
        groups = (None, "mmeb", f"mmeb/{meta_task}", f"mmeb/{name}", "mmeb/ind" if in_distribution else "mmeb/ood")
        if group in groups and (listed or objects.list_under(objects.join(url, name))):
            there[name] = (meta_task, in_distribution)
    if "://" not in url:
        others = {file.parent.name for file in Path(url).glob("*/*.parquet")} - known.keys()
        why = (
            f"its {TASKS_FILE} does not name them" if listed else f"it has no {TASKS_FILE} and they are none of MMEB's"
        )
        note_unread(f"{url}, for {why}", sorted(others), kind="dataset")
    if not there:
        raise PipelineError(
            f"nothing to evaluate at {url}: it has no "
            + (f"dataset of {group}" if group else f"{TASKS_FILE}, {INDEX_FILE} or dataset of MMEB's")
        )
    find = _finder(url)
    return {name: partial(_add, url=url, name=name, kind=kind, find=find, apart=apart) for name, kind in there.items()}


def _add(collection: Collection, url: str, name: str, kind: tuple[str, bool], find: Find, apart: bool) -> None:
    folder = objects.join(url, name)
    if objects.exists(objects.join(folder, INDEX_FILE)):
        if apart:
            raise PipelineError(f"{folder} was converted, with the instructions in its texts: name MMEB-V2's own files")
        queries, candidates = _converted(collection, folder)
    else:
        queries, candidates = _published(collection, find, evaluation_rows(folder, apart=apart))
    collection.tasks.append(Ranking(name, *kind, queries, candidates))


def _finder(url: str) -> Find:
    """Each dataset has a folder of pictures, which is listed when a row first refers to it."""

    @cache
    def stamps(top: str) -> dict[str, str]:
        found = [objects.stamps(objects.join(url, folder, top)) for folder in IMAGE_FOLDERS]
        return {each: stamp for listed in found for each, stamp in listed.items()}

    def find(path: str) -> tuple[str, str]:
        urls = [objects.join(url, folder, path) for folder in IMAGE_FOLDERS]
        for each in urls:
            if stamp := stamps(path.partition("/")[0]).get(each):
                return each, stamp
        raise PipelineError(
            f"there is no {' or '.join(urls)}, to which a row refers: a score without it would not be comparable"
        )

    return find


def _published(
    collection: Collection, find: Find, rows: Iterable[tuple[Side, list[Side]]]
) -> tuple[np.ndarray, list[np.ndarray]]:
    @cache
    def row(side: Side) -> int:
        text, image, *apart = side
        instruction = "".join(apart)
        if image:
            return collection.medium(text, *find(image), name=image, instruction=instruction)
        return collection.text(text, instruction)

    numbers = [(row(query), np.array([row(side) for side in sides])) for query, sides in rows]
    return np.array([query for query, _ in numbers]), [candidates for _, candidates in numbers]


def _converted(collection: Collection, folder: str) -> tuple[np.ndarray, list[np.ndarray]]:
    index = Index.load(folder)
    names, queries, candidates = converted_rows(folder, index)
    keys: list[bytes] = []
    readers: list[Callable[[], Item]] = []
    for shard in index.shards:
        records = load_sidecar(folder, shard)
        starts = np.flatnonzero(np.diff(records["offset"].astype(np.int64) // _BLOCK_BYTES, prepend=-1))
        for start, stop in pairwise([*starts.tolist(), len(records)]):
            block = _Block(index.shards_url or folder, shard, records[start:stop])
            keys += map(content_key, block.records["query_hash"].tolist())
            readers += [partial(block.item, number) for number in range(stop - start)]
    rows = np.array([collection.row(*item) for item in zip(keys, names, readers, strict=True)])
    return rows[queries], [rows[numbers] for numbers in candidates]


@dataclass(frozen=True, eq=False)
class _Block:
    """Consecutive items of a shard that are read together."""

    url: str
    shard: Shard
    records: np.ndarray
    lock: Lock = field(default_factory=Lock)

    def item(self, number: int) -> Item:
        with self.lock:  # other threads wait for the block instead of reading it again
            data = _samples(self)[number]
        single = parse_sample(data)
        if not isinstance(single, Single):
            raise BadSample("a pair, where a single item was expected")
        return single.item


@lru_cache(maxsize=64)
def _samples(block: _Block) -> list[bytes]:
    return read_samples(block.url, block.shard, block.records)
