"""Inspect datasets: verify every byte, show one sample, print statistics."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial

import numpy as np
from numpy.typing import ArrayLike
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.convert.command import Command, add_processes
from pipeline.convert.img2dataset import Tape, read_tape
from pipeline.convert.stores import sample_rows, store_faults, store_lines
from pipeline.convert.workers import Run, workers
from pipeline.data.arrays import array_of
from pipeline.data.index import (
    INDEX_FILE,
    Captions,
    Index,
    Shard,
    load_sidecar,
    read_records,
    read_samples,
)
from pipeline.data.lengths import Lengths
from pipeline.data.mmeb import ROWS_FILE, TASKS_FILE, converted_rows, read_tasks
from pipeline.data.sample import BadSample, Pair, Single
from pipeline.data.shards import ShardRecords, parse_sample
from pipeline.data.tiles import Tiling, decode_image, image_format
from pipeline.data.video import sample_frames, video_format
from pipeline.errors import PipelineError, printable
from pipeline.progress import progress_bar
from pipeline.storage import objects

# Token lengths are estimated for LLaVA-OneVision with 8 frames per video.
_PINPOINTS = ((384, 384), (384, 768), (768, 384), (768, 768))
_LENGTHS = Lengths(Tiling(size=384, patches=27, pinpoints=_PINPOINTS, max_tiles=9), video_frames=8)
_SHOWN = 10  # the most faults to print
_MOST_JOBS = 512  # per dataset
_PERCENTILES = (1, 10, 50, 90, 99)


def _add_dest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dest", metavar="DEST", help="a dataset, or a folder (or s3:// prefix) of several")


def _indexes(dest: str) -> dict[str, Index]:
    """Load URL -> index of the dataset `dest`, or of all datasets below it."""
    urls, ending = [dest], f"/{INDEX_FILE}"
    if not objects.exists(objects.join(dest, INDEX_FILE)):
        urls = [url.removesuffix(ending) for url in objects.list_under(dest) if url.endswith(ending)]
    if not urls:
        raise PipelineError(
            f"neither {dest} nor a folder below it contains {INDEX_FILE}: correct the path, or convert a dataset to it"
        )
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(urls, pool.map(Index.load, urls), strict=True))


# verify

_VERIFY = """\
read datasets back, and check everything that their indexes say

Every tar and sidecar is read completely. Their sizes and sha256 are checked, and each sample's position, CRC-32, texts,
hashes and image sizes are compared with its record. Every image is decoded, and every video is opened. The rows of an
evaluation set must be those converted, and refer to existing items. What lies beside the index must have its sha256,
too, and belong to these shards: vectors of pipeline.embed, mined negatives and clusters of pipeline.mine. Prints one
line, or ends with status 2 and a list of faults.

    python tools/make_shards.py verify s3://bucket/my-data
