"""Texts -> token ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from operator import eq
from typing import ClassVar

import numpy as np
from PIL.Image import Image as Picture
from transformers import PreTrainedTokenizerBase as Tokenizer

from pipeline.data.collate import Encoded
from pipeline.data.sample import BadSample, Item
from pipeline.models import loading
from pipeline.models.text_encoder.checks import SETTINGS, load_config


@dataclass(frozen=True)
class TextProcessor:
    """Texts -> token ids. instruction: stands before each of them, seen and not pooled."""

    tokenizer: Tokenizer
    max_tokens: int
    instruction: str = ""

    as_stored: ClassVar[bool] = False

    @classmethod
    def load(cls, path: str, max_tokens: int, instruction: str | None = None) -> "TextProcessor":
        """Of a folder or hub name.  instruction: None is the one that the text encoder was trained with."""
        config = load_config(path)
        if instruction is None:
            instruction = getattr(config, SETTINGS, {}).get("instruction", "")
        return cls(loading.tokenizer(path, config.vocab_size), max_tokens, instruction)

    def encode(self, item: Item) -> Encoded:
        """Raises BadSample for an item with an image or a video. A text too long is cut at its end."""
        if item.images or item.video is not None:
            raise BadSample("an item with an image or a video, and the model reads texts alone")
        return self.tokenized(item.text)

    def encode_parts(
        self, text: str, images: Sequence[Callable[[], Picture]], frames: Callable[[], Sequence[Picture]] | None
    ) -> Encoded:
        """As `encode`, of a text by itself."""
        if images or frames:
            raise BadSample("the model reads texts alone, no images or videos")
        return self.tokenized(text)

    @cached_property
    def before(self) -> list[int]:
        """What stands before every text: what the tokenizer begins texts with, as Llama's does, and the instruction.

        What it ends texts with, be that its end of text or another token (Qwen3-Embedding), is left out: LLM2CLIP has
        none, nor had any text encoder that was trained here.
        """
        instruction = self.tokenizer(self.instruction, add_special_tokens=False)["input_ids"]
        return begins_with(self.tokenizer) + instruction

    def tokenized(self, text: str) -> Encoded:
        before = self.before
        ids = self.tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
        # A text of no tokens has its start pooled, or something that stands for it.
        ids = (before + ids)[: self.max_tokens] or [self.tokenizer.eos_token_id or 0]
        return Encoded(np.array(ids, np.int32), skipped=min(len(before), len(ids) - 1))


def begins_with(tokenizer: Tokenizer) -> list[int]:
    """The tokens that the tokenizer puts before a text: those in which two texts begin alike, less their own."""
    bare, whole = (tokenizer(["A cat", "2 dogs"], add_special_tokens=special)["input_ids"] for special in (False, True))
    alike, own = (list(takewhile(lambda pair: eq(*pair), zip(*texts, strict=False))) for texts in (whole, bare))
    return whole[0][: len(alike) - len(own)]
