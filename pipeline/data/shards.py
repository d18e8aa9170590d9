"""Samples as WebDataset tars: write shards with their sidecars, and parse the bytes of a sample.

The members of a sample share the key before the first dot. KEY.json describes the sample; KEY.query.0.jpg,
KEY.target.0.png, KEY.positive.0.0.jpg and KEY.negative.0.0.jpg are images in order; KEY.query.mp4 is a video;
KEY.item.0.jpg is an image of a single item. Tars in img2dataset's layout (KEY.jpg, KEY.txt, KEY.json) are read as pairs
without conversion.
"""

import codecs
import hashlib
import inspect
import json
import math
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from webdataset.tariterators import base_plus_ext, tar_file_iterator

from pipeline.data.captions import usable_captions
from pipeline.data.index import INDEX_FILE, Captions, Index, Shard, shard_entry, sidecar_dtype
from pipeline.data.sample import LARGEST_NUMBER, PICTURE_ENDINGS, BadSample, Item, Pair, Single
from pipeline.data.tiles import image_format
from pipeline.data.video import video_format
from pipeline.errors import PipelineError
from pipeline.storage import objects
from pipeline.storage.atomic import replacing

END = bytes(2 * tarfile.BLOCKSIZE)  # two empty blocks end a tar
_KEPT_SIZES = 16  # image sizes of a shard that the index lists


def sample_bytes(sample: Pair | Single) -> bytes:
    """Return the tar members of a sample, with headers and without the end of the archive."""
    if not sample.key or "." in sample.key or "/" in sample.key:
        raise PipelineError(f"{sample.dataset}: sample key {sample.key!r} must be a name without dots and slashes")
    description: dict[str, Any] = {"dataset": sample.dataset, "task": sample.task}
    if isinstance(sample, Single):
        description["item"] = _description(sample.item)
    else:
        description["query"] = _description(sample.query)
        right = [_description(item) for item in (sample.target, *sample.positives)]
        wrong = [_description(item) for item in sample.negatives]
        if sample.alternatives:
            right[0]["alternatives"] = sample.alternatives
        for entry, weight in zip(right, sample.weights, strict=True):
            if weight != 1:
                entry["weight"] = weight
        if sample.scores is not None:
            for entry, score in zip((*right, *wrong), sample.scores, strict=True):
                entry["score"] = score
        description["target"] = right[0]
        if sample.positives:
            description["positives"] = right[1:]
        description["negatives"] = wrong
    members = {"json": json.dumps(description, ensure_ascii=False).encode()}
    for role, item in _roles(sample):
        for number, image in enumerate(item.images):
            members[f"{role}.{number}.{image_format(image)[0]}"] = image
        if item.video is not None:
            members[f"{role}.{video_format(item.video)}"] = item.video
    return tar_bytes(sample.key, members)


def tar_bytes(key: str, members: dict[str, bytes]) -> bytes:
    """Write tar members KEY.NAME, without the end of the archive. Fixed owner and time keep the bytes reproducible."""
    buffer = BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0, user="pipeline", group="pipeline") as writer:
        writer.write({"__key__": key, **members})
        length = writer.tarstream.offset
    return buffer.getvalue()[:length]


def _description(item: Item) -> dict[str, Any]:
    return {"text": item.text, "images": len(item.images), "video": int(item.video is not None)}


def _roles(sample: Pair | Single) -> Iterator[tuple[str, Item]]:
    if isinstance(sample, Single):
        yield "item", sample.item
    else:
        yield "query", sample.query
        yield "target", sample.target
        for number, item in enumerate(sample.positives):
            yield f"positive.{number}", item
        for number, item in enumerate(sample.negatives):
            yield f"negative.{number}", item