"""


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _add_dest(parser)
    add_processes(parser)


def _verify(arguments: argparse.Namespace) -> None:
    datasets = _indexes(arguments.dest)
    checks: list[Run] = [
        partial(_group_faults, url, index.shards_url or url, index.captions) for url, index in datasets.items()
    ]
    jobs = [(number, group) for number, index in enumerate(datasets.values()) for group in _grouped(index.shards)]
    size = sum(shard.size for _, group in jobs for shard in group)
    faults: list[str] = []
    with (
        progress_bar(total=size, unit="B", unit_scale=True, desc="verifying") as bar,
        workers(arguments.processes, checks) as (threads, run),
    ):
        outcomes = [threads.submit(run, *job) for job in jobs]
        for (_, group), outcome in zip(jobs, outcomes, strict=True):
            faults += outcome.result()
            bar.update(sum(shard.size for shard in group))
    for url, index in datasets.items():
        faults += _file_faults(url, index, arguments.dest) + store_faults(url, index)
    if faults:
        more = f"\n(and {len(faults) - _SHOWN} more)" if len(faults) > _SHOWN else ""
        raise PipelineError(f"{arguments.dest} is not intact:\n" + "\n".join(faults[:_SHOWN]) + more)
    samples = sum(index.samples for index in datasets.values())
    shards = sum(len(index.shards) for index in datasets.values())
    print(f"{arguments.dest}: {samples} samples in {shards} shards are intact", flush=True)


def _grouped(shards: tuple[Shard, ...]) -> Iterator[tuple[Shard, ...]]:
    """Group consecutive shards into jobs: one job per shard would be slow for a million small shards."""
    size = -(-len(shards) // _MOST_JOBS)
    for start in range(0, len(shards), size):
        yield shards[start : start + size]


def _file_faults(url: str, index: Index, dest: str) -> list[str]:
    """Return the faults of the files beside the shards; for an evaluation set below `dest`, also of tasks.json."""
    try:
        for name in index.files:
            index.read_file(url, name)
        if ROWS_FILE in index.files:
            converted_rows(url, index)
            folder, _, name = url.rpartition("/")
            if url != dest and name not in read_tasks(folder := folder or "."):
                return [f"{objects.join(folder, TASKS_FILE)} does not name {name}"]
    except PipelineError as error:
        return [str(error)]
    return []


def _group_faults(url: str, tars_url: str, captions: Captions | None, shards: tuple[Shard, ...]) -> list[str]:
    """Return the faults of shards, one line each. url: folder of the sidecars. tars_url: folder of the tars."""
    return [fault for shard in shards for fault in _shard_faults(url, tars_url, captions, shard)]


def _shard_faults(url: str, tars_url: str, captions: Captions | None, shard: Shard) -> list[str]:
    name = objects.join(tars_url, shard.file)
    try:
        tape = Tape(name)
        if tape.size != shard.size:
            return [f"{name}: {tape.size} bytes, but the index says {shard.size}"]
        return [f"{name}{fault}" for fault in _sample_faults(shard, load_sidecar(url, shard), tape, captions)]
    except PipelineError as error:
        return [str(error)]


def _sample_faults(shard: Shard, records: np.ndarray, tape: Tape, captions: Captions | None) -> Iterator[str]:
    rebuilt = ShardRecords()
    begins, lengths = records["offset"].tolist(), records["length"].tolist()
    for number, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
        tape.keep_from = begin
        data = tape.between(begin, begin + length)
        tape.seek(begin + length)
        try:
            sample = parse_sample(data, captions)
            for item in sample.items:
                for image in item.images:
                    decode_image(image)
                if item.video is not None:
                    sample_frames(item.video, 1)
            rebuilt.add(sample, begin, data)
        except BadSample as reason:
            yield f"#{number}: {reason}"
    tape.keep_from = tape.size
    while tape.read(1 << 24):
        pass
    if tape.sha256.hexdigest() != shard.sha256:
        yield ": its sha256 is not the index's"
    if len(rebuilt) < len(records):
        return
    entry, sidecar = rebuilt.finish(shard.file, tape.size, tape.sha256.hexdigest())
    found = array_of(sidecar)
    for name in (found.dtype.names or ())[:-1]:  # all except the checksum
        if found[name].shape == records[name].shape:
            differ = _either_way_up(name, found[name]) != _either_way_up(name, records[name])
            places = np.flatnonzero(differ.any(axis=tuple(range(1, differ.ndim))))
            yield from (f"#{place}: its record's {name} is wrong" for place in places)
    for name in (field.name for field in fields(Shard)):
        values, indexed = (np.array(_either_way_up(name, getattr(each, name))) for each in (entry, shard))
        if not name.endswith("sha256") and not np.array_equal(values, indexed):  # hashes were checked above
            yield f": the index's {name} is wrong"


def _either_way_up(name: str, values: ArrayLike) -> np.ndarray:
    """Return the values. Sides of image sizes are sorted: earlier versions recorded them before the EXIF rotation."""
    return np.sort(values, axis=-1) if name == "image_sizes" else np.asarray(values)


# show

_SHOW = """\
print one sample: its position, texts, images and videos

    python tools/make_shards.py show s3://bucket/my-data 17
    python tools/make_shards.py show data/cc3m --key 000000017
