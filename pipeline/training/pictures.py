"""Pictures of what a step learns from: queries, their targets and their hardest negatives, with similarities.

The queries are the first rank's, from different datasets where there are several. Their negatives are those of all
ranks. All comes from the step's batch and embeddings: nothing is read or embedded again. A margin's mask, sub-batches,
and the shortened or rounded vectors of a loss do not count here.
"""

import logging
from collections.abc import Callable, Sequence
from heapq import nlargest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.batch import Batch, Encoded
from pipeline.models.shown import View

QUERIES, NEGATIVES = 4, 3
_CELL, _HEIGHT, _MARGIN = 200, 240, 6  # pixels
_PICTURE = _CELL - 2 * _MARGIN, 120
_LINES, _LETTERS = 6, 31
_TEXT = 1000  # characters
_SIZE = 11
logger = logging.getLogger(__name__)

_BLACK, _GREY, _RED = (20, 20, 20), (120, 120, 120), (190, 30, 30)


class Candidate(NamedTuple):
    """An item, and its similarity to a query."""

    similarity: float
    view: View


class Row(NamedTuple):
    """A query, its target, and its most similar negatives, the hardest first."""

    query: View
    target: Candidate
    negatives: list[Candidate]


class _Query(NamedTuple):
    """A query's key, the keys of its right answers, its target's first, and its vector."""

    key: int
    answers: tuple[int, ...]
    vector: np.ndarray


def hardest(batch: Batch, embeddings: torch.Tensor, shown: Callable[[Encoded], View]) -> list[Row]:
    """Return rows of the global batch on the first rank; on others none. Collective.

    batch: this rank's part.  embeddings: (items, D) of its items, in their order.  shown: see `Processor`.
    """

    def view(key: int) -> View:
        return _small(batch.items[key], shown)

    place = {key: row for row, key in enumerate(batch.items)}
    chosen: list[list[_Query]] = [[]]
    if dist.get_rank() == 0:
        pairs = _chosen(batch)
        rows = embeddings[[place[batch.query[i]] for i in pairs]].float().cpu().numpy()
        answers = [(batch.target[i], *batch.positives[i]) for i in pairs]
        chosen = [[_Query(batch.query[i], *each) for i, *each in zip(pairs, answers, rows, strict=True)]]
    dist.broadcast_object_list(chosen)
    queries = chosen[0]
    if not queries:
        return []
    keys = list(
        dict.fromkeys(
            key
            for i, valid in enumerate(batch.valid)
            if valid
            for key in (batch.target[i], *batch.positives[i], *batch.negatives[i])
        )
    )
    found: list[list[Candidate]] = [[] for _ in queries]
    own: list[Candidate] = []
    if keys:
        vectors = torch.from_numpy(np.stack([query.vector for query in queries])).to(embeddings.device)
        columns = embeddings[[place[key] for key in keys]].float()
        similarities = (vectors @ columns.T).cpu().numpy()
        for number, (query, row) in enumerate(zip(queries, similarities, strict=True)):
            right = _right(batch, query)
            best = nlargest(NEGATIVES, ((float(s), key) for s, key in zip(row, keys, strict=True) if key not in right))
            found[number] = [Candidate(similarity, view(key)) for similarity, key in best]
            if dist.get_rank() == 0:
                target = query.answers[0]
                own.append(Candidate(float(row[keys.index(target)]), view(target)))
    ranks: list = [None] * dist.get_world_size()
    dist.gather_object(found, ranks if dist.get_rank() == 0 else None)
    if dist.get_rank():
        return []
    return [
        Row(
            view(query.key),
            target,
            nlargest(NEGATIVES, (each for of_rank in ranks for each in of_rank[number]), key=lambda each: each[0]),
        )
        for number, (query, target) in enumerate(zip(queries, own, strict=True))
    ]


def _small(item: Encoded, shown: Callable[[Encoded], View]) -> View:
    """Return an item's view as large as it will be drawn: of all ranks' views, the first GPU holds a copy."""
    try:
        view = shown(item)
        picture = None if view.picture is None else np.asarray(_scaled(view)).transpose(2, 0, 1)
    except Exception as error:  # the other ranks wait, and no picture is worth a run
        logger.warning("an item cannot be shown: %r", error)
        return View("(cannot be shown)")
    return View(view.text[:_TEXT], picture, view.aspect)


