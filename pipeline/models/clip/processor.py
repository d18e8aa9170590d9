"""CLIP's tokenization of texts."""

from dataclasses import dataclass
from typing import cast

import numpy as np
from transformers import CLIPConfig, CLIPTextConfig, PreTrainedTokenizerBase

from pipeline.data.batch import Encoded
from pipeline.errors import PipelineError
from pipeline.models import loading


@dataclass(frozen=True)
class ClipTexts:
    """Tokenizes texts with the tokenizer's start and end tokens, cut at the model's context length."""

    tokenizer: PreTrainedTokenizerBase
    context: int

    @classmethod
    def load(cls, path: str, max_tokens: int) -> "ClipTexts":
        config = text_of(load_config(path))
        tokenizer = loading.tokenizer(path, config.vocab_size)
        require_end(path, tokenizer, config)
        return cls(tokenizer, min(config.max_position_embeddings, max_tokens))

    def tokenized(self, text: str) -> Encoded:
        ids = self.tokenizer(text, truncation=True, max_length=self.context)["input_ids"]
        return Encoded(np.array(ids, np.int32))


def load_config(path: str) -> CLIPConfig:
    """Return the config of a folder or hub name; PipelineError if it is not a CLIP."""
    if (kind := loading.config_dict(path).get("model_type")) != "clip":
        raise PipelineError(f"{path} is a {kind} model; expected clip")
    return loading.config(path, CLIPConfig)


def text_of(config: CLIPConfig) -> CLIPTextConfig:
    return cast(CLIPTextConfig, config.text_config)


def require_end(path: str, tokenizer: PreTrainedTokenizerBase, config: CLIPTextConfig) -> None:
    """Raise PipelineError if texts do not end with the token that CLIP pools.

    CLIP would then pool the first token, which is the same for all texts. For old configs, whose eos_token_id is 2, it
    pools the token with the largest id.
    """
    ids, end = tokenizer("a")["input_ids"], config.eos_token_id
    if not ids or ids[-1] != (max(ids) if end == 2 else end):
        last = tokenizer.convert_ids_to_tokens(ids[-1:])
        raise PipelineError(
            f"{path}: its tokenizer ends texts with {last[0] if last else None!r}, and its model pools token {end} "
            f"(text_config.eos_token_id={end}): is the tokenizer another model's?"
        )
