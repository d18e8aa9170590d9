"""Inspect what lies beside a dataset's shards for its training: stored vectors, mined negatives, clusters."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from pipeline.data.index import Index, Shard, read_records, read_samples
from pipeline.data.mined import MINED_FILE, MinedIndex
from pipeline.data.neighbours import NEIGHBOURS_FILE, Neighbours
from pipeline.data.sample import BadSample
from pipeline.data.shards import members_of
from pipeline.data.stored_vectors import KINDS, StoredVectors, StoreKind
from pipeline.errors import PipelineError, printable
from pipeline.storage import objects


def stores_beside(url: str) -> Iterator[StoredVectors]:
    """Yield the stored vectors beside a dataset. Raises ObjectError if an index is damaged."""
    for kind in KINDS:
        if objects.exists(objects.join(url, kind.index_file)):
            yield StoredVectors.load(url, kind)


def mined_beside(url: str) -> MinedIndex | None:
    """Return the mined negatives beside a dataset. Raises ObjectError if their index is damaged."""
    return MinedIndex.load(url) if objects.exists(objects.join(url, MINED_FILE)) else None


def neighbours_beside(url: str) -> Neighbours | None:
    """Return the index of the clusters beside a dataset. Raises ObjectError if it is damaged."""
    return Neighbours.load(url) if objects.exists(objects.join(url, NEIGHBOURS_FILE)) else None


def store_faults(url: str, index: Index) -> list[str]:
    """Return the faults of what is beside a dataset: what belongs to other shards, and files with wrong bytes."""
    checks: list[Callable[[str, Index], list[str]]] = [partial(_faults_of_vectors, kind) for kind in KINDS]
    faults = []
    for check in (*checks, _faults_of_mined, _faults_of_neighbours):
        try:
            faults += check(url, index)
        except PipelineError as error:
            faults.append(str(error))
    return faults


def _faults_of_vectors(kind: StoreKind, url: str, index: Index) -> list[str]:
    if not objects.exists(objects.join(url, kind.index_file)):
        return []
    store, hashes = StoredVectors.load(url, kind), {}
    store.check(url, url, index)
    for part in store.parts:
        hashes[objects.join(store.tars_url or url, part.shard.file)] = part.shard.sha256
        hashes[objects.join(url, part.shard.sidecar)] = part.shard.sidecar_sha256
    return _faults(hashes)


def _faults_of_mined(url: str, index: Index) -> list[str]:
    if not (mined := mined_beside(url)):
        return []
    mined.check(url, url, index)
    return _faults({objects.join(url, part.file): part.sha256 for part in mined.parts})


def _faults_of_neighbours(url: str, index: Index) -> list[str]:
    if neighbours := neighbours_beside(url):
        neighbours.check(url, url, index)
        neighbours.clusters(url, index.samples)
    return []


def _faults(hashes: dict[str, str]) -> list[str]:
    """Return the faults of files, given by URL their SHA-256."""
    with ThreadPoolExecutor(8) as pool:
        return [fault for fault in pool.map(_fault, hashes, hashes.values()) if fault]


def _fault(url: str, expected: str) -> str:
    try:
        return "" if objects.sha256(url) == expected else f"{url}: its sha256 is not the index's"
    except PipelineError as error:
        return str(error)


def store_lines(url: str, index: Index) -> Iterator[str]:
    """Yield a line about each store beside a dataset."""
    for store in stores_beside(url):
        made, name = store.metadata, objects.join(url, store.kind.index_file)
        size = f"{store.total_bytes / 1e6:,.1f} MB"
        yield f"{name}: vectors of {store.kind.what} by {made.model}, width {made.width}, {made.stored}, {size}"
    if mined := mined_beside(url):
        dropped = mined.total("above_margin") + mined.total("above_absolute_margin")
        yield (
            f"{objects.join(url, MINED_FILE)}: {mined.total('mined'):,} mined negatives of {mined.total('queries'):,} "
            f"queries by {mined.metadata.model}, mean similarity {mined.mean_score:.3f} (targets "
            f"{mined.mean_positive:.3f}); {dropped:,} likely right ones dropped"
        )
    if neighbours := neighbours_beside(url):
        count = index.samples // neighbours.size
        yield (
            f"{objects.join(url, NEIGHBOURS_FILE)}: {count:,} clusters of {neighbours.size} neighbours by "
            f"{neighbours.made.get('model')}"
        )


def sample_rows(url: str, index: Index, shard: Shard, number: int) -> Iterator[tuple[str, str]]:
    """Yield (label, value) of a sample's stored vectors and mined negatives.

    Raises ObjectError if they belong to other shards.
    """
    for store in stores_beside(url):
        store.check(url, url, index)
        part = store.parts[index.shards.index(shard)].shard
        (data,) = read_samples(store.tars_url or url, part, read_records(url, part, number, number + 1))
        try:  # LLM2CLIP's tars have a member, not a row, for each text
            rows = len(members_of(data)[1]) if store.metadata.stored == "fp32" else len(store.rows_in(data)[1])
        except BadSample:
            rows = 0
        yield f"vectors of {store.kind.what}", f"{rows}, by {printable(store.metadata.model)}"
    if mined := mined_beside(url):
        mined.check(url, url, index)
        place = index.shards.index(shard)
        for each in mined.references(url, shard, place, number, number + 1)[0]:
            if each["shard"] >= 0:
                name = mined.datasets[each["dataset"]].name
                where = f" of {name!r}" if each["dataset"] != mined.own else ""
                yield (
                    "mined negative",
                    f"the target of sample {each['sample']} of shard {each['shard']}{where}, score {each['score']:.4f}",
                )
