"""Convert your own pairs: one JSON object per line."""

import argparse
import re
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO

import numpy as np
from pydantic import BaseModel, Field, ValidationError, model_validator

from pipeline.convert.command import add_images, conversion, filled, image_folder
from pipeline.convert.sharding import ImageFolder, Rejection, Rows, checked_text, member_bytes
from pipeline.data.sample import LARGEST_NUMBER, Item, Pair
from pipeline.errors import PipelineError
from pipeline.progress import progress_bar
from pipeline.storage import objects
from pipeline.storage.documents import DocumentError, explained, foreign, parse_json

DESCRIPTION = """\
your own pairs, one JSON object per line

SOURCE is a file with lines like

    {"query":     {"text": "<image>\\nFind the caption of this picture.", "images": ["cats/1.jpg"]},
     "target":    {"text": "A cat on a mat.", "alternatives": ["On a mat lies a cat."]},
     "positives": [{"text": "A mat with a cat.", "weight": 0.5}],
     "negatives": [{"text": "A dog on a mat."}],
     "dataset":   "Captions",
     "task":      "retrieval"}

    query, target  a text, optionally with `images` (paths of PNG, JPEG, WebP or GIF files) or a `video` (path of an
                   MP4, MOV, WebM, MKV or AVI file). The text has one mark <image> or <video> per file, at its place.
    alternatives   optional: texts that can replace the target's text; training draws one
    positives      optional: further right answers to the query
    negatives      optional: hard negatives of the query
    weight         optional, of the target and each positive: its weight among them, above 0 (default: 1)
    score          optional: a judge's or reranker's score; either the target, all positives and all negatives have one,
                   or none of them
    dataset        optional: if any row names a dataset, every dataset becomes DEST/<dataset>/
    task           optional: a name for the task

Paths are relative to the folder of SOURCE, or to --images, and must not lead out of it. A sample's key is its line
number. An unreadable row belongs to the dataset of the row before it.

    python tools/make_shards.py jsonl pairs.jsonl s3://bucket/my-data --images photos
"""

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # valid names of datasets, which become folders
MAX_LINE = 16 << 20  # bytes; a file without line ends must not fill the memory
MAX_COUNT = 255  # images, videos, further positives with negatives: the limit of the index


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=lambda text: Path(filled(text)), help="the JSON Lines file")
    parser.add_argument("--dataset", metavar="NAME", help="dataset of rows that name none (default: the file's name)")
    add_images(parser, "that of SOURCE")


def datasets(arguments: argparse.Namespace) -> dict[str, Rows]:
    """Return the URL of each dataset in the file and its rows."""
    fallback = arguments.dataset or arguments.source.stem
    if not re.fullmatch(NAME, fallback):
        raise PipelineError(
            f"{fallback!r} is not a valid dataset name: use letters, digits, '.', '_', '-' in --dataset"
        )
    images = image_folder(arguments, arguments.images or arguments.source.parent)
    places, named = _scan(arguments.source, images, fallback)
    return {
        objects.join(arguments.dest, name) if named else arguments.dest: Lines(name, arguments.source, images, rows)
        for name, rows in places.items()
    }


class Entry(BaseModel, extra="forbid", strict=True):
    """A query in a row; with more fields, any other item."""

    text: str
    images: tuple[str, ...] = Field((), max_length=MAX_COUNT)
    video: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        return self.images if self.video is None else (*self.images, self.video)


class Judged(Entry):
    """A negative."""

    score: float | None = Field(None, allow_inf_nan=False, ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)


class Weighted(Judged):
    """A positive."""

    weight: float = Field(1.0, allow_inf_nan=False, ge=1 / LARGEST_NUMBER, le=LARGEST_NUMBER)


class Target(Weighted):
    alternatives: tuple[str, ...] = ()


