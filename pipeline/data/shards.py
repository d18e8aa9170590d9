"""Samples as WebDataset tars: writing shards with their index, and reading a sample's bytes back.

Members of one sample share the key before the first dot: KEY.json says what the sample is, KEY.query.0.jpg,
KEY.target.0.png, KEY.negative.0.0.jpg are images in order, KEY.query.mp4 a video.
"""

import hashlib
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from pipeline.data import objects
from pipeline.data.index import INDEX_FILE, Index, Shard, sidecar_dtype
from pipeline.data.sample import IMAGE_SUFFIXES, BadSample, Item, Pair
from pipeline.errors import PipelineError

_END = bytes(2 * tarfile.BLOCKSIZE)  # two empty blocks end a tar


def image_format(data: bytes) -> tuple[str, int, int]:
    """(suffix by content, width, height in pixels); ("bin", 0, 0) for what is no PNG, JPEG, WebP or GIF."""
    with suppress(Exception):  # Pillow raises nearly anything on bytes made to confuse it
        image = Image.open(BytesIO(data), formats=tuple(IMAGE_SUFFIXES))
        fits = max(image.size) <= np.iinfo(np.uint16).max  # the sidecar's field
        return IMAGE_SUFFIXES[image.format], *(image.size if fits else (0, 0))
    return "bin", 0, 0


def sample_bytes(pair: Pair) -> bytes:
    """The tar members of one sample, headers included, without the end of an archive."""
    if not pair.key or "." in pair.key or "/" in pair.key:
        raise PipelineError(f"{pair.dataset}: sample key {pair.key!r} must be a name without dots and slashes")
    description = {
        "dataset": pair.dataset,
        "task": pair.task,
        "query": _description(pair.query),
        "target": _description(pair.target),
        "negatives": [_description(item) for item in pair.negatives],
    }
    members = {"__key__": pair.key, "json": json.dumps(description, ensure_ascii=False).encode()}
    for role, item in _roles(pair):
        for number, image in enumerate(item.images):
            members[f"{role}.{number}.{image_format(image)[0]}"] = image
        if item.video is not None:
            members[f"{role}.mp4"] = item.video
    buffer = BytesIO()
    # Fixed owner and time: the same samples give the same bytes.
    with webdataset.TarWriter(buffer, encoder=False, mtime=0, user="pipeline", group="pipeline") as writer:
        writer.write(members)
        length = writer.tarstream.offset
    return buffer.getvalue()[:length]


def _description(item: Item) -> dict:
    return {"text": item.text, "images": len(item.images), "video": int(item.video is not None)}


def _roles(pair: Pair) -> Iterator[tuple[str, Item]]:
    yield "query", pair.query
    yield "target", pair.target
    for number, item in enumerate(pair.negatives):
        yield f"negative.{number}", item


def parse_sample(data: bytes) -> Pair:
    """The sample in these bytes of a shard (no end of an archive needed).

    Raises BadSample with the reason when the bytes, intact as they are, hold no sample.
    """
    try:
        with tarfile.open(fileobj=BytesIO(data), mode="r:") as tar:
            named = [(member.name, tar.extractfile(member).read()) for member in tar if member.isreg()]
    except (tarfile.TarError, OSError) as error:
        raise BadSample(f"no tar ({error})") from error
    keys = {name.partition(".")[0] for name, _ in named}
    if len(keys) != 1:
        raise BadSample(f"members of {len(keys)} samples, where one was expected: {sorted(keys)[:3]}")
    key = keys.pop()
    members = {name.partition(".")[2]: content for name, content in named}
    # Images are found without their suffix: "query.0.jpg" as "query.0".
    stems = {name.rpartition(".")[0]: content for name, content in members.items()}

    def item(role: str, entry: dict) -> Item:
        if not isinstance(entry["text"], str):
            raise TypeError(f"{role} has no text")
        images = tuple(stems[f"{role}.{number}"] for number in range(entry["images"]))
        return Item(entry["text"], images, members[f"{role}.mp4"] if entry.get("video") else None)

    try:
        description = json.loads(members["json"])
        return Pair(
            key,
            str(description["dataset"]),
            str(description["task"]),
            item("query", description["query"]),
            item("target", description["target"]),
            tuple(item(f"negative.{number}", entry) for number, entry in enumerate(description["negatives"])),
        )
    except KeyError as error:
        raise BadSample(f"{key}: {error.args[0]!r} is missing") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise BadSample(f"{key}: its json is malformed ({error})") from error


