"""Turn a dataset into WebDataset shards with an index, in a folder or on S3.

    python tools/make_shards.py jsonl pairs.jsonl s3://bucket/my-data --images photos
    python tools/make_shards.py demo 0 s3://bucket/demo

jsonl: one training pair a line.

    {"query":     {"text": "<image>\\nFind the caption of this picture.", "images": ["cats/1.jpg"]},
     "target":    {"text": "A cat on a mat."},
     "negatives": [{"text": "A dog on a mat."}],
     "dataset":   "Captions",
     "task":      "retrieval"}

    query, target  `text`, and `images` (paths of PNG, JPEG, WebP or GIF files). The text says by
                   `<image>` where each image goes, so it has as many marks as there are images.
    negatives      optional: what looks as if it answered the query, and does not
    dataset        optional: as soon as a row names one, every dataset becomes DEST/<dataset>/
    task           optional: a free name of what is asked

Image paths are relative to the jsonl's folder, or to --images, and may not lead out of it. A sample's
key is its line number. All rows are checked before the first shard is written.

demo: the demo world drawn from a seed: training pairs in DEST/train/<dataset>/, evaluation in DEST/eval/.
"""

import argparse
import re
import sys
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError, model_validator
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.data import objects
from pipeline.data.index import INDEX_FILE
from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK, Item, Pair
from pipeline.data.shards import image_format, write_shards
from pipeline.errors import PipelineError, command_line

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of a dataset: it becomes a folder


def refuse_occupied(dest: str) -> None:
    """Fail early when there is a dataset at `dest` already, or when its bucket is missing or out of reach."""
    if objects.exists(objects.join(dest, INDEX_FILE)):
        raise PipelineError(f"{dest} holds a dataset already: delete it or choose another DEST")


def make_dataset(pairs: Iterable[Pair], count: int, dest: str, dataset: str, shard_bytes: int) -> None:
    """Write the pairs' shards to `dest`; on the way to S3 only one shard at a time is on the disk."""
    began = time.monotonic()
    bar = tqdm(pairs, total=count, desc=dataset, unit=" samples", disable=None)
    if "://" not in dest:
        index = write_shards(bar, Path(dest), dataset=dataset, shard_bytes=shard_bytes)
    else:
        with tempfile.TemporaryDirectory(prefix="make-shards-") as folder:

            def upload(path: Path) -> None:
                objects.write(objects.join(dest, path.name), path)
                path.unlink()

            index = write_shards(bar, Path(folder), dataset=dataset, shard_bytes=shard_bytes, finished=upload)
    seconds = time.monotonic() - began
    print(
        f"{dest}: {index.samples} samples in {len(index.shards)} shards, {index.bytes / 1e6:.1f} MB, "
        f"{seconds:.1f} s, {index.samples / seconds:.0f} samples/s",
        flush=True,
    )


def make_demo(arguments: argparse.Namespace) -> None:
    """Training shards and evaluation files of the demo world."""
    from pipeline.demo import tasks

    train = {name: objects.join(arguments.dest, "train", name) for name in tasks.DATASETS}
    for dest in train.values():
        refuse_occupied(dest)
    for name, dest in train.items():
        pairs = tasks.training_pairs(name, arguments.source, arguments.pairs)
        make_dataset(pairs, arguments.pairs, dest, name, arguments.shard_mb << 20)
    dest = objects.join(arguments.dest, "eval")
    with tempfile.TemporaryDirectory(prefix="make-shards-") as folder:
        tasks.write_evaluation(Path(folder), arguments.source, arguments.queries)
        upload_folder(Path(folder), dest)


