"""Convert MMEB's training set and its evaluation sets, and others in their layouts."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from pipeline.convert.command import add_images, conversion, image_folder, in_range, local_path
from pipeline.convert.sharding import ImageFolder, Rejection, Rows, folder, member_bytes
from pipeline.data.mmeb import (
    IMAGE_FOLDERS,
    ITEMS_FILE,
    MATTERS,
    MMEB_TASKS,
    ROWS_FILE,
    TASKS_FILE,
    Side,
    evaluation_rows,
    mmeb_text,
    read_tasks,
)
from pipeline.data.sample import EMPTY_TEXT, IMAGE_MARK, Item, Pair, Single, is_absent, text_fault
from pipeline.errors import PipelineError
from pipeline.storage import objects
from pipeline.storage.documents import check_members, note_unread

_TRAIN = """\
MMEB's training set, or another one in its layout

SOURCE has the layout of https://huggingface.co/datasets/TIGER-Lab/MMEB-train:

    SOURCE/<subset>/original-*.parquet              rows: qry, qry_image_path, pos_text, pos_image_path,
    SOURCE/<subset>/diverse_instruction-*.parquet         neg_text, neg_image_path
    SOURCE/<path>, or SOURCE/images/<path>          the images that the rows name

Each subset becomes DEST/<subset>/. Every row becomes a pair: its query is qry, its target the positive, and its hard
negative the negative, unless that is empty. In texts, <|image_1|> becomes <image>; nothing else changes, white space at
the ends included. A row may have an image without a mark, or a mark without an image, as WebQA's queries:
model.marks in the recipe says how they are read. A row is rejected if it has another mark, such as <|image_2|>, a
second one, a query or positive without text and image, or a value that is not a text; null and NaN count as the empty
text.

    python tools/make_shards.py mmeb-train MMEB-train s3://bucket/mmeb --split diverse_instruction
"""
_EVAL = """\
MMEB's evaluation sets, or others in their layout

SOURCE has the layout of https://huggingface.co/datasets/TIGER-Lab/MMEB-eval:

    SOURCE/<dataset>/*.parquet   rows: qry_text, qry_img_path, tgt_text, tgt_img_path; the first target is correct.
                                 The instructions qry_inst and tgt_inst of MMEB-V2 are put before the texts
    SOURCE/images/<path>         the images that the rows name; or eval_images, as in the hub's archive
    SOURCE/tasks.json            only for datasets other than MMEB's 36:
                                 {"My-Set": {"task": "retrieval", "in_distribution": false}, ...}, where task is
                                 classification, vqa, retrieval or grounding

Each dataset becomes DEST/<dataset>/: its distinct queries and candidates are items in shards, and rows.parquet lists
the candidates of each query by number. Give DEST to `pipeline.evaluate`. A score over fewer rows would not be
comparable, so a missing or broken image is an error here, regardless of --max-rejected.

    python tools/make_shards.py mmeb-eval MMEB-eval s3://bucket/mmeb-eval
"""
_SIDES = (("qry", "qry_image_path"), ("pos_text", "pos_image_path"), ("neg_text", "neg_image_path"))
_COLUMNS = [column for side in _SIDES for column in side]


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=local_path, help="the folder with one folder per subset")
    parser.add_argument("--subset", nargs="+", metavar="NAME", help="use only these subsets (default: all)")
    parser.add_argument(
        "--split", choices=("original", "diverse_instruction"), default="original", help="(default original)"
    )
    parser.add_argument("--limit", type=in_range(1), metavar="N", help="use only the first N rows of each subset")
    _add_keep_empty(parser, "query or positive")
    add_images(parser, "SOURCE/images or SOURCE, depending on where the first image is")


def _add_keep_empty(parser: argparse.ArgumentParser, sides: str) -> None:
    parser.add_argument(
        "--keep-empty", action="store_true", help=f"keep rows with a {sides} that has neither text nor image"
    )


def _subsets(arguments: argparse.Namespace) -> dict[str, Rows]:
    source = folder(arguments.source)
    files: dict[str, list[Path]] = {}
    for file in sorted(source.glob(f"*/{arguments.split}-*.parquet")):
        files.setdefault(file.parent.name, []).append(file)
    if not files:
        raise PipelineError(f"{source} has no <subset>/{arguments.split}-*.parquet: see --help for the layout")
    others = {file.parent.name for file in source.glob("*/*.parquet")} - files.keys()
    note_unread(f"{source}, which has no {arguments.split}-*.parquet", sorted(others), kind="subset")
    names = arguments.subset or list(files)
    if unknown := [name for name in names if name not in files]:
        raise PipelineError(f"--subset: no {', '.join(unknown)} in {source}; it has {', '.join(files)}")
    groups = {name: _row_groups(files[name], arguments.limit or sys.maxsize) for name in names}
    images = image_folder(arguments, arguments.images or _image_place(source, chain(*groups.values())))
    keep = arguments.keep_empty
    return {objects.join(arguments.dest, name): Subset(name, images, groups[name], keep) for name in names}


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file. rows: only its first `rows` rows are used."""

    file: Path
    number: int
    rows: int


def _row_groups(files: list[Path], limit: int) -> tuple[RowGroup, ...]:
    """Return the row groups that contain the first `limit` rows. Later files are not opened."""
    groups = []
    for file in files:
        if not limit:
            break
        with _readable(file):
            metadata = parquet.read_metadata(file)
            schema = metadata.schema.to_arrow_schema()
            check_members(str(file), schema.names, _COLUMNS, matters=MATTERS)
            if missing := set(_COLUMNS) - set(schema.names):
                raise ValueError(f"it has no column {', '.join(sorted(missing))}")
            types = {name: schema.field(name).type for name in _COLUMNS}
            if nested := [name for name in _COLUMNS if pa.types.is_nested(types[name])]:
                raise ValueError(f"its column {nested[0]} contains {types[nested[0]]} instead of texts")
        for number in range(metadata.num_row_groups):
            rows = min(metadata.row_group(number).num_rows, limit)
            if rows:
                groups.append(RowGroup(file, number, rows))
            limit -= rows
    return tuple(groups)


@lru_cache(maxsize=2)  # rows are read in order
def _table(group: RowGroup) -> pa.Table:
    """Read a group's rows. Columns of any text type become strings."""
    with _readable(group.file), parquet.ParquetFile(group.file) as file:
        table = file.read_row_group(group.number, columns=_COLUMNS).slice(0, group.rows)
        return pa.table({name: _as_strings(table[name]) for name in _COLUMNS})


