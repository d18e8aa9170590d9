"""Qwen-VL's training and saved-model interfaces."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from pipeline.config import Recipe
from pipeline.data.lengths import Lengths
from pipeline.data.source import Source
from pipeline.errors import PipelineError
from pipeline.models import loading
from pipeline.models.attention import choose
from pipeline.models.chunks import Features, Frozen
from pipeline.models.family import ChunkMemory, ModelMemory, Processor, SavedModelInterface, TrainingInterface
from pipeline.models.files import Tensors
from pipeline.models.flops import StepFlops
from pipeline.models.folder import note_images
from pipeline.models.loading import DTYPES, image_reading
from pipeline.models.memory import Execution
from pipeline.models.qwen_vl import checks
from pipeline.models.qwen_vl.config import QwenVLSection
from pipeline.models.qwen_vl.flops import step_flops
from pipeline.models.qwen_vl.folder import save_folder
from pipeline.models.qwen_vl.memory import chunk_memory
from pipeline.models.qwen_vl.model import TILE, FrozenQwenTower, QwenVL, TowerlessQwenVL, build
from pipeline.models.qwen_vl.processor import QwenVLProcessor


class QwenVLTraining(TrainingInterface[QwenVLSection]):
    """Keeps a frozen tower outside the engine."""

    estimates_memory = True
    adapted = "language_model"

    def check(self, model: QwenVLSection) -> None:
        config = checks.config_of(model)
        if model.path:
            loading.check_weights(model.path, QwenVL, config)
            QwenVLProcessor.load(model.path, model.max_tokens, config=config)

    def check_data(self, recipe: Recipe, source: Source) -> None:
        super().check_data(recipe, source)
        if recipe.data.scaled_jpeg:
            raise PipelineError(
                "data.scaled_jpeg would change an image's number of tokens in a Qwen-VL: set it to false"
            )
        config = checks.config_of(self.section(recipe))
        number = next((number for number, shard in source.shards if shard.videos), None)
        if number is None:
            return
        if not checks.patches(config, "model.path", recipe.model.max_tokens).fits(recipe.video.frames):
            raise PipelineError(
                f"dataset {source.names[number]} has videos, of which video.frames={recipe.video.frames} frames are "
                f"too many for model.max_tokens={recipe.model.max_tokens}: lower one or raise the other"
            )

    def conditions(self, model: QwenVLSection) -> dict[str, Any]:
        settings = checks.Settings.of(checks.config_of(model), "model.path")
        return super().conditions(model) | {
            "model.images": image_reading(model.path, model.images),
            "model.prompt": settings.prompt,
        }

    def memory(self, recipe: Recipe, videos: bool) -> ModelMemory:
        section = self.section(recipe)
        config, how, trained = checks.config_of(section), Execution.of(recipe), bool(section.train.vision_tower)
        with torch.device("meta"):
            model, frozen = (QwenVL(config), None) if trained else (TowerlessQwenVL(config), FrozenQwenTower(config))

        def chunk(tokens: int) -> ChunkMemory:
            at_once = None if trained else recipe.batch.tower_tiles * TILE
            return chunk_memory(config, tokens, how, tower_trained=trained, videos=videos, patches_at_once=at_once)

        return ModelMemory(model, frozen, chunk)

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

    def decoder(self, recipe: Recipe) -> PreTrainedConfig:
        return cast(PreTrainedConfig, checks.config_of(self.section(recipe)))

    def load(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        kind, config = self._trained(recipe, path)
        tower = self._tower_attention(recipe, config)
        return cast(nn.Module, kind.load(path, DTYPES[recipe.precision], config, attention, tower))

    def empty(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        kind, config = self._trained(recipe, path)
        return kind(kind.config_for(config, attention, self._tower_attention(recipe, config)))

    def own_name(self, stored: str) -> str:
        return QwenVL.own_name(stored)

    def load_whole(self, recipe: Recipe, path: str) -> nn.Module:
        return cast(nn.Module, QwenVL.load(path, DTYPES[recipe.precision], self._config(recipe, path)))

    def flops(self, model: nn.Module, frozen: Frozen | None) -> StepFlops | None:
        own = cast(QwenVL, model)
        return step_flops(own, cast(FrozenQwenTower, frozen).visual if frozen else own.visual)

    def frozen(self, recipe: Recipe, path: str, device: torch.device) -> Frozen | None:
        if self.section(recipe).train.vision_tower:
            return None
        attention = self._tower_attention(recipe, checks.load_config(path), device.type)
        return FrozenQwenTower.load(path, DTYPES[recipe.precision], device, attention, recipe.batch.tower_tiles)

    def exported(self, weights: Tensors, frozen: Frozen | None) -> Tensors:
        if frozen is None:
            return weights
        tower = cast(FrozenQwenTower, frozen)
        return weights | {name: parameter.to("cpu") for name, parameter in tower.named_parameters()}

    def save(self, recipe: Recipe, model: nn.Module, weights: Tensors, source: str, folder: Path) -> None:
        save_folder(cast(QwenVL, model), weights, source, folder, recipe.model.path)
        note_images(folder, source, self.section(recipe).images)

    def _trained(self, recipe: Recipe, path: str) -> tuple[type[QwenVL], Any]:
        """Return the class of the model that the engine trains, and its config with the recipe's settings."""
        kind = QwenVL if self.section(recipe).train.vision_tower else TowerlessQwenVL
        return kind, self._config(recipe, path)

    def _tower_attention(self, recipe: Recipe, config: Any, device: str | None = None) -> str:
        """Return the tower's kind of attention: its heads may have another size than the language model's.

        device: its type; None is the engine's.
        """
        if device is None:
            from deepspeed.accelerator import get_accelerator  # embedding does not need DeepSpeed

            device = get_accelerator().device_name()
        return choose(recipe.model.attention, device, DTYPES[recipe.precision], checks.tower_heads(config))

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
        parts = (choose("auto", device.type, dtype, each) for each in (config, checks.tower_heads(config)))
        model = QwenVL.load(path, dtype, config, *parts)
        return model.eval().to(device), None


TRAINING = {"contrastive": QwenVLTraining()}
SAVED = SavedQwenVL()
