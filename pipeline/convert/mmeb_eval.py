"""Convert MMEB's evaluation sets: each distinct query and candidate becomes an item, and rows contain item numbers."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from pipeline.convert.command import conversion, local_path, positive
from pipeline.convert.rows import ImageFolder, Rejection, Rows, checked_text, folder, member_bytes
from pipeline.data.mmeb import (
    IMAGE_FOLDERS,
    ITEMS_FILE,
    MMEB_TASKS,
    ROWS_FILE,
    TASKS_FILE,
    Side,
    evaluation_rows,
    read_tasks,
)
from pipeline.data.sample import Item, Single
from pipeline.errors import PipelineError
from pipeline.storage import objects

DESCRIPTION = """\
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=local_path, help="the folder with one folder per dataset")
    parser.add_argument(
        "--images",
        type=local_path,
        metavar="FOLDER",
        help="folder of the images (default: SOURCE/images, SOURCE/eval_images or SOURCE)",
    )
    parser.add_argument("--subset", nargs="+", metavar="NAME", help="use only these datasets (default: all)")
    parser.add_argument("--limit", type=positive, metavar="N", help="use only the first N queries of each dataset")


def datasets(arguments: argparse.Namespace) -> dict[str, Rows]:
    """Return the URL of each selected set and its items."""
    source = folder(arguments.source)
    beside = next((source / name for name in IMAGE_FOLDERS if (source / name).is_dir()), source)
    images = ImageFolder(folder(arguments.images or beside))
    sets: dict[str, Rows] = {}
    for name, (meta_task, _) in _tasks(arguments).items():
        rows = list(islice(evaluation_rows(str(source / name)), arguments.limit))
        sets[objects.join(arguments.dest, name)] = EvaluationSet.of(name, meta_task, images, rows)
    return sets


def tasks_file(arguments: argparse.Namespace) -> Iterator[tuple[str, bytes]]:
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
    """One set. items: the distinct queries and candidates. queries, candidates: item numbers of each row."""

    task: str
    images: ImageFolder
    items: list[Side]
    queries: list[int]
    candidates: list[list[int]]

    @classmethod
    def of(cls, dataset: str, task: str, images: ImageFolder, rows: list[tuple[Side, list[Side]]]) -> "EvaluationSet":
        """Number the queries in order of appearance, then the candidates that are not queries."""
        sides = chain((query for query, _ in rows), chain.from_iterable(candidates for _, candidates in rows))
        numbers = {side: number for number, side in enumerate(dict.fromkeys(sides))}
        queries = [numbers[query] for query, _ in rows]
        candidates = [[numbers[side] for side in sides] for _, sides in rows]
        return cls(dataset, task, images, list(numbers), queries, candidates)

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
        text, image = self.items[number]
        try:
            item = Item(checked_text(text, images=int(bool(image))), (self.images.read(image),) if image else ())
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


COMMAND = conversion(DESCRIPTION, add_arguments, datasets, tasks_file)
