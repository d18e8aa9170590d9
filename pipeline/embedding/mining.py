"""Mine hard negatives on all processes, and write references to them beside the shards; see data/mined.py.

A model embeds all items once, into a store beside the shards. Then the ranks share the shards in turn: each ranks the
targets for the queries of its shards, and writes a shard's references as soon as they are found. Finished shards are
recorded in PLACE/.mined: if the command is killed, run it again to continue. The result is the same on any number of
processes and devices.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from math import fsum
from pathlib import Path

import numpy as np
import torch

from pipeline.config import Data, MiningRun
from pipeline.data.index import Shard, as_json, sidecar_of
from pipeline.data.mined import (
    MINED_FILE,
    REFERENCE,
    MinedIndex,
    MinedPart,
    MiningMetadata,
    Referred,
    content_of,
    mined_dtype,
    mined_file,
)
from pipeline.data.source import Source
from pipeline.data.stored_vectors import ITEMS, Stored, StoredVectors
from pipeline.distributed import gathered, on_first_rank, rank_and_world, start_distributed
from pipeline.embedding.clustering import check_sizes, cluster_datasets
from pipeline.embedding.dataset import EmbeddedDataset, in_threads, open_datasets
from pipeline.embedding.embed_shards import embed_datasets
from pipeline.embedding.ranks import Ranking, Ranks, chosen, rank_in_turn, ranked_queries
from pipeline.embedding.targets import Targets, shared_targets
from pipeline.errors import PipelineError, printable
from pipeline.evaluation.encoder import Encoder
from pipeline.evaluation.encoders import load_encoder
from pipeline.progress import progress_bar
from pipeline.storage import lock, objects
from pipeline.storage.atomic import remove_leftovers
from pipeline.storage.documents import DocumentError, parse_json
from pipeline.storage.objects import ObjectError

_RECORDS = ".mined"

logger = logging.getLogger(__name__)


@dataclass
class MinedDataset:
    """A dataset, and the folder `place` for its mined negatives.

    number: among the datasets that are mined together.  source: opened with its items' vectors.
    plan: the index without parts.  parts: the finished ones, by file.
    finished: the whole index, if an earlier start wrote it.
    """

    number: int
    place: str
    source: Source
    plan: MinedIndex
    parts: dict[str, MinedPart] = field(default_factory=dict)
    finished: MinedIndex | None = None

    @property
    def shards(self) -> list[Shard]:
        return [shard for _, shard in self.source.shards]

    def begin(self, overwrite: bool) -> None:
        """Find the finished parts of the same plan, and prepare to write the others.

        Raises PipelineError if the place has negatives that were mined otherwise, unless `overwrite`.
        """
        finished = self._loaded(self.place, overwrite)
        unfinished = None if finished else self._loaded(self._records, overwrite)
        known = finished or unfinished
        if known and replace(known, parts=()) != self.plan and not overwrite:
            raise PipelineError(
                f"{self.place} has negatives that {known.metadata.model} mined with other options, vectors or shards: "
                "add overwrite=true, or choose another out="
            )
        same = known is not None and replace(known, parts=()) == self.plan
        parts = [*finished.parts] if finished and same else self._recorded() if same else []
        there = in_threads(self._is_there, parts)
        self.parts = {part.file: part for part, found in zip(parts, there, strict=True) if found}
        if finished and same and len(self.parts) == len(self.shards):
            self.finished = finished
            self._forget(keep=set())  # a start that was killed may have left records
            return
        plan = objects.join(self._records, MINED_FILE)
        # Records of another plan are deleted before this one is written.
        self._forget(keep={plan, *map(self._record, self.parts)})
        objects.write(plan, self.plan.to_json().encode())
        if finished:  # without an index the parts have records already
            in_threads(self._note, self.parts.values())
        # Before any file is overwritten, so that nobody reads a mix of old and new.
        objects.delete(objects.join(self.place, MINED_FILE))

    def _loaded(self, folder: str, overwrite: bool) -> MinedIndex | None:
        try:
            return MinedIndex.load(folder) if objects.exists(objects.join(folder, MINED_FILE)) else None
        except ObjectError:
            if not overwrite:
                raise
            return None

    def _recorded(self) -> list[MinedPart]:
        """Return the parts that an earlier start has finished. One with a damaged record is mined again."""

        def recorded(url: str) -> MinedPart | None:
            with suppress(DocumentError):
                return parse_json(objects.read(url), url, MinedPart, remedy="")
            return None

        records = [url for url in objects.list_under(self._records) if url.endswith(".npy.json")]
        return [part for part in in_threads(recorded, records) if part]

    @property
    def _records(self) -> str:
        return objects.join(self.place, _RECORDS)

    def _forget(self, keep: set[str]) -> None:
        """Delete the records, but for these URLs."""
        in_threads(objects.delete, [url for url in objects.list_under(self._records) if url not in keep])

    def _is_there(self, part: MinedPart) -> bool:
        url = objects.join(self.place, part.file)
        return objects.exists(url) and objects.size(url) == part.size

    def _record(self, file: str) -> str:
        return objects.join(self._records, f"{file}.json")

    def _note(self, part: MinedPart) -> None:
        objects.write(self._record(part.file), json.dumps(as_json(part)).encode())

    def keep(self, shard: Shard, records: np.ndarray, counts: dict[str, float]) -> None:
        """Write the references of a shard, (samples,) of `mined_dtype`, and record them as a finished part."""
        data = sidecar_of(records, self.plan.seed(shard))
        sums = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        part = MinedPart(shard=shard.sha256, file=mined_file(shard), **sums, **counts)  # type: ignore[arg-type]
        objects.write(objects.join(self.place, part.file), data)
        self._note(part)
        self.parts[part.file] = part

    def finish(self) -> MinedIndex:
        """Verify all files, and write the index. `parts` has those of all ranks."""
        if self.finished:
            return self.finished
        index = replace(self.plan, parts=tuple(self.parts[mined_file(shard)] for shard in self.shards))
        if wrong := index.damaged(self.place):
            for part in wrong:
                objects.delete(self._record(part.file))
            files = ", ".join(part.file for part in wrong)
            raise ObjectError(
                f"{self.place}: the hash of {files} is wrong; start again, and only these are mined again"
            )
        objects.write(objects.join(self.place, MINED_FILE), index.to_json().encode())
        self._forget(keep=set())
        if "://" not in self.place:
            remove_leftovers(Path(self.place), "*.mined.npy")
        return index


def mine(model: str, url: str, options: MiningRun) -> None:
    """Embed the dataset at this URL, or all below it, unless they are embedded, and mine their negatives. Collective.

    Raises PipelineError if a place has vectors or negatives of other shards, models or options, unless
    options.overwrite.
    """
    with _options_named():
        embedded = open_datasets([url], options.teacher, ITEMS)
    places = [*(dataset.place for dataset in embedded), *_places(embedded, url, options.out).values()]
    is_first = int(os.environ.get("RANK", 0)) == 0
    with lock.held(dict.fromkeys(places) if is_first else []):
        device = start_distributed(options.timeout_minutes)
        encoder = load_encoder(model, options, device)
        mine_datasets(encoder, embedded, url, options, device)


def mine_datasets(
    encoder: Encoder, embedded: list[EmbeddedDataset], url: str, options: MiningRun, device: torch.device
) -> None:
    """Like `mine`, with a loaded encoder and the datasets at or below `url`."""
    check_sizes([each.index for each in embedded], options.clusters)
    stored = on_first_rank(lambda: _stored(embedded))
    with _options_named():
        embed_datasets(encoder, embedded, stored, device, overwrite=options.overwrite)
    datasets = _planned(encoder, embedded, url, options)
    sources = [dataset.source for dataset in datasets]

    def finished() -> list[set[str]]:
        for dataset in datasets:
            dataset.begin(options.overwrite)
        return [set(dataset.parts) for dataset in datasets]

    whole = on_first_rank(finished)
    todo = [
        (dataset, number)
        for dataset in datasets
        for number, shard in enumerate(dataset.shards)
        if mined_file(shard) not in whole[dataset.number]
    ]
    total, left = sum(map(len, sources)), sum(dataset.shards[number].samples for dataset, number in todo)
    rank, _ = rank_and_world()
    if rank == 0 and left < total:
        logger.info("the negatives of %s of %s samples are already mined", f"{total - left:,}", f"{total:,}")
    if todo:
        with (
            shared_targets(sources, options.scratch) as targets,
            progress_bar(initial=total - left, total=total, desc="mining", unit="query", disable=rank > 0) as bar,
        ):
            rank_in_turn(todo, targets, options, device, _mined_shard, bar)
        # Not from a listing of the records: on a shared file system it may lack other nodes' newest ones.
        for parts in gathered([dataset.parts for dataset in datasets]):
            for dataset, found in zip(datasets, parts, strict=True):
                dataset.parts |= found

    def finish() -> None:
        for dataset in datasets:
            _log(dataset, dataset.finish())

    on_first_rank(finish)
    if options.clusters:
        clustered = [(dataset.place, dataset.source) for dataset in datasets]
        cluster_datasets(clustered, encoder.name, encoder.identity, options, device)


@contextmanager
def _options_named() -> Iterator[None]:
    """Name this program's options in the errors of embedding, which name those of pipeline.embed."""
    try:
        yield
    except PipelineError as error:
        ours = {"--overwrite": "overwrite=true", "--out": "teacher=", "--shards ": ""}
        pattern = "|".join(ours)
        raise type(error)(re.sub(pattern, lambda found: ours[found[0]], str(error))) from error


