"""Files for TensorBoard's embedding projector: some queries of each evaluation set, and their right answers.

    FOLDER/projector_config.pbtxt         names the vectors that there are
    FOLDER/projector/NAME/vectors.bytes   (N, D) float32
    FOLDER/projector/NAME/labels.tsv      of each row: the item, its dataset, and whether it is a query or an answer
    FOLDER/projector/NAME/sprite.png      a small picture of each row

The vectors are those of the evaluation: no item is embedded for this.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import isqrt
from pathlib import Path
from textwrap import wrap

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.Image import Image as Picture
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from pipeline.errors import disk_errors, printable
from pipeline.evaluation.measure import name_of, thumbnail
from pipeline.evaluation.tasks import Collection, Ranking
from pipeline.storage.atomic import replacing, write_file

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

    folder: of a run of TensorBoard.
    take: rows of the collection -> (n, D) unit vectors.  queries: of each task, evenly spaced.

    Raises PipelineError if the folder cannot be written.
    """
    roles = _roles(collection, queries)
    side = 1 + isqrt(len(roles) - 1)  # TensorBoard's sprites are squares of pictures, row by row
    cell = min(_CELL, _SIDE // side)
    sprite = Image.new("RGB", (side * cell, side * cell), "white")
    lines = ["item\tdataset\trole"]
    with ThreadPoolExecutor(_THREADS) as pool:
        drawn = pool.map(lambda row: _drawn(collection, row, cell), roles)
        for place, ((label, picture), role) in enumerate(zip(drawn, roles.values(), strict=True)):
            lines.append("\t".join([label, *role]))
            left, top = place % side * cell, place // side * cell
            sprite.paste(picture, (left + (cell - picture.width) // 2, top + (cell - picture.height) // 2))
    with disk_errors(folder):
        with replacing(folder / "projector" / name) as partial:
            partial.mkdir()
            (partial / _VECTORS).write_bytes(take(np.array([*roles])).astype("<f4").tobytes())
            (partial / _LABELS).write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
            sprite.save(partial / _SPRITE)
        write_file(folder / "projector_config.pbtxt", _config(folder).encode())


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
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), _SIZE)


def _config(folder: Path) -> str:
    """Return the configuration of all vectors in the folder."""
    config = ProjectorConfig()
    for place in sorted((folder / "projector").glob("[!.]*")):
        rows = (place / _LABELS).read_bytes().count(b"\n") - 1
        numbers = (place / _VECTORS).stat().st_size // 4
        below = place.relative_to(folder)
        info = config.embeddings.add(tensor_name=place.name, tensor_shape=[rows, numbers // rows])
        info.tensor_path, info.metadata_path = str(below / _VECTORS), str(below / _LABELS)
        info.sprite.image_path = str(below / _SPRITE)
        with Image.open(place / _SPRITE) as sprite:
            cell = sprite.width // (1 + isqrt(rows - 1))
        info.sprite.single_image_dim.extend([cell, cell])
    return str(config)
