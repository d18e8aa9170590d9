"""A decoder with its LM head, trained by masked next-token prediction (LLM2Vec, arXiv 2404.05961).

Some tokens of a text are masked. Each is predicted from the last hidden state of the token before it, so the decoder's
own LM head fits.
"""

from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pipeline.errors import PipelineError
from pipeline.models import loading
from pipeline.models.attention import Segments, implementation
from pipeline.models.chunks import Packed
from pipeline.models.flops import StepFlops, per_row
from pipeline.models.folder import finish, write_card
from pipeline.models.lean import keep_less
from pipeline.models.text_encoder.model import TextEncoder, check
from pipeline.models.text_encoder.model import step_flops as model_flops
from pipeline.models.text_encoder.processor import SETTINGS, begins_with, load_config

_BLANK = "_"  # masks tokens if the tokenizer has no mask token, like those of Llama and Qwen2


class MaskedLanguageModel(TextEncoder):
    """Maps packed texts to the cross entropies of their masked tokens.

    causal: a decoder with its LM head.  mask_token: id of the token that masks others.  vocabulary: number of tokens.
    """

    def __init__(self, causal: PreTrainedModel, mask_token: int, vocabulary: int) -> None:
        super(TextEncoder, self).__init__()
        keep_less(causal)
        self.causal, self.mask_token, self.vocabulary = causal, mask_token, vocabulary

    @classmethod
    def load(cls, path: str, dtype: torch.dtype | Literal["auto"], attention: str = "sdpa") -> "MaskedLanguageModel":
        """Load like TextEncoder.load. Raises PipelineError if the decoder has no LM head or its tokenizer no mask."""
        causal: PreTrainedModel = loading.open_model(
            AutoModelForCausalLM, path, load_config(path), dtype, implementation(attention), check
        )
        return cls(causal, *_tokens(path, causal.config))

    @classmethod
    def empty(cls, path: str, attention: str) -> "MaskedLanguageModel":
        """Build the model that `load` returns, without loading weights."""
        config = load_config(path)
        causal = AutoModelForCausalLM.from_config(config, attn_implementation=implementation(attention))
        causal.tie_weights()  # if the config says so; ZeRO-3's partitioning undid it
        return cls(causal, *_tokens(path, config))

    @property
    def language_model(self) -> PreTrainedModel:  # TextEncoder has a submodule there
        """The decoder without its head."""
        return cast(PreTrainedModel, self.causal.base_model)

    def forward(self, packed: Packed, with_images: bool = False, predicted: torch.Tensor | None = None) -> torch.Tensor:
        """Map N packed texts to (N, 2) float32: each text's sum of cross entropies and number of correct predictions.

        predicted: (2, M) int64, the positions to predict from and the target tokens. Only the logits (M, vocabulary) at
        these positions are computed. Without it, return the texts' embeddings like a TextEncoder.
        """
        if predicted is None:
            return super().forward(packed)
        segments = Segments(packed.lengths, packed.input_ids.device, causal=False)
        places, targets = predicted
        logits = self.causal(
            input_ids=packed.input_ids[None],
            position_ids=packed.positions,
            segments=segments,
            use_cache=False,
            logits_to_keep=places,
        ).logits[0]
        costs = F.cross_entropy(logits.float(), targets, reduction="none")
        rows = torch.stack([costs, logits.argmax(dim=1) == targets], dim=1)
        owner = torch.searchsorted(segments.bounds, places, right=True) - 1
        return rows.new_zeros(len(packed.lengths), 2).index_add(0, owner, rows)


def step_flops(model: MaskedLanguageModel) -> StepFlops | None:
    decoder = model_flops(model)
    head = per_row(model.causal.get_output_embeddings(), inputs=True)
    return decoder and (lambda items, logits: decoder(items, logits) + head * logits)


def _tokens(path: str, config: PreTrainedConfig) -> tuple[int, int]:
    """Return the id of the mask token and the number of tokens. Raises PipelineError if there is no mask token."""
    tokenizer = loading.tokenizer(path, config.vocab_size)
    token = tokenizer.mask_token_id
    if token is None:
        token = tokenizer.get_vocab().get(_BLANK)
    if token is None:
        raise PipelineError(f"{path}: its tokenizer has no mask token, and no {_BLANK!r} to use as one; add one")
    return token, min(len(tokenizer), config.vocab_size)


def save(
    model: MaskedLanguageModel, weights: dict[str, torch.Tensor], source: str, folder: Path, base: str | None
) -> None:
    """Write `weights` (the model's parameters by name) as a folder like TextEncoder's, with the LM head."""
    own = {name.removeprefix("causal."): weight for name, weight in weights.items()}
    model.causal.save_pretrained(folder, state_dict=own)
    tokenizer = loading.tokenizer(source)
    tokenizer.save_pretrained(folder)
    mask, before = tokenizer.convert_ids_to_tokens(model.mask_token), begins_with(tokenizer)
    names = {"mask": mask, "mask_id": model.mask_token, "before": before}
    write_card(folder, Path(__file__).with_name("masked.md.jinja"), base, **names)
    # If training started from a text encoder, the result is no longer one.
    finish(folder, {"is_causal": False, SETTINGS: None})