def _stored(embedded: list[EmbeddedDataset]) -> Stored:
    """Return the number format of vectors that are there already, or else fp16."""
    for each in embedded:
        if objects.exists(objects.join(each.place, ITEMS.index_file)):
            with suppress(ObjectError):  # `embed_datasets` says what to do
                return StoredVectors.load(each.place, ITEMS).metadata.stored
    return "fp16"


def _places(embedded: list[EmbeddedDataset], url: str, out: str | None) -> dict[str, str]:
    """Return the place of each dataset's mined negatives, by the dataset's name below `url`; "" for itself."""
    root = url.rstrip("/") if "://" in url else str(Path(url))
    names = {dataset.url.removeprefix(root).lstrip("/"): dataset.url for dataset in embedded}
    return {
        name: objects.join(out, *filter(None, [name])) if out else dataset_url for name, dataset_url in names.items()
    }


def _planned(encoder: Encoder, embedded: list[EmbeddedDataset], url: str, options: MiningRun) -> list[MinedDataset]:
    """Open the datasets with their items' vectors, and say how their negatives are mined."""
    places = _places(embedded, url, options.out)
    referred = [Referred(name, content_of(each.index)) for name, each in zip(places, embedded, strict=True)]
    stores = [StoredVectors.load(each.place, ITEMS).to_json() for each in embedded]
    chosen_by = {name: getattr(options, name) for name in ("count", "margin", "absolute_margin", "skip", "depth")}
    chosen_by |= {name: getattr(options, name) for name in ("choose", "seed", "among")}
    datasets = []
    for number, (place, each) in enumerate(zip(places.values(), embedded, strict=True)):
        among = slice(number, number + 1) if options.among == "own" else slice(None)
        vectors = hashlib.sha256("".join(stores[among]).encode()).hexdigest()
        metadata = MiningMetadata(encoder.name, encoder.identity, vectors, **chosen_by)
        own = 0 if options.among == "own" else number
        plan = MinedIndex(metadata, tuple(referred[among]), own, ())
        source = Source.open(Data(url=each.url, teacher=each.place, **options.store()))
        datasets.append(MinedDataset(number, place, source, plan))
    return datasets


