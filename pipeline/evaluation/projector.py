"""Files for TensorBoard's embedding projector: some queries of each task, with one right answer to each.

    FOLDER/projector_config.pbtxt         names the vectors that there are
    FOLDER/projector/NAME/vectors.bytes   (N, D) float32
    FOLDER/projector/NAME/labels.tsv      of each row: the item, its dataset, and whether it is a query or an answer
    FOLDER/projector/NAME/sprite.png      a small picture of each row

The vectors are those of the evaluation: no item is embedded for this.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import isqrt
from pathlib import Path
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.Image import Image as Picture
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from pipeline.errors import PipelineError, disk_errors, printable
from pipeline.evaluation.measure import name_of, thumbnail
from pipeline.evaluation.tasks import Collection, Ranking
from pipeline.storage.atomic import remove_leftovers, replacing, write_file

logger = logging.getLogger(__name__)

_CONFIG = "projector_config.pbtxt"
_VECTORS, _LABELS, _SPRITE = "vectors.bytes", "labels.tsv", "sprite.png"
_CELL = 64  # pixels of an item's picture
_SIDE = 8192  # pixels of a sprite's side, as TensorBoard demands
_SIZE, _LETTERS, _LINES = 9, 11, 5  # of a text as a picture
_LABEL = 200  # characters
_THREADS = 16


def write_projector(
    folder: Path, name: str, collection: Collection, take: Callable[[np.ndarray], np.ndarray], queries: int
) -> None:
    """Write vectors, labels and pictures under `name`, in the place of those that it had.

    folder: of a run of TensorBoard. No other process may write to it.
    take: rows of the collection -> (n, D) unit vectors.  queries: of each task, evenly spaced.

    Raises PipelineError if the folder cannot be written, and if there is no query; ValueError if `name` is not that of
    a folder, or hidden.
    """
    if not name or name.startswith(".") or "/" in name:  # an empty one would replace all others
        raise ValueError(f"{name!r} cannot name vectors")
    if not (roles := _roles(collection, queries)):
        raise PipelineError("the embedding projector has nothing to show: the evaluation sets have no query")
    side, cell = _grid(len(roles))
    sprite = Image.new("RGB", (side * cell, side * cell), "white")
    lines = ["item\tdataset\trole"]
    with ThreadPoolExecutor(_THREADS) as pool:
        drawn = pool.map(lambda row: _drawn(collection, row, cell), roles)
        for place, ((label, picture), role) in enumerate(zip(drawn, roles.values(), strict=True)):
            lines.append("\t".join([label, *role]))
            left, top = place % side * cell, place // side * cell
            sprite.paste(picture, (left + (cell - picture.width) // 2, top + (cell - picture.height) // 2))
    with disk_errors(folder):
        remove_leftovers(folder, _CONFIG)
        remove_leftovers(folder / "projector")
        with replacing(folder / "projector" / name) as partial:
            partial.mkdir()
            (partial / _VECTORS).write_bytes(take(np.array([*roles])).astype("<f4").tobytes())
            (partial / _LABELS).write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
            sprite.save(partial / _SPRITE)
        write_file(folder / _CONFIG, _config(folder).encode())


def _roles(collection: Collection, queries: int) -> dict[int, tuple[str, str]]:
    """Return the dataset and the role of each chosen row; of an item with several, the first."""
    roles: dict[int, tuple[str, str]] = {}
    for task in collection.tasks:
        count = len(task.queries)
        for number in np.unique(np.linspace(0, count - 1, min(queries, count)).round().astype(int)).tolist():
            if isinstance(task, Ranking):
                right = task.candidates[number][0]
            else:  # a class has several prompts
                right = np.ravel(task.candidates[task.right[number][0]])[0]
            roles.setdefault(int(task.queries[number]), (task.name, "query"))
            roles.setdefault(int(right), (task.name, "answer"))
    return roles


def _drawn(collection: Collection, row: int, pixels: int) -> tuple[str, Picture]:
    """Return an item's label, and its picture or else its text as a picture."""
    item = collection.items[row]()
    name = printable(" ".join(name_of(item, collection.names[row]).split()))  # neither tabs nor ends of lines
    if picture := thumbnail(item, pixels):
        return name[:_LABEL], picture
    picture = Image.new("RGB", (pixels, pixels), (255, 250, 225))
    text = "\n".join(wrap(name, _LETTERS, max_lines=_LINES, placeholder="…"))
    ImageDraw.Draw(picture).multiline_text((2, 2), text, "black", _font(), spacing=2)
    return name[:_LABEL], picture


@cache
def _font() -> ImageFont.FreeTypeFont:
    import matplotlib  # here: each process of training imports this module, and would start later

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), _SIZE)


def _grid(count: int) -> tuple[int, int]:
    """Return how many pictures a sprite has in a row, and their pixels: sprites are squares, filled row by row."""
    side = 1 + isqrt(count - 1)
    return side, min(_CELL, _SIDE // side)


def _config(folder: Path) -> str:
    """Return the configuration of all vectors in the folder."""
    config = ProjectorConfig()
    for place in sorted((folder / "projector").glob("[!.]*")):
        if not (shape := _shape(place)):
            logger.warning("%s is not complete: the embedding projector does not show it", place)
            continue
        below = place.relative_to(folder)
        info = config.embeddings.add(tensor_name=place.name, tensor_shape=shape)
        info.tensor_path, info.metadata_path = str(below / _VECTORS), str(below / _LABELS)
        info.sprite.image_path = str(below / _SPRITE)
        info.sprite.single_image_dim.extend([_grid(shape[0])[1]] * 2)
    return str(config)


def _shape(place: Path) -> tuple[int, int] | None:
    """Return the shape (N, D) of the vectors in `place`, or None if a file is missing or cut."""
    try:
        (place / _SPRITE).stat()
        rows = (place / _LABELS).read_bytes().count(b"\n") - 1
        size = (place / _VECTORS).stat().st_size
    except OSError:
        return None
    if rows < 1 or not size or size % (4 * rows):
        return None
    return rows, size // (4 * rows)
