"""LLaVE's training and saved-model interfaces."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from pipeline.config import Recipe
from pipeline.data.lengths import Lengths
from pipeline.errors import PipelineError
from pipeline.models import loading
from pipeline.models.attention import choose
from pipeline.models.chunks import Features, Frozen
from pipeline.models.family import ChunkMemory, ModelMemory, Processor, SavedModelInterface, TrainingInterface
from pipeline.models.files import Tensors
from pipeline.models.flops import StepFlops
from pipeline.models.folder import finish, note_images
from pipeline.models.llave import checks, original, weights
from pipeline.models.llave.config import LlaveSection
from pipeline.models.llave.flops import step_flops
from pipeline.models.llave.folder import save_folder
from pipeline.models.llave.memory import chunk_memory, tokens_per_tile
from pipeline.models.llave.model import FrozenTower, Llave, TowerlessLlave, build, check_language_model
from pipeline.models.llave.processor import MARKS, LlaveProcessor, mark_reading
from pipeline.models.loading import DTYPES, IMAGES, image_reading
from pipeline.models.memory import Execution


class LlaveTraining(TrainingInterface[LlaveSection]):
    """Keeps a frozen tower outside the engine."""

    estimates_memory = True
    adapted = "language_model"
    unused = ("vision_tower.post_layernorm.",)  # the embedding reads the tower before its final norm

    def check(self, model: LlaveSection) -> None:
        config = original.config_of(model)
        if model.path and original.is_original(model.path):
            original.load_processor(model.path, model.max_tokens)
        elif model.path:
            loading.check_weights(model.path, Llave, config)
            LlaveProcessor.load(model.path, model.max_tokens)
        check_language_model(model.path or "model.architecture", config)

    def conditions(self, model: LlaveSection) -> dict[str, Any]:
        path, given = model.path, dict[str, str]()
        if path and original.is_original(path):
            given, path = original.readings(path), None
        return super().conditions(model) | {
            "model.images": image_reading(path, model.images or given.get(IMAGES)),
            "model.marks": mark_reading(path, model.marks or given.get(MARKS)),
            "white space around texts": "kept",  # earlier versions stripped every text
        }

    def converts(self, path: str) -> bool:
        return original.is_original(path)

    def memory(self, recipe: Recipe, videos: bool) -> ModelMemory:
        section = self.section(recipe)
        config, how, trained = original.config_of(section), Execution.of(recipe), bool(section.train.vision_tower)
        with torch.device("meta"):
            model, frozen = self._llave(recipe)(config), None if trained else FrozenTower(config)
        tile_tokens = tokens_per_tile(checks.tiling(config), videos)

        def chunk(tokens: int) -> ChunkMemory:
            return chunk_memory(
                config,
                tokens,
                math.ceil(tokens / tile_tokens),
                how,
                tower_trained=trained,
                tiles_at_once=None if trained else recipe.batch.tower_tiles,
            )

        return ModelMemory(model, frozen, chunk)

    def lengths(self, recipe: Recipe) -> Lengths:
        return Lengths(checks.tiling(original.config_of(self.section(recipe))), recipe.video.frames)

    def resolve(self, path: str, cache: Path) -> str:
        return weights.resolve(path, cache)

    def build(self, model: LlaveSection, texts: Iterable[str], seed: int, folder: Path) -> None:
        assert model.architecture
        build(model.architecture, texts, seed, folder)

    def processor(self, recipe: Recipe, path: str) -> Processor:
        section, tokens = self.section(recipe), recipe.model.max_tokens
        own = self._own(recipe) | {"images": section.images, "marks": section.marks}
        processor = LlaveProcessor.load(path, tokens, recipe.video.frames, **own)
        return replace(processor, scaled_jpeg=recipe.data.scaled_jpeg)

    def decoder(self, recipe: Recipe) -> PreTrainedConfig:
        return checks.text_of(original.config_of(self.section(recipe)))

    def towers(self, recipe: Recipe) -> Sequence[PreTrainedConfig]:
        return [checks.vision_of(original.config_of(self.section(recipe)))]

    def load(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        return self._llave(recipe).load(path, DTYPES[recipe.precision], attention=attention, **self._own(recipe))

    def empty(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        llave = self._llave(recipe)
        return llave(llave.config_for(path, attention=attention, **self._own(recipe)))

    def own_name(self, stored: str) -> str:
        # Checkpoints of earlier and current versions of transformers use different prefixes.
        stored = re.sub(r"^model\.(?=language_model|vision_tower|multi_modal_projector|image_newline)", "", stored)
        return re.sub(r"^(language_model|vision_tower)\.(model|vision_model)\.", r"\1.", stored)

    def load_whole(self, recipe: Recipe, path: str) -> nn.Module:
        return Llave.load(path, DTYPES[recipe.precision], **self._own(recipe))

    def flops(self, model: nn.Module, frozen: Frozen | None) -> StepFlops | None:
        llave = cast(Llave, model)
        return step_flops(llave, cast(FrozenTower, frozen).vision_tower if frozen else llave.vision_tower)

    def frozen(self, recipe: Recipe, path: str, device: torch.device) -> Frozen | None:
        if self.section(recipe).train.vision_tower:
            return None
        return FrozenTower.load(path, DTYPES[recipe.precision], device, recipe.batch.tower_tiles)

    def exported(self, weights: Tensors, frozen: Frozen | None) -> Tensors:
        if frozen is None:
            return weights
        return weights | {name: parameter.to("cpu") for name, parameter in cast(FrozenTower, frozen).named_parameters()}

    def save(self, recipe: Recipe, model: nn.Module, weights: Tensors, source: str, folder: Path) -> None:
        save_folder(cast(Llave, model), weights, source, folder, recipe.model.path)
        note_images(folder, source, self.section(recipe).images)
        marks = mark_reading(source, self.section(recipe).marks)
        finish(folder, {MARKS: None if marks == "mended" else marks})

    def adapter_prefix(self, recipe: Recipe, source: str) -> str:
        trained, stored = (checks.tiling(checks.load_config(source, **own)) for own in (self._own(recipe), {}))
        if trained != stored:
            raise PipelineError(
                "--adapters: model.image_grid_pinpoints or model.mm_newline_position is not what the config.json of "
                f"{source} says, which adapters do not change: export without --adapters"
            )
        return super().adapter_prefix(recipe, source)

    def _own(self, recipe: Recipe) -> dict[str, Any]:
        """Return the recipe's values that override the model's own."""
        model = self.section(recipe)
        return {"pinpoints": model.image_grid_pinpoints, "newline": model.mm_newline_position}

    def _llave(self, recipe: Recipe) -> type[Llave]:
        return Llave if self.section(recipe).train.vision_tower else TowerlessLlave


class SavedLlave(SavedModelInterface):
    instructed = True

    def owns(self, path: str, config: dict[str, Any]) -> bool:
        return config.get("model_type") == "llava_onevision" or checks.is_original(config)

    def folder(self, path: str) -> Path:
        return weights.opened(path)

    def dimension(self, path: str) -> int:
        return int(checks.text_of(original.open_config(path)).hidden_size)

    def reader(self, path: str, max_tokens: int, video_frames: int, video_fps: float | None = None) -> Processor:
        if original.is_original(path):
            return original.load_processor(path, max_tokens, video_frames, video_fps)
        return LlaveProcessor.load(path, max_tokens, video_frames, video_fps=video_fps)

    def open(self, path: str, precision: str, device: torch.device) -> tuple[nn.Module, Features | None]:
        folder = str(self.folder(path))
        attention = choose("auto", device.type, DTYPES[precision], checks.load_config(folder))
        model = Llave.load(folder, DTYPES[precision], attention=attention)
        return model.eval().requires_grad_(False).to(device), None


TRAINING = {"contrastive": LlaveTraining()}
SAVED = SavedLlave()