def _mined_shard(dataset: MinedDataset, number: int, ranking: Ranking) -> Iterator[int]:
    """Mine the negatives of a shard and write them. Yields the number of queries after each part of them."""
    shard, count = dataset.shards[number], ranking.options.count
    records = np.zeros(shard.samples, mined_dtype(count))
    records["negatives"]["shard"] = -1
    totals: dict[str, float] = dict.fromkeys(("queries", "left_out", "above_margin", "above_absolute_margin"), 0)
    positives = list[float]()
    for first, ranks in ranked_queries(dataset.source, number, ranking):
        places = chosen(ranks, ranking.options, (dataset.number, number), first)
        records["negatives"][first : first + len(places)] = _references(dataset, ranking.targets, ranks, places)
        totals["queries"] += int(ranks.usable.sum())
        totals["left_out"] += ranks.left_out
        totals["above_margin"] += int(ranks.above_margin.sum())
        totals["above_absolute_margin"] += int(ranks.above_absolute_margin.sum())
        positives += ranks.positive[ranks.usable].tolist()
        yield len(places)
    found = records["negatives"][records["negatives"]["shard"] >= 0]
    totals |= {"mined": len(found), "referred_bytes": int(found["length"].sum(dtype=np.int64))}
    # fsum: rounded once, whatever the processor.
    sums = {"score_sum": fsum(found["score"].tolist()), "positive_sum": fsum(positives)}
    dataset.keep(shard, records, totals | sums)


def _references(dataset: MinedDataset, targets: Targets, ranks: Ranks, places: np.ndarray) -> np.ndarray:
    """Return (n, count) of `REFERENCE` to the candidates at these places of the ranks; -1: none."""
    result = np.zeros(places.shape, REFERENCE)
    result["shard"] = -1
    rows, columns = np.nonzero(places >= 0)
    numbers = ranks.numbers[rows, places[rows, columns]]
    shard = np.searchsorted(targets.firsts, numbers, side="right") - 1
    found = np.zeros(len(numbers), REFERENCE)
    found["dataset"] = 0 if len(dataset.plan.datasets) == 1 else targets.datasets[shard, 0]
    found["shard"], found["sample"] = targets.datasets[shard, 1], numbers - targets.firsts[shard]
    found["score"] = ranks.scores[rows, places[rows, columns]]
    facts = targets.facts[numbers]
    for name in set(REFERENCE.names or ()) & set(facts.dtype.names or ()):
        found[name] = facts[name]
    result[rows, columns] = found
    return result


def _log(dataset: MinedDataset, index: MinedIndex) -> None:
    queries, mined = index.total("queries"), index.total("mined")
    dropped = index.total("above_margin") + index.total("above_absolute_margin")
    logger.info(
        "%s: %s negatives for %s queries, mean similarity %.3f (targets %.3f); likely right and dropped: %s, for each "
        "query %.1f of the nearest %s",
        printable(dataset.place),
        f"{mined:,}",
        f"{queries:,}",
        index.mean_score,
        index.mean_positive,
        f"{dropped:,}",
        dropped / max(queries, 1),
        f"{index.metadata.depth:,}",
    )
    if mined < queries * index.metadata.count:
        logger.warning(
            "%s: %s of %s negatives are missing: too few of the %s nearest candidates remain; raise depth",
            printable(dataset.place),
            f"{queries * index.metadata.count - mined:,}",
            f"{queries * index.metadata.count:,}",
            f"{index.metadata.depth:,}",
        )
