"""Load shards of pairs, as for training, as a dataset: all targets are candidates for each query."""

from dataclasses import replace
from functools import partial

import numpy as np

from pipeline.data.index import Captions, Index, load_sidecar, read_samples
from pipeline.data.mmeb import META_TASKS, MMEB_TASKS, TASKS_FILE
from pipeline.data.sample import BadSample, Pair
from pipeline.data.shards import parse_sample
from pipeline.errors import PipelineError
from pipeline.evaluation.tasks import Collection, Ranking, content_key
from pipeline.storage import objects

_SIMILARITIES = 100_000_000


def add(collection: Collection, url: str) -> None:
    """Add the pairs at `url` as a dataset of their meta-task; without one, of "retrieval".

    A query with several targets or positives is repeated for each of them, without the others among its candidates.
    """
    index = Index.load(url)
    _check_size(url, index.samples, index.samples)
    pairs = []
    for shard in index.shards:
        for number, data in enumerate(read_samples(index.shards_url or url, shard, load_sidecar(url, shard))):
            pairs.append(_parse(f"{objects.join(url, shard.file)}#{number}", data, index.captions))
    rows = {
        item.content_hash: collection.row(
            content_key(item.content_hash), f"{pair.key}: {item.text}", partial(replace, item)
        )
        for pair in pairs
        for item in (pair.query, pair.target, *pair.positives)
    }
    right: dict[int, set[int]] = {}
    for pair in pairs:
        own = {rows[item.content_hash] for item in (pair.target, *pair.positives)}
        right.setdefault(pair.query.content_hash, set()).update(own)
    targets = np.unique([row for own in right.values() for row in own])
    _check_size(url, sum(map(len, right.values())), len(targets))
    queries, candidates = [], []
    for query, own in right.items():
        others = np.setdiff1d(targets, list(own))
        for target in sorted(own):
            queries.append(rows[query])
            candidates.append(np.concatenate([[target], others]).astype(np.int32))
    # Pairs with the name of an MMEB dataset need another name, because the candidates differ.
    name = f"{index.dataset}, pairs" if index.dataset in MMEB_TASKS else index.dataset
    meta_task = pairs[0].task if pairs[0].task in META_TASKS else "retrieval"
    collection.tasks.append(Ranking(name, meta_task, True, np.array(queries), candidates))


def _check_size(url: str, queries: int, targets: int) -> None:
    if queries * targets > _SIMILARITIES:
        raise PipelineError(
            f"{url} has {queries:,} pairs of a query and a right answer, and each would be compared with all answers: "
            f"evaluate on fewer, {int(_SIMILARITIES**0.5):,} at most"
        )


def _parse(key: str, sample: bytes, captions: Captions | None) -> Pair:
    try:
        pair = parse_sample(sample, captions)
    except BadSample as reason:
        raise PipelineError(f"{key} cannot be evaluated: {reason}") from None
    if not isinstance(pair, Pair):
        raise PipelineError(f"{key} is an item of an evaluation set: give the folder above, with its {TASKS_FILE}")
    return pair