def _as_strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    type_ = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    return column.cast(pa.string()) if str(type_) in _TEXTUAL else column


_TEXTUAL = ("string", "large_string", "string_view", "binary", "large_binary", "null")


def _texts(group: RowGroup, name: str) -> pa.ChunkedArray:
    """Return a column as strings, with "" for missing values and for values that are not texts."""
    column = _table(group)[name]
    column = column if pa.types.is_string(column.type) else pa.chunked_array([pa.nulls(len(column), pa.string())])
    return pc.fill_null(column, "")


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PipelineError(f"{file} does not contain MMEB's rows: {error}; see --help for the layout") from None


def _image_place(source: Path, groups: Iterable[RowGroup]) -> Path:
    """Return the folder of the first image. Published paths begin with "images/", but paths in some copies do not."""
    columns = (_texts(group, column).cast(pa.binary()) for group in groups for _, column in _SIDES)
    first = next((path for column in columns for path in column.to_pylist() if path), b"")
    return source / "images" if ImageFolder(source / "images").size(os.fsdecode(first)) else source


@dataclass(frozen=True)
class Subset(Rows):
    """The rows of one subset.  keep_empty: keep rows with a query or positive that has neither text nor image."""

    images: ImageFolder
    groups: tuple[RowGroup, ...]
    keep_empty: bool = False

    def sizes(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *map(self._group_sizes, self.groups)])

    def _group_sizes(self, group: RowGroup) -> np.ndarray:
        texts = [pc.binary_length(_texts(group, text)).to_numpy().astype(np.int64) for text, _ in _SIDES]
        sizes = member_bytes(np.sum(texts, axis=0))
        for _, column in _SIDES:
            paths = _texts(group, column).cast(pa.binary()).combine_chunks()
            paths = paths.dictionary_encode()  # many rows share an image
            names = map(os.fsdecode, paths.dictionary.to_pylist())
            known = [member_bytes(self.images.size(name)) if name else 0 for name in names]
            sizes += np.array(known, np.int64)[paths.indices.to_numpy()]
        return sizes

    def sample(self, number: int) -> Pair:
        query, target, negative = self._sides(number)
        negatives = (_item(self.images, *negative),) if any(map(str.strip, negative)) else ()
        task, _ = MMEB_TASKS.get(self.dataset, ("", True))
        query_item, target_item = (_item(self.images, *side, may_be_empty=self.keep_empty) for side in (query, target))
        return Pair(f"{number:08d}", self.dataset, task, query_item, target_item, negatives)

    def _sides(self, number: int) -> list[tuple[str, str]]:
        """Return (text with our marks, image path) of the row's query, positive and negative."""
        for group in self.groups:
            if number < group.rows:
                break
            number -= group.rows
        try:
            (row,) = _table(group).slice(number, 1).to_pylist()
        except UnicodeDecodeError as error:
            raise Rejection("not UTF-8", str(error)) from None
        for name, value in row.items():
            if is_absent(value):
                row[name] = ""
            elif not isinstance(value, str):
                raise Rejection("wrong fields", f"{name} is {value!r}, which is not a text")
        try:
            return [(mmeb_text(row[text]), row[path]) for text, path in _SIDES]
        except ValueError as error:
            raise Rejection("marks and files differ", str(error)) from None