"""


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dest", metavar="DEST", help="a dataset: a folder or s3://bucket/prefix")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "number", metavar="N", type=int, nargs="?", help="the sample's number in the dataset, starting at 0"
    )
    which.add_argument("--key", metavar="KEY", help="the sample's key instead; reads the tars up to the sample")


def _show(arguments: argparse.Namespace) -> None:
    url, datasets = arguments.dest, _indexes(arguments.dest)
    if url not in datasets:
        raise PipelineError(f"{url} is not a dataset; show one of those below it: {', '.join(datasets)}")
    index = datasets[url]
    tars = index.shards_url or url
    shard, number = _place(url, index, arguments.number, arguments.key)
    record = read_records(url, shard, number, number + 1)
    (data,) = read_samples(tars, shard, record)
    offset = int(record["offset"][0])
    try:
        sample = parse_sample(data, index.captions)
        rows = [
            ("shard", f"{printable(objects.join(tars, shard.file))}, sample {number}"),
            ("bytes", f"{offset:,} to {offset + len(data) - 1:,}: {len(data):,}"),
            # repr: control characters of the dataset must not reach the terminal.
            ("key", repr(sample.key)),
            ("dataset", repr(index.dataset)),
            ("task", repr(sample.task)),
            ("tokens", f"about {_LENGTHS.of_records(record)[0]:,} for LLaVA-OneVision"),
            *sample_rows(url, index, shard, number),
            *_item_rows(sample),
        ]
    except BadSample as reason:
        raise PipelineError(f"{shard.file}#{number} of {url} is not a valid sample: {reason}") from None
    table = Table.grid(padding=(0, 2))
    for label, value in rows:
        table.add_row(label, Text(value))
    _console().print(table)


def _place(url: str, index: Index, number: int, key: str | None) -> tuple[Shard, int]:
    """Return (shard, number in the shard) of the dataset's sample `number`, or of the one with the key, if given."""
    first = 0
    for shard in index.shards:
        if key is not None:
            samples = read_tape(Tape(objects.join(index.shards_url or url, shard.file)))
            if (begin := next((sample.begin for sample in samples if sample.key == key), None)) is not None:
                if not len(found := np.flatnonzero(load_sidecar(url, shard)["offset"] == begin)):
                    raise PipelineError(f"{key!r} in {shard.file} of {url} was rejected: see rejected.jsonl")
                return shard, int(found[0])
        elif first <= number < first + shard.samples:
            return shard, number - first
        first += shard.samples
    if key is not None:
        raise PipelineError(f"{url} has no sample with key {key!r}")
    raise PipelineError(f"{url} has no sample {number}: the samples are 0 to {index.samples - 1}")


def _item_rows(sample: Pair | Single) -> Iterator[tuple[str, str]]:
    """Yield (label, value) of each item's properties. Of a video that cannot be decoded, the size is the reason."""
    roles, judged = ["item"], dict[str, dict[int, float]]()
    if isinstance(sample, Pair):
        roles = ["query", "target", *("positive" for _ in sample.positives), *("negative" for _ in sample.negatives)]
        weights = sample.weights if set(sample.weights) != {1.0} else ()
        judged = {"  weight": dict(enumerate(weights, 1)), "  score": dict(enumerate(sample.scores or (), 1))}
    for number, (role, item) in enumerate(zip(roles, sample.items, strict=True)):
        yield "", ""
        yield role, repr(item.text)
        for image in item.images:
            suffix, width, height = image_format(image)
            yield "  image", f"{suffix}, {width} x {height}, {len(image):,} bytes"
        if item.video is not None:
            try:
                size = "{} x {}".format(*sample_frames(item.video, 1)[0].size)
            except BadSample as reason:
                size = printable(str(reason))
            yield "  video", f"{video_format(item.video)}, {size}, {len(item.video):,} bytes"
        yield "  hash", f"{item.content_hash:016x}"
        if role == "target" and isinstance(sample, Pair):
            yield from (("  or", repr(text)) for text in sample.alternatives)
        yield from ((label, f"{values[number]:g}") for label, values in judged.items() if number in values)


def _console() -> Console:
    # A log file has no width.
    return Console(highlight=False) if sys.stdout.isatty() else Console(width=120, highlight=False)


