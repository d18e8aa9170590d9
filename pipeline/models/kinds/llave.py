"""LLaVE."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from pipeline.config import Model, Recipe
from pipeline.data.lengths import Lengths
from pipeline.models import files, llave, loading, weights
from pipeline.models.chunks import Features
from pipeline.models.folder import note_images, save_folder
from pipeline.models.frozen import Frozen
from pipeline.models.kinds.kind import Kind, Processor, fastest
from pipeline.models.llave import Llave, TowerlessLlave
from pipeline.models.loading import DTYPES, reads_as_stored
from pipeline.models.tower import FrozenTower


class LlaveKind(Kind):
    """LLaVA-OneVision as an embedder. A tower that is not trained is outside the engine."""

    parts: ClassVar = {
        "projector": ("multi_modal_projector.", "image_newline"),
        "language_model": ("language_model.",),
        "vision_tower": ("vision_tower.",),
    }
    unused = ("vision_tower.post_layernorm.",)  # the embedding reads the tower before its final norm
    text_part = "language_model"
    instructed = True

    # Names that tensors have in LLaVA-OneVision's checkpoints of earlier and present versions of transformers.
    _RENAMED: ClassVar = (
        (re.compile(r"^model\.(?=language_model|vision_tower|multi_modal_projector|image_newline)"), ""),
        (re.compile(r"^language_model\.model\."), "language_model."),
        (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
    )

    def check(self, model: Model) -> None:
        if model.architecture:
            llave.check_architecture(model.architecture)
        config = weights.config_of(model)
        if model.path and not weights.is_original(files.fetched(model.path, weights=False)):
            loading.check_weights(model.path, Llave, config)
            llave.Processor.load(model.path, model.max_tokens)
            llave.require_normalisation(model.path)
        llave.check_language_model(model.path or "model.architecture", config)

    def lengths(self, recipe: Recipe) -> Lengths:
        return Lengths(llave.tiling(weights.config_of(recipe.model)), recipe.video.frames)

    def resolve(self, path: str, cache: Path) -> str:
        return weights.resolve(path, cache)

    def build(self, model: Model, texts: Iterable[str], seed: int, folder: Path) -> None:
        llave.build(model.architecture, texts, seed, folder)

    def processor(self, recipe: Recipe, path: str) -> Processor:
        tokens, frames, images = recipe.model.max_tokens, recipe.video.frames, recipe.model.images
        return llave.Processor.load(path, tokens, frames, **_own(recipe), images=images)

    def load(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        return _llave(recipe).load(path, DTYPES[recipe.precision], attention=attention, **_own(recipe))

    def empty(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        kind = _llave(recipe)
        return kind(kind.config_for(path, attention=attention, **_own(recipe)))

    def own_name(self, stored: str) -> str:
        for pattern, replacement in self._RENAMED:
            stored = pattern.sub(replacement, stored)
        return stored

    def load_whole(self, recipe: Recipe, path: str) -> nn.Module:
        return Llave.load(path, DTYPES[recipe.precision], **_own(recipe))

    def frozen(self, recipe: Recipe, path: str, device: torch.device) -> Frozen | None:
        if recipe.train.vision_tower:
            return None
        return FrozenTower.load(path, DTYPES[recipe.precision], device, recipe.batch.tower_tiles)

    def exported(self, weights: dict[str, torch.Tensor], frozen: Frozen | None) -> dict[str, torch.Tensor]:
        if frozen is None:
            return weights
        return weights | {name: parameter.to("cpu") for name, parameter in frozen.named_parameters()}

    def save(
        self, recipe: Recipe, model: nn.Module, weights: dict[str, torch.Tensor], source: str, folder: Path
    ) -> None:
        save_folder(model, weights, source, folder, recipe.model.path)
        note_images(folder, reads_as_stored(source, recipe.model.images))

    def dimension(self, path: str) -> int:
        return llave.load_config(path).text_config.hidden_size

    def reader(self, path: str, max_tokens: int, video_frames: int) -> Processor:
        return llave.Processor.load(path, max_tokens, video_frames)

    def open(self, path: str, precision: str, device: torch.device) -> tuple[nn.Module, Features | None]:
        llave.require_normalisation(path)
        attention = fastest(llave.load_config(path), precision, device)
        return Llave.load(path, DTYPES[precision], attention=attention).eval().to(device), None


def _own(recipe: Recipe) -> dict[str, Any]:
    """What the recipe sets in place of the model's own."""
    return {"pinpoints": recipe.model.image_grid_pinpoints, "newline": recipe.model.mm_newline_position}


def _llave(recipe: Recipe) -> type[Llave]:
    return Llave if recipe.train.vision_tower else TowerlessLlave
