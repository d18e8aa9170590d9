"""The text encoder's config and tokenization."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import takewhile
from operator import eq
from typing import Any, ClassVar

import numpy as np
from PIL.Image import Image as Picture
from transformers import PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from pipeline.data.batch import Encoded
from pipeline.data.sample import BadSample, Item
from pipeline.errors import PipelineError
from pipeline.models import loading
from pipeline.models.sentence_transformers import TEXT_ENCODER
from pipeline.models.shown import View, shown_text
from pipeline.models.text_encoder.templates import NONE, TEMPLATES, check

SETTINGS = TEXT_ENCODER


@dataclass(frozen=True)
class Settings:
    """How a text encoder embeds a text, in its config.json.

    pooling: of the last hidden states.  instruction: stands before each text; it is not pooled.
    template: the name of a chat template around instruction and text, or none.
    """

    pooling: str = "mean"
    instruction: str = ""
    template: str = NONE

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Settings":
        """Return the settings in a config that `load_config` returned."""
        return cls(**getattr(config, SETTINGS, {}))

    def stored(self) -> dict[str, str]:
        """Return them for config.json. Versions that know no templates can read a folder without one."""
        return {name: value for name, value in asdict(self).items() if name != "template" or value != NONE}


class TextsAlone(ABC):
    """The part that processors of models of texts share; an item with an image or a video is a BadSample."""

    as_stored: ClassVar[bool] = False
    tokenizer: Tokenizer

    def shown(self, item: Encoded) -> View:
        return View(shown_text(self.tokenizer, item.input_ids))

    @abstractmethod
    def tokenized(self, text: str, instruction: str = "") -> Encoded:
        """Encode a text, cut to `max_tokens`.  instruction: replaces the processor's, if it is not empty."""

    def encode(self, item: Item) -> Encoded:
        """Encode an item's text, cut to `max_tokens`. Raises BadSample for an item with an image or a video.

        An item's own instruction replaces the processor's.
        """
        if item.images or item.video is not None:
            raise BadSample("an item with an image or a video, and the model reads texts alone")
        return self.tokenized(item.text, item.instruction)

    def encode_parts(
        self, text: str, images: Sequence[Callable[[], Picture]], frames: Callable[[], Sequence[Picture]] | None
    ) -> Encoded:
        """Encode a text; BadSample if there are images or a video."""
        if images or frames:
            raise BadSample("the model reads texts alone, no images or videos")
        return self.tokenized(text)


@dataclass(frozen=True)
class TextProcessor(TextsAlone):
    """Tokenizes texts.

    instruction: stands before each text; its tokens are not pooled.  template: the name of that around both.
    """

    tokenizer: Tokenizer
    max_tokens: int
    instruction: str = ""
    template: str = NONE

    @classmethod
    def load(
        cls, path: str, max_tokens: int, instruction: str | None = None, template: str | None = None
    ) -> "TextProcessor":
        """Load from a folder or hub name.

        instruction, template: None is that of the folder's config. Raises PipelineError if the tokenizer lacks the
        template's tokens.
        """
        config = load_config(path)
        settings = Settings.of(config)
        tokenizer = loading.tokenizer(path, config.vocab_size)
        template = settings.template if template is None else template
        check(template, tokenizer, path)
        return cls(tokenizer, max_tokens, settings.instruction if instruction is None else instruction, template)

    @cached_property
    def start(self) -> list[int]:
        """The tokenizer's start tokens, which Llama has.

        The tokenizer's end tokens (Qwen3-Embedding has one) are left out: neither LLM2CLIP nor any text encoder trained
        with this project uses them.
        """
        return begins_with(self.tokenizer)

    def tokenized(self, text: str, instruction: str = "") -> Encoded:
        """Encode a text, cut to `max_tokens`.  instruction: replaces the processor's, if it is not empty.

        At least one token is pooled. Of a templated text that is as long as `max_tokens` without the template's
        beginning, all tokens are: LLM2CLIP's code does this.
        """
        instruction = instruction or self.instruction
        if template := TEMPLATES.get(self.template):
            ids, count = template.tokenized(self.tokenizer, instruction, text)
            ids = (self.start + ids)[: self.max_tokens]
            return Encoded(np.array(ids, np.int32), skipped=max(len(ids) - count, 0) if count else 0)
        before = self.before(instruction)
        ids = self.tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
        # For a text without tokens, pool the last token before it, or an end token.
        ids = (before + ids)[: self.max_tokens] or [self.tokenizer.eos_token_id or 0]
        return Encoded(np.array(ids, np.int32), skipped=min(len(before), len(ids) - 1))

    def before(self, instruction: str) -> list[int]:
        """Return the tokens before a text without a template."""
        if instruction not in self._instructions:
            self._instructions[instruction] = self.tokenizer(instruction, add_special_tokens=False)["input_ids"]
        return self.start + self._instructions[instruction]

    @cached_property
    def _instructions(self) -> dict[str, list[int]]:
        return {}


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
    if not isinstance(settings, dict) or not _is_supported(settings):
        raise PipelineError(
            f"{path}: {SETTINGS}={settings!r} in its config.json is not supported; expected are pooling, such as mean, "
            f"instruction, a text, and template, {' or '.join((NONE, *TEMPLATES))}: was it written by a later "
            "version?"
        )
    return config


def _is_supported(settings: dict[str, Any]) -> bool:
    known = settings.keys() <= {field.name for field in fields(Settings)}
    if not known or not all(isinstance(value, str) for value in settings.values()):
        return False
    read = Settings(**settings)
    return read.pooling == "mean" and read.template in (NONE, *TEMPLATES)


def require_decoder(where: str, config: PreTrainedConfig) -> None:
    parts = [name for name in type(config).sub_configs if re.search("text|vision|audio", name)]
    if parts or not hasattr(config, "num_hidden_layers") or not hasattr(type(config), "rope_parameters"):
        raise PipelineError(
            f"{where} is a {config.model_type} model; expected a text-only decoder, such as llama or qwen2"
        )