# stats

_STATS = """\
statistics of datasets: tasks, sizes, lengths, duplicates

Only indexes and sidecars are read, not the tars. p90 is the 90th percentile. Token lengths are estimates for
LLaVA-OneVision with 8 frames per video. The last lines name what lies beside the indexes, such as a teacher's vectors.

    python tools/make_shards.py stats s3://bucket/my-data
"""


def _stats(arguments: argparse.Namespace) -> None:
    datasets = _indexes(arguments.dest)
    console = _console()
    console.print(_totals(datasets))
    shards = [(url, shard) for url, index in datasets.items() for shard in index.shards]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda each: _facts(load_sidecar(*each)), shards)
        parts = list(progress_bar(iterable=found, total=len(shards), unit=" shards", desc="reading sidecars"))
    facts = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    queries, targets = facts.pop("query hash"), facts.pop("target hash")
    table = _right_aligned("", "mean", *(f"p{percent}" for percent in _PERCENTILES), "most")
    for name, values in facts.items():
        if values.any():
            spread = (*np.percentile(values, _PERCENTILES), values.max())
            table.add_row(name, f"{values.mean():,.1f}", *(f"{number:,.0f}" for number in spread))
    console.print(table)
    single = targets == 0
    pairs = np.stack([queries, targets], axis=1)[~single]
    contents = {"items": queries[single], "queries": pairs[:, 0], "targets": pairs[:, 1], "pairs": pairs}
    for name, hashes in contents.items():
        if len(hashes):
            distinct = len(np.unique(hashes, axis=0))
            console.print(
                f"{name}: {distinct:,} distinct, {len(hashes) - distinct:,} of {len(hashes):,} are duplicates"
            )
    for url, index in datasets.items():
        for line in store_lines(url, index):
            console.print(Text(printable(line)))


def _totals(datasets: dict[str, Index]) -> Table:
    table = _right_aligned("dataset", "samples", "shards", "MB", "images", "videos", "samples of each task")
    table.columns[-1].justify = "left"
    totals = np.zeros(5)
    for index in datasets.values():
        images, videos = (sum(getattr(shard, name) for shard in index.shards) for name in ("images", "videos"))
        row = np.array([index.samples, len(index.shards), index.total_bytes / 1e6, images, videos])
        totals += row
        tasks: Counter[str] = Counter()
        for shard in index.shards:
            tasks.update(shard.tasks)
        listed = ", ".join(f"{task!r} {samples:,}" for task, samples in tasks.most_common())
        table.add_row(Text(repr(index.dataset)), *(f"{value:,.10g}" for value in row.round(1)), Text(listed))
    table.add_section()
    table.add_row("all", *(f"{value:,.10g}" for value in totals.round(1)))
    return table


def _right_aligned(first: str, *others: str) -> Table:
    table = Table(first, box=SIMPLE_HEAD)
    for column in others:
        table.add_column(column, justify="right")
    return table


def _facts(records: np.ndarray) -> dict[str, np.ndarray]:
    """Return arrays of properties: one number per sample, or per image."""
    counts = records["query_images"].astype(np.int64) + records["target_images"] + records["negative_images"]
    sizes = records["image_sizes"].astype(np.int64)
    sizes = sizes[np.arange(sizes.shape[1]) < counts[:, None]]
    return {
        "query hash": records["query_hash"],
        "target hash": records["target_hash"],
        "tokens of a sample (estimate)": _LENGTHS.of_records(records),
        "bytes of the query's text": records["query_text"],
        "bytes of the target's text": records["target_text"],
        "bytes of other positives' and negatives' texts": records["negative_text"],
        "images of a sample": counts,
        "pixels of an image": sizes.prod(axis=1),
        "longer side of an image": sizes.max(axis=1, initial=0),
        "shorter side of an image": sizes.min(axis=1, initial=1 << 16),
    }


VERIFY = Command(_VERIFY, _add_verify, _verify)
SHOW = Command(_SHOW, _add_show, _show)
STATS = Command(_STATS, _add_dest, _stats)
