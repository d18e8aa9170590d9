"""LLM2CLIP's training and saved-model interfaces."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import CLIPVisionConfig, PreTrainedConfig

from pipeline.config import Recipe
from pipeline.data.batch import Encoded, Image
from pipeline.data.lengths import Lengths, Square
from pipeline.data.sample import ContentDraw
from pipeline.data.source import Source
from pipeline.errors import PipelineError
from pipeline.models.attention import choose
from pipeline.models.chunks import Features, Frozen
from pipeline.models.family import Processor, SavedModelInterface, TrainingInterface
from pipeline.models.files import Tensors, fetched, fingerprint
from pipeline.models.flops import StepFlops
from pipeline.models.folder import note_images
from pipeline.models.llm2clip import model as llm2clip
from pipeline.models.llm2clip.config import Llm2ClipSection
from pipeline.models.llm2clip.model import Llm2Clip
from pipeline.models.loading import DTYPES, image_reading, refuse_unknown
from pipeline.models.text_encoder.family import SAVED as SAVED_TEXT_ENCODER
from pipeline.models.text_encoder.model import FrozenTextEncoder
from pipeline.models.two_tower import TwoTowerProcessor
from pipeline.models.vision import Pixels, RandomCrops, VisionEncoder, layer_factors, shape_of, tokens_of, undecayed


class Llm2ClipTraining(TrainingInterface[Llm2ClipSection]):
    """LLM2CLIP's second stage: trains a vision encoder, and an adapter on a frozen text encoder's vectors.

    The vectors come with the data (data.text_embeddings) or from the text encoder, which runs outside the engine.
    """

    stages = (0, 1, 2)

    def check(self, model: Llm2ClipSection) -> None:
        # An export needs the text encoder even if training does not.
        SAVED_TEXT_ENCODER.check(str(fetched(model.text_encoder)))
        if model.path:
            Pixels.load(model.path)
            VisionEncoder.check(model.path, new_projection=model.dimension is not None)
        elif model.architecture:
            refuse_unknown("vision", model.architecture.vision, CLIPVisionConfig())

    def check_data(self, recipe: Recipe, source: Source) -> None:
        if (stored := source.embedding_metadata) is None:
            return
        model = self.section(recipe)
        reader = SAVED_TEXT_ENCODER.reader(model.text_encoder, model.max_tokens)
        now = {
            "template": reader.template,
            "instruction": reader.instruction,
            "width": SAVED_TEXT_ENCODER.dimension(model.text_encoder),
            "weights": fingerprint(str(fetched(model.text_encoder)), modules=True),
            "max_tokens": reader.max_tokens,
        }
        for name, value in now.items():
            before = getattr(stored, name)
            unknown = stored.template is None if name == "instruction" else before is None
            if not unknown and before != value:
                raise PipelineError(
                    f"data.text_embeddings were made by {stored.model} with {name}={before!r}, which is {value!r} for "
                    f"model.text_encoder={model.text_encoder} and model.max_tokens={model.max_tokens}: embed the "
                    "shards again, or set both to what embedded them"
                )

    def dimension(self, model: Llm2ClipSection, saved: int) -> int:
        return model.dimension or saved

    def conditions(self, model: Llm2ClipSection) -> dict[str, Any]:
        return super().conditions(model) | {
            "the text encoder's fingerprint": fingerprint(model.text_encoder, modules=True),
            "model.images": image_reading(model.path, model.images),
        }

    def lengths(self, recipe: Recipe) -> Lengths:
        # Texts count by tokens even if their vectors come with the data: it is little, and equal on all ranks.
        model = self.section(recipe)
        return Lengths(Square(tokens_of(model.path, model.architecture)), recipe.video.frames)

    def build(self, model: Llm2ClipSection, texts: Iterable[str], seed: int, folder: Path) -> None:
        assert model.architecture
        vision = model.architecture.vision
        VisionEncoder.build(vision, CLIPVisionConfig(**vision).projection_dim, seed).save(folder)

    def processor(self, recipe: Recipe, path: str) -> Processor:
        model, vectors = self.section(recipe), bool(recipe.data.text_embeddings)
        pixels, tokens = Pixels.load(path, model.images), tokens_of(model.path, model.architecture)
        texts = SAVED_TEXT_ENCODER.reader(model.text_encoder, model.max_tokens)
        return TwoTowerProcessor(
            pixels, tokens, texts, recipe.video.frames, vectors, scaled_jpeg=recipe.data.scaled_jpeg
        )

    def augmented(self, recipe: Recipe, processor: Processor, draws: ContentDraw) -> Processor:
        if (scale := self.section(recipe).crop_scale) is None:
            return processor
        return replace(cast(TwoTowerProcessor, processor), crops=RandomCrops(scale, draws))

    def rate_factors(self, model: Llm2ClipSection, names: Sequence[str]) -> dict[str, float] | None:
        if (decay := model.train.layer_decay) == 1:
            return None
        tower = [name for name in names if name.startswith(model.train.parts()["vision_tower"])]
        return dict.fromkeys(names, 1.0) | layer_factors(tower, decay)

    def undecayed(self, name: str) -> bool:
        return undecayed(name)

    def decoder(self, recipe: Recipe) -> PreTrainedConfig | None:
        return None if recipe.data.text_embeddings else SAVED_TEXT_ENCODER.decoder(self.section(recipe).text_encoder)

    def towers(self, recipe: Recipe) -> Sequence[PreTrainedConfig]:
        model = self.section(recipe)
        if model.architecture:
            return [CLIPVisionConfig(**model.architecture.vision)]
        return [shape_of(cast(str, model.path)).tower.config]

    def load(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        section = self.section(recipe)
        width = SAVED_TEXT_ENCODER.dimension(section.text_encoder)
        model = Llm2Clip.load(path, DTYPES[recipe.precision], width, recipe.seed, section.dimension)
        model.pads = not recipe.data.text_embeddings and SAVED_TEXT_ENCODER.pads(section.text_encoder, attention)
        return model

    def flops(self, model: nn.Module, frozen: Frozen | None) -> StepFlops | None:
        return llm2clip.step_flops(cast(Llm2Clip, model), cast(FrozenTextEncoder | None, frozen))

    def frozen(self, recipe: Recipe, path: str, device: torch.device) -> Frozen | None:
        return None if recipe.data.text_embeddings else self._text_encoder(recipe, device)

    def for_evaluation(
        self, recipe: Recipe, processor: Processor, frozen: Frozen | None, device: torch.device
    ) -> tuple[Processor, Features | None]:
        if frozen is None:  # evaluation sets have no text vectors
            processor = replace(cast(TwoTowerProcessor, processor), with_vectors=False)
            frozen = self._text_encoder(recipe, device)
        return processor, frozen.features_of

    def save(self, recipe: Recipe, model: nn.Module, weights: Tensors, source: str, folder: Path) -> None:
        llm2clip.save(cast(Llm2Clip, model), self.section(recipe).text_encoder, folder, recipe.model.path)
        note_images(folder, source, self.section(recipe).images)

    def _text_encoder(self, recipe: Recipe, device: torch.device) -> FrozenTextEncoder:
        dtype = cast(torch.dtype, DTYPES[recipe.precision])
        model = SAVED_TEXT_ENCODER.load(
            self.section(recipe).text_encoder,
            dtype,
            lambda config: choose(recipe.model.attention, device.type, dtype, config),
        )
        return FrozenTextEncoder(model, device)


class SavedLlm2Clip(SavedModelInterface):
    """A vision encoder's folder with an adapter and the text encoder in a subfolder."""

    def owns(self, path: str, config: dict[str, Any]) -> bool:
        return llm2clip.width_of(path) is not None

    def dimension(self, path: str) -> int:
        return shape_of(path).dimension

    def reader(self, path: str, max_tokens: int, video_frames: int, video_fps: float | None = None) -> Processor:
        texts = SAVED_TEXT_ENCODER.reader(llm2clip.text_encoder_of(path), max_tokens)
        return TwoTowerProcessor(Pixels.load(path), shape_of(path).tokens, texts, video_frames, video_fps=video_fps)

    def open(self, path: str, precision: str, device: torch.device) -> tuple[nn.Module, Features | None]:
        text_encoder, _ = SAVED_TEXT_ENCODER.open(llm2clip.text_encoder_of(path), precision, device)
        model = Llm2Clip.load(path, DTYPES[precision], text_encoder.dimension).eval().to(device)
        model.pads = text_encoder.pads
        return model, FrozenTextEncoder(text_encoder, device).features_of

    def open_trained(self, path: str) -> nn.Module:
        return Llm2Clip.load(path, DTYPES["auto"], cast(int, llm2clip.width_of(path))).eval()

    def probe(self, path: str) -> list[Encoded]:
        pixels, width = Pixels.load(path), cast(int, llm2clip.width_of(path))
        tile = np.linspace(0, 255, 3 * pixels.size**2).astype(np.uint8).reshape(1, 3, pixels.size, pixels.size)
        image = Encoded(np.zeros(1, np.int32), (Image(tile, pixels.size, pixels.size),))
        return [image, Encoded(np.zeros(1, np.int32), vector=np.linspace(-1, 1, width, dtype=np.float32))]


TRAINING = {"contrastive": Llm2ClipTraining()}
SAVED = SavedLlm2Clip()
