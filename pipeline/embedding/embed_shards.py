"""Embed the captions or all items of datasets on all processes, and write tars of vectors; see data/stored_vectors.py.

Groups of consecutive samples, across shards, are assigned to ranks in turn, so that all ranks are busy even with fewer
shards than ranks. Each rank reads the samples of its groups. The first rank writes all vectors, which are small: a few
kilobytes, while an image has tens. The groups do not depend on the number of processes.

If the command is killed, run it again to continue: see `EmbeddedDataset`.
"""

import logging
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Encoding
from pipeline.data.index import Shard
from pipeline.data.sample import BadSample
from pipeline.data.shards import sample_key
from pipeline.data.source import Source
from pipeline.data.stored_vectors import CAPTIONS, ITEMS, Stored, StoreKind, rounded, sample_bytes, write_tar
from pipeline.distributed import all_gather_constant, on_first_rank, rank_and_world, start_distributed
from pipeline.embedding.dataset import EmbeddedDataset
from pipeline.errors import PipelineError, printable
from pipeline.evaluation.encode import in_turn, unit_vectors
from pipeline.evaluation.encoder import Encoder
from pipeline.evaluation.encoders import load_encoder
from pipeline.progress import progress_bar
from pipeline.storage import lock

GROUP = 256  # samples that one rank embeds at a time
_WITH_IMAGES = 32  # likewise if their images are embedded: a decoded one has megabytes
_THREADS = 8  # that prepare a group's items
_AHEAD = 3  # groups that a rank reads while it embeds one
_UPLOADS = 2  # at a time; their tars are in TMPDIR, beside the next one
_SHOWN = 10  # unusable samples that each rank logs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleGroup:
    """Consecutive samples that a rank embeds together.

    samples: the key of each, and the content hashes of its items; no items if it is unusable.
    prepared: the distinct items by content hash, longest text first, as the encoder prepared them.
    unusable: a message for each unusable sample.
    """

    samples: list[tuple[str, tuple[int, ...]]]
    prepared: dict[int, Any]
    unusable: list[str]


def embed_shards(
    model: str, datasets: list[EmbeddedDataset], stored: Stored, options: Encoding, *, overwrite: bool
) -> None:
    """Embed all captions or items that have no stored vectors yet, and write the indexes. Collective.

    datasets: as `open_datasets` returns them, of one kind.

    Raises PipelineError if a place has vectors of other shards or of another model, unless `overwrite`.
    """
    is_first = int(os.environ.get("RANK", 0)) == 0
    with lock.held([dataset.place for dataset in datasets] if is_first else []):
        device = start_distributed(options.timeout_minutes)
        encoder = load_encoder(model, options, device)
        embed_datasets(encoder, datasets, stored, device, overwrite=overwrite)


