"""CLIP's training and saved-model interfaces."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig

from pipeline.config import Recipe
from pipeline.data.lengths import Lengths, Square
from pipeline.models import loading
from pipeline.models.chunks import Features, Frozen
from pipeline.models.clip import model as clip
from pipeline.models.clip.config import ClipSection
from pipeline.models.clip.model import Clip
from pipeline.models.clip.processor import ClipTexts, load_config
from pipeline.models.family import Processor, SavedModelInterface, TrainingInterface
from pipeline.models.files import Tensors
from pipeline.models.flops import StepFlops
from pipeline.models.folder import finish, note_images
from pipeline.models.loading import DTYPES, image_reading, refuse_unknown
from pipeline.models.two_tower import TwoTowerProcessor
from pipeline.models.vision import Pixels, shape_of, tokens_of

_TEXTS = "texts_beside_images"  # the config's field of a model that was trained here: it learned from pictures alone


class ClipTraining(TrainingInterface[ClipSection]):
    """Trains both towers inside the engine."""

    stages = (0, 1, 2)

    def check(self, model: ClipSection) -> None:
        if architecture := model.architecture:
            refuse_unknown("vision", architecture.vision, CLIPVisionConfig())
            refuse_unknown("text", architecture.text, CLIPTextConfig())
        elif model.path:
            loading.check_weights(model.path, CLIPModel, load_config(model.path))
            SAVED.reader(model.path, model.max_tokens, 1)

    def conditions(self, model: ClipSection) -> dict[str, Any]:
        return super().conditions(model) | {"model.images": image_reading(model.path, model.images)}

    def lengths(self, recipe: Recipe) -> Lengths:
        model = self.section(recipe)
        return Lengths(Square(tokens_of(model.path, model.architecture)), recipe.video.frames)

    def build(self, model: ClipSection, texts: Iterable[str], seed: int, folder: Path) -> None:
        assert model.architecture
        clip.build(model.architecture, texts, seed, folder)

    def processor(self, recipe: Recipe, path: str) -> Processor:
        pixels = Pixels.load(path, self.section(recipe).images)
        processor = SAVED.reader(path, recipe.model.max_tokens, recipe.video.frames)
        return replace(processor, pixels=pixels, scaled_jpeg=recipe.data.scaled_jpeg)

    def towers(self, recipe: Recipe) -> Sequence[PreTrainedConfig]:
        model = self.section(recipe)
        if model.architecture:
            return [CLIPVisionConfig(**model.architecture.vision), CLIPTextConfig(**model.architecture.text)]
        config = load_config(cast(str, model.path))
        return [cast(CLIPVisionConfig, config.vision_config), cast(CLIPTextConfig, config.text_config)]

    def load(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        return Clip.load(path, DTYPES[recipe.precision])

    def flops(self, model: nn.Module, frozen: Frozen | None) -> StepFlops | None:
        return clip.step_flops(cast(Clip, model))

    def save(self, recipe: Recipe, model: nn.Module, weights: Tensors, source: str, folder: Path) -> None:
        clip.save(cast(Clip, model), source, folder)
        note_images(folder, source, self.section(recipe).images)
        finish(folder, {_TEXTS: "ignored"})


class SavedClip(SavedModelInterface):
    def owns(self, path: str, config: dict[str, Any]) -> bool:
        return config.get("model_type") == "clip"

    def as_baseline(self, config: dict[str, Any]) -> bool:
        return config.get(_TEXTS) is None

    def dimension(self, path: str) -> int:
        return int(cast(int, load_config(path).projection_dim))

    def reader(
        self, path: str, max_tokens: int, video_frames: int, video_fps: float | None = None
    ) -> TwoTowerProcessor:
        texts = ClipTexts.load(path, max_tokens)
        return TwoTowerProcessor(Pixels.load(path), shape_of(path).tokens, texts, video_frames, video_fps=video_fps)

    def open(self, path: str, precision: str, device: torch.device) -> tuple[nn.Module, Features | None]:
        return Clip.load(path, DTYPES[precision]).eval().to(device), None


TRAINING = {"contrastive": ClipTraining()}
SAVED = SavedClip()
