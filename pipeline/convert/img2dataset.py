"""Tars in img2dataset's layout as they are: an index and sidecars for them, and of the tars not a byte is written."""

import argparse
import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from pipeline.convert.command import Command, add_dest, add_work
from pipeline.convert.engine import Result, carry_out, refuse_occupied
from pipeline.convert.rows import Rejection
from pipeline.convert.workers import Report
from pipeline.data.index import Captions, Index, Shard
from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK, BadSample, Pair
from pipeline.data.shards import READ_NAMES, ShardRecords, captioned, members_of, split_name
from pipeline.data.text_embeddings import SUFFIX
from pipeline.data.tiles import decode_image
from pipeline.errors import PipelineError
from pipeline.storage import objects
from pipeline.storage.documents import note_unread, packed_by

DESCRIPTION = """\
an index for tars in img2dataset's layout, which stay as and where they are

SOURCE is a folder or s3:// prefix of tars. A sample's members share their name up to the first dot and follow one
another:

    000000017.jpg                (or jpeg, png, webp, gif) the image
    000000017.txt                its caption
    000000017.json               columns, of which further ones can be captions: a text, or a list of texts

Each becomes a pair: the query is --query with the image, the target its first caption; a training step that takes
the pair draws one of all its captions. Only the index and a sidecar for each tar are written, to DEST, which may be
SOURCE itself. The tars must stay where they are then. Every tar is read once. A caption that is damaged, no text, or
has <image> or <video> in it is left out. So is, and is listed in DEST/rejected.jsonl, a sample without any other, one
without image or with several, undecodable, larger than 256 MiB, or whose members lie apart; a broken or compressed
tar is an error. What webdataset skips is skipped: folders, links, hidden files, names without a suffix.

    python tools/make_shards.py img2dataset s3://bucket/cc3m s3://bucket/cc3m --captions txt caption_long
"""
_MAX_SAMPLE = 256 << 20
_PIECE = 16 << 20  # bytes of a read
_NOTES = 20  # of a tar; where keys have dots, every member's name may be another


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a folder or s3://bucket/prefix of tars")
    add_dest(parser)
    parser.add_argument(
        "--captions",
        nargs="+",
        default=["txt"],
        metavar="COLUMN",
        help='where captions are: "txt" is the .txt member, any other name a column of the .json (txt)',
    )
    query = f"{IMAGE_MARK}\nFind an image caption describing the given everyday image."
    parser.add_argument("--query", default=query, metavar="TEXT", help=f"of all pairs ({query!r})")
    parser.add_argument("--task", default="retrieval", metavar="NAME", help="a free name of what is asked (retrieval)")
    parser.add_argument("--dataset", metavar="NAME", help="the dataset's name (the last part of SOURCE)")
    add_work(parser)


def run(arguments: argparse.Namespace) -> None:
    refuse_occupied(arguments.dest)
    if (arguments.query.count(IMAGE_MARK), arguments.query.count(VIDEO_MARK)) != (1, 0):
        raise PipelineError(f"--query {arguments.query!r} must have one {IMAGE_MARK}, and no {VIDEO_MARK}")
    captions = Captions(arguments.query, tuple(arguments.captions), arguments.task)
    source, dest = _absolute(arguments.source), _absolute(arguments.dest)
    tars = _tars(source)
    _check_columns(objects.join(source, min(tars)), captions)
    work = TarsWork(arguments.dataset or source.rpartition("/")[2], source, dest, captions, tars)
    carry_out({dest: work}, unit="B", processes=arguments.processes, max_rejected=arguments.max_rejected)


COMMAND = Command(DESCRIPTION, add_arguments, run)


def _absolute(url: str) -> str:
    return url.rstrip("/") if "://" in url else str(Path(url).resolve())


