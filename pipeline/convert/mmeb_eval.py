"""MMEB's evaluation sets: each distinct query and candidate once, as an item by itself, and rows of their numbers."""

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
from pipeline.convert.rows import ImageFolder, Rejection, checked_text, folder, member_bytes
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

SOURCE is laid out as https://huggingface.co/datasets/TIGER-Lab/MMEB-eval:

    SOURCE/<dataset>/*.parquet   rows: qry_text, qry_img_path, tgt_text, tgt_img_path; the first target is right;
                                 with qry_inst and tgt_inst, as MMEB-V2 has them, these go before the texts
    SOURCE/images/<path>         the images that the rows name; or eval_images, as the hub's archive calls it
    SOURCE/tasks.json            only for datasets other than MMEB's 36:
                                 {"My-Set": {"task": "retrieval", "in_distribution": false}, ...}, where task is
                                 classification, vqa, retrieval or grounding

Each dataset becomes DEST/<dataset>/: its distinct queries and candidates as items in shards, each once, and
rows.parquet, which says by their numbers what each query's candidates are. DEST is what `pipeline.evaluate` takes.
A score over fewer rows would be another benchmark's, so a missing or broken image is an error here, whatever
--max-rejected says.

    python tools/make_shards.py mmeb-eval MMEB-eval s3://bucket/mmeb-eval
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=local_path, help="the folder with a folder for each dataset")
    parser.add_argument(
        "--images", type=local_path, metavar="FOLDER", help="of the images (SOURCE/images or eval_images, else SOURCE)"
    )
    parser.add_argument("--subset", nargs="+", metavar="NAME", help="only these datasets (all)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N queries of each dataset")


def datasets(arguments: argparse.Namespace) -> dict[str, "EvaluationSet"]:
    """The sets asked for, by the URL of their folder."""
    source = folder(arguments.source)
    beside = next((source / name for name in IMAGE_FOLDERS if (source / name).is_dir()), source)
    images = ImageFolder(folder(arguments.images or beside))
    sets = {}
    for name, (meta_task, _) in _tasks(arguments).items():
        rows = list(islice(evaluation_rows(str(source / name)), arguments.limit))
        sets[objects.join(arguments.dest, name)] = EvaluationSet.of(name, meta_task, images, rows)
    return sets


def tasks_file(arguments: argparse.Namespace) -> Iterator[tuple[str, bytes]]:
    """DEST/tasks.json, of the sets asked for."""
    tasks = {name: {"task": task, "in_distribution": known} for name, (task, known) in _tasks(arguments).items()}
    yield objects.join(arguments.dest, TASKS_FILE), (json.dumps(tasks, indent=1) + "\n").encode()


def _tasks(arguments: argparse.Namespace) -> dict[str, tuple[str, bool]]:
    """Name -> meta-task and whether it is in distribution, of the sets asked for."""
    source = folder(arguments.source)
    file = source / TASKS_FILE
    known, where = (read_tasks(str(source)), file) if file.is_file() else (MMEB_TASKS, "MMEB's 36 datasets")
    names = set(arguments.subset or (file.parent.name for file in source.glob("*/*.parquet")))
    if not names:
        raise PipelineError(f"{source} has no <dataset>/*.parquet: see --help for the layout")
    if unknown := names - known.keys():
        raise PipelineError(
            f"{', '.join(sorted(unknown))}: not in {where}; choose others by --subset, or give the meta-task of each "
            f"dataset in {file}: see --help"
        )
    return {name: kind for name, kind in known.items() if name in names}


@dataclass(frozen=True)
class EvaluationSet:
    """One set. items: distinct sides of its rows; queries, candidates: their numbers, row by row."""

    dataset: str
    task: str
    images: ImageFolder
    items: list[Side]
    queries: list[int]
    candidates: list[list[int]]

    @classmethod
    def of(cls, dataset: str, task: str, images: ImageFolder, rows: list[tuple[Side, list[Side]]]) -> "EvaluationSet":
        """Queries are numbered first, in order of appearance, then candidates that are not among them."""
        sides = chain((query for query, _ in rows), chain.from_iterable(candidates for _, candidates in rows))
        numbers = {side: number for number, side in enumerate(dict.fromkeys(sides))}
        queries = [numbers[query] for query, _ in rows]
        candidates = [[numbers[side] for side in sides] for _, sides in rows]
        return cls(dataset, task, images, list(numbers), queries, candidates)

    def sizes(self) -> np.ndarray:
        """(items,) int64 bytes in a shard, about."""
        sizes = [self.images.size(image) if image else 0 for _, image in self.items]
        return 1024 + member_bytes(np.array(sizes, np.int64))

    def name(self, number: int) -> str:
        """Where the item comes first in the rows."""
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
                f"{self.dataset}, {self.name(number)}: {reason}; an evaluation set is converted whole: mend it, or "
                "choose others by --subset"
            ) from None
        return Single(f"{number:08d}", self.dataset, self.task, item)

    def files(self) -> dict[str, bytes]:
        """The rows, and what a person would call each item: its image's path, else its text."""
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
