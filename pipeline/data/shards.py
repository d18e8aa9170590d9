"""Samples as WebDataset tars: writing shards with their sidecars, and reading a sample's bytes back.

Members of one sample share the key before the first dot: KEY.json says what the sample is, KEY.query.0.jpg,
KEY.target.0.png, KEY.negative.0.0.jpg are images in order, KEY.query.mp4 a video; KEY.item.0.jpg is an image
of an item by itself. Tars in img2dataset's layout (KEY.jpg, KEY.txt, KEY.json) are read as pairs as they are.
"""

import codecs
import hashlib
import inspect
import json
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
import webdataset
from webdataset.tariterators import base_plus_ext, tar_file_iterator

from pipeline.data.captions import usable_captions
from pipeline.data.index import INDEX_FILE, Captions, Index, Shard, sidecar_dtype, sidecar_of
from pipeline.data.sample import IMAGE_SUFFIXES, BadSample, Item, Pair, Single
from pipeline.data.tiles import image_format
from pipeline.data.video import video_format
from pipeline.errors import PipelineError
from pipeline.storage import objects

END = bytes(2 * tarfile.BLOCKSIZE)  # two empty blocks end a tar
_KEPT_SIZES = 16  # of a shard's images, in the index


def sample_bytes(sample: Pair | Single) -> bytes:
    """The tar members of one sample, headers included, without the end of an archive."""
    if not sample.key or "." in sample.key or "/" in sample.key:
        raise PipelineError(f"{sample.dataset}: sample key {sample.key!r} must be a name without dots and slashes")
    description = {"dataset": sample.dataset, "task": sample.task}
    if isinstance(sample, Single):
        description["item"] = _description(sample.item)
    else:
        description["query"] = _description(sample.query)
        description["target"] = _description(sample.target)
        if sample.alternatives:
            description["target"]["alternatives"] = sample.alternatives
        description["negatives"] = [_description(item) for item in sample.negatives]
    members = {"__key__": sample.key, "json": json.dumps(description, ensure_ascii=False).encode()}
    for role, item in _roles(sample):
        for number, image in enumerate(item.images):
            members[f"{role}.{number}.{image_format(image)[0]}"] = image
        if item.video is not None:
            members[f"{role}.{video_format(item.video)}"] = item.video
    buffer = BytesIO()
    # Fixed owner and time: the same samples give the same bytes.
    with webdataset.TarWriter(buffer, encoder=False, mtime=0, user="pipeline", group="pipeline") as writer:
        writer.write(members)
        length = writer.tarstream.offset
    return buffer.getvalue()[:length]


def _description(item: Item) -> dict:
    return {"text": item.text, "images": len(item.images), "video": int(item.video is not None)}


def _roles(sample: Pair | Single) -> Iterator[tuple[str, Item]]:
    if isinstance(sample, Single):
        yield "item", sample.item
    else:
        yield "query", sample.query
        yield "target", sample.target
        for number, item in enumerate(sample.negatives):
            yield f"negative.{number}", item


def parse_sample(data: bytes, captions: Captions | None = None) -> Pair | Single:
    """The sample in these bytes of a shard (no end of an archive needed).

    captions: for tars in img2dataset's layout, of which every sample is a pair.
    Raises BadSample with the reason when the bytes, intact as they are, hold no sample.
    """
    key, members = members_of(data)
    if captions is not None:
        return captioned(key, members, captions)[0]
    # Images and videos are found without their suffix: "query.0.jpg" as "query.0".
    stems = {name.rpartition(".")[0]: content for name, content in members.items()}

    def item(role: str, entry: dict) -> Item:
        text = _text(entry["text"])
        images = tuple(stems[f"{role}.{number}"] for number in range(entry["images"]))
        return Item(text, images, stems[role] if entry.get("video") else None)

    try:
        description = json.loads(members["json"])
        name = str(description["dataset"]), str(description["task"])
        if "item" in description:
            return Single(key, *name, item("item", description["item"]))
        query, target = item("query", description["query"]), item("target", description["target"])
        negatives = (item(f"negative.{number}", entry) for number, entry in enumerate(description["negatives"]))
        alternatives = map(_text, description["target"].get("alternatives", ()))
        return Pair(key, *name, query, target, tuple(negatives), tuple(alternatives))
    except KeyError as error:
        raise BadSample(f"{error.args[0]!r} is missing") from error
    except UnicodeError as error:
        raise BadSample(f"a text that is not UTF-8 ({error})") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadSample(f"its json is malformed ({error})") from error


