"""One optimizer step of masked next-token prediction over the whole global batch.

Its loss is a sum over texts, by the number of hidden tokens of them all, which is known beforehand: each chunk's
gradient needs no other chunk, and there is one pass.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from pipeline.config import Recipe
from pipeline.data.batch import Batch
from pipeline.models.chunks import Features, in_order, plan_chunks
from pipeline.objectives.masked_tokens import masks
from pipeline.objectives.masked_tokens.config import MaskedNextTokenSection
from pipeline.objectives.masked_tokens.masks import mask, to_predict
from pipeline.objectives.objective import Cut, Objective, StepResult, backward_chunks, optimizer_step


@dataclass(frozen=True)
class MaskedResult(StepResult):
    """Of the global batch. loss: the mean cross entropy of its hidden tokens, nats.

    masked_tokens: how many these are.  accuracy: the share of them that were predicted, or None where there are none.
    valid: pairs that could be used.
    """

    loss: float
    masked_tokens: int
    accuracy: float | None
    valid: int

    def metrics(self, batch: Batch) -> tuple[dict, dict]:
        names = ("loss", "masked_tokens", "accuracy", "valid")
        return {name: getattr(self, name) for name in names}, {}


class MaskedNextToken(Objective):
    """The mean cross entropy over the global batch's hidden tokens, not a mean of ranks' means.

    What is hidden of a text depends on the seed, the step and the text alone. A text counts as often as pairs have it,
    whichever ranks these are on.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._recipe = recipe

    def step(
        self, engine: DeepSpeedEngine, batch: Batch, cut: Cut, step: int, *, lr: float, features: Features | None = None
    ) -> MaskedResult:
        recipe, objective = self._recipe, self._recipe.objective
        assert isinstance(objective, MaskedNextTokenSection)
        model, device, world = engine.module, engine.device, dist.get_world_size()
        texts = [
            mask(item, objective, model.mask_token, model.vocabulary, (recipe.seed, step, content))
            for content, item in batch.items.items()
        ]
        # Of the empty text that stands in for what could not be used, nothing is hidden.
        counts = Counter(chain(batch.query, batch.target, *batch.negatives))
        occurring = torch.tensor([counts[content] for content in batch.items], dtype=torch.float64, device=device)
        ours = [sum(counts[c] * len(text.places) for c, text in zip(batch.items, texts, strict=True)), sum(batch.valid)]
        totals = torch.tensor(ours, device=device)
        dist.all_reduce(totals)
        masked_tokens, valid = totals.tolist()

        chunks = plan_chunks(texts, cut.chunk_tokens, device, padded=model.pads)
        # DeepSpeed takes the mean over ranks of what is to be a sum.
        by_cost = occurring * world / max(masked_tokens, 1)
        gradient = torch.stack([by_cost, torch.zeros_like(by_cost)], dim=1).float()
        rows = in_order(chunks, backward_chunks(engine, [], [], chunks, gradient, to_predict), len(texts))
        norm = optimizer_step(engine, lr)
        sums = occurring @ rows.double()
        dist.all_reduce(sums)
        cost, right = (sums / max(masked_tokens, 1)).tolist()
        return MaskedResult(
            grad_norm=norm,
            tokens=sum(len(text.input_ids) for text in texts),
            largest_chunk=max(chunk.size for chunk in chunks),
            loss=cost,
            masked_tokens=masked_tokens,
            accuracy=right if masked_tokens else None,
            valid=valid,
        )

    @classmethod
    def conditions(cls) -> dict[str, Any]:
        return {"the masks' version": masks.VERSION}


OBJECTIVE = MaskedNextToken
