"""Compose clusters of neighbours for batches of hard in-batch negatives, on all processes; see data/neighbours.py.

The ranks share the shards in turn, and note each query's nearest targets as soon as they are ranked, in
PLACE/.neighbours: if the command is killed, run it again to continue. Then each dataset is clustered on one process.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import MiningRun
from pipeline.data.arrays import array_bytes, array_of
from pipeline.data.index import Index
from pipeline.data.mined import content_of
from pipeline.data.neighbours import ARRAY_FILE, NEIGHBOURS_FILE, Neighbours, write_neighbours
from pipeline.data.source import Source
from pipeline.distributed import on_every_rank, on_first_rank, rank_and_world
from pipeline.embedding.dataset import in_threads
from pipeline.embedding.partition import Apart, clusters_of
from pipeline.embedding.ranks import Ranking, Ranks, rank_in_turn, ranked_queries
from pipeline.embedding.targets import Targets, shared_targets
from pipeline.errors import PipelineError, printable
from pipeline.progress import progress_bar
from pipeline.storage import objects
from pipeline.storage.atomic import remove_leftovers
from pipeline.storage.objects import ObjectError

_RECORDS = ".neighbours"
_PLAN = "plan.json"
_NEIGHBOURS = 30  # of a sample in the graph; more make it slower, and hardly better

# A target near a query: their samples' numbers in the dataset, and the similarity. right: it is likely right.
_NEAR = np.dtype([("query", "<u4"), ("target", "<u4"), ("score", "<f4"), ("right", "?")])

logger = logging.getLogger(__name__)


@dataclass
class ClusteredDataset:
    """A dataset that was opened with its teacher's vectors, and the folder `place` for its clusters.

    number: among the datasets that are clustered together.  made: how, see `Neighbours`.
    """

    number: int
    place: str
    source: Source
    size: int
    made: dict[str, Any]

    @property
    def index(self) -> Index:
        return self.source.indexes[0][1]

    def is_whole(self, overwrite: bool) -> bool:
        """Return whether the same clusters are there.

        Raises PipelineError if others are, unless `overwrite`.
        """
        url = objects.join(self.place, NEIGHBOURS_FILE)
        try:
            found = Neighbours.load(self.place) if objects.exists(url) else None
        except ObjectError:
            if not overwrite:
                raise
            found = None
        if found is None:
            return False
        same = found.size == self.size and self.made.items() <= found.made.items()
        same &= found.shards == content_of(self.index)
        if not same and not overwrite:
            raise PipelineError(
                f"{self.place} has clusters of {found.size} that {found.made.get('model')} found with other options, "
                "vectors or shards: add overwrite=true, or choose another out="
            )
        array = objects.join(self.place, ARRAY_FILE)
        return same and objects.exists(array) and objects.size(array) == found.array.size

    def begin(self) -> None:
        """Keep the records of an earlier start only if they are of the same plan."""
        plan = json.dumps({"made": self.made, "shards": content_of(self.index)}).encode()
        url = objects.join(self._records, _PLAN)
        if not (objects.exists(url) and objects.read(url) == plan):
            self.forget()
            objects.write(url, plan)

    def left(self) -> list[int]:
        """Return the shards without a record."""
        shards = range(len(self.source.shards))
        there = in_threads(objects.exists, map(self.record, shards))
        return [shard for shard, found in zip(shards, there, strict=True) if not found]

    def forget(self) -> None:
        """Delete all records."""
        in_threads(objects.delete, objects.list_under(self._records))

    @property
    def _records(self) -> str:
        return objects.join(self.place, _RECORDS)

    def record(self, shard: int) -> str:
        """The URL of a shard's record: (n,) of `_NEAR`."""
        return objects.join(self._records, self.source.shards[shard][1].sidecar)

    def _near(self, shard: int) -> np.ndarray:
        """Read the record of a shard. Raises ObjectError if it is damaged."""
        url = self.record(shard)
        try:
            near = array_of(objects.read(url))
            if near.dtype != _NEAR:
                raise ValueError(f"it holds {near.dtype}")
            return near
        except ValueError as error:
            objects.delete(url)
            raise ObjectError(f"{url}: {error}; start again, and only this shard is ranked again") from None

    def finish(self, targets: Targets) -> None:
        """Cluster the dataset from the records of all shards, write the result and delete them."""
        near = np.concatenate(in_threads(self._near, range(len(self.source.shards))))
        facts = targets.facts[targets.of_dataset(self.number)]
        pairs = np.stack([near["query"], near["target"]], axis=1).astype(np.int64)
        apart = Apart.of(facts["query_hash"], facts["target_hash"], pairs[near["right"]])
        kept = ~near["right"]
        neighbours, scores = _neighbours(pairs[kept], near["score"][kept], apart.target)
        clusters, together = clusters_of(neighbours, scores, apart, self.size)
        alone = int((neighbours < 0).all(axis=1).sum())
        counts = {"samples_without_neighbours": alone, "pairs_not_separated": together}
        write_neighbours(self.place, self.index, clusters, self.size, self.made | counts)
        self.forget()
        if "://" not in self.place:
            remove_leftovers(Path(self.place), "neighbours.*")
        logger.info(
            "%s: %s clusters of %s neighbours; samples without neighbours: %s; pairs in one cluster that are likely "
            "right: %s",
            printable(self.place),
            f"{len(clusters) // self.size:,}",
            self.size,
            f"{alone:,}",
            f"{together:,}",
        )