def sample_key(data: bytes) -> str:
    """The key in a sample's first tar header, for messages; "" if there is none to be read."""
    with suppress(tarfile.TarError):
        return tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "utf-8", "replace").name.partition(".")[0]
    return ""


def members_of(data: bytes) -> tuple[str, dict[str, bytes]]:
    """A sample's key, and its members by their names without it."""
    try:
        files = _plain_files(data) or _files(data)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise BadSample(f"no tar ({error})") from error
    named = [(split, content) for path, content in files if (split := split_name(path))]
    keys = {key for (key, _), _ in named}
    if len(keys) != 1:
        raise BadSample(f"members of {len(keys)} samples, where one was expected: {sorted(keys)[:3]}")
    return keys.pop(), {name: content for (_, name), content in named}


def _plain_files(data: bytes) -> list[tuple[str, bytes]] | None:
    """The (path, content) of a tar's members, as `_files`; None unless all are plain files with short names.

    It is five times as fast, and nearly every tar is so.
    """
    files, place = [], 0
    while place < len(data):
        header = data[place : place + tarfile.BLOCKSIZE]
        name, size, kind, prefix = header[:100], header[124:136].strip(b" \0"), header[156:157], header[345:500]
        checksum = sum(header[:148]) + sum(header[156:]) + sum(b" " * 8)  # its own field counts as spaces
        if kind not in _PLAIN or not size.isdigit() or prefix.strip(b"\0"):
            return None
        if header[148:156].strip(b" \0") != b"%06o" % checksum:
            return None
        begin, length = place + tarfile.BLOCKSIZE, int(size, 8)
        content = data[begin : begin + length]
        if kind != tarfile.XHDTYPE:
            files.append((name.partition(b"\0")[0].decode("utf-8", "surrogateescape"), content))
        elif not _TIME.fullmatch(content):
            return None
        place = begin + -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return files if place == len(data) else None


_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.XHDTYPE)
# webdataset's writer, which img2dataset uses, puts before each member what fraction of a second it was written at.
_TIME = re.compile(rb"[0-9]+ mtime=[0-9.]+\n")


def _files(data: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=BytesIO(data), mode="r:", encoding="utf-8") as tar:
        files = [member for member in tar if member.isreg()]
        if any(member.issparse() for member in files):  # a few bytes may claim to be terabytes
            raise BadSample("a sparse file in the tar")
        return [(member.name, tar.extractfile(member).read()) for member in files]


def split_name(path: str) -> tuple[str, str] | None:
    """A member's (key, name), by webdataset's own rule: the key nearly always ends at the file's first dot.

    None for what it skips: names without a dot or that begin with one (macOS's `._NAME`, .DS_Store), its `__NOTES__`.
    Names that begin with a dot are skipped in folders, too, which webdataset takes for samples called as the folder is.
    """
    key, name = (None, None) if _NOTES.match(path) else base_plus_ext(path)
    return None if key is None or key.endswith("/") else (key, name)


_NOTES = re.compile(inspect.signature(tar_file_iterator).parameters["skip_meta"].default)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    value.encode()  # half of a surrogate pair, which JSON can hold, is none either
    return value


def captioned(key: str, members: dict[str, bytes], captions: Captions) -> tuple[Pair, list[tuple[str, str]]]:
    """A sample of img2dataset's: KEY.jpg (or another image), and KEY.txt and KEY.json with the captions.

    Returns it with (cause, detail) of each caption that is of no use beside others. Raises BadSample if none is of use,
    and if there is not one image.
    """
    members = {name.lower(): content for name, content in members.items()}  # as webdataset reads them
    images = [name for name in members if name in _IMAGE_NAMES]
    if not images:
        raise BadSample(f"no image (it has {', '.join(members)})")
    if len(images) > 1:
        raise BadSample(f"several images (leave one of {', '.join(images)} in it)")
    values, faults, described = [], [], None
    for column in captions.columns:
        try:
            if column == "txt":
                found = _decoded(members.get("txt", b""))
            else:
                described = _described(members) if described is None else described
                found = described.get(column)
            values += found if isinstance(found, list) else [found]
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
        raise BadSample("a text in UTF-16: convert it to UTF-8")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise BadSample("a text that is not UTF-8") from None


