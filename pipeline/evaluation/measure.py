"""Compute the report from the embeddings of a collection's items."""

import base64
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from io import BytesIO

import numpy as np
import torch
from PIL.Image import Image as Picture

from pipeline.data.sample import BadSample, Item
from pipeline.data.tiles import decode_image
from pipeline.data.video import sample_frames
from pipeline.evaluation.encoder import without_marks
from pipeline.evaluation.metrics import Scores, collapsed, leading, result_of, score_of, scores_of, worst_queries
from pipeline.evaluation.report import Case, Report, Shown, Variant
from pipeline.evaluation.tasks import Collection, Ranking, Task
from pipeline.models.compact import Form
from pipeline.progress import progress_bar

_PIXELS = 160  # the longer side of a picture in the report
_THREADS = 16


def measure(
    model: str,
    collection: Collection,
    take: Callable[[np.ndarray], np.ndarray],
    *,
    worst: int = 0,
    forms: Sequence[Form] = (),
    device: torch.device | str = "cpu",
) -> Report:
    """Return the report of a model.

    take: rows of the collection -> (n, D) unit vectors.  worst: how many of each dataset's worst queries to include.
    forms: other forms of the vectors to score, too.
    """
    results = {}
    others = [Variant(form, {}) for form in forms]
    shown = cache(partial(_shown, collection))
    names = dict.fromkeys(task.name for task in collection.tasks)
    for name in progress_bar(iterable=names, desc="scoring", unit="dataset", leave=False):
        tasks = [task for task in collection.tasks if task.name == name]
        scores = [scores_of(task, take, device=device) for task in tasks]
        chosen = [
            (task, each, query)
            for task, each in zip(tasks, scores, strict=True)
            for query in worst_queries(each, worst).tolist()
        ]
        chosen.sort(key=lambda case: case[1].positive[case[2]] - case[1].hardest[case[2]])
        with ThreadPoolExecutor(_THREADS) as pool:
            cases = list(pool.map(lambda case: _case(shown, *case), chosen[:worst]))
        results[name] = result_of(tasks, scores, cases, collapsed=any(collapsed(task, take) for task in tasks))
        task = leading(tasks)
        for other in others:
            other.scores[name] = score_of(task, scores_of(task, take, form=other.form, device=device))
    if not others:
        return Report(model, results)
    whole = Form(take(collection.tasks[0].queries[:1]).shape[1])
    variants = (Variant(whole, {name: result.score for name, result in results.items()}), *others)
    return Report(model, results, variants=variants)


def _case(shown: Callable[[int], Shown], task: Task, scores: Scores, query: int) -> Case:
    def candidate(number: int) -> Shown:
        if isinstance(task, Ranking):
            return shown(task.candidates[query][number])
        return Shown(task.names[number]) if task.names else shown(task.candidates[number])

    found = scores.worst_rank[query] == 1
    return Case(
        query=shown(task.queries[query]),
        right=candidate(scores.right[query]),
        first=candidate(scores.first[query]),
        positive=round(float(scores.positive[query]), 4),
        similarity=round(float(scores.positive[query] if found else scores.hardest[query]), 4),
        rank=int(scores.worst_rank[query]),
        direction=task.direction,
    )


def name_of(item: Item, name: str) -> str:
    """Return how an item is named for display: its text, and the name of its picture or video if it has one."""
    text, seen = without_marks(item.text), item.images or item.video is not None
    return f"{text} ({name})" if text and seen else name


def thumbnail(item: Item, pixels: int) -> Picture | None:
    """Return an item's first image, or the middle frame of its video, as RGB with sides of `pixels` at most, or None.

    A picture that cannot be decoded is None, too: a user's encoder may support more formats.
    """
    try:
        if item.images:
            picture = decode_image(item.images[0])
        elif item.video is not None:
            picture = sample_frames(item.video, 3)[1]
        else:
            return None
    except BadSample:
        return None
    picture.thumbnail((pixels, pixels))
    return picture.convert("RGB")


def _shown(collection: Collection, row: int) -> Shown:
    """Return an item with a thumbnail."""
    item = collection.items[row]()
    picture = thumbnail(item, _PIXELS)
    return Shown(name_of(item, collection.names[row]), _jpeg(picture) if picture else "")


def _jpeg(picture: Picture) -> str:
    data = BytesIO()
    picture.save(data, "JPEG", quality=75)
    return base64.b64encode(data.getvalue()).decode()