def check_sizes(indexes: Sequence[Index], size: int | None) -> None:
    """Raise PipelineError if a dataset has fewer samples than a cluster."""
    for index in indexes:
        if size and index.samples < size:
            raise PipelineError(
                f"dataset {index.dataset} has {index.samples} samples, less than a cluster of {size}: set clusters to "
                f"{index.samples} or less, or mine without it"
            )


def cluster_datasets(
    datasets: Sequence[tuple[str, Source]], model: str, identity: str, options: MiningRun, device: torch.device
) -> None:
    """Write the clusters of neighbours of datasets, (place, source with its teacher's vectors) each. Collective.

    model, identity: of the teacher (see Encoder). Only a dataset's own targets are compared with its queries.
    Raises PipelineError if a place has other clusters, unless options.overwrite.
    """
    size = options.clusters
    assert size
    options = options.model_copy(update={"among": "own"})
    planned = [_planned(number, *each, size, model, identity, options) for number, each in enumerate(datasets)]
    rank, world = rank_and_world()

    def begin() -> list[list[int] | None]:
        return [_begun(dataset, options.overwrite) for dataset in planned]

    shards_left = on_first_rank(begin)  # on a shared file system other ranks may not see all records yet
    todo = [dataset for dataset, shards in zip(planned, shards_left, strict=True) if shards is not None]
    if not todo:
        return
    left = [(dataset, shard) for dataset in todo for shard in shards_left[dataset.number] or ()]
    total = sum(dataset.source.shards[shard][1].samples for dataset, shard in left)
    with (
        shared_targets([each.source for each in planned], options.scratch) as targets,
        progress_bar(total=total, desc="ranking neighbours", unit="query", disable=rank > 0) as bar,
    ):

        def noted(dataset: ClusteredDataset, shard: int, ranking: Ranking) -> Iterator[int]:
            _note_nearest(dataset, shard, ranking)
            yield dataset.source.shards[shard][1].samples

        rank_in_turn(left, targets, options, device, noted, bar)
        clustered = 0

        def cluster() -> None:
            nonlocal clustered
            for dataset in todo[rank::world]:
                dataset.finish(targets)
                clustered += 1

        on_every_rank(cluster, lambda: clustered, lambda _: None)


def _begun(dataset: ClusteredDataset, overwrite: bool) -> list[int] | None:
    """Return the shards that are still to be ranked; None if the same clusters are there."""
    if dataset.is_whole(overwrite):
        dataset.forget()  # a start that was killed may have left records
        return None
    dataset.begin()
    return dataset.left()


def _planned(
    number: int, place: str, source: Source, size: int, model: str, identity: str, options: MiningRun
) -> ClusteredDataset:
    vectors = hashlib.sha256(source.teacher[0][1].to_json().encode()).hexdigest()
    made = {"model": model, "identity": identity, "vectors": vectors, "neighbours": _NEIGHBOURS}
    made |= {name: getattr(options, name) for name in ("margin", "absolute_margin", "skip", "depth")}
    return ClusteredDataset(number, place, source, size, made)


def _note_nearest(dataset: ClusteredDataset, shard: int, ranking: Ranking) -> None:
    """Write the record of a shard: each query's nearest remaining targets, and those that are likely right."""
    first = ranking.first_sample(shard) - ranking.targets.of_dataset(dataset.number).start
    parts = [
        _nearest(ranks, first + start, ranking.targets.of_dataset(dataset.number).start, ranking.options.skip)
        for start, ranks in ranked_queries(dataset.source, shard, ranking)
    ]
    objects.write(dataset.record(shard), array_bytes(np.concatenate(parts)))


def _nearest(ranks: Ranks, first: int, own: int, skip: int) -> np.ndarray:
    """Return (n,) of `_NEAR`.  first: the number of the first query in the dataset.  own: that of its first sample."""
    order = np.cumsum(ranks.remaining, axis=1)
    near = ranks.remaining & (order > skip) & (order <= skip + _NEIGHBOURS)
    rows, columns = np.nonzero(near | ranks.above_margin | ranks.above_absolute_margin)
    found = np.zeros(len(rows), _NEAR)
    found["query"], found["target"] = first + rows, ranks.numbers[rows, columns] - own
    found["score"], found["right"] = ranks.scores[rows, columns], ~near[rows, columns]
    return found


def _neighbours(pairs: np.ndarray, scores: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each sample's neighbours and their scores, (N, m); -1 and 0 where there are fewer.

    pairs: (P, 2), a query and a near target's first sample, by query.  target: (N,), equal for equal targets.
    Of n samples with an equal target, sample i of a target is the neighbour of sample i, modulo n: so that each has
    neighbours, as in a dataset of classes.
    """
    count = len(target)
    by_target = np.argsort(target, kind="stable")
    sizes = np.bincount(target)
    starts = np.cumsum(sizes) - sizes
    place = np.empty(count, np.int64)  # among the samples with an equal target
    place[by_target] = np.arange(count) - starts[target[by_target]]
    near = target[pairs[:, 1]]
    others = by_target[starts[near] + place[pairs[:, 0]] % sizes[near]]
    queries = np.bincount(pairs[:, 0], minlength=count)
    column = np.arange(len(pairs)) - np.repeat(np.cumsum(queries) - queries, queries)
    neighbours, found = np.full((count, _NEIGHBOURS), -1), np.zeros((count, _NEIGHBOURS), np.float32)
    neighbours[pairs[:, 0], column], found[pairs[:, 0], column] = others, scores
    return neighbours, found