def _tars(source: str) -> dict[str, int]:
    """File name -> bytes of the tars right below `source`."""
    names = [url.removeprefix(source + "/") for url in objects.list_under(source)]
    below = {name.partition("/")[0] for name in names if "/" in name and name.endswith(".tar")}
    note_unread(f"{source}, for tars are read right below it alone", sorted(below), kind="folder")
    names = [name for name in names if "/" not in name and not name.startswith(".")]
    if packed := [name for name in names if name.endswith((".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"))]:
        raise PipelineError(
            f"{objects.join(source, packed[0])} is compressed, so no sample in it can be read by itself"
        )
    tars = [name for name in names if name.endswith(".tar") and not name.endswith(SUFFIX)]
    if not tars:
        raise PipelineError(f"{source} holds no .tar files: name the folder (or prefix) right above them")
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(tars, pool.map(lambda name: objects.size(objects.join(source, name)), tars), strict=True))


def _check_columns(url: str, captions: Captions) -> None:
    """PipelineError if no sample of this tar has one of the columns; a misspelt one would only cost samples."""
    found: set[str] = set()
    tape, sample = Tape(url), None
    for sample in read_tape(tape):
        if sample.fault is None:
            found |= _columns(tape.between(sample.begin, sample.end))
            if found.issuperset(captions.columns):
                return
    if sample is None:  # a shard of which no download succeeded
        return
    missing = ", ".join(sorted(set(captions.columns) - found))
    raise PipelineError(f"--captions: no sample of {url} has {missing}; it has {', '.join(sorted(found)) or 'none'}")


def _columns(data: bytes) -> set[str]:
    columns = set()
    with suppress(BadSample, ValueError, RecursionError):
        members = {name.lower(): content for name, content in members_of(data)[1].items()}
        columns |= {"txt"} & members.keys()
        if isinstance(described := json.loads(members.get("json", b"{}")), dict):
            columns.update(described)
    return columns


@dataclass(frozen=True)
class TarsWork:
    """Work on the tars in `source` (file name -> bytes): every job indexes one."""

    dataset: str
    source: str
    dest: str
    captions: Captions
    tars: dict[str, int]
    rows: None = None

    @property
    def plan(self) -> dict[str, object]:
        return {"dataset": self.dataset, "source": self.source, "captions": asdict(self.captions)}

    @property
    def jobs(self) -> dict[str, int]:
        # With the size in its name: a tar that was mended since is another job, and only that is done again.
        return {f"{name}.{size}": size for name, size in self.tars.items()}

    def run(self, job: str, folder: Path, report: Report) -> Result:
        file = job.rpartition(".")[0]
        tape = Tape(objects.join(self.source, file), report)
        records, rejected, times, unread, notes = ShardRecords(), [], Counter(), Counter(), Counter()
        for sample in read_tape(tape):
            times[sample.key] += 1
            unread.update(sample.names - READ_NAMES)
            try:
                if sample.fault is not None:
                    raise sample.fault
                data = tape.between(sample.begin, sample.end)
                pair, faults = _pair(data, self.captions)
                records.add(pair, sample.begin, data)
                notes.update(f"captions left out beside others: {cause}" for cause, _ in faults)
            except Rejection as reason:
                rejected.append((sample.key, reason))
        rejected = list(_rows(file, rejected, times))
        for name, count in unread.most_common():
            notes[f"members .{name if len(notes) < _NOTES else '...'}, which nothing reads"] += count
        if not len(records):
            return Result(None, len(rejected), rejected, {}, dict(notes))
        shard, sidecar = records.finish(file, tape.size, tape.sha256.hexdigest())
        objects.write(str(folder / shard.sidecar), sidecar)
        files = {shard.sidecar: shard.sidecar_bytes}
        return Result(shard, len(records) + len(rejected), rejected, files, dict(notes))

    def index(self, shards: tuple[Shard, ...]) -> Index:
        return Index(self.dataset, shards, self.captions, "" if self.source == self.dest else self.source)

    def files(self) -> dict[str, bytes]:
        return {}


def _rows(file: str, rejected: list[tuple[str, Rejection]], times: Counter[str]) -> Iterator[dict[str, str]]:
    """What rejected.jsonl says.  times: how often each key came, of which members that lie apart make several."""
    apart = set()
    for key, reason in rejected:
        name = key.encode(errors="backslashreplace").decode()
        if times[key] > 1 and reason.cause.startswith(("no image", "no caption")):
            if key in apart:  # the same sample
                continue
            apart.add(key)
            what = f"members of key {name} do not lie together in {file}, as WebDataset has them"
            reason = Rejection("members apart", f"{what}: repack it in the order of names, as tar --sort=name does")
        yield {"row": f"{file}: {name}", "cause": reason.cause, "detail": reason.detail}


