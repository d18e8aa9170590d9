"""The training interfaces of LLM2CLIP's text encoder, one for each objective, and its saved-model interface."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from pipeline.config import Recipe
from pipeline.data.lengths import Lengths, Square
from pipeline.data.sample import Draw, Pair
from pipeline.models.attention import fastest
from pipeline.models.chunks import Features
from pipeline.models.family import Processor, SavedModelInterface, TrainingInterface
from pipeline.models.files import Tensors
from pipeline.models.loading import DTYPES
from pipeline.models.text_encoder import masked
from pipeline.models.text_encoder import model as decoder
from pipeline.models.text_encoder.config import TextEncoderSection
from pipeline.models.text_encoder.masked import MaskedLanguageModel
from pipeline.models.text_encoder.model import TextEncoder
from pipeline.models.text_encoder.processor import SETTINGS, TextProcessor, load_config


class TextEncoderTraining(TrainingInterface[TextEncoderSection]):
    """LLM2CLIP's first stage: trains a decoder as a text encoder with a contrastive loss on pairs of captions."""

    adapted = "language_model"
    _model: ClassVar[type[TextEncoder]] = TextEncoder
    _decoder: ClassVar[type[_BaseAutoModelClass]] = AutoModel

    def check(self, model: TextEncoderSection) -> None:
        if model.architecture:
            decoder.random_config(model.architecture.text)
        elif model.path:
            decoder.check_folder(model.path, self._decoder)

    def lengths(self, recipe: Recipe) -> Lengths:
        return Lengths(Square(), recipe.video.frames)

    def trained_on(self, pair: Pair, draw: Draw) -> Pair:
        return pair.two_texts(draw)

    def build(self, model: TextEncoderSection, texts: Iterable[str], seed: int, folder: Path) -> None:
        assert model.architecture
        decoder.build(model.architecture.text, texts, seed, folder, self._decoder)

    def processor(self, recipe: Recipe, path: str) -> Processor:
        return TextProcessor.load(path, recipe.model.max_tokens, self.section(recipe).instruction)

    def load(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        return self._model.load(path, DTYPES[recipe.precision], attention)

    def empty(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        return self._model.empty(path, attention)

    def own_name(self, stored: str) -> str:
        return re.sub(r"^(model\.)?(?=layers\.|embed_tokens\.|norm\.)", "language_model.", stored)

    def save(self, recipe: Recipe, model: nn.Module, weights: Tensors, source: str, folder: Path) -> None:
        instruction = self.section(recipe).instruction
        decoder.save(cast(TextEncoder, model), weights, source, folder, recipe.model.path, instruction)


class MaskedTraining(TextEncoderTraining):
    """An optional stage before the first: adapts a decoder to bidirectional attention by masked next-token prediction.

    An export is a decoder with its LM head. It is not trained as an embedder.
    """

    _model = MaskedLanguageModel
    _decoder = AutoModelForCausalLM

    def trained_on(self, pair: Pair, draw: Draw) -> Pair:
        """Return one of an image's texts, or both texts of a pair."""
        pair = pair.one_text(draw)
        if pair.query.images or pair.query.video is not None:
            return replace(pair, query=pair.target, negatives=())
        return pair

    def own_name(self, stored: str) -> str:
        return "causal." + re.sub(r"^(?=layers\.|embed_tokens\.|norm\.)", "model.", stored)

    def save(self, recipe: Recipe, model: nn.Module, weights: Tensors, source: str, folder: Path) -> None:
        masked.save(cast(MaskedLanguageModel, model), weights, source, folder, recipe.model.path)


class SavedTextEncoder(SavedModelInterface):
    """A decoder that its config marks as a text encoder."""

    def owns(self, path: str, config: dict[str, Any]) -> bool:
        return SETTINGS in config

    def dimension(self, path: str) -> int:
        return int(load_config(path).hidden_size)

    def reader(self, path: str, max_tokens: int, video_frames: int, video_fps: float | None = None) -> Processor:
        return TextProcessor.load(path, max_tokens)

    def open(self, path: str, precision: str, device: torch.device) -> tuple[TextEncoder, Features | None]:
        attention = fastest(load_config(path), DTYPES[precision], device)
        return TextEncoder.load(path, DTYPES[precision], attention).eval().to(device), None


TRAINING = {"contrastive": TextEncoderTraining(), "masked_next_token": MaskedTraining()}
SAVED = SavedTextEncoder()
