"""Convert MMEB's training set, and others in its layout."""

import argparse
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from pipeline.convert.command import add_images, conversion, image_folder, local_path, positive
from pipeline.convert.rows import ImageFolder, Rejection, Rows, checked_text, folder, member_bytes
from pipeline.data.mmeb import MATTERS, MMEB_TASKS, mmeb_text
from pipeline.data.sample import Item, Pair, is_absent
from pipeline.errors import PipelineError
from pipeline.storage import objects
from pipeline.storage.documents import check_members, note_unread

DESCRIPTION = """\
MMEB's training set, or another one in its layout

SOURCE has the layout of https://huggingface.co/datasets/TIGER-Lab/MMEB-train:

    SOURCE/<subset>/original-*.parquet              rows: qry, qry_image_path, pos_text, pos_image_path,
    SOURCE/<subset>/diverse_instruction-*.parquet         neg_text, neg_image_path
    SOURCE/<path>, or SOURCE/images/<path>          the images that the rows name

Each subset becomes DEST/<subset>/. Every row becomes a pair: its query is qry, its target the positive, and its hard
negative the negative, unless that is empty. In texts, <|image_1|> becomes <image>; if the row names an image and the
text has no mark, <image> goes to the front. If the row names no image, as for WebQA's queries, the mark and the white
space after it are removed. A row is rejected if it has another mark, such as <|image_2|>, or a value that is not a
text; null and NaN count as the empty text.

    python tools/make_shards.py mmeb-train MMEB-train s3://bucket/mmeb --split diverse_instruction
"""

_SIDES = (("qry", "qry_image_path"), ("pos_text", "pos_image_path"), ("neg_text", "neg_image_path"))
_COLUMNS = [column for side in _SIDES for column in side]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=local_path, help="the folder with one folder per subset")
    parser.add_argument("--subset", nargs="+", metavar="NAME", help="use only these subsets (default: all)")
    parser.add_argument(
        "--split", choices=("original", "diverse_instruction"), default="original", help="(default original)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="use only the first N rows of each subset")
    add_images(parser, "SOURCE/images or SOURCE, depending on where the first image is")


def datasets(arguments: argparse.Namespace) -> dict[str, Rows]:
    """Return the URL of each selected subset and its rows."""
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
    groups = {name: _first_rows(chain.from_iterable(map(_row_groups, files[name])), arguments.limit) for name in names}
    images = image_folder(arguments, arguments.images or _image_place(source, chain(*groups.values())))
    return {objects.join(arguments.dest, name): Subset(name, images, groups[name]) for name in names}


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file. rows: only its first `rows` rows are used."""

    file: Path
    number: int
    rows: int


def _row_groups(file: Path) -> list[RowGroup]:
    with _readable(file):
        metadata = parquet.read_metadata(file)
        names = metadata.schema.to_arrow_schema().names
        check_members(str(file), names, _COLUMNS, matters=MATTERS)
        if missing := set(_COLUMNS) - set(names):
            raise ValueError(f"it has no column {', '.join(sorted(missing))}")
        types = {name: metadata.schema.to_arrow_schema().field(name).type for name in _COLUMNS}
        if nested := [name for name in _COLUMNS if pa.types.is_nested(types[name])]:
            raise ValueError(f"its column {nested[0]} contains {types[nested[0]]} instead of texts")
    return [RowGroup(file, number, metadata.row_group(number).num_rows) for number in range(metadata.num_row_groups)]


def _first_rows(groups: Iterable[RowGroup], limit: int | None) -> tuple[RowGroup, ...]:
    """Return the groups that contain the first `limit` rows."""
    if limit is None:
        return tuple(groups)
    kept = []
    for group in groups:
        kept.append(replace(group, rows=min(group.rows, limit)))
        limit -= kept[-1].rows
        if not limit:
            break
    return tuple(kept)


@lru_cache(maxsize=2)  # rows are read in order
def _table(group: RowGroup) -> pa.Table:
    """Read a group's rows. Columns of any text type become strings."""
    with _readable(group.file), parquet.ParquetFile(group.file) as file:
        table = file.read_row_group(group.number, columns=_COLUMNS).slice(0, group.rows)
        return pa.table({name: _as_strings(table[name]) for name in _COLUMNS})


def _as_strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    type_ = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    return column.cast(pa.string()) if any(is_type(type_) for is_type in _TEXTUAL) else column


_TEXTUAL = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_null,
)


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
    """The rows of one subset."""

    images: ImageFolder
    groups: tuple[RowGroup, ...]

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

    def name(self, number: int) -> str:
        return f"row {number}"

    def sample(self, number: int) -> Pair:
        query, target, negative = self._sides(number)
        negatives = (self._item(*negative),) if negative[0].strip() else ()  # with an image, the text has a mark
        task, _ = MMEB_TASKS.get(self.dataset, ("", True))
        return Pair(f"{number:08d}", self.dataset, task, self._item(*query), self._item(*target), negatives)

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
            return [(mmeb_text(row[text], bool(row[path])), row[path]) for text, path in _SIDES]
        except ValueError as error:
            raise Rejection("marks and files differ", str(error)) from None

    def _item(self, text: str, path: str) -> Item:
        return Item(checked_text(text, images=int(bool(path))), (self.images.read(path),) if path else ())


COMMAND = conversion(DESCRIPTION, add_arguments, datasets)