def _pair(data: bytes, captions: Captions) -> tuple[Pair, list[tuple[str, str]]]:
    """The sample, and what is wrong with captions of it that are left out."""
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
    """A tar read once from its first byte to its last, by large pieces: the file that `tarfile` goes through.

    sha256: of the bytes so far.
    keep_from: bytes before this one may be forgotten, once they are read.
    """

    def __init__(self, url: str, report: Report = lambda read: None) -> None:
        self.url, self.size = url, objects.size(url)
        self.sha256 = hashlib.sha256()
        self.keep_from = 0
        self._report = report
        self._position = 0
        self._start, self._kept = 0, bytearray()

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position:  # a size below zero, which would be read for ever
            raise tarfile.ReadError("it leads backwards")
        self._position = position

    def read(self, length: int) -> bytes:
        if length > _MAX_SAMPLE:
            raise tarfile.ReadError(f"a header of {length} bytes")
        data = self.between(self._position, min(self._position + length, self.size))
        self._position += len(data)
        return data

    def between(self, begin: int, end: int) -> bytes:
        """Bytes begin..end-1, of which none may be forgotten yet."""
        while self._start + len(self._kept) < end:
            reached = self._start + len(self._kept)
            piece = objects.read(self.url, reached, min(_PIECE, self.size - reached))
            self.sha256.update(piece)
            forgotten = max(min(self.keep_from, self._position, reached) - self._start, 0)
            del self._kept[:forgotten]
            self._start += forgotten
            self._kept += piece
            self._report(len(piece))
        return bytes(memoryview(self._kept)[begin - self._start : end - self._start])


@dataclass
class TapeSample:
    """Consecutive members of one key: bytes begin..end-1 of the tar. fault: why they are of no use."""

    key: str
    begin: int
    end: int
    names: set[str] = field(default_factory=set)
    fault: Rejection | None = None


def read_tape(tape: Tape) -> Iterator[TapeSample]:
    """The tar's samples as webdataset groups them. Until the next one is asked for, the tape keeps its bytes.

    PipelineError if this is no whole, plain tar.
    """
    try:
        yield from _read_tape(tape)
    except (tarfile.TarError, ArithmeticError, LookupError, RecursionError, ValueError) as error:
        raise PipelineError(
            f"{tape.url} is no tar, or a damaged one ({error or type(error).__name__}): mend it, or move it away"
        ) from None


def _read_tape(tape: Tape) -> Iterator[TapeSample]:
    sample = None
    head = tape.between(0, min(6, tape.size))
    if packed := packed_by(head):
        raise tarfile.ReadError(f"it is compressed by {packed}, so no sample in it can be read by itself: unpack it")
    with tarfile.open(fileobj=tape, mode="r:", encoding="utf-8") as tar:
        while member := tar.next():
            tar.members = []  # they would be kept until the end
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
            usable = sample is not None and sample.fault is None
            tape.keep_from = sample.begin if usable else tar.offset
    if sample is not None:
        yield sample
    # tarfile ends at whatever is no header; an archive, at two blocks of zeros, up to the end of the file.
    end = tape.between(tar.offset, min(tar.offset + tarfile.BLOCKSIZE, tape.size))
    if any(end):
        raise tarfile.ReadError(f"no header at byte {tar.offset}")
    if len(end) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it ends without an end of archive, as one cut short does")
    tape.keep_from = tape.size
    while piece := tape.read(_PIECE):
        if piece.count(0) < len(piece):
            raise tarfile.ReadError(f"more after the end of the archive at byte {tar.offset}")


def _key_fault(key: str) -> Rejection | None:
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts:
        return Rejection("unsafe name", repr(key))
    if not key.isprintable():  # half of a surrogate pair is what stands for a byte that is no UTF-8
        return Rejection("unprintable name", repr(key))
    return None
