"""Index tars in img2dataset's layout: write an index and sidecars without changing the tars."""

import argparse
import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, cast

from pipeline.convert.command import IMAGE_QUERY, Command, add_dest, add_names, add_work, check_query
from pipeline.convert.engine import JobResult, Work, refuse_occupied, run_conversions
from pipeline.convert.sharding import Rejection
from pipeline.convert.workers import check_stop
from pipeline.data.index import Captions, Index
from pipeline.data.sample import IMAGE_MARK, BadSample, Pair
from pipeline.data.shards import READ_NAMES, ShardRecords, captioned, members_of, split_name
from pipeline.data.stored_vectors import KINDS
from pipeline.data.tiles import decode_image
from pipeline.errors import PipelineError
from pipeline.storage import objects
from pipeline.storage.documents import note_unread, packed_by

DESCRIPTION = """\
an index for tars in img2dataset's layout, which stay unchanged

SOURCE is a folder or s3:// prefix of tars. The members of a sample are consecutive, and share their name up to the
first dot:

    000000017.jpg                (or jpeg, png, webp, gif) the image
    000000017.txt                its caption
    000000017.json               columns, some of which can contain further captions: a text or a list of texts

Each sample becomes a pair: the query is --query with the image, and the target is its first caption; each training step
draws one of all its captions. Every tar is read once. Only the index and one sidecar per tar are written to DEST, which
may be SOURCE; the tars must then stay where they are.

Captions are skipped if they are damaged, are not texts, or contain <image> or <video>. A sample is rejected and listed
in DEST/rejected.jsonl if it has no other caption, no image or several images, cannot be decoded, is larger than 256
MiB, or if its members are not consecutive. A damaged or compressed tar is an error. As in webdataset, folders, links,
hidden files and names without a suffix are skipped.

    python tools/make_shards.py img2dataset s3://bucket/cc3m s3://bucket/cc3m --captions txt caption_long
"""
_MAX_SAMPLE = 256 << 20
_PIECE = 16 << 20  # bytes per read
_NOTES = 20  # the most notes per tar: if keys contain dots, every member may have another name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a folder or s3://bucket/prefix of tars")
    add_dest(parser)
    parser.add_argument(
        "--captions",
        nargs="+",
        default=["txt"],
        metavar="COLUMN",
        help='where the captions are: "txt" is the .txt member, any other name a column of the .json (default txt)',
    )
    add_names(parser, IMAGE_QUERY, "the last part of SOURCE")
    parser.add_argument("--task", default="retrieval", metavar="NAME", help="name of the task (default retrieval)")
    add_work(parser)


def run(arguments: argparse.Namespace) -> None:
    refuse_occupied(arguments.dest)
    check_query(arguments.query, IMAGE_MARK)
    captions = Captions(arguments.query, tuple(arguments.captions), arguments.task)
    source, dest = _absolute(arguments.source), _absolute(arguments.dest)
    tars = _tars(source)
    _check_columns(objects.join(source, min(tars)), captions)
    work = indexing(arguments.dataset or source.rpartition("/")[2], source, dest, captions, tars)
    run_conversions({dest: work}, unit="B", processes=arguments.processes, max_rejected=arguments.max_rejected)


COMMAND = Command(DESCRIPTION, add_arguments, run)


def _absolute(url: str) -> str:
    return url.rstrip("/") if "://" in url else str(Path(url).resolve())


def _tars(source: str) -> dict[str, int]:
    """Return file name -> bytes of the tars directly in `source`."""
    stamps = {url.removeprefix(source + "/"): stamp for url, stamp in objects.stamps(source).items()}
    below = {name.partition("/")[0] for name in stamps if "/" in name and name.endswith(".tar")}
    note_unread(f"{source}, since only tars directly in it are read", sorted(below), kind="folder")
    names = [name for name in stamps if "/" not in name and not name.startswith(".")]
    if packed := [name for name in names if name.endswith((".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"))]:
        raise PipelineError(
            f"{objects.join(source, packed[0])} is compressed, so single samples cannot be read: decompress it"
        )
    vectors = tuple(kind.suffix for kind in KINDS)
    tars = [name for name in names if name.endswith(".tar") and not name.endswith(vectors)]
    if not tars:
        raise PipelineError(f"{source} contains no .tar files: give the folder (or prefix) that directly contains them")
    return {name: int(stamps[name].partition(" ")[0]) for name in tars}  # a stamp begins with the size