def upload_folder(folder: Path, dest: str) -> None:
    """Copy every file below `folder` to the same place below `dest`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())

    def upload(path: Path) -> int:
        data = path.read_bytes()
        objects.write(objects.join(dest, path.relative_to(folder).as_posix()), data)
        return len(data)

    with ThreadPoolExecutor(8) as pool:
        for _ in tqdm(pool.map(upload, files), total=len(files), desc="eval", unit=" files", disable=None):
            pass
    print(f"{dest}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB", flush=True)


class Entry(BaseModel, extra="forbid", strict=True):
    """A query, a target or a negative, as a row says it."""

    text: str
    images: tuple[str, ...] = ()

    @model_validator(mode="after")
    def marks_match_images(self) -> "Entry":
        if not self.text.strip() and not self.images:
            raise ValueError("is empty: neither text nor images")
        if VIDEO_MARK in self.text:
            raise ValueError(f"has {VIDEO_MARK} in its text, but rows carry no video")
        if (marks := self.text.count(IMAGE_MARK)) != len(self.images):
            raise ValueError(f"has {marks} {IMAGE_MARK} marks in its text for {len(self.images)} images")
        return self


class Row(BaseModel, extra="forbid", strict=True):
    """One line of the jsonl file."""

    query: Entry
    target: Entry
    negatives: tuple[Entry, ...] = ()
    dataset: str = Field("", pattern=NAME)
    task: str = ""


@dataclass(frozen=True)
class Rows:
    """The rows of a jsonl file whose images lie in the folder `images`; errors name the line."""

    file: Path
    images: Path

    def check(self) -> dict[str, array]:
        """Check all rows. Returns, per dataset ("" for none), line number and byte offset of each in turn."""
        places: dict[str, array] = {}
        offset = 0
        with self.file.open("rb") as file:
            for number, line in enumerate(tqdm(file, desc="checking", unit=" rows", disable=None), 1):
                if line.strip():
                    row = self.row(number, line)
                    for entry in (row.query, row.target, *row.negatives):
                        for path in entry.images:
                            self.image_path(number, path)
                    places.setdefault(row.dataset, array("Q")).extend((number, offset))
                offset += len(line)
        return places

    def pairs(self, places: array, dataset: str) -> Iterator[Pair]:
        with self.file.open("rb") as file:
            for number, offset in zip(places[::2], places[1::2], strict=True):
                file.seek(offset)
                row = self.row(number, file.readline())
                query, target, *negatives = (
                    self.item(number, entry) for entry in (row.query, row.target, *row.negatives)
                )
                yield Pair(f"{number:08d}", dataset, row.task, query, target, tuple(negatives))

    def row(self, number: int, line: bytes) -> Row:
        try:
            return Row.model_validate_json(line.strip())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise self.error(number, f"unknown field {where!r}") from error
            reason = first["msg"].removeprefix("Value error, ").replace(" at line 1 column", " at column")
            raise self.error(number, f"{where} {reason}".strip()) from error

    def item(self, number: int, entry: Entry) -> Item:
        images = tuple(self.image_path(number, path).read_bytes() for path in entry.images)
        for path, image in zip(entry.images, images, strict=True):
            if image_format(image)[0] == "bin":
                raise self.error(number, f"{path} cannot be read as a PNG, JPEG, WebP or GIF image")
        return Item(entry.text, images)

    def image_path(self, number: int, path: str) -> Path:
        found = (self.images / path).resolve()
        if not found.is_relative_to(self.images):
            raise self.error(number, f"image {path!r} leads out of the images folder {self.images}")
        if not found.is_file():
            raise self.error(number, f"there is no image file {found}")
        return found

    def error(self, number: int, reason: str) -> PipelineError:
        return PipelineError(f"{self.file}, line {number}: {reason}")


def make_jsonl(arguments: argparse.Namespace) -> None:
    """Shards of the pairs in a jsonl file."""
    fallback = arguments.dataset or arguments.source.stem
    if not re.fullmatch(NAME, fallback):
        raise PipelineError(f"{fallback!r} cannot name a dataset: give --dataset letters, digits, '.', '_', '-'")
    images = (arguments.images or arguments.source.parent).resolve()
    if not images.is_dir():
        raise PipelineError(f"{images}: there is no such folder")
    refuse_occupied(arguments.dest)
    rows = Rows(arguments.source, images)
    places = rows.check()
    if not places:
        raise PipelineError(f"{arguments.source} has no rows")
    if set(places) == {""}:
        dests = {fallback: arguments.dest}
    else:
        dests = {name or fallback: objects.join(arguments.dest, name or fallback) for name in places}
        for dest in dests.values():
            refuse_occupied(dest)
    if "" in places:
        places.setdefault(fallback, array("Q")).extend(places.pop(""))
    for dataset, dest in dests.items():
        pairs = rows.pairs(places[dataset], dataset)
        make_dataset(pairs, len(places[dataset]) // 2, dest, dataset, arguments.shard_mb << 20)


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


@command_line
def main() -> None:
    described = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**described)
    formats = parser.add_subparsers(metavar="FORMAT", required=True)
    demo = formats.add_parser("demo", help="the demo world", **described)
    demo.add_argument("source", metavar="SOURCE", type=int, help="the seed")
    demo.set_defaults(make=make_demo)
    jsonl = formats.add_parser("jsonl", help="one pair a line", **described)
    jsonl.add_argument("source", metavar="SOURCE", type=Path, help="the .jsonl file")
    jsonl.set_defaults(make=make_jsonl)
    for command in (demo, jsonl):
        command.add_argument("dest", metavar="DEST", help="a folder or s3://bucket/prefix")
        command.add_argument("--shard-mb", type=positive, default=256, metavar="N", help="MiB a shard (256)")
    demo.add_argument("--pairs", type=positive, default=4800, metavar="N", help="pairs a dataset (4800)")
    demo.add_argument("--queries", type=positive, default=200, metavar="N", help="queries a dataset (200)")
    jsonl.add_argument("--images", type=Path, metavar="FOLDER", help="folder of the images (the jsonl's)")
    jsonl.add_argument("--dataset", metavar="NAME", help="dataset of rows that name none (the file's stem)")
    arguments = parser.parse_args()
    try:
        arguments.make(arguments)
    except OSError as error:
        raise PipelineError(f"{error.filename or 'writing'}: {error.strerror}") from error


if __name__ == "__main__":
    main()
