"""MMEB (https://huggingface.co/TIGER-Lab): its datasets, and the files of its evaluation sets.

    URL/tasks.json          {"Scene-VQA": {"task": "vqa", "in_distribution": true}, ...}; MMEB itself lacks this file
    URL/<dataset>/*.parquet rows: qry_text, qry_img_path, tgt_text, tgt_img_path; the first target is the correct one.
                            MMEB-V2's image sets have instructions in separate columns: qry_inst, tgt_inst
    URL/images/<path>       the images that the rows name; or eval_images, as in the hub's archive

After conversion, the queries and candidates are items in shards:

    URL/tasks.json                  as above
    URL/<dataset>/index.json        each distinct query and candidate, once
    URL/<dataset>/rows.parquet      query, candidates: item numbers
    URL/<dataset>/items.parquet     name: a readable name of each item
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from pipeline.data.index import Index
from pipeline.data.sample import EMPTY_TEXT, IMAGE_MARK, MMEB_IMAGE_MARK, is_absent, text_fault
from pipeline.errors import PipelineError
from pipeline.storage import objects
from pipeline.storage.documents import FIXED, check_members, parse_json

TASKS_FILE, ROWS_FILE, ITEMS_FILE = "tasks.json", "rows.parquet", "items.parquet"
IMAGE_FOLDERS = ("images", "eval_images")
META_TASKS = ("classification", "vqa", "retrieval", "grounding")

# Meta-task -> (datasets that are also in the training set, which are in distribution; datasets only for evaluation).
_NAMES = {
    "classification": (
        "ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
        "Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    ),
    "vqa": (
        "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W",
        "ScienceQA VizWiz GQA TextVQA",
    ),
    "retrieval": (
        "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
        "OVEN FashionIQ EDIS Wiki-SS-NQ",
    ),
    "grounding": ("MSCOCO", "RefCOCO RefCOCO-Matching Visual7W-Pointing"),
}
# Name -> (meta-task, whether it is in distribution).
MMEB_TASKS = {
    name: (meta_task, part == 0)
    for meta_task, parts in _NAMES.items()
    for part, names in enumerate(parts)
    for name in names.split()
}
MMEB_TASKS["ImageNet_1K"] = MMEB_TASKS["ImageNet-1K"]  # its name in the training set

_COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
_INSTRUCTIONS = ("qry_inst", "tgt_inst")
MATTERS = "^(qry|query|tgt|target|cand|pos|neg)|inst|prompt|text|image|img|video"  # see check_members

Side = tuple[str, ...]  # a text, the path of its image or "", and if they are apart, the instruction or ""


def mmeb_text(text: str) -> str:
    """Return a row's text with MMEB's image mark as `<image>`. Nothing else changes, as in LLaVE's code.

    Raises ValueError for another mark, and for more than one.
    """
    if others := set(_MARKS.findall(text)) - {MMEB_IMAGE_MARK}:
        raise ValueError(f"the mark {min(others)}, but only {MMEB_IMAGE_MARK} is supported, in {text[:200]!r}")
    text = text.replace(MMEB_IMAGE_MARK, IMAGE_MARK)
    if (marks := text.count(IMAGE_MARK)) > 1:
        raise ValueError(f"{marks} {IMAGE_MARK}, but a row has at most one image, in {text[:200]!r}")
    return text


# Marks of further images, of videos, and of Qwen's models.
_MARKS = re.compile(r"<\|(?:image|video|audio|vision)(?:_\w+)?\|>", re.IGNORECASE)


def read_tasks(url: str) -> dict[str, tuple[str, bool]]:
    """Read `url`/tasks.json: name -> (meta-task, whether it is in distribution)."""
    file = objects.join(url, TASKS_FILE)
    remedy = f"give each dataset its task ({', '.join(META_TASKS)}) and in_distribution (true, false)"
    listed = parse_json(objects.read(file), file, dict[str, _Listed], remedy=remedy)
    return {name: (entry.task, entry.in_distribution) for name, entry in listed.items()}


@dataclass(frozen=True)
class _Listed:
    __pydantic_config__ = FIXED

    task: Literal["classification", "vqa", "retrieval", "grounding"]
    in_distribution: bool


def evaluation_rows(url: str, *, apart: bool = False) -> Iterator[tuple[Side, list[Side]]]:
    """Yield each query and its candidates, the correct one first, from the .parquet files below the folder `url`.

    apart: instructions are not joined with the texts, and candidates have none, as in Qwen3-VL-Embedding's evaluation
    (src/evaluation/mmeb_v2/data/datasets of github.com/QwenLM/Qwen3-VL-Embedding, commit 8ce3aab).
    """
    files = [file for file in objects.list_under(url) if file.endswith(".parquet")]
    if not files:
        raise PipelineError(f"{url} contains no .parquet file with MMEB's rows")
    for file in files:
        try:
            table = parquet.ParquetFile(BytesIO(objects.read(file)))
            names = table.schema_arrow.names
            check_members(file, names, (*_COLUMNS, *_INSTRUCTIONS), matters=MATTERS)
            if missing := [name for name in _COLUMNS if name not in names]:
                raise ValueError(f"it has no column {', '.join(missing)}")
            if apart and "qry_inst" not in names:
                raise ValueError("it has no column qry_inst: its instructions are in the texts")
            columns = [*_COLUMNS, *(name for name in _INSTRUCTIONS if name in names)]
            batches = table.iter_batches(batch_size=64, columns=columns)
            for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
                try:
                    yield _sides(row, apart)
                except ValueError as error:
                    raise ValueError(f"row {number}: {error}") from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise PipelineError(f"{file} does not contain MMEB's rows ({', '.join(_COLUMNS)}): {error}") from None


def _sides(row: dict[str, object], apart: bool) -> tuple[Side, list[Side]]:
    """Return a row's query and candidates. Raises ValueError if they are invalid."""

    def plain(value: object) -> str:
        if not isinstance(value, str) and not is_absent(value):
            raise ValueError(f"{value!r} is not a text")
        return value if isinstance(value, str) else ""

    def listed(values: object) -> list[str]:  # a single candidate may have no list around it
        return list(map(plain, values if isinstance(values, list) else [values]))

    def side(text: str, image: str, instruction: object, *, query: bool = False) -> Side:
        instruction = plain(instruction)
        text = mmeb_text(text if apart else _instructed(instruction, text))
        fault = text_fault(text, images=text.count(IMAGE_MARK))
        if fault and fault[0] != EMPTY_TEXT:
            raise ValueError(": ".join(fault))
        if apart:
            return text, image, instruction.replace(MMEB_IMAGE_MARK, "").strip() if query else ""
        return text, image

    targets, paths = listed(row["tgt_text"]), listed(row["tgt_img_path"])
    # As in VLM2Vec: images may share one empty text, and texts one empty path.
    if len(targets) == 1 and not targets[0]:
        targets = targets * len(paths)
    if len(paths) < 2 and not any(paths):
        paths = [""] * len(targets)
    if not targets or len(targets) != len(paths):
        raise ValueError(f"{len(targets)} tgt_text and {len(paths)} tgt_img_path")
    query = side(plain(row["qry_text"]), plain(row["qry_img_path"]), row.get("qry_inst"), query=True)
    return query, [side(*target, row.get("tgt_inst")) for target in zip(targets, paths, strict=True)]