def parse_sample(data: bytes, captions: Captions | None = None) -> Pair | Single:
    """Parse the sample in these bytes of a shard; the end of the archive may be missing.

    captions: for tars in img2dataset's layout, which contain only pairs.
    Raises BadSample, with the reason, if the undamaged bytes contain no valid sample.
    """
    key, members = members_of(data)
    if captions is not None:
        return captioned(key, members, captions)[0]
    # Images and videos are looked up without their suffix: "query.0.jpg" as "query.0".
    stems = {name.rpartition(".")[0]: content for name, content in members.items()}

    def item(role: str, entry: dict[str, Any]) -> Item:
        text = _text(entry["text"])
        images = tuple(stems[f"{role}.{number}"] for number in range(entry["images"]))
        return Item(text, images, stems[role] if entry.get("video") else None)

    try:
        description = json.loads(members["json"])
        name = str(description["dataset"]), str(description["task"])
        if "item" in description:
            return Single(key, *name, item("item", description["item"]))
        query = item("query", description["query"])
        right = [description["target"], *description.get("positives", ())]
        wrong = description["negatives"]
        return Pair(
            key,
            *name,
            query,
            item("target", right[0]),
            tuple(item(f"negative.{number}", entry) for number, entry in enumerate(wrong)),
            tuple(map(_text, right[0].get("alternatives", ()))),
            positives=tuple(item(f"positive.{number}", entry) for number, entry in enumerate(right[1:])),
            weights=tuple(_number("weight", entry.get("weight", 1.0)) for entry in right),
            scores=_scores([*right, *wrong]),
        )
    except KeyError as error:
        raise BadSample(f"{error.args[0]!r} is missing") from error
    except UnicodeError as error:
        raise BadSample(f"a text is not UTF-8 ({error})") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadSample(f"its json is malformed ({error})") from error


def sample_key(data: bytes) -> str:
    """Return the key in a sample's first tar header, for messages; "" if it cannot be read."""
    with suppress(tarfile.TarError):
        return tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "utf-8", "replace").name.partition(".")[0]
    return ""


def members_of(data: bytes) -> tuple[str, dict[str, bytes]]:
    """Split a sample's bytes into its key and its members: name without the key -> content."""
    try:
        files = _plain_files(data) or _files(data)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise BadSample(f"not a tar ({error})") from error
    named = [(split, content) for path, content in files if (split := split_name(path))]
    keys = {key for (key, _), _ in named}
    if len(keys) != 1:
        raise BadSample(f"members of {len(keys)} samples instead of one: {sorted(keys)[:3]}")
    return keys.pop(), {name: content for (_, name), content in named}


def _plain_files(data: bytes) -> list[tuple[str, bytes]] | None:
    """Return the same as `_files`, five times as fast; None unless all members are plain files with short names."""
    files, place = [], 0
    while place < len(data):
        header = data[place : place + tarfile.BLOCKSIZE]
        name, size, type_, prefix = header[:100], header[124:136].strip(b" \0"), header[156:157], header[345:500]
        checksum = sum(header[:148]) + sum(header[156:]) + sum(b" " * 8)  # the checksum field itself counts as spaces
        if type_ not in _PLAIN or not size.isdigit() or prefix.strip(b"\0"):
            return None
        if header[148:156].strip(b" \0") != b"%06o" % checksum:
            return None
        begin, length = place + tarfile.BLOCKSIZE, int(size, 8)
        content = data[begin : begin + length]
        if type_ != tarfile.XHDTYPE:
            files.append((name.partition(b"\0")[0].decode("utf-8", "surrogateescape"), content))
        elif not _TIME.fullmatch(content):
            return None
        place = begin + -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return files if place == len(data) else None


_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.XHDTYPE)
# webdataset's writer, which img2dataset uses, writes a header with the time before each member.
_TIME = re.compile(rb"[0-9]+ mtime=[0-9.]+\n")


def _files(data: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=BytesIO(data), mode="r:", encoding="utf-8") as tar:
        files = [member for member in tar if member.isreg()]
        if any(member.issparse() for member in files):  # a few bytes could expand to terabytes
            raise BadSample("the tar contains a sparse file")
        return [(member.name, content.read()) for member in files if (content := tar.extractfile(member))]