def _item(images: ImageFolder, text: str, path: str, *, may_be_empty: bool = False) -> Item:
    """Return a text with the image at `path`, if there is one; neither has to exist. Raises Rejection."""
    fault = text_fault(text, images=text.count(IMAGE_MARK))
    if fault and not (fault[0] == EMPTY_TEXT and (path or may_be_empty)):
        raise Rejection(*fault)
    return Item(text, (images.read(path),) if path else ())


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=local_path, help="the folder with one folder per dataset")
    parser.add_argument(
        "--images",
        type=local_path,
        metavar="FOLDER",
        help="folder of the images (default: SOURCE/images, SOURCE/eval_images or SOURCE)",
    )
    parser.add_argument("--subset", nargs="+", metavar="NAME", help="use only these datasets (default: all)")
    parser.add_argument("--limit", type=in_range(1), metavar="N", help="use only the first N queries of each dataset")
    _add_keep_empty(parser, "query or candidate")


def _evaluation_sets(arguments: argparse.Namespace) -> dict[str, Rows]:
    source = folder(arguments.source)
    beside = next((source / name for name in IMAGE_FOLDERS if (source / name).is_dir()), source)
    images = ImageFolder(folder(arguments.images or beside))
    sets: dict[str, Rows] = {}
    for name, (meta_task, _) in _tasks(arguments).items():
        rows = list(islice(evaluation_rows(str(source / name)), arguments.limit))
        keep = arguments.keep_empty
        sets[objects.join(arguments.dest, name)] = EvaluationSet.of(name, meta_task, images, rows, keep)
    return sets


def _tasks_file(arguments: argparse.Namespace) -> Iterator[tuple[str, bytes]]:
    """Yield DEST/tasks.json for the selected sets."""
    tasks = {name: {"task": task, "in_distribution": known} for name, (task, known) in _tasks(arguments).items()}
    yield objects.join(arguments.dest, TASKS_FILE), (json.dumps(tasks, indent=1) + "\n").encode()


def _tasks(arguments: argparse.Namespace) -> dict[str, tuple[str, bool]]:
    """Return name -> (meta-task, whether it is in distribution) of the selected sets."""
    source = folder(arguments.source)
    file = source / TASKS_FILE
    known, where = (read_tasks(str(source)), file) if file.is_file() else (MMEB_TASKS, "MMEB's 36 datasets")
    names = set(arguments.subset or (file.parent.name for file in source.glob("*/*.parquet")))
    if not names:
        raise PipelineError(f"{source} has no <dataset>/*.parquet: see --help for the layout")
    if unknown := names - known.keys():
        raise PipelineError(
            f"{', '.join(sorted(unknown))}: not in {where}; choose others with --subset, or give the meta-task of each "
            f"dataset in {file}: see --help"
        )
    return {name: task for name, task in known.items() if name in names}


@dataclass(frozen=True)
class EvaluationSet(Rows):
    """One set.  items: the distinct queries and candidates.  queries, candidates: item numbers of each row.

    keep_empty: items may have neither text nor image.
    """

    task: str
    images: ImageFolder
    items: list[Side]
    queries: list[int]
    candidates: list[list[int]]
    keep_empty: bool = False

    @classmethod
    def of(
        cls,
        dataset: str,
        task: str,
        images: ImageFolder,
        rows: list[tuple[Side, list[Side]]],
        keep_empty: bool,
    ) -> "EvaluationSet":
        """Number the queries in order of appearance, then the candidates that are not queries."""
        sides = chain((query for query, _ in rows), chain.from_iterable(candidates for _, candidates in rows))
        numbers = {side: number for number, side in enumerate(dict.fromkeys(sides))}
        queries = [numbers[query] for query, _ in rows]
        candidates = [[numbers[side] for side in sides] for _, sides in rows]
        return cls(dataset, task, images, list(numbers), queries, candidates, keep_empty)

    def sizes(self) -> np.ndarray:
        sizes = [self.images.size(image) if image else 0 for _, image in self.items]
        return 1024 + member_bytes(np.array(sizes, np.int64))

    def name(self, number: int) -> str:
        """Return the item's first occurrence: row and role."""
        for row, (query, candidates) in enumerate(zip(self.queries, self.candidates, strict=True)):
            if query == number:
                return f"row {row}, query"
            if number in candidates:
                return f"row {row}, candidate {candidates.index(number)}"
        raise AssertionError("unreachable")

    def sample(self, number: int) -> Single:
        try:
            item = _item(self.images, *self.items[number], may_be_empty=self.keep_empty)
        except Rejection as reason:
            raise PipelineError(
                f"{self.dataset}, {self.name(number)}: {reason}; an evaluation set must be complete: correct it, or "
                "choose others with --subset"
            ) from None
        return Single(f"{number:08d}", self.dataset, self.task, item)

    def files(self) -> dict[str, bytes]:
        """Return the rows, and the name of each item: its image's path, or its text."""
        candidates = pa.array(self.candidates, pa.list_(pa.int32()))
        return {
            ROWS_FILE: _parquet({"query": pa.array(self.queries, pa.int32()), "candidates": candidates}),
            ITEMS_FILE: _parquet({"name": pa.array([image or text for text, image in self.items])}),
        }


def _parquet(columns: dict[str, pa.Array]) -> bytes:
    buffer = BytesIO()
    parquet.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


TRAIN = conversion(_TRAIN, _add_train_arguments, _subsets)
EVAL = conversion(_EVAL, _add_eval_arguments, _evaluation_sets, _tasks_file)
