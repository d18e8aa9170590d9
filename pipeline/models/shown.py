"""An item as people see it, from a model's input: nothing is read or decoded again."""

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.batch import Encoded, Image


class View(NamedTuple):
    """A text, and a picture (3, H, W) uint8 or None, which is to be shown with width / height = `aspect`."""

    text: str
    picture: np.ndarray | None = None
    aspect: float = 1.0


def view(item: Encoded, text: str) -> View:
    """Return the view of an item whose first image's first tile is the whole image, or a video's first frame."""
    if not item.images:
        return View(text)
    image: Image = item.images[0]
    return View(text, image.tiles[0], image.width / image.height)


def shown_text(
    tokenizer: Any, ids: np.ndarray, *, placeholders: Collection[int] = (), before: str = "", after: str = ""
) -> str:
    """Return the text of tokens.

    placeholders: tokens that stand for parts of images, which are left out.  before, after: the prompt around the text,
    which is left out, too. Other special tokens stay only with a prompt, whose text may contain them.
    """
    kept = ids[~np.isin(ids, list(placeholders))]
    text: str = tokenizer.decode(kept.tolist(), skip_special_tokens=not before)
    return text.removeprefix(before).removesuffix(after).strip()
