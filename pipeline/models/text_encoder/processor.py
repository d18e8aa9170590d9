"""The text encoder's config and tokenization."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from operator import eq
from typing import ClassVar

import numpy as np
from PIL.Image import Image as Picture
from transformers import PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from pipeline.data.batch import Encoded
from pipeline.data.sample import BadSample, Item
from pipeline.errors import PipelineError
from pipeline.models import loading

SETTINGS = "text_encoder"  # the field of config.json that marks a text encoder


@dataclass(frozen=True)
class TextProcessor:
    """Tokenizes texts.  instruction: is put before each text, and its tokens are excluded from pooling."""

    tokenizer: Tokenizer
    max_tokens: int
    instruction: str = ""

    as_stored: ClassVar[bool] = False

    @classmethod
    def load(cls, path: str, max_tokens: int, instruction: str | None = None) -> "TextProcessor":
        """Load from a folder or hub name.  instruction: None is the one that the text encoder was trained with."""
        config = load_config(path)
        if instruction is None:
            instruction = getattr(config, SETTINGS, {}).get("instruction", "")
        return cls(loading.tokenizer(path, config.vocab_size), max_tokens, instruction)

    def encode(self, item: Item) -> Encoded:
        """Encode an item's text, cut to `max_tokens`. Raises BadSample for an item with an image or a video."""
        if item.images or item.video is not None:
            raise BadSample("an item with an image or a video, and the model reads texts alone")
        return self.tokenized(item.text)

    def encode_parts(
        self, text: str, images: Sequence[Callable[[], Picture]], frames: Callable[[], Sequence[Picture]] | None
    ) -> Encoded:
        """Encode a text; BadSample if there are images or a video."""
        if images or frames:
            raise BadSample("the model reads texts alone, no images or videos")
        return self.tokenized(text)

    @cached_property
    def before(self) -> list[int]:
        """The tokens before every text: the tokenizer's start tokens, which Llama has, and the instruction.

        The tokenizer's end tokens (Qwen3-Embedding has one) are left out: neither LLM2CLIP nor any text encoder trained
        with this project uses them.
        """
        instruction = self.tokenizer(self.instruction, add_special_tokens=False)["input_ids"]
        return begins_with(self.tokenizer) + instruction

    def tokenized(self, text: str) -> Encoded:
        before = self.before
        ids = self.tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
        # For a text without tokens, pool the last token before it, or an end token.
        ids = (before + ids)[: self.max_tokens] or [self.tokenizer.eos_token_id or 0]
        return Encoded(np.array(ids, np.int32), skipped=min(len(before), len(ids) - 1))


def begins_with(tokenizer: Tokenizer) -> list[int]:
    """Return the tokenizer's start tokens: two texts' common prefix with special tokens, less that without."""
    bare, whole = (tokenizer(["A cat", "2 dogs"], add_special_tokens=special)["input_ids"] for special in (False, True))
    alike, own = (list(takewhile(lambda pair: eq(*pair), zip(*texts, strict=False))) for texts in (whole, bare))
    return whole[0][: len(alike) - len(own)]


def load_config(path: str) -> PreTrainedConfig:
    """Return the config of a folder or hub name; PipelineError if it is not a supported decoder."""
    config: PreTrainedConfig = loading.config(path)
    require_decoder(path, config)
    settings = getattr(config, SETTINGS, {})
    right = isinstance(settings, dict) and settings.keys() <= {"pooling", "instruction"}
    if not right or settings.get("pooling", "mean") != "mean" or not isinstance(settings.get("instruction", ""), str):
        raise PipelineError(
            f"{path}: {SETTINGS}={settings!r} in its config.json is not supported; expected are pooling, such as mean, "
            "and instruction, a text: was it written by a later version?"
        )
    return config


def require_decoder(where: str, config: PreTrainedConfig) -> None:
    parts = [name for name in type(config).sub_configs if re.search("text|vision|audio", name)]
    if parts or not hasattr(config, "num_hidden_layers") or not hasattr(type(config), "rope_parameters"):
        raise PipelineError(
            f"{where} is a {config.model_type} model; expected a text-only decoder, such as llama or qwen2"
        )
