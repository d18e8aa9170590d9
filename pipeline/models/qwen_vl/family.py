"""Qwen-VL's training and saved-model interfaces."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from pipeline.config import Recipe
from pipeline.data.lengths import Lengths
from pipeline.data.source import Source
from pipeline.errors import PipelineError
from pipeline.models import loading
from pipeline.models.attention import choose, fastest, head_size
from pipeline.models.chunks import Features, Frozen
from pipeline.models.family import Processor, SavedModelInterface, TrainingInterface
from pipeline.models.files import Tensors
from pipeline.models.flops import StepFlops
from pipeline.models.folder import note_images
from pipeline.models.loading import DTYPES, image_reading
from pipeline.models.qwen_vl import checks
from pipeline.models.qwen_vl.config import QwenVLSection
from pipeline.models.qwen_vl.flops import step_flops
from pipeline.models.qwen_vl.folder import save_folder
from pipeline.models.qwen_vl.model import FrozenQwenTower, QwenVL, TowerlessQwenVL, build
from pipeline.models.qwen_vl.processor import QwenVLProcessor


class QwenVLTraining(TrainingInterface[QwenVLSection]):
    """Keeps a frozen tower outside the engine."""

    adapted = "language_model"

    def check(self, model: QwenVLSection) -> None:
        config = checks.config_of(model)
        if model.path:
            loading.check_weights(model.path, QwenVL, config)
            QwenVLProcessor.load(model.path, model.max_tokens, config=config)

    def check_data(self, recipe: Recipe, source: Source) -> None:
        super().check_data(recipe, source)
        config = checks.config_of(self.section(recipe))
        if checks.reads_videos(config):
            return
        if (number := next((number for number, shard in source.shards if shard.videos), None)) is not None:
            raise PipelineError(
                f"dataset {source.names[number]} has videos, which are not supported with a {config.model_type}, only "
                "with qwen3_vl: leave it out of data.datasets"
            )

    def conditions(self, model: QwenVLSection) -> dict[str, Any]:
        return super().conditions(model) | {"model.images": image_reading(model.path, model.images)}

    def lengths(self, recipe: Recipe) -> Lengths:
        config = checks.config_of(self.section(recipe))
        return Lengths(checks.patches(config, "model.path", recipe.model.max_tokens), recipe.video.frames)

    def build(self, model: QwenVLSection, texts: Iterable[str], seed: int, folder: Path) -> None:
        assert model.architecture
        build(model.architecture, texts, seed, folder)

    def processor(self, recipe: Recipe, path: str) -> Processor:
        section = self.section(recipe)
        config = self._config(recipe, path)
        return QwenVLProcessor.load(path, section.max_tokens, recipe.video.frames, config, section.images)

    def load(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        kind = QwenVL if self.section(recipe).train.vision_tower else TowerlessQwenVL
        return cast(nn.Module, kind.load(path, DTYPES[recipe.precision], self._config(recipe, path), attention))

    def empty(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        kind = QwenVL if self.section(recipe).train.vision_tower else TowerlessQwenVL
        return kind(kind.config_for(self._config(recipe, path), attention))

    def own_name(self, stored: str) -> str:
        for pattern, new in QwenVL.renamings:
            stored = re.sub(pattern, new, stored)
        return stored

    def load_whole(self, recipe: Recipe, path: str) -> nn.Module:
        return cast(nn.Module, QwenVL.load(path, DTYPES[recipe.precision], self._config(recipe, path)))

    def flops(self, model: nn.Module, frozen: Frozen | None) -> StepFlops | None:
        own = cast(QwenVL, model)
        return step_flops(own, cast(FrozenQwenTower, frozen).visual if frozen else own.visual)

    def frozen(self, recipe: Recipe, path: str, device: torch.device) -> Frozen | None:
        if self.section(recipe).train.vision_tower:
            return None
        dtype = cast(torch.dtype, DTYPES[recipe.precision])
        attention = choose(recipe.model.attention, device.type, dtype, head_size(checks.load_config(path)))
        return FrozenQwenTower.load(path, dtype, device, attention, recipe.batch.tower_tiles)

    def exported(self, weights: Tensors, frozen: Frozen | None) -> Tensors:
        if frozen is None:
            return weights
        tower = cast(FrozenQwenTower, frozen)
        return weights | {name: parameter.to("cpu") for name, parameter in tower.named_parameters()}

    def save(self, recipe: Recipe, model: nn.Module, weights: Tensors, source: str, folder: Path) -> None:
        save_folder(cast(QwenVL, model), weights, source, folder, recipe.model.path)
        note_images(folder, source, self.section(recipe).images)

    def _config(self, recipe: Recipe, path: str) -> Any:
        """Return the config at `path` with the recipe's settings."""
        return checks.config_of(self.section(recipe).model_copy(update={"path": path}))


class SavedQwenVL(SavedModelInterface):
    instructed = True

    def owns(self, path: str, config: dict[str, Any]) -> bool:
        # `load_config` raises an error for a model with experts.
        return config.get("model_type") in (*checks.VERSIONS, *checks.EXPERTS)

    def dimension(self, path: str) -> int:
        return int(checks.load_config(path).text_config.hidden_size)

    def reader(self, path: str, max_tokens: int, video_frames: int, video_fps: float | None = None) -> Processor:
        return QwenVLProcessor.load(path, max_tokens, video_frames, video_fps=video_fps)

    def open(self, path: str, precision: str, device: torch.device) -> tuple[nn.Module, Features | None]:
        config, dtype = checks.load_config(path), DTYPES[precision]
        model = QwenVL.load(path, dtype, config, fastest(config, dtype, device))
        return model.eval().to(device), None


TRAINING = {"contrastive": QwenVLTraining()}
SAVED = SavedQwenVL()