def _chosen(batch: Batch) -> list[int]:
    """Return the first valid pair of each dataset, then others, `QUERIES` at most."""
    valid = [i for i, is_valid in enumerate(batch.valid) if is_valid]
    first: dict[int, int] = {}
    for i in valid:
        first.setdefault(batch.origins[i].dataset, i)
    return [*first.values(), *(i for i in valid if i not in first.values())][:QUERIES]


def _right(batch: Batch, query: _Query) -> set[int]:
    """Return the keys of this rank's candidates that are no negatives: see `query_ids` of the loss."""
    alike = {query.key, *query.answers}
    for i, target in enumerate(batch.target):
        if batch.query[i] == query.key or batch.query[i] == query.answers[0] or target == query.answers[0]:
            alike |= {target, *batch.positives[i]}
    return alike


def drawn(rows: Sequence[Row]) -> np.ndarray:
    """Return the rows as one picture (height, width, 3) uint8."""
    import matplotlib  # here: each process of training imports this module, and would start later

    fonts = Path(matplotlib.get_data_path(), "fonts/ttf")
    font, bold = (ImageFont.truetype(str(fonts / name), _SIZE) for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"))
    sheet = Image.new("RGB", (_CELL * (2 + NEGATIVES), _HEIGHT * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        cells = [("query", _GREY, row.query), (f"target  {row.target.similarity:.3f}", _BLACK, row.target.view)]
        for rank, each in enumerate(row.negatives, 1):
            colour = _RED if each.similarity >= row.target.similarity else _BLACK
            cells.append((f"negative {rank}  {each.similarity:.3f}", colour, each.view))
        for column, (title, colour, view) in enumerate(cells):
            left, top = column * _CELL + _MARGIN, number * _HEIGHT + _MARGIN
            draw.text((left, top), title, colour, bold)
            top += _SIZE + _MARGIN
            if view.picture is not None:
                picture = _scaled(view)
                sheet.paste(picture, (left, top))
                top += picture.height + _MARGIN
            draw.multiline_text((left, top), _wrapped(view.text), _BLACK, font)
        draw.line([(0, (number + 1) * _HEIGHT - 1), (sheet.width, (number + 1) * _HEIGHT - 1)], (220, 220, 220))
    return np.asarray(sheet)


def _scaled(view: View) -> Image.Image:
    """Return the picture in its aspect ratio, as large as there is room."""
    assert view.picture is not None
    width, height = _PICTURE
    size = min(width, round(height * view.aspect)), min(height, round(width / view.aspect))
    return Image.fromarray(view.picture.transpose(1, 2, 0)).resize((max(size[0], 1), max(size[1], 1)))


def _wrapped(text: str) -> str:
    """Return a text in lines of so many letters, also without spaces, as in Chinese; cut at the last line."""
    lines, line = list[str](), ""
    for word in text.split():
        while len(word) > _LETTERS:
            lines, line, word = [*lines, line] if line else lines, word[:_LETTERS], word[_LETTERS:]
        if len(line) + 1 + len(word) > _LETTERS and line:
            lines, line = [*lines, line], word
        else:
            line = f"{line} {word}".strip()
    lines = [*lines, line]
    return "\n".join([*lines[: _LINES - 1], "…"] if len(lines) > _LINES else lines)


def as_table(rows: Sequence[Row]) -> str:
    """Return the texts and similarities as a Markdown table: the picture's font lacks some scripts."""

    def cell(view: View) -> str:
        return " ".join(view.text.split()).replace("|", "\\|") or "(picture)"

    titles = ["query", "target", *(f"negative {n}" for n in range(1, NEGATIVES + 1))]
    lines = [f"|{'|'.join(titles)}|", "|-" * len(titles) + "|"]
    for row in rows:
        cells = [cell(row.query)]
        cells += [f"**{each.similarity:.3f}** {cell(each.view)}" for each in (row.target, *row.negatives)]
        lines.append("|" + "|".join([*cells, *[""] * (NEGATIVES - len(row.negatives))]) + "|")
    return "\n".join(lines)
