"""A frozen part of a model: outside the engine, whole on every rank, without gradient or optimizer state.

What it makes of a chunk is kept from a step's first pass for its second, so that it runs once.
"""

from typing import Protocol

import torch

from pipeline.models.chunks import Chunk


class Frozen(Protocol):
    """A vision tower whose features, or a text encoder whose vectors, the trained parts take."""

    @property
    def device(self) -> torch.device: ...

    def features_of(self, chunk: Chunk) -> torch.Tensor | None:
        """What the model's forward pass takes as `features`; None where the chunk has nothing for it to see."""


class KeptFeatures:
    """A step's features by chunk: worked out at the first use, then at hand.

    limit: bytes of them that stay on the device; further ones wait in the host's memory.
    """

    def __init__(self, frozen: Frozen, limit: int) -> None:
        self._frozen, self._room = frozen, limit
        self._kept: dict[int, torch.Tensor | None] = {}

    def __call__(self, chunk: Chunk) -> torch.Tensor | None:
        if id(chunk) in self._kept:
            kept = self._kept[id(chunk)]
            return None if kept is None else kept.to(self._frozen.device, non_blocking=True)
        features = self._frozen.features_of(chunk)
        size = 0 if features is None else features.nbytes
        fits = size <= self._room
        self._room -= size if fits else 0
        self._kept[id(chunk)] = features if fits or features is None else features.cpu()
        return features