def _check_columns(url: str, captions: Captions) -> None:
    """Raise PipelineError if this tar lacks one of the columns; a misspelt column would only cause rejections."""
    found: set[str] = set()
    tape, sample = Tape(url), None
    for sample in read_tape(tape):
        with suppress(BadSample, ValueError, TypeError, RecursionError):  # as in a row that will be rejected
            if sample.fault is None:
                _, named = members_of(tape.between(sample.begin, sample.end))
                members = {name.lower(): content for name, content in named.items()}
                found |= {"txt"} & members.keys()
                found |= dict(json.loads(members.get("json", b"{}"))).keys()
        if found.issuperset(captions.columns):
            return
    if sample is None:  # a shard without any successful download
        return
    missing = ", ".join(sorted(set(captions.columns) - found))
    raise PipelineError(f"--captions: no sample of {url} has {missing}; it has {', '.join(sorted(found)) or 'none'}")


def indexing(dataset: str, source: str, dest: str, captions: Captions, tars: dict[str, int]) -> Work:
    """Return the work that indexes the tars in `source`, one per job. tars: file name -> bytes."""
    return Work(
        plan={"dataset": dataset, "source": source, "captions": asdict(captions)},
        # A job's name contains the size, so a tar that was repaired in the meantime is a new job, and only it is run.
        jobs={f"{name}.{size}": size for name, size in tars.items()},
        run=partial(_index_tar, source, captions),
        index=Index(dataset, (), captions, "" if source == dest else source),
    )


def _index_tar(source: str, captions: Captions, job: str, folder: Path) -> JobResult:
    file = job.rpartition(".")[0]
    tape = Tape(objects.join(source, file))
    records, rejections = ShardRecords(), []
    times: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    for sample in read_tape(tape):
        times[sample.key] += 1
        unread.update(sample.names - READ_NAMES)
        try:
            if sample.fault is not None:
                raise sample.fault
            data = tape.between(sample.begin, sample.end)
            pair, faults = _pair(data, captions)
            records.add(pair, sample.begin, data)
            notes.update(f"unusable captions skipped: {cause}" for cause, _ in faults)
        except Rejection as reason:
            rejections.append((sample.key, reason))
    rejected = list(_rows(file, rejections, times))
    for name, count in unread.most_common():
        notes[f"members .{name if len(notes) < _NOTES else '...'}, which nothing reads"] += count
    if not len(records):
        return JobResult(None, len(rejected), rejected, {}, dict(notes))
    shard, sidecar = records.finish(file, tape.size, tape.sha256.hexdigest())
    objects.write(str(folder / shard.sidecar), sidecar)
    files = {shard.sidecar: shard.sidecar_bytes}
    return JobResult(shard, len(records) + len(rejected), rejected, files, dict(notes))