def split_name(path: str) -> tuple[str, str] | None:
    """Split a member's path into (key, name) by webdataset's rule: the key nearly always ends at the file's first dot.

    Returns None for names that webdataset skips: names without a dot, names that begin with one (macOS's `._NAME`,
    .DS_Store), and `__NOTES__`; also for files in folders whose names begin with a dot, since webdataset would name
    their samples after the folder.
    """
    key, name = (None, None) if _NOTES.match(path) else base_plus_ext(path)
    return None if key is None or name is None or key.endswith("/") else (key, name)


_NOTES = re.compile(inspect.signature(tar_file_iterator).parameters["skip_meta"].default)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    value.encode()  # JSON can contain half of a surrogate pair, which is an error
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} {value!r} is not a finite number")
    if abs(value) > LARGEST_NUMBER:
        raise ValueError(f"{name} {value!r} is larger than {LARGEST_NUMBER:g}")
    if name == "weight" and value < 1 / LARGEST_NUMBER:
        raise ValueError(f"weight {value!r} is less than {1 / LARGEST_NUMBER:g}")
    return float(value)


def _scores(entries: list[dict[str, Any]]) -> tuple[float, ...] | None:
    scores = [entry.get("score") for entry in entries]
    if scores.count(None) == len(scores):
        return None
    if None in scores:
        raise ValueError("only some of its target, positives and negatives have a score")
    return tuple(_number("score", score) for score in scores)


def captioned(key: str, members: dict[str, bytes], captions: Captions) -> tuple[Pair, list[tuple[str, str]]]:
    """Parse a sample in img2dataset's layout: KEY.jpg (or another image), and captions in KEY.txt and KEY.json.

    Returns the pair, and (cause, detail) of each unusable caption. Raises BadSample if no caption is usable, or if
    there is not exactly one image.
    """
    members = {name.lower(): content for name, content in members.items()}  # as webdataset does
    images = [name for name in members if name in PICTURE_ENDINGS]
    if not images:
        raise BadSample(f"no image (it has {', '.join(members)})")
    if len(images) > 1:
        raise BadSample(f"several images (keep only one of {', '.join(images)})")
    values: list[object] = []
    faults: list[tuple[str, str]] = []
    described: dict[str, object] | None = None
    for column in captions.columns:
        try:
            if column != "txt" and described is None:
                described = _described(members)
            value = _decoded(members.get("txt", b"")) if described is None or column == "txt" else described.get(column)
            values += value if isinstance(value, list) else [value]
        except BadSample as reason:
            faults.append((str(reason), f"{key}, {column}"))
    texts, more = usable_captions(values)
    faults += more
    if not texts:
        cause, detail = faults[0] if faults else ("no caption", "")
        where = f" in {', '.join(captions.columns)}" if cause == "no caption" else ""
        raise BadSample(f"{cause}{where}" + (f" ({detail[:200]})" if detail else ""))
    query, target = Item(captions.query, (members[images[0]],)), Item(texts[0])
    return Pair(key, "", captions.task, query, target, alternatives=tuple(texts[1:])), faults


def _described(members: dict[str, bytes]) -> dict[str, object]:
    try:
        found = json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BadSample("its json is malformed")
    return found


