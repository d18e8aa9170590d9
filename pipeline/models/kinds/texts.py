"""LLM2CLIP's text encoder, and what may come before it."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from pipeline.config import Model, Recipe
from pipeline.data.lengths import Lengths, Square
from pipeline.data.sample import Draw, Pair
from pipeline.models import decoder, loading, masked
from pipeline.models.chunks import Features
from pipeline.models.decoder import TextEncoder, TextProcessor
from pipeline.models.kinds.kind import Kind, Processor, fastest
from pipeline.models.loading import DTYPES
from pipeline.models.masked import MaskedLanguageModel


class CaptionKind(Kind):
    """LLM2CLIP's first stage: a decoder as an encoder of texts, trained to tell captions apart."""

    parts: ClassVar = {"language_model": ("language_model.",)}
    text_part = "language_model"
    sees = False
    _transformers: ClassVar = AutoModel

    def check(self, model: Model) -> None:
        if model.architecture:
            decoder.random_config(model.architecture.text)
        else:
            config = decoder.load_config(model.path)
            loading.check_weights(model.path, self._transformers, config)
            decoder.check(model.path, config)
            loading.tokenizer(model.path, config.vocab_size)

    def lengths(self, recipe: Recipe) -> Lengths:
        return Lengths(Square(), recipe.video.frames)

    def trained_on(self, pair: Pair, draw: Draw) -> Pair:
        return pair.two_texts(draw)

    def build(self, model: Model, texts: Iterable[str], seed: int, folder: Path) -> None:
        decoder.build(model.architecture.text, texts, seed, folder)

    def processor(self, recipe: Recipe, path: str) -> Processor:
        return TextProcessor.load(path, recipe.model.max_tokens, recipe.model.instruction)

    def load(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        return TextEncoder.load(path, DTYPES[recipe.precision], attention)

    def empty(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        return TextEncoder.of_config(decoder.load_config(path), attention)

    def own_name(self, stored: str) -> str:
        return re.sub(r"^(model\.)?(?=layers\.|embed_tokens\.|norm\.)", "language_model.", stored)

    def save(
        self, recipe: Recipe, model: nn.Module, weights: dict[str, torch.Tensor], source: str, folder: Path
    ) -> None:
        decoder.save(model, weights, source, folder, recipe.model.path, recipe.model.instruction)

    def dimension(self, path: str) -> int:
        return decoder.load_config(path).hidden_size

    def reader(self, path: str, max_tokens: int, video_frames: int) -> Processor:
        return TextProcessor.load(path, max_tokens)

    def open(self, path: str, precision: str, device: torch.device) -> tuple[nn.Module, Features | None]:
        attention = fastest(decoder.load_config(path), precision, device)
        return TextEncoder.load(path, DTYPES[precision], attention).eval().to(device), None


class MntpKind(CaptionKind):
    """What may come before the first stage: a decoder gets used to attending both ways, by masked next tokens.

    An export is a decoder with its LM head, and by itself an embedder no more than any other.
    """

    parts: ClassVar = {"language_model": ("causal.",)}
    _transformers: ClassVar = AutoModelForCausalLM
    contrastive = False

    def trained_on(self, pair: Pair, draw: Draw) -> Pair:
        """Of an image one of its texts; of a pair of texts both."""
        pair = pair.one_text(draw)
        if pair.query.images or pair.query.video is not None:
            return replace(pair, query=pair.target, negatives=())
        return pair

    def build(self, model: Model, texts: Iterable[str], seed: int, folder: Path) -> None:
        masked.build(model.architecture.text, texts, seed, folder)

    def load(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        return MaskedLanguageModel.load(path, DTYPES[recipe.precision], attention)

    def empty(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        return MaskedLanguageModel.empty(path, attention)

    def own_name(self, stored: str) -> str:
        return "causal." + re.sub(r"^(?=layers\.|embed_tokens\.|norm\.)", "model.", stored)

    def save(
        self, recipe: Recipe, model: nn.Module, weights: dict[str, torch.Tensor], source: str, folder: Path
    ) -> None:
        masked.save(model, weights, source, folder, recipe.model.path)
