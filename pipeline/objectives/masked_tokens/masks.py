"""Which tokens of a text are hidden, and by what.

How many, and by what, are those of LLM2Vec's run_mntp.py and its train_configs/mntp (github.com/McGill-NLP/llm2vec).
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.data.collate import Encoded, sent
from pipeline.models.chunks import Chunk
from pipeline.objectives.masked_tokens.config import MaskedNextTokenSection

# Of what is drawn, by what: raise it with every change of which tokens are hidden. 2: by `Encoded.key`.
VERSION = 2


@dataclass(frozen=True)
class MaskedText(Encoded):
    """A text some of whose tokens are hidden.

    places: (M,) int64, where they are, none of them 0.  targets: (M,) int64, the tokens that they were.
    """

    places: np.ndarray = field(kw_only=True)
    targets: np.ndarray = field(kw_only=True)


def mask(
    text: Encoded, objective: MaskedNextTokenSection, mask_token: int, vocabulary: int, key: tuple[int, ...]
) -> MaskedText:
    """Hide a share of the text's tokens; a pure function of its arguments.

    Each token is hidden with the probability `mask_rate`. The shares `mask_random` and `mask_kept` of the hidden ones
    are replaced by any token of the vocabulary, and by themselves; `mask_token` replaces the rest. The first token is
    never hidden, for it has no token before it to be predicted from; nor are an instruction's.

    key: non-negative, what the draws depend on besides.
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


def to_predict(chunk: Chunk) -> torch.Tensor:
    """(2, M) int64 of a chunk of masked texts: the places in their packed row to predict from, and the tokens."""
    places, targets, start = [], [], 0
    for item in chunk.items:
        if isinstance(item, MaskedText):  # not an empty chunk's dummy
            places.append(start - 1 + item.places)
            targets.append(item.targets)
        start += len(item.input_ids)
    empty = np.zeros(0, np.int64)
    row = np.stack([np.concatenate([empty, *places]), np.concatenate([empty, *targets])])
    return sent(torch.from_numpy(row), chunk.rows.device)
