"""LLM2CLIP's vision encoder with its adapter, and CLIP: two towers each."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, CLIPModel, CLIPVisionConfig

from pipeline.config import Model, Recipe
from pipeline.data.collate import Encoded, Image
from pipeline.data.lengths import Lengths, Square
from pipeline.data.source import Source
from pipeline.errors import PipelineError
from pipeline.models import clip, decoder, llm2clip, loading, weights
from pipeline.models.attention import choose
from pipeline.models.chunks import Features
from pipeline.models.clip import Clip, ClipTexts
from pipeline.models.decoder import FrozenTextEncoder, TextEncoder, TextProcessor
from pipeline.models.files import fetched
from pipeline.models.folder import note_images
from pipeline.models.frozen import Frozen
from pipeline.models.kinds.kind import Kind, Processor
from pipeline.models.kinds.texts import CaptionKind
from pipeline.models.llm2clip import Llm2Clip
from pipeline.models.loading import DTYPES, reads_as_stored, refuse_unknown
from pipeline.models.two_tower import TwoTowerProcessor
from pipeline.models.vision import Pixels, VisionEncoder


class Llm2ClipKind(Kind):
    """LLM2CLIP's second stage: a vision encoder, and an adapter over a frozen text encoder's vectors.

    These come with the data (data.text_embeddings), or the text encoder is outside the engine.
    """

    parts: ClassVar = {"vision_tower": ("vision.",), "adapter": ("adapter.",)}
    text_part = "adapter"
    stages = (0, 1, 2)

    def check(self, model: Model) -> None:
        # Needed at the end at the latest.
        config = decoder.load_config(model.text_encoder)
        loading.check_weights(str(fetched(model.text_encoder)), AutoModel, config)
        decoder.check(model.text_encoder, config)
        TextProcessor.load(model.text_encoder, model.max_tokens)
        if model.path:
            Pixels.load(model.path)
            VisionEncoder.check(model.path)
        else:
            refuse_unknown("vision", model.architecture.vision, CLIPVisionConfig())

    def check_data(self, recipe: Recipe, source: Source) -> None:
        if (made := source.embedding_metadata) is None:
            return
        text_encoder, again = recipe.model.text_encoder, "embed the shards again, or name what made them"
        width = self.dimension_of_texts(text_encoder)
        if made.width != width:
            raise PipelineError(
                f"data.text_embeddings are {made.width} wide, made by {made.model}, and those of "
                f"model.text_encoder={text_encoder} are {width} wide: {again}"
            )
        if made.weights and made.weights != weights.fingerprint(str(fetched(text_encoder))):
            raise PipelineError(
                f"data.text_embeddings were made by {made.model} with other weights than "
                f"model.text_encoder={text_encoder} has now: {again}"
            )
        if made.max_tokens and made.max_tokens != recipe.model.max_tokens:
            raise PipelineError(
                f"data.text_embeddings are of texts cut at {made.max_tokens} tokens, and model.max_tokens is "
                f"{recipe.model.max_tokens}: set it to that, or embed the shards again with --max-tokens"
            )

    def lengths(self, recipe: Recipe) -> Lengths:
        # Of texts, too, where their vectors come with them: few, and equal for all ranks.
        return Lengths(Square(_tokens(recipe.model)), recipe.video.frames)

    def build(self, model: Model, texts: Iterable[str], seed: int, folder: Path) -> None:
        vision = model.architecture.vision
        VisionEncoder.build(vision, CLIPVisionConfig(**vision).projection_dim, seed).save(folder)

    def processor(self, recipe: Recipe, path: str) -> Processor:
        pixels, vectors = Pixels.load(path, recipe.model.images), bool(recipe.data.text_embeddings)
        return TwoTowerProcessor(pixels, _tokens(recipe.model), self._texts(recipe), recipe.video.frames, vectors)

    def load(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        width = self.dimension_of_texts(recipe.model.text_encoder)
        model = Llm2Clip.load(path, DTYPES[recipe.precision], width, recipe.seed)
        model.pads = not recipe.data.text_embeddings and attention == "sdpa"
        return model

    def frozen(self, recipe: Recipe, path: str, device: torch.device) -> Frozen | None:
        return None if recipe.data.text_embeddings else self._text_encoder(recipe, device)

    def for_evaluation(
        self, recipe: Recipe, processor: Processor, frozen: Frozen | None, device: torch.device
    ) -> tuple[Processor, Features | None]:
        if frozen is None:  # the texts of evaluation sets have no vectors
            processor = replace(processor, with_vectors=False)
            frozen = self._text_encoder(recipe, device)
        return processor, frozen.features_of

    def save(
        self, recipe: Recipe, model: nn.Module, weights: dict[str, torch.Tensor], source: str, folder: Path
    ) -> None:
        llm2clip.save(model, recipe.model.text_encoder, folder, recipe.model.path)
        note_images(folder, reads_as_stored(source, recipe.model.images))

    def dimension(self, path: str) -> int:
        return _shape(path).dimension

    def reader(self, path: str, max_tokens: int, video_frames: int) -> Processor:
        texts = TextProcessor.load(llm2clip.text_encoder_of(path), max_tokens)
        return TwoTowerProcessor(Pixels.load(path), _shape(path).tokens, texts, video_frames)

    def open(self, path: str, precision: str, device: torch.device) -> tuple[nn.Module, Features | None]:
        text_encoder, _ = CaptionKind().open(llm2clip.text_encoder_of(path), precision, device)
        model = Llm2Clip.load(path, DTYPES[precision], text_encoder.dimension).eval().to(device)
        model.pads = text_encoder.pads
        return model, FrozenTextEncoder(text_encoder, device).features_of

    def open_trained(self, path: str) -> nn.Module:
        return Llm2Clip.load(path, DTYPES["auto"], llm2clip.settings(path)["width"]).eval()

    def probe(self, path: str) -> list[Encoded]:
        pixels, width = Pixels.load(path), llm2clip.settings(path)["width"]
        tile = np.linspace(0, 255, 3 * pixels.size**2).astype(np.uint8).reshape(1, 3, pixels.size, pixels.size)
        image = Encoded(np.zeros(1, np.int32), (Image(tile, pixels.size, pixels.size),))
        return [image, Encoded(np.zeros(1, np.int32), vector=np.linspace(-1, 1, width, dtype=np.float32))]

    def _texts(self, recipe: Recipe) -> TextProcessor:
        return TextProcessor.load(recipe.model.text_encoder, recipe.model.max_tokens)

    def _text_encoder(self, recipe: Recipe, device: torch.device) -> FrozenTextEncoder:
        dtype = DTYPES[recipe.precision]
        attention = choose(recipe.model.attention, device.type, dtype)
        return FrozenTextEncoder(TextEncoder.load(recipe.model.text_encoder, dtype, attention), device)

    @staticmethod
    def dimension_of_texts(text_encoder: str) -> int:
        return decoder.load_config(text_encoder).hidden_size


class ClipKind(Kind):
    """CLIP, both of whose towers are trained; an export is evaluated as any other CLIP."""

    parts: ClassVar = {
        "vision_tower": ("clip.vision_model.", "clip.visual_projection."),
        "language_model": ("clip.text_model.", "clip.text_projection."),
    }
    text_part = "language_model"
    stages = (0, 1, 2)

    def check(self, model: Model) -> None:
        if model.architecture:
            clip.check_architecture(model.architecture)
        else:
            loading.check_weights(model.path, CLIPModel, clip.load_config(model.path))
            self.reader(model.path, model.max_tokens, 1)

    def lengths(self, recipe: Recipe) -> Lengths:
        return Lengths(Square(_tokens(recipe.model)), recipe.video.frames)

    def build(self, model: Model, texts: Iterable[str], seed: int, folder: Path) -> None:
        clip.build(model.architecture, texts, seed, folder)

    def processor(self, recipe: Recipe, path: str) -> Processor:
        pixels = Pixels.load(path, recipe.model.images)
        return replace(self.reader(path, recipe.model.max_tokens, recipe.video.frames), pixels=pixels)

    def load(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        return Clip.load(path, DTYPES[recipe.precision])

    def save(
        self, recipe: Recipe, model: nn.Module, weights: dict[str, torch.Tensor], source: str, folder: Path
    ) -> None:
        clip.save(model, source, folder)
        note_images(folder, reads_as_stored(source, recipe.model.images))

    def dimension(self, path: str) -> int:
        return clip.load_config(path).projection_dim

    def reader(self, path: str, max_tokens: int, video_frames: int) -> Processor:
        texts = ClipTexts.load(path, max_tokens)
        return TwoTowerProcessor(Pixels.load(path), _shape(path).tokens, texts, video_frames)

    def open(self, path: str, precision: str, device: torch.device) -> tuple[nn.Module, Features | None]:
        return Clip.load(path, DTYPES[precision]).eval().to(device), None


@cache
def _shape(path: str) -> VisionEncoder:
    """A vision encoder's folder or hub name -> the module without weights."""
    with torch.device("meta"):
        return VisionEncoder.empty(path)


def _tokens(model: Model) -> int:
    """What an image stands for, in tokens."""
    if model.path:
        return _shape(model.path).tokens
    config = CLIPVisionConfig(**model.architecture.vision)
    return (config.image_size // config.patch_size) ** 2 + 1
