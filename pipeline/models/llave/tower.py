"""The vision tower, which maps tiles to features for LLaVA-OneVision's projector.

A frozen tower stays outside the engine: see frozen.py.
"""

from typing import TYPE_CHECKING, Literal

import torch
from transformers import AutoModel, LlavaOnevisionConfig, LlavaOnevisionPreTrainedModel, SiglipVisionModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from pipeline.data.collate import sent
from pipeline.models import loading

if TYPE_CHECKING:
    from pipeline.models.chunks import Chunk

MEAN = STD = 0.5  # SigLIP's


def normalised(tiles: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Normalise (n, 3, size, size) uint8 for the tower. It computes in float32: bf16 has only eight bits."""
    return sent(tiles, device).float().div_(255).sub_(MEAN).div_(STD).to(dtype)


def tower_features(tower: SiglipVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    """Map (n, 3, size, size) normalised pixels to (n, patches², width) of the last layer, before the final norm."""
    return tower.encoder(tower.embeddings(pixels)).last_hidden_state


class FrozenTower(LlavaOnevisionPreTrainedModel):
    """The tower of a LLaVA-OneVision folder or hub name; no other weights are read.

    tiles_at_once: tiles per forward pass.
    """

    tiles_at_once = 64

    _keys_to_ignore_on_load_unexpected = [r"^(?!(model\.)?vision_tower)"]  # noqa: RUF012 (as in its base class)

    def __init__(self, config: LlavaOnevisionConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.post_init()

    @classmethod
    def load(
        cls, path: str, dtype: torch.dtype | Literal["auto"], device: torch.device, tiles_at_once: int = 64
    ) -> "FrozenTower":
        tower = loading.open_model(cls, path, loading.config(path, LlavaOnevisionConfig), dtype)
        tower.tiles_at_once = tiles_at_once
        return tower.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]  # its decorator hides self

    @torch.no_grad()
    def features(self, tiles: torch.Tensor) -> torch.Tensor:
        """Map (n, 3, size, size) uint8 to (n, patches², width) in the tower's dtype."""
        parts = (normalised(part, self.device, self.dtype) for part in tiles.split(self.tiles_at_once))
        return torch.cat([tower_features(self.vision_tower, part) for part in parts])

    def features_of(self, chunk: "Chunk") -> torch.Tensor | None:
        """Return the features of all the chunk's tiles; None if it has no image."""
        packed = chunk.packed
        return self.features(packed.tiles) if packed.images else None


# transformers looks up the mapping of checkpoint names by class name.
register_checkpoint_conversion_mapping("FrozenTower", get_checkpoint_conversion_mapping("LlavaOnevisionModel"))
