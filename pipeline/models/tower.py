"""The vision tower: tiles -> features, as LLaVA-OneVision's projector takes them.

A frozen tower stays outside the engine: whole on every rank, without gradient or optimizer state. What it makes of a
chunk's tiles is kept from a step's first pass for its second, so that it runs once.
"""

from typing import TYPE_CHECKING

import torch
from transformers import AutoModel, LlavaOnevisionConfig, LlavaOnevisionPreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from pipeline.data.collate import sent
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.models.chunks import Chunk

MEAN = STD = 0.5  # SigLIP's


def normalised(tiles: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(n, 3, size, size) uint8 -> what the tower takes. In float32 on the way: bf16 has but eight bits."""
    return sent(tiles, device).float().div_(255).sub_(MEAN).div_(STD).to(dtype)


def tower_features(tower: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """(n, 3, size, size) normalised -> (n, patches², width): the last layer, before the tower's final norm."""
    return tower.encoder(tower.embeddings(pixels)).last_hidden_state


class FrozenTower(LlavaOnevisionPreTrainedModel):
    """The tower of a LLaVA-OneVision folder or hub name, alone: of its weights no others are read."""

    _keys_to_ignore_on_load_unexpected = (r"^(?!(model\.)?vision_tower)",)

    def __init__(self, config: LlavaOnevisionConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.post_init()

    @classmethod
    def load(cls, path: str, dtype: torch.dtype, device: torch.device) -> "FrozenTower":
        tower, loaded = cls.from_pretrained(path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
        refuse_missing(path, loaded)
        return tower.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, tiles: torch.Tensor, tiles_at_once: int) -> torch.Tensor:
        """(n, 3, size, size) uint8 -> (n, patches², width), in the tower's dtype."""
        parts = (normalised(part, self.device, self.dtype) for part in tiles.split(tiles_at_once))
        return torch.cat([tower_features(self.vision_tower, part) for part in parts])

    def features_of(self, chunk: "Chunk", tiles_at_once: int) -> torch.Tensor:
        return self.features(chunk.packed.tiles, tiles_at_once)


# transformers finds a class's checkpoint names by the name of the class.
register_checkpoint_conversion_mapping("FrozenTower", get_checkpoint_conversion_mapping("LlavaOnevisionModel"))


def refuse_missing(path: str, loaded: dict) -> None:
    """Raise PipelineError where from_pretrained's report lists weights that were not there."""
    if missing := sorted(loaded["missing_keys"]):
        raise PipelineError(f"{path} lacks {len(missing)} of the model's weights, {missing[0]} the first")


class KeptFeatures:
    """A step's features by chunk: worked out at the first use, then at hand.

    limit: bytes of them that stay on the device; further ones wait in the host's memory.
    """

    def __init__(self, tower: FrozenTower, tiles_at_once: int, limit: int) -> None:
        self._tower, self._tiles_at_once, self._room = tower, tiles_at_once, limit
        self._kept: dict[int, torch.Tensor] = {}

    def __call__(self, chunk: "Chunk") -> torch.Tensor:
        """(tiles of the chunk, patches², width)"""
        if id(chunk) in self._kept:
            return self._kept[id(chunk)].to(self._tower.device, non_blocking=True)
        features = self._tower.features_of(chunk, self._tiles_at_once)
        fits = features.nbytes <= self._room
        self._room -= features.nbytes if fits else 0
        self._kept[id(chunk)] = features if fits else features.cpu()
        return features
