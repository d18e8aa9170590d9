"""The interface that evaluation needs from a model."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from pipeline.data.sample import Item


class Encoder(Protocol):
    """A model that maps items to vectors of one space.

    name: for the report.
    identity: a hash of its weights and of all other settings that change a vector.
    dimension: of the vectors.
    instructed: whether queries contain an instruction, as in MMEB. Otherwise items are only captions, pictures and
        videos; the text of a picture or video is its mark.
    """

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    @property
    def instructed(self) -> bool: ...

    def prepare(self, item: Item) -> Any:
        """Decode and tokenize an item for `embed`. Called in threads. Raises BadSample if the item cannot be used."""

    def embed(self, prepared: Sequence[Any]) -> torch.Tensor:
        """Return (n, dimension) float32 unit rows, on any device.

        In a process group, all ranks call this the same number of times, some perhaps without items.
        """