class PairRow(BaseModel, extra="forbid", strict=True):
    """A line of the file."""

    query: Entry
    target: Target
    positives: tuple[Weighted, ...] = ()
    negatives: tuple[Judged, ...] = ()
    dataset: str = Field("", pattern=NAME)
    task: str = ""

    @model_validator(mode="after")
    def files_can_be_counted(self) -> "PairRow":
        others = (*self.positives, *self.negatives)
        images = sum(len(entry.images) for entry in others)
        videos = sum(entry.video is not None for entry in self.entries)
        if max(len(others), images, videos) > MAX_COUNT:
            raise ValueError(f"has more than {MAX_COUNT} positives and negatives, images of these, or videos")
        return self

    @model_validator(mode="after")
    def all_or_none_are_scored(self) -> "PairRow":
        if len({entry.score is None for entry in self.judged}) > 1:
            raise ValueError("has a score for only some of its target, positives and negatives: give all one, or none")
        return self

    @property
    def judged(self) -> tuple[Judged, ...]:
        return (self.target, *self.positives, *self.negatives)

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.query, *self.judged)

    @property
    def scores(self) -> tuple[float, ...] | None:
        scores = tuple(entry.score for entry in self.judged if entry.score is not None)
        return scores or None

    @classmethod
    def parse(cls, line: bytes) -> "PairRow":
        """Parse a line; raises Rejection. Does not access the row's files."""
        if len(line) > MAX_LINE:
            raise Rejection("line too long", f"more than {MAX_LINE >> 20} MiB")
        try:
            # In concatenated files, any line can begin with a byte-order mark.
            row = cls.model_validate_json(line.decode("utf-8-sig").strip())
            parse_json(line, "the line", remedy="remove one of them")  # detects duplicate keys
            return row
        except DocumentError as error:
            raise Rejection("wrong fields", str(error)) from None
        except UnicodeDecodeError as error:
            raise Rejection("not UTF-8", f"byte {error.start + 1} of the line") from None
        except ValidationError as error:
            errors = error.errors()
            if (first := errors[0])["type"] == "json_invalid":
                raise Rejection("not JSON", first["msg"].replace(" at line 1 column", " at column")) from None
            unknown = next((each["loc"] for each in errors if each["type"] == "extra_forbidden"), ())
            raise Rejection("wrong fields", explained(error) + (cls._known(*unknown) if unknown else "")) from None

    @classmethod
    def _known(cls, *place: str | int) -> str:
        """Return the end of a message about an unknown field: the nearest known one, or all of its object."""
        forms: dict[str | int, type[BaseModel]] = {
            "query": Entry,
            "target": Target,
            "positives": Weighted,
            "negatives": Judged,
        }
        known = (forms[place[0]] if len(place) > 1 else cls).model_fields
        near = get_close_matches(str(place[-1]).lower(), known, 1)
        return f", did you mean {near[0]}?" if near else f": the known ones are {', '.join(known)}"


@dataclass(frozen=True)
class Lines(Rows):
    """The rows of one dataset. places: (rows, 3) int64: line number from 1, byte offset, approximate shard bytes."""

    file: Path
    source: ImageFolder
    places: np.ndarray

    def sizes(self) -> np.ndarray:
        return self.places[:, 2]

    def name(self, number: int) -> str:
        return f"line {self.places[number, 0]}"

    def sample(self, number: int) -> Pair:
        line_number, offset, _ = self.places[number].tolist()
        with self.file.open("rb") as file:
            file.seek(offset)
            row = PairRow.parse(file.readline(MAX_LINE + 1))
        return Pair(
            f"{line_number:08d}",
            self.dataset,
            row.task,
            self._item(row.query),
            self._item(row.target),
            tuple(map(self._item, row.negatives)),
            tuple(_checked(text, row.target) for text in row.target.alternatives),
            positives=tuple(map(self._item, row.positives)),
            weights=tuple(entry.weight for entry in (row.target, *row.positives)),
            scores=row.scores,
        )

    def _item(self, entry: Entry) -> Item:
        text = _checked(entry.text, entry)
        images = tuple(self.source.read(name) for name in entry.images)
        return Item(text, images, None if entry.video is None else self.source.read_video(entry.video))


def _checked(text: str, entry: Entry) -> str:
    return checked_text(text, len(entry.images), int(entry.video is not None))


def _check_form(path: Path, file: BinaryIO) -> None:
    """Raise PipelineError if the beginning of the file shows that it does not have one JSON object per line."""
    why = foreign(file.read(8))
    file.seek(0)
    first = next((line.strip() for _, line in _lines(file) if line.strip()), b"")
    file.seek(0)
    if not first and not why:
        why = "has no rows: it is empty"
    elif first.startswith(b"[") or first == b"{":
        why = "does not have one object per line: write it so with jq -c 'if type == \"array\" then .[] else . end'"
    if why:
        raise PipelineError(f"{path} {why}")


def _scan(path: Path, source: ImageFolder, fallback: str) -> tuple[dict[str, np.ndarray], bool]:
    """Return the places of each dataset's rows (see `Lines`), and whether any row names its dataset."""
    places: dict[str, array[int]] = {}
    name, named = "", False
    with path.open("rb") as file:
        _check_form(path, file)
        lines = progress_bar(iterable=_lines(file), unit=" lines", unit_scale=True, desc="reading")
        for number, (offset, line) in enumerate(lines, 1):
            if not line.strip():
                continue
            shard_bytes = member_bytes(len(line))
            with suppress(Rejection):
                row = PairRow.parse(line)
                name, named = row.dataset or fallback, named or bool(row.dataset)
                paths = (path for entry in row.entries for path in entry.paths)
                shard_bytes += sum(member_bytes(source.size(path)) for path in paths)
            places.setdefault(name, array("q")).extend((number, offset, shard_bytes))
    if "" in places:  # unreadable rows before the first readable one
        first = places.pop("")
        name = next(iter(places), fallback)
        places[name] = first + places.get(name, array("q"))
    return {name: np.array(flat).reshape(-1, 3) for name, flat in places.items()}, named


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, content) of each line, without a byte-order mark; long lines are cut to MAX_LINE + 1 bytes."""
    if file.read(len(BOM_UTF8)) != BOM_UTF8:
        file.seek(0)
    while line := file.readline(MAX_LINE + 1):
        yield file.tell() - len(line), line
        while len(line) > MAX_LINE and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE + 1)


COMMAND = conversion(DESCRIPTION, add_arguments, datasets)