def embed_datasets(
    encoder: Encoder, datasets: list[EmbeddedDataset], stored: Stored, device: torch.device, *, overwrite: bool
) -> None:
    """Like `embed_shards`, with a loaded encoder.  device: the one on which the process group communicates."""
    rank, kind = rank_and_world()[0], datasets[0].kind
    made = [dataset.made(encoder, stored) for dataset in datasets]

    def finished() -> list[set[str]]:
        for dataset, by in zip(datasets, made, strict=True):
            dataset.begin(by, overwrite)
        return [set(dataset.parts) for dataset in datasets]

    whole = on_first_rank(finished)
    groups = [
        (dataset, number, start, min(start + size, shard.samples))
        for dataset, each in enumerate(datasets)
        for number, shard in enumerate(each.index.shards)
        if kind.file_of(shard) not in whole[dataset]
        for size in [_group_samples(kind, shard)]
        for start in range(0, shard.samples, size)
    ]
    total = sum(dataset.samples for dataset in datasets)
    todo = sum(stop - start for _, _, start, stop in groups)
    if rank == 0 and todo < total:
        logger.info("the %s of %s of %s samples are already embedded", kind.what, f"{total - todo:,}", f"{total:,}")
    pool, unusable = ThreadPoolExecutor(_AHEAD), 0

    def begin(group: tuple[int, int, int, int]) -> Callable[[], SampleGroup]:
        dataset, *samples = group
        return pool.submit(read_group, datasets[dataset].source, encoder, kind, *samples).result

    def embed(group: SampleGroup | None) -> list[bytes]:
        nonlocal unusable
        group = group or SampleGroup([], {}, [])
        for line in group.unusable[: max(_SHOWN - unusable, 0)]:
            logger.warning("no embeddings for %s", printable(line))
        unusable += len(group.unusable)
        return embedded(encoder, group, stored, kind)

    def embedded_samples() -> Iterator[bytes]:
        for _, part in in_turn(groups, begin, embed, ahead=_AHEAD):
            bar.update(len(part))
            yield from part

    bar = progress_bar(initial=total - todo, total=total, desc="embedding", unit="sample", disable=rank > 0)
    shards = dict.fromkeys(group[:2] for group in groups) if rank == 0 else {}
    samples, uploads = embedded_samples(), deque[Future[None]]()
    # On leaving, also after an error, the executor waits for running uploads.
    with bar, tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(_UPLOADS) as uploader:
        try:
            for dataset, number in shards:
                shard, tar = datasets[dataset].index.shards[number], Path(folder, f"{dataset}.{number}.tar")
                entry, sidecar = write_tar(tar, kind.file_of(shard), islice(samples, shard.samples))
                if len(uploads) == _UPLOADS:
                    uploads.popleft().result()
                uploads.append(uploader.submit(datasets[dataset].keep, shard, entry, sidecar, tar))
            deque(samples, maxlen=0)  # the other ranks write nothing, but embed their groups
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for upload in uploads:
        upload.result()

    def finish() -> None:
        for dataset, by in zip(datasets, made, strict=True):
            dataset.finish(by)
            logger.info("%s: %s of %s samples", printable(dataset.place), kind.what, f"{dataset.samples:,}")

    on_first_rank(finish)
    if without := int(all_gather_constant(torch.tensor([unusable], device=device)).sum()):
        if rank == 0:
            logger.warning(
                "%s of %s samples could not be used: their %s have no embeddings",
                f"{without:,}",
                f"{todo:,}",
                kind.what,
            )
        if without == todo:
            wanted = "whose targets are texts" if kind is CAPTIONS else "that the model can read"
            raise PipelineError(f"no sample could be used: give shards of pairs {wanted}")


def _group_samples(kind: StoreKind, shard: Shard) -> int:
    return _WITH_IMAGES if kind is ITEMS and (shard.images or shard.videos) else GROUP


def read_group(source: Source, encoder: Encoder, kind: StoreKind, number: int, start: int, stop: int) -> SampleGroup:
    """Read samples start..stop-1 of a shard, and prepare their items, equal ones once.

    Of the samples' bytes, only what is still to be prepared stays in memory.
    """
    found: list[tuple[str, tuple[int, ...] | BadSample]] = []
    preparing, lengths = dict[int, Future[Any]](), dict[int, int]()
    with ThreadPoolExecutor(_THREADS) as pool:
        for record, data in source.tars(number)[0].samples(start, stop):
            key = sample_key(data) or str(start + len(found))
            try:
                pair = source.parse(number, record, data)
                key = pair.key
                if kind is CAPTIONS and (pair.target.images or pair.target.video is not None):
                    raise BadSample("the target is not only a text")
                items = kind.items(pair)
            except BadSample as reason:
                found.append((key, reason))
                continue
            for item in items:
                if item.content_hash not in preparing:
                    preparing[item.content_hash] = pool.submit(encoder.prepare, item)
                    lengths[item.content_hash] = len(item.text)
            found.append((key, tuple(item.content_hash for item in items)))
    group = SampleGroup([], {}, [])
    for key, hashes in found:
        try:
            if isinstance(hashes, BadSample):
                raise hashes
            group.prepared.update({each: preparing[each].result() for each in hashes})
        except BadSample as reason:
            group.unusable.append(f"{source.origin(number, start + len(group.samples))}, key {key}: {reason}")
            hashes = ()
        group.samples.append((key, hashes))
    ordered = sorted(group.prepared, key=lambda each: -lengths[each])  # stable: chunks and vectors are reproducible
    return replace(group, prepared={each: group.prepared[each] for each in ordered})


def embedded(encoder: Encoder, group: SampleGroup, stored: Stored, kind: StoreKind) -> list[bytes]:
    """Embed a group, and return the tar members of its samples. Collective, like `Encoder.embed`."""
    owners = {item: f"{kind.one} of sample {key}" for key, items in group.samples for item in items}
    vectors = unit_vectors(encoder, list(group.prepared.values()), [owners[item] for item in group.prepared])
    rows = rounded(torch.from_numpy(vectors), stored)
    places = {item: place for place, item in enumerate(group.prepared)}
    return [sample_bytes(key, rows[[places[item] for item in items]], kind) for key, items in group.samples]