def _rows(file: str, rejections: list[tuple[str, Rejection]], times: Counter[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of rejected.jsonl. times: of each key, how often; a sample whose members lie apart counts once."""
    apart = set()
    for key, reason in rejections:
        name = key.encode(errors="backslashreplace").decode()
        if times[key] > 1 and reason.cause.startswith(("no image", "no caption")):
            if key in apart:
                continue
            apart.add(key)
            what = f"the members of key {name} are not consecutive in {file}, as WebDataset requires"
            reason = Rejection("members apart", f"{what}: repack it sorted by name, for example with tar --sort=name")
        yield {"row": f"{file}: {name}", "cause": reason.cause, "detail": reason.detail}


def _pair(data: bytes, captions: Captions) -> tuple[Pair, list[tuple[str, str]]]:
    """Parse a sample. Returns the pair, and (cause, detail) of each skipped caption."""
    try:
        pair, faults = captioned(*members_of(data), captions)
    except BadSample as reason:
        cause, _, detail = str(reason).partition(" (")
        raise Rejection(cause, detail.removesuffix(")") or cause) from None
    try:
        decode_image(pair.query.images[0])
    except BadSample as reason:
        raise Rejection("broken image", str(reason)) from None
    return pair, faults


class Tape:
    """A tar as a file object for `tarfile`, which reads it once from start to end in large pieces.

    sha256: hash of the bytes read so far.
    keep_from: bytes before this position may be dropped after they are read.
    """

    def __init__(self, url: str) -> None:
        self.url, self.size = url, objects.size(url)
        self.sha256 = hashlib.sha256()
        self.keep_from = 0
        self._position = 0
        self._start, self._kept = 0, bytearray()

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position:  # a negative size, which would cause an endless loop
            raise tarfile.ReadError("a header points backwards")
        self._position = position

    def read(self, length: int) -> bytes:
        if length > _MAX_SAMPLE:
            raise tarfile.ReadError(f"a header of {length} bytes")
        data = self.between(self._position, min(self._position + length, self.size))
        self._position += len(data)
        return data

    def between(self, begin: int, end: int) -> bytes:
        """Return bytes begin..end-1. None of them may have been dropped."""
        while self._start + len(self._kept) < end:
            check_stop()
            reached = self._start + len(self._kept)
            piece = objects.read(self.url, reached, min(_PIECE, self.size - reached))
            self.sha256.update(piece)
            dropped = max(min(self.keep_from, self._position, reached) - self._start, 0)
            del self._kept[:dropped]
            self._start += dropped
            self._kept += piece
        return bytes(memoryview(self._kept)[begin - self._start : end - self._start])


@dataclass
class TapeSample:
    """Consecutive members with one key: bytes begin..end-1 of the tar. fault: why the sample is unusable."""

    key: str
    begin: int
    end: int
    names: set[str] = field(default_factory=set)
    fault: Rejection | None = None


def read_tape(tape: Tape) -> Iterator[TapeSample]:
    """Yield the tar's samples as webdataset groups them. The tape keeps the bytes of a sample until the next one.

    Raises PipelineError if this is not a complete, uncompressed tar.
    """
    try:
        yield from _read_tape(tape)
    except (tarfile.TarError, ArithmeticError, LookupError, RecursionError, ValueError) as error:
        raise PipelineError(
            f"{tape.url} is not a tar, or is damaged ({error or type(error).__name__}): repair it, or move it away"
        ) from None


def _read_tape(tape: Tape) -> Iterator[TapeSample]:
    sample: TapeSample | None = None
    head = tape.between(0, min(6, tape.size))
    if packed := packed_by(head):
        raise tarfile.ReadError(f"it is compressed by {packed}, so single samples cannot be read: decompress it")
    with tarfile.open(fileobj=cast(IO[bytes], tape), mode="r:", encoding="utf-8") as tar:
        while member := tar.next():
            tar.members = []  # type: ignore[attr-defined]  # typeshed lacks it; tarfile would keep all members
            if member.isreg() and (split := split_name(member.name)):
                key, name = split
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield sample
                    sample = TapeSample(key, member.offset, tar.offset, fault=_key_fault(key))
                sample.end = tar.offset
                if name.lower() in sample.names:
                    sample.fault = Rejection("two members of one name", f"{name!r}")
                sample.names.add(name.lower())
            if sample is not None and tar.offset - sample.begin > _MAX_SAMPLE:
                sample.fault = Rejection("too large", f"more than {_MAX_SAMPLE >> 20} MiB")
            tape.keep_from = sample.begin if sample is not None and sample.fault is None else tar.offset
    if sample is not None:
        yield sample
    # tarfile stops at anything that is not a header; a complete archive ends with at least two blocks of zeros.
    end = tape.between(tar.offset, min(tar.offset + tarfile.BLOCKSIZE, tape.size))
    if any(end):
        raise tarfile.ReadError(f"no header at byte {tar.offset}")
    if len(end) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("its end is missing: it may be truncated")
    tape.keep_from = tape.size
    while piece := tape.read(_PIECE):
        if piece.count(0) < len(piece):
            raise tarfile.ReadError(f"more data after the end of the archive at byte {tar.offset}")


def _key_fault(key: str) -> Rejection | None:
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts:
        return Rejection("unsafe name", repr(key))
    if not key.isprintable():  # surrogates are not printable: they represent bytes that are not UTF-8
        return Rejection("unprintable name", repr(key))
    return None
