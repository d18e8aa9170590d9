"""A frozen part of a model: outside the engine, unsharded on every rank, without gradient or optimizer state.

Its output for a chunk is cached between a step's two passes, so it runs once per step.
"""

from typing import Protocol

import torch

from pipeline.models.chunks import Chunk


class Frozen(Protocol):
    """A vision tower or text encoder whose output is input to the trained parts."""

    @property
    def device(self) -> torch.device: ...

    def features_of(self, chunk: Chunk) -> torch.Tensor | None:
        """Return the `features` for the model's forward pass; None if the chunk has no input for the frozen part."""


class KeptFeatures:
    """A cache of a step's features by chunk, computed at the first use.

    limit: bytes that stay on the device; the rest is offloaded to CPU memory.
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
