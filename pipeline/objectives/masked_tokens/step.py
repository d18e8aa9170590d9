"""One optimizer step of masked next-token prediction over the whole global batch.

The loss is a sum over texts, divided by the number of all their masked tokens. That number is known in advance, so a
chunk's gradient does not depend on other chunks, and one pass is enough.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from pipeline.config import Recipe
from pipeline.data.batch import Batch
from pipeline.models.chunks import Ahead, Features, in_order, plan_chunks, sent
from pipeline.objectives.masked_tokens import masks
from pipeline.objectives.masked_tokens.config import MaskedNextTokenSection
from pipeline.objectives.masked_tokens.masks import MaskedText, mask, to_predict
from pipeline.objectives.objective import Cut, Objective, StepResult, backward_chunks, optimizer_step
from pipeline.phases import phase


@dataclass(frozen=True)
class MaskedResult(StepResult):
    """The result for the global batch.

    loss: mean cross entropy of the masked tokens, in nats.  masked_tokens: their number.
    accuracy: fraction of them predicted correctly, or None if there are none.  valid: number of valid pairs.
    not_finite: the ranks whose part of the loss is not finite.
    """

    loss: float
    masked_tokens: int
    accuracy: float | None
    valid: int
    not_finite: list[int]

    def metrics(self, batch: Batch, datasets: Sequence[str]) -> tuple[dict, dict]:
        names = ("loss", "masked_tokens", "accuracy", "valid")
        metrics = {name: getattr(self, name) for name in names}
        return metrics | ({"not_finite": self.not_finite} if self.not_finite else {}), {}


class MaskedNextToken(Objective):
    """The mean cross entropy over all masked tokens of the global batch, not a mean of the ranks' means.

    A text's mask depends only on the seed, the step and the text. A text counts once for each occurrence in a pair, on
    any rank.
    """

    passes = 1

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._recipe = recipe

    def items(self, model: Any, batch: Batch, step: int) -> list[MaskedText]:
        recipe, objective = self._recipe, self._recipe.objective
        assert isinstance(objective, MaskedNextTokenSection)
        return [
            mask(item, objective, model.mask_token, model.vocabulary, (recipe.seed, step, content))
            for content, item in batch.items.items()
        ]

    def step(
        self,
        engine: DeepSpeedEngine,
        batch: Batch,
        cut: Cut,
        step: int,
        *,
        lr: float,
        features: Features | None = None,
        ahead: Ahead | None = None,
    ) -> MaskedResult:
        model, device, world = engine.module, engine.device, dist.get_world_size()
        texts = cast(list[MaskedText], ahead.items if ahead else self.items(model, batch, step))
        # An unusable item is an empty text, in which nothing is masked.
        counts = Counter(chain(batch.query, batch.target, *batch.positives, *batch.negatives))
        occurring = sent(torch.tensor([counts[content] for content in batch.items], dtype=torch.float64), device)
        ours = [sum(counts[c] * len(text.places) for c, text in zip(batch.items, texts, strict=True)), sum(batch.valid)]
        totals = sent(torch.tensor(ours), device)
        dist.all_reduce(totals)
        divisor = totals[0].clamp(min=1)

        chunks = plan_chunks(texts, cut.chunk_tokens, device, padded=model.pads, ahead=ahead)
        # DeepSpeed averages gradients over ranks; `world` turns the mean into a sum.
        by_cost = occurring * world / divisor
        gradient = torch.stack([by_cost, torch.zeros_like(by_cost)], dim=1).float()
        with phase("pass"):
            rows = in_order(chunks, backward_chunks(engine, [], [], chunks, gradient, to_predict), len(texts))
        norm = optimizer_step(engine, lr)
        sums = occurring @ rows.double()
        faults = sums.new_zeros(world)  # by rank
        faults[dist.get_rank()] = ~sums[0].isfinite()
        sums = torch.cat([sums, faults])
        dist.all_reduce(sums)
        # Numbers below 2^53 are exact in float64, so one copy brings all.
        found = torch.cat([sums[:2] / divisor, totals.double(), sums[2:]]).tolist()
        cost, right, masked_tokens, valid, *faulty = found
        return MaskedResult(
            grad_norm=norm,
            tokens=sum(len(text.input_ids) for text in texts),
            padded=sum(chunk.size for chunk in chunks),
            largest_chunk=max(chunk.size for chunk in chunks),
            logits=sum(len(text.places) for text in texts),
            loss=cost,
            masked_tokens=int(masked_tokens),
            accuracy=right if masked_tokens else None,
            valid=int(valid),
            not_finite=[rank for rank, fault in enumerate(faulty) if fault],
        )

    @classmethod
    def conditions(cls) -> dict[str, Any]:
        return {"the masks' version": masks.VERSION}


OBJECTIVE = MaskedNextToken
