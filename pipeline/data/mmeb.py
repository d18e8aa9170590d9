"""MMEB (https://huggingface.co/TIGER-Lab): its datasets, and the files its evaluation sets consist of.

    URL/tasks.json          {"Scene-VQA": {"task": "vqa", "in_distribution": true}, ...}; ours, MMEB has none
    URL/<dataset>/*.parquet rows: qry_text, qry_img_path, tgt_text, tgt_img_path; the first target is the right one.
                            Instructions may be apart, as in MMEB-V2's image sets: qry_inst, tgt_inst
    URL/images/<path>       the pictures the rows name; or eval_images, as the hub's archive calls it

or, converted, with the queries and candidates as items in shards:

    URL/tasks.json                  the same
    URL/<dataset>/index.json        each distinct query and candidate, once
    URL/<dataset>/rows.parquet      query, candidates: numbers of items
    URL/<dataset>/items.parquet     name: what a person would call each item
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
from pipeline.data.sample import BYTE_ORDER_MARK, IMAGE_MARK, MMEB_IMAGE_MARK, is_absent, text_fault
from pipeline.errors import PipelineError
from pipeline.storage import objects
from pipeline.storage.documents import FIXED, check_members, parse_json

TASKS_FILE, ROWS_FILE, ITEMS_FILE = "tasks.json", "rows.parquet", "items.parquet"
IMAGE_FOLDERS = ("images", "eval_images")
META_TASKS = ("classification", "vqa", "retrieval", "grounding")

# By meta-task: the datasets that training has too (in distribution), then those of evaluation alone.
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
# Name -> meta-task, and whether it is in distribution.
MMEB_TASKS = {
    name: (meta_task, part == 0)
    for meta_task, parts in _NAMES.items()
    for part, names in enumerate(parts)
    for name in names.split()
}
MMEB_TASKS["ImageNet_1K"] = MMEB_TASKS["ImageNet-1K"]  # so called in the training set

_COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
_INSTRUCTIONS = ("qry_inst", "tgt_inst")
MATTERS = "^(qry|query|tgt|target|cand|pos|neg)|inst|prompt|text|image|img|video"  # in a column's name

Side = tuple[str, str]  # a text, and the path of its image or ""


def mmeb_text(text: str, has_image: bool) -> str:
    """A row's text with `<image>` where its image goes: at the front, if the text does not say.

    A mark without an image is taken out, with the white space after it. ValueError for a mark of anything else.
    """
    if others := set(_MARKS.findall(text)) - {MMEB_IMAGE_MARK}:
        raise ValueError(f"{min(others)}, where a text may have {MMEB_IMAGE_MARK} alone, in {text[:200]!r}")
    text = text.lstrip(BYTE_ORDER_MARK)
    if not has_image:
        return re.sub(rf"{re.escape(MMEB_IMAGE_MARK)}\s*", "", text)
    text = text.replace(MMEB_IMAGE_MARK, IMAGE_MARK)
    return text if IMAGE_MARK in text else f"{IMAGE_MARK}\n{text}"


# Of other images and videos, and as Qwen's models write them.
_MARKS = re.compile(r"<\|(?:image|video|audio|vision)(?:_\w+)?\|>", re.IGNORECASE)


def read_tasks(url: str) -> dict[str, tuple[str, bool]]:
    """What `url`/tasks.json says: name -> meta-task, and whether it is in distribution."""
    file = objects.join(url, TASKS_FILE)
    remedy = (
        f"it does not give each dataset's task ({', '.join(META_TASKS)}) and in_distribution (true, false); mend it"
    )
    listed = parse_json(objects.read(file), file, dict[str, _Listed], remedy=remedy)
    return {name: (entry.task, entry.in_distribution) for name, entry in listed.items()}


@dataclass(frozen=True)
class _Listed:
    __pydantic_config__ = FIXED

    task: Literal[META_TASKS]
    in_distribution: bool


def evaluation_rows(url: str) -> Iterator[tuple[Side, list[Side]]]:
    """Each query with its candidates, the right one first, from the .parquet files below the folder `url`."""
    files = [file for file in objects.list_under(url) if file.endswith(".parquet")]
    if not files:
        raise PipelineError(f"{url} holds no .parquet file with MMEB's rows")
    for file in files:
        try:
            table = parquet.ParquetFile(BytesIO(objects.read(file)))
            names = table.schema_arrow.names
            check_members(file, names, (*_COLUMNS, *_INSTRUCTIONS), matters=MATTERS)
            if missing := [name for name in _COLUMNS if name not in names]:
                raise ValueError(f"it has no column {', '.join(missing)}")
            columns = [*_COLUMNS, *(name for name in _INSTRUCTIONS if name in names)]
            batches = table.iter_batches(batch_size=64, columns=columns)
            for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
                yield _sides(number, *(row.get(name) for name in (*_COLUMNS, *_INSTRUCTIONS)))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise PipelineError(f"{file} does not hold MMEB's rows ({', '.join(_COLUMNS)}): {error}") from None


def _sides(
    number: int, text: object, image: object, texts: object, images: object, asked: object, shown: object
) -> tuple[Side, list[Side]]:
    """A row's query and candidates; ValueError, by the row's number, if they are none.

    asked, shown: the instructions of the query and of all candidates, if there are any.
    """

    def plain(value: object) -> str:
        if not isinstance(value, str) and not is_absent(value):
            raise ValueError(f"row {number} has {value!r} where a text should be")
        return value.lstrip(BYTE_ORDER_MARK) if isinstance(value, str) else ""

    text, image, asked, shown = map(plain, (text, image, asked, shown))
    # A single candidate may stand without a list around it.
    texts, images = (list(map(plain, each if isinstance(each, list) else [each])) for each in (texts, images))
    # As VLM2Vec reads them: pictures may share one empty text, and texts one empty path.
    if len(texts) == 1 and not texts[0]:
        texts = texts * len(images)
    if len(images) < 2 and not any(images):
        images = [""] * len(texts)
    if not texts or len(texts) != len(images):
        raise ValueError(f"row {number} has {len(texts)} tgt_text and {len(images)} tgt_img_path")
    asks = [asked, *[shown] * len(texts)]
    query, *candidates = (_side(number, *each) for each in zip(asks, [text, *texts], [image, *images], strict=True))
    return query, candidates


def _side(number: int, instruction: str, text: str, image: str) -> Side:
    try:
        text = mmeb_text(_instructed(instruction, text), bool(image))
    except ValueError as error:
        raise ValueError(f"row {number} has {error}") from None
    if text.strip() and (fault := text_fault(text, images=int(bool(image)))):
        raise ValueError(f"row {number}: {fault[0]}: {fault[1]}")
    return text, image


def _instructed(instruction: str, text: str) -> str:
    """An instruction and the text that it is about, joined as VLM2Vec joins them: as MMEB's rows have both in one."""
    if not (instruction := instruction.replace(MMEB_IMAGE_MARK, "").strip()):
        return text
    return (f"{instruction} {text}" if text.strip() else instruction).replace(" \n", "\n") + "\n"


def converted_rows(url: str, index: Index) -> tuple[list[str], np.ndarray, list[np.ndarray]]:
    """A converted set: what each item is called, the number of each query, and those of its candidates.

    Raises ObjectError if a file is not the one indexed, PipelineError if the numbers are not those of items.
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
    raise PipelineError(f"{url}: {ROWS_FILE} or {ITEMS_FILE} is not of its {index.samples} items: convert again")


def _table(url: str, index: Index, name: str) -> pa.Table:
    return parquet.read_table(BytesIO(index.read_file(url, name)))
