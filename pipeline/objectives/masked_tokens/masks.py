"""Choose the masked tokens of a text and their replacements.

The rates follow LLM2Vec's run_mntp.py and its train_configs/mntp (github.com/McGill-NLP/llm2vec).
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.data.batch import Encoded
from pipeline.models.chunks import Chunk, Packed, sent
from pipeline.objectives.masked_tokens.config import MaskedNextTokenSection

# The version of the masks; increase it when a change masks other tokens. Since version 2, `Encoded.key` is in the seed.
VERSION = 2


@dataclass(frozen=True)
class MaskedText(Encoded):
    """A text with masked tokens.

    places: (M,) int64, their positions, all above 0.  targets: (M,) int64, the original tokens.
    """

    places: np.ndarray = field(kw_only=True)
    targets: np.ndarray = field(kw_only=True)


def mask(
    text: Encoded, objective: MaskedNextTokenSection, mask_token: int, vocabulary: int, key: tuple[int, ...]
) -> MaskedText:
    """Mask tokens of a text; a pure function of its arguments.

    Each token is masked with probability `mask_rate`. A fraction `mask_random` of masked tokens is replaced by a random
    token of the vocabulary, a fraction `mask_kept` is unchanged, and the rest becomes `mask_token`. The first token,
    which has no token before it to predict it from, and an instruction's tokens are never masked.

    key: non-negative numbers that seed the random choice.
    """
    draws = np.random.default_rng(key)
    hidden = draws.random(len(text.input_ids)) < objective.mask_rate
    hidden[: max(text.skipped, 1)] = False
    places = np.flatnonzero(hidden)
    others, how = draws.integers(vocabulary, size=len(places)), draws.random(len(places))
    targets = text.input_ids[places].astype(np.int64)
    seen = np.where(
        how < objective.mask_random,
        others,
        np.where(how < objective.mask_random + objective.mask_kept, targets, mask_token),
    )
    ids = text.input_ids.copy()
    ids[places] = seen
    return MaskedText(ids, skipped=text.skipped, places=places, targets=targets)


def to_predict(chunk: Chunk, packed: Packed) -> torch.Tensor:
    """Return (2, M) int64 for a chunk of masked texts: the positions in the packed row to predict from, and targets."""
    places, targets, start = [], [], 0
    for item in chunk.items:
        if isinstance(item, MaskedText):  # not an empty chunk's dummy
            places.append(start - 1 + item.places)
            targets.append(item.targets)
        start += len(item.input_ids)
    empty = np.zeros(0, np.int64)
    row = np.stack([np.concatenate([empty, *places]), np.concatenate([empty, *targets])])
    return sent(torch.from_numpy(row), chunk.rows.device)