def write_shards(
    pairs: Iterable[Pair],
    folder: Path,
    *,
    dataset: str,
    shard_bytes: int = 256 << 20,
    finished: Callable[[Path], None] = lambda path: None,
) -> Index:
    """Write samples as tars of about `shard_bytes` (at least one sample each), sidecars and an index.

    finished: called with each file once it is whole, in an order in which no file names one that is yet
    to come (the index is last); it may move the file away, so that a dataset need not fit on the disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # An index of earlier shards would name files that are about to change.
    (folder / INDEX_FILE).unlink(missing_ok=True)
    shards: list[Shard] = []
    pairs = iter(pairs)
    for first in pairs:
        path = folder / f"{len(shards):06d}.tar"
        shard, sidecar = _write_shard(chain([first], pairs), path, shard_bytes)
        shards.append(shard)
        finished(path)
        finished(sidecar)
    index = Index(dataset, tuple(shards))
    if not shards:
        raise PipelineError(f"{dataset}: there are no samples to write")
    objects.write(str(folder / INDEX_FILE), index.to_json().encode())
    finished(folder / INDEX_FILE)
    return index


def _write_shard(pairs: Iterable[Pair], path: Path, shard_bytes: int) -> tuple[Shard, Path]:
    """Take samples from the iterator until the tar is full."""
    records, sizes, offset, digest, last_key = [], [], 0, hashlib.sha256(), None
    partial = path.with_suffix(".tar.partial")
    with partial.open("wb") as file:
        for pair in pairs:
            if pair.key == last_key:
                raise PipelineError(f"{pair.dataset}: two samples in a row have the key {pair.key!r}")
            last_key, data = pair.key, sample_bytes(pair)
            file.write(data)
            digest.update(data)
            records.append(_record(pair, offset, data))
            sizes.append([image_format(image)[1:] for item in pair.items for image in item.images])
            offset += len(data)
            if offset >= shard_bytes:
                break
        file.write(_END)
        digest.update(_END)
    sidecar = np.zeros(len(records), sidecar_dtype(max(map(len, sizes))))
    for number, record in enumerate(records):
        sidecar[number] = (*record, 0)
        if sizes[number]:
            sidecar["image_sizes"][number, : len(sizes[number])] = sizes[number]
    buffer = BytesIO()
    np.save(buffer, sidecar, allow_pickle=False)
    shard = Shard(
        path.name,
        len(records),
        offset + len(_END),
        digest.hexdigest(),
        hashlib.sha256(buffer.getvalue()).hexdigest(),
    )
    partial.replace(path)
    objects.write(str(path.with_name(shard.sidecar)), buffer.getvalue())
    return shard, path.with_name(shard.sidecar)


def _record(pair: Pair, offset: int, data: bytes) -> tuple[int, ...]:
    """The fields of `sidecar_dtype` before image_sizes, in their order."""
    counts = {
        "query's images": len(pair.query.images),
        "target's images": len(pair.target.images),
        "negatives": len(pair.negatives),
    }
    for name, count in counts.items():
        if count > 255:
            raise PipelineError(f"{pair.dataset}, sample {pair.key}: {count} {name}, an index holds 255 at most")
    return (
        offset,
        len(data),
        zlib.crc32(data),
        pair.query.content_hash,
        pair.target.content_hash,
        len(pair.query.text),
        len(pair.target.text),
        sum(len(item.text) for item in pair.negatives),
        *counts.values(),
    )