def _decoded(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadSample("a text is in UTF-16: convert it to UTF-8")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise BadSample("a text is not UTF-8") from None


READ_NAMES = {*PICTURE_ENDINGS, "txt", "json"}  # all members that are read


class ShardRecords:
    """Collects the records of a shard's samples, for its sidecar and its entry in the index."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, ...]] = []
        self._sizes: list[list[tuple[int, int]]] = []
        self._text_bytes = 0
        self._videos = 0
        self._tasks: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, sample: Pair | Single, offset: int, data: bytes) -> None:
        """Add the next sample, whose bytes in the tar are `data`, at `offset`."""
        query, target, *others = (*sample.items, Item("")) if isinstance(sample, Single) else sample.items
        texts = [len(query.text.encode()), len(target.text.encode())]
        if isinstance(sample, Pair):
            texts[1] = max(len(text.encode()) for text in sample.texts)
        texts.append(sum(len(item.text.encode()) for item in others))
        counts = {
            "images of the query": len(query.images),
            "images of the target": len(target.images),
            "images of further positives and negatives": sum(len(item.images) for item in others),
            "further positives and negatives": len(others),
            "videos": sum(item.video is not None for item in sample.items),
        }
        for name, count in counts.items():
            if count > 255:
                raise PipelineError(
                    f"{sample.dataset}, sample {sample.key}: {count} {name}, but at most 255 are possible"
                )
        hashes = query.content_hash, 0 if isinstance(sample, Single) else target.content_hash
        self._rows.append((offset, len(data), zlib.crc32(data), *hashes, *texts, *counts.values()))
        self._sizes.append([image_format(image)[1:] for item in sample.items for image in item.images])
        self._text_bytes += sum(texts)
        self._videos += counts["videos"]
        self._tasks[sample.task] += 1

    def finish(self, file: str, size: int, sha256: str) -> tuple[Shard, bytes]:
        """Return the shard's entry in the index and the bytes of its sidecar. size, sha256: of the tar."""
        max_images = max(map(len, self._sizes), default=0)
        records = np.zeros(len(self._rows), sidecar_dtype(max_images))
        for number, (row, sizes) in enumerate(zip(self._rows, self._sizes, strict=True)):
            records[number] = (*row, 0, 0)
            if sizes:
                records["image_sizes"][number, : len(sizes)] = sizes
        all_sizes = sorted(chain.from_iterable(self._sizes), key=lambda size: (size[0] * size[1], size))
        kept = min(len(all_sizes), _KEPT_SIZES)
        return shard_entry(
            file,
            size,
            sha256,
            records,
            text_bytes=self._text_bytes,
            images=len(all_sizes),
            videos=self._videos,
            image_sizes=tuple(all_sizes[(2 * i + 1) * len(all_sizes) // (2 * kept)] for i in range(kept)),
            max_images=max_images,
            tasks=dict(self._tasks),
        )


def write_shard(samples: Iterable[Pair | Single], path: Path, shard_bytes: int | None = None) -> Shard:
    """Write one tar and its sidecar. Each file appears under its name when it is complete.

    shard_bytes: write samples until the tar has at least this many bytes. None: write all samples.
    """
    records, offset, digest, last_key = ShardRecords(), 0, hashlib.sha256(), None
    with replacing(path, durable=False) as partial, partial.open("wb") as file:
        for sample in samples:
            if sample.key == last_key:
                raise PipelineError(f"{sample.dataset}: two samples in a row have the key {sample.key!r}")
            last_key, data = sample.key, sample_bytes(sample)
            file.write(data)
            digest.update(data)
            records.add(sample, offset, data)
            offset += len(data)
            if shard_bytes is not None and offset >= shard_bytes:
                break
        file.write(END)
        digest.update(END)
    shard, sidecar = records.finish(path.name, offset + len(END), digest.hexdigest())
    objects.write(str(path.with_name(shard.sidecar)), sidecar)
    return shard


def write_shards(
    samples: Iterable[Pair | Single], folder: str | Path, *, dataset: str, shard_bytes: int = 256 << 20
) -> Index:
    """Write samples in order as tars of about `shard_bytes`, with sidecars and an index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The index of earlier shards would not match the new files.
    (folder / INDEX_FILE).unlink(missing_ok=True)
    shards: list[Shard] = []
    samples = iter(samples)
    for first in samples:
        shards.append(write_shard(chain([first], samples), folder / f"{len(shards):06d}.tar", shard_bytes))
    if not shards:
        raise PipelineError(f"{dataset}: there are no samples to write")
    index = Index(dataset, tuple(shards))
    objects.write(str(folder / INDEX_FILE), index.to_json().encode())
    return index
