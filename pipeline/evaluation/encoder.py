"""What an evaluation needs of a model."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from pipeline.data.sample import Item


class Encoder(Protocol):
    """A model that turns items into vectors of one space.

    name: what a report calls it.
    identity: of its weights and of all else that changes a vector.
    dimension: of the vectors.
    instructed: a query says what is sought, as MMEB's do; otherwise sets give bare captions, pictures and videos,
        the item's text being the marks alone.
    """

    name: str
    identity: str
    dimension: int
    instructed: bool

    def prepare(self, item: Item) -> Any:
        """What `embed` takes of an item: decoded, tokenized. Called in threads. BadSample if it cannot be used."""

    def embed(self, prepared: Sequence[Any]) -> torch.Tensor:
        """(n, dimension) float32 unit rows, on any device.

        In a process group all ranks call it equally often, some perhaps without items.
        """