def _instructed(instruction: str, text: str) -> str:
    """Join an instruction and its text as in VLM2Vec and in MMEB's own rows."""
    if not (instruction := instruction.replace(MMEB_IMAGE_MARK, "").strip()):
        return text
    return (f"{instruction} {text}" if text.strip() else instruction).replace(" \n", "\n") + "\n"


def converted_rows(url: str, index: Index) -> tuple[list[str], np.ndarray, list[np.ndarray]]:
    """Read a converted set. Returns each item's name, each row's query, and each row's candidates, as item numbers.

    Raises ObjectError if a file differs from the indexed one, PipelineError if an item number does not exist.
    """
    try:
        names = _table(url, index, ITEMS_FILE)["name"].to_pylist()
        rows = _table(url, index, ROWS_FILE)
        queries, candidates = rows["query"].to_numpy(), rows["candidates"].to_numpy()
        numbers = np.concatenate([queries, *candidates])
        of_items = len(names) == index.samples and min(map(len, candidates)) > 0
        if of_items and numbers.dtype.kind == "i" and numbers.min() >= 0 and numbers.max() < index.samples:
            return names, queries, list(candidates)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        pass
    raise PipelineError(f"{url}: {ROWS_FILE} or {ITEMS_FILE} does not match its {index.samples} items: convert again")


def _table(url: str, index: Index, name: str) -> pa.Table:
    return parquet.read_table(BytesIO(index.read_file(url, name)))