_IMAGE_NAMES = {*IMAGE_SUFFIXES.values(), "jpeg"}
READ_NAMES = {*_IMAGE_NAMES, "txt", "json"}  # of a sample's members, that are ever read


class ShardRecords:
    """Collects what the index and a shard's sidecar say of its samples."""

    def __init__(self) -> None:
        self._rows: list[tuple] = []
        self._sizes: list[list[tuple[int, int]]] = []
        self._text_bytes = 0
        self._videos = 0
        self._tasks: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, sample: Pair | Single, offset: int, data: bytes) -> None:
        """Note the next sample, whose bytes in the tar are `data`, at `offset`."""
        query, target, *negatives = (*sample.items, Item("")) if isinstance(sample, Single) else sample.items
        texts = [len(query.text.encode()), len(target.text.encode())]
        if isinstance(sample, Pair):
            texts[1] = max(len(text.encode()) for text in sample.texts)
        texts.append(sum(len(item.text.encode()) for item in negatives))
        counts = {
            "images of the query": len(query.images),
            "images of the target": len(target.images),
            "images of negatives": sum(len(item.images) for item in negatives),
            "negatives": len(negatives),
            "videos": sum(item.video is not None for item in sample.items),
        }
        for name, count in counts.items():
            if count > 255:
                raise PipelineError(f"{sample.dataset}, sample {sample.key}: {count} {name}, 255 at most")
        hashes = query.content_hash, 0 if isinstance(sample, Single) else target.content_hash
        self._rows.append((offset, len(data), zlib.crc32(data), *hashes, *texts, *counts.values()))
        self._sizes.append([image_format(image)[1:] for item in sample.items for image in item.images])
        self._text_bytes += sum(texts)
        self._videos += counts["videos"]
        self._tasks[sample.task] += 1

    def finish(self, file: str, size: int, sha256: str) -> tuple[Shard, bytes]:
        """The shard's entry in the index and the bytes of its sidecar; size and sha256 are the tar's."""
        max_images = max(map(len, self._sizes), default=0)
        records = np.zeros(len(self._rows), sidecar_dtype(max_images))
        for number, (row, sizes) in enumerate(zip(self._rows, self._sizes, strict=True)):
            records[number] = (*row, 0, 0)
            if sizes:
                records["image_sizes"][number, : len(sizes)] = sizes
        sidecar = sidecar_of(records)
        all_sizes = sorted(chain.from_iterable(self._sizes), key=lambda size: (size[0] * size[1], size))
        kept = min(len(all_sizes), _KEPT_SIZES)
        shard = Shard(
            file=file,
            samples=len(records),
            bytes=size,
            sha256=sha256,
            sidecar_sha256=hashlib.sha256(sidecar).hexdigest(),
            sidecar_bytes=len(sidecar),
            text_bytes=self._text_bytes,
            images=len(all_sizes),
            videos=self._videos,
            image_sizes=tuple(all_sizes[(2 * i + 1) * len(all_sizes) // (2 * kept)] for i in range(kept)),
            max_images=max_images,
            tasks=dict(self._tasks),
        )
        return shard, sidecar


def write_shard(samples: Iterable[Pair | Single], path: Path, shard_bytes: int | None = None) -> Shard:
    """Write one tar and its sidecar, each beside its place and renamed when whole.

    shard_bytes: stop taking samples when the tar has as many (at least one sample); without, take them all.
    """
    records, offset, digest, last_key = ShardRecords(), 0, hashlib.sha256(), None
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
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
    partial.replace(path)
    objects.write(str(path.with_name(shard.sidecar)), sidecar)
    return shard


def write_shards(
    samples: Iterable[Pair | Single], folder: str | Path, *, dataset: str, shard_bytes: int = 256 << 20
) -> Index:
    """Write samples from Python, in their order, as tars of about `shard_bytes`, with sidecars and an index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # An index of earlier shards would name files that are about to change.
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
