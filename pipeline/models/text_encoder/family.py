"""The training interfaces of LLM2CLIP's text encoder, one for each objective, and its saved-model interface."""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from pipeline.config import Recipe
from pipeline.data.lengths import Lengths, Square
from pipeline.data.sample import Draw, Pair
from pipeline.data.source import Source
from pipeline.errors import PipelineError
from pipeline.models.attention import choose
from pipeline.models.chunks import Features, Frozen
from pipeline.models.family import Processor, SavedModelInterface, TrainingInterface
from pipeline.models.files import Tensors
from pipeline.models.flops import StepFlops
from pipeline.models.loading import DTYPES, config_dict
from pipeline.models.text_encoder import masked, sentence
from pipeline.models.text_encoder import model as decoder
from pipeline.models.text_encoder.config import ByLength, TextEncoderSection
from pipeline.models.text_encoder.masked import MaskedLanguageModel
from pipeline.models.text_encoder.model import TextEncoder
from pipeline.models.text_encoder.processor import SETTINGS, Settings, TextProcessor, load_config
from pipeline.models.text_encoder.sentence import SentenceEncoder, SentenceProcessor


class TextEncoderTraining(TrainingInterface[TextEncoderSection]):
    """LLM2CLIP's first stage: trains a decoder as a text encoder with a contrastive loss on pairs of captions."""

    adapted = "language_model"
    _model: ClassVar[type[TextEncoder]] = TextEncoder
    _decoder: ClassVar[type[_BaseAutoModelClass]] = AutoModel

    def check(self, model: TextEncoderSection) -> None:
        if model.architecture:
            decoder.random_config(model.architecture.text)
        elif model.path:
            decoder.check_folder(model.path, self._decoder, model.template)

    def lengths(self, recipe: Recipe) -> Lengths:
        return Lengths(Square(), recipe.video.frames)

    def check_data(self, recipe: Recipe, source: Source) -> None:
        super().check_data(recipe, source)
        given = self.section(recipe).query_instructions
        if given and (missing := [name for name in source.names if name not in given]):
            raise PipelineError(
                f"model.query_instructions has none for {', '.join(missing)}: add one, or a text in quotes that is "
                "empty, for each dataset of the run"
            )
        with_images = (number for number, shard in source.shards if shard.images or shard.videos)
        if recipe.data.negatives and (number := next(with_images, None)) is not None:
            raise PipelineError(
                f"data.negatives: dataset {source.names[number]} has images or videos, whose captions a text encoder "
                "pairs without negatives: remove data.negatives, or give datasets of texts"
            )

    def trained_on(self, recipe: Recipe, pair: Pair, draw: Draw) -> Pair:
        """Return two texts, the query with the instruction of its dataset in model.query_instructions."""
        pair = pair.two_texts(draw)
        given = self.section(recipe).query_instructions.get(pair.dataset, "")
        if isinstance(given, list):
            # Bits of the sample's random number that the draw of its texts does not depend on.
            given = given[draw(len(given) << 32) >> 32]
        elif isinstance(given, ByLength):
            given = given.longer if len(pair.query.text) > len(pair.target.text) else given.shorter
        return replace(pair, query=replace(pair.query, instruction=given)) if given else pair

    def build(self, model: TextEncoderSection, texts: Iterable[str], seed: int, folder: Path) -> None:
        assert model.architecture
        decoder.build(model.architecture.text, texts, seed, folder, self._decoder)

    def processor(self, recipe: Recipe, path: str) -> Processor:
        section = self.section(recipe)
        return TextProcessor.load(path, section.max_tokens, section.instruction, section.template)

    def decoder(self, recipe: Recipe) -> PreTrainedConfig:
        model = self.section(recipe)
        return (
            decoder.random_config(model.architecture.text) if model.architecture else load_config(cast(str, model.path))
        )

    def load(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        return self._model.load(path, DTYPES[recipe.precision], attention)

    def empty(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        return self._model.empty(path, attention)

    def adapter_prefix(self, recipe: Recipe, source: str) -> str:
        if config_dict(source).get("is_causal") is not False:
            raise PipelineError(
                f"--adapters: {source} attends causally, and adapters do not change that: export without --adapters"
            )
        return "language_model."

    def flops(self, model: nn.Module, frozen: Frozen | None) -> StepFlops | None:
        return decoder.step_flops(model)

    def own_name(self, stored: str) -> str:
        return re.sub(r"^(model\.)?(?=layers\.|embed_tokens\.|norm\.)", "language_model.", stored)

    def save(self, recipe: Recipe, model: nn.Module, weights: Tensors, source: str, folder: Path) -> None:
        section = self.section(recipe)
        settings = Settings(instruction=section.instruction, template=section.template)
        decoder.save(cast(TextEncoder, model), weights, source, folder, recipe.model.path, settings)


class MaskedTraining(TextEncoderTraining):
    """An optional stage before the first: adapts a decoder to bidirectional attention by masked next-token prediction.

    An export is a decoder with its LM head. It is not trained as an embedder.
    """

    _model = MaskedLanguageModel
    _decoder = AutoModelForCausalLM

    def trained_on(self, recipe: Recipe, pair: Pair, draw: Draw) -> Pair:
        """Return one of an image's texts, or both texts of a pair."""
        pair = pair.one_text(draw)
        if pair.query.images or pair.query.video is not None:
            return pair.alone(pair.target, pair.target)
        return pair

    def adapter_prefix(self, recipe: Recipe, source: str) -> str:
        raise PipelineError("--adapters is for embedders, and masked training makes none: export without --adapters")

    def flops(self, model: nn.Module, frozen: Frozen | None) -> StepFlops | None:
        return masked.step_flops(cast(MaskedLanguageModel, model))

    def own_name(self, stored: str) -> str:
        return "causal." + re.sub(r"^(?=layers\.|embed_tokens\.|norm\.)", "model.", stored)

    def save(self, recipe: Recipe, model: nn.Module, weights: Tensors, source: str, folder: Path) -> None:
        masked.save(cast(MaskedLanguageModel, model), weights, source, folder, recipe.model.path)


class SavedTextEncoder(SavedModelInterface):
    """A decoder that its config marks as a text encoder, or a sentence embedder; see sentence.py."""

    def owns(self, path: str, config: dict[str, Any]) -> bool:
        return SETTINGS in config or sentence.is_sentence_embedder(path, config)

    def check(self, path: str) -> None:
        """Raise PipelineError if the folder or hub name cannot be a text encoder, without loading its weights."""
        if _is_sentence_embedder(path):
            sentence.check_folder(path)
        else:
            decoder.check_folder(path)

    def dimension(self, path: str) -> int:
        if _is_sentence_embedder(path):
            return sentence.dimension_of(path)
        return int(load_config(path).hidden_size)

    def reader(
        self, path: str, max_tokens: int, video_frames: int = 0, video_fps: float | None = None
    ) -> TextProcessor | SentenceProcessor:
        if _is_sentence_embedder(path):
            return SentenceProcessor.load(path, max_tokens)
        return TextProcessor.load(path, max_tokens)

    def decoder(self, path: str) -> PreTrainedConfig | None:
        """Return the config of a decoder, which attends on packed texts; None for a sentence embedder."""
        return None if _is_sentence_embedder(path) else load_config(path)

    def pads(self, path: str, attention: str) -> bool:
        """Whether texts are padded to the longest of a chunk.  attention: the kind, for a decoder on packed texts."""
        return attention == "sdpa" or _is_sentence_embedder(path)

    def load(
        self, path: str, dtype: torch.dtype | Literal["auto"], attention: Callable[[PreTrainedConfig], str]
    ) -> TextEncoder | SentenceEncoder:
        """Return the model on the CPU.  attention: config -> kind of attention, for a decoder on packed texts."""
        if _is_sentence_embedder(path):
            return SentenceEncoder.load(path, dtype)
        return TextEncoder.load(path, dtype, attention(load_config(path)))

    def open(
        self, path: str, precision: str, device: torch.device
    ) -> tuple[TextEncoder | SentenceEncoder, Features | None]:
        dtype = DTYPES[precision]
        model = self.load(path, dtype, lambda config: choose("auto", device.type, dtype, config))
        return model.eval().to(device), None


def _is_sentence_embedder(path: str) -> bool:
    return sentence.is_sentence_embedder(path, config_dict(path))


TRAINING = {"contrastive": TextEncoderTraining(), "masked_next_token": MaskedTraining()}
SAVED = SavedTextEncoder()
