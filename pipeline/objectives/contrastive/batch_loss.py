"""The loss of a rank's part of a batch, as the recipe's objective defines it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import Recipe
from pipeline.data.batch import Batch
from pipeline.distributed import rank_and_world
from pipeline.models.chunks import sent
from pipeline.models.compact import shortened, straight_through
from pipeline.objectives.contrastive.config import ContrastiveSection, DistillSection
from pipeline.objectives.contrastive.listwise import listwise_kl
from pipeline.objectives.contrastive.loss import Distill, LossOutput, Positives, Teacher, hardness_weighted_loss


def contrastive_loss(
    embeddings: Tensor, batch: Batch, recipe: Recipe, temperature: float | Tensor, alpha: float
) -> LossOutput:
    """Compute the batch's loss from the embeddings of its distinct items, (items, hidden).

    temperature: of all pairs, or (pairs,) of each.  alpha: of this step.

    If the recipe sets batch.sub_batch, it is the mean of the sub-batches' losses, each with only its own negatives.
    Without objective.mask_duplicates, an item that occurs twice is embedded once, and is nevertheless a negative.
    """
    objective = recipe.objective
    assert isinstance(objective, ContrastiveSection)
    loss = _BatchLoss(embeddings, batch, objective, temperature, alpha)
    count = recipe.batch.global_batch // (recipe.batch.sub_batch or recipe.batch.global_batch)
    # Each sub-batch has equally many pairs of every lane, so it is the same for any number of ranks.
    share = recipe.batch.global_batch // recipe.data.lanes
    parts = np.arange(len(batch.query)).reshape(-1, count, share // count).swapaxes(0, 1).reshape(count, -1)
    outputs = [loss.of(pairs.tolist()) for pairs in parts]
    back = sent(torch.from_numpy(np.argsort(parts.ravel())), embeddings.device)

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(output, name) for output in outputs])[back]

    def mean(name: str) -> Tensor:
        return torch.stack([getattr(output, name) for output in outputs]).mean()

    return LossOutput(
        loss=mean("loss"),
        positive=joined("positive"),
        hardest_negative=joined("hardest_negative"),
        mean_negative=joined("mean_negative"),
        masked_pairs=mean("masked_pairs"),
        masked_by_margin=mean("masked_by_margin"),
        valid_count=torch.stack([output.valid_count for output in outputs]).sum(),
        effective_negatives=joined("effective_negatives"),
        hardest_share=joined("hardest_share"),
        contrastive=mean("contrastive"),
        distillation=mean("distillation"),
    )


class _BatchLoss:
    """The loss of some of a batch's pairs, which are negatives of each other and of the other ranks' pairs."""

    def __init__(
        self, embeddings: Tensor, batch: Batch, objective: ContrastiveSection, temperature: float | Tensor, alpha: float
    ) -> None:
        self.embeddings, self.batch, self.objective, self.alpha = embeddings, batch, objective, alpha
        self.temperature, self.device = temperature, embeddings.device
        self.row = {content: i for i, content in enumerate(batch.items)}

    def of(self, pairs: list[int]) -> LossOutput:
        batch, objective = self.batch, self.objective
        query, query_ids = self._items([batch.query[i] for i in pairs])
        target, target_ids = self._items([batch.target[i] for i in pairs])
        negatives, negative_ids = self._items([negative for i in pairs for negative in batch.negatives[i]])
        valid = self._tensor([batch.valid[i] for i in pairs])
        temperature = self.temperature
        if isinstance(temperature, Tensor) and temperature.ndim:
            temperature = temperature[self._tensor(pairs, torch.long)]
        masked, distill = objective.mask_duplicates, objective.distill
        of_teacher = distill if distill and distill.scores == "teacher" else None
        output = hardness_weighted_loss(
            query,
            target,
            alpha=self.alpha,
            temperature=temperature,
            margin=self._margin(pairs),
            directions=objective.directions,
            negatives=negatives,
            query_ids=query_ids if masked else None,
            target_ids=target_ids if masked else None,
            negative_ids=negative_ids if masked else None,
            valid=valid,
            positives=self._positives(pairs, masked=masked),
            teacher=self._teacher(pairs) if objective.uses_teacher else None,
            reward=objective.reward,
            distill=Distill(of_teacher.weight, of_teacher.temperature) if of_teacher else None,
            dimensions=objective.dimensions,
            dimension_weights=objective.dimension_weights,
            quantized=objective.quantized,
        )
        if distill and distill.scores == "stored":
            divergence = self._stored_divergence(pairs, query, temperature, distill) * valid
            world = rank_and_world()[1]
            mean = distill.weight * world * divergence.sum() / output.valid_count.clamp(min=1)
            output = replace(output, loss=output.loss + mean, distillation=mean.detach())
        return output

    def _items(self, hashes: list[int]) -> tuple[Tensor, Tensor]:
        rows = self._tensor([self.row[h] for h in hashes], torch.long)
        return self.embeddings[rows], self._sent(np.array(hashes, np.uint64).view(np.int64))

    def _tensor(self, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
        return sent(torch.tensor(values, dtype=dtype), self.device)

    def _sent(self, values: np.ndarray) -> Tensor:
        return sent(torch.from_numpy(values), self.device)

    def _margin(self, pairs: list[int]) -> float | Tensor | None:
        objective = self.objective
        if not objective.margins:
            return objective.margin
        margins = [objective.margins.get(self.batch.tasks[i], objective.margin) for i in pairs]
        return self._tensor([torch.inf if margin is None else margin for margin in margins])

    def _positives(self, pairs: list[int], *, masked: bool) -> Positives:
        batch = self.batch
        owners = [place for place, i in enumerate(pairs) for _ in batch.positives[i]]
        vectors, ids = self._items([positive for i in pairs for positive in batch.positives[i]])
        return Positives(
            vectors,
            owners=torch.tensor(owners, dtype=torch.long),
            weights=self._tensor([weight for i in pairs for weight in batch.weights[i][1:]], torch.float32),
            target_weights=self._tensor([batch.weights[i][0] for i in pairs], torch.float32),
            ids=ids if masked else None,
        )

    def _teacher(self, pairs: list[int]) -> Teacher:
        """Return the teacher's vectors, which each pair has as rows: query, target, positives, negatives."""
        assert self.batch.teacher is not None  # the recipe's check
        rows = [self.batch.teacher[i] for i in pairs]
        further = [1 + 1 + len(self.batch.positives[i]) for i in pairs]

        def joined(parts: list[np.ndarray]) -> Tensor:
            return self._sent(np.concatenate(parts))

        return Teacher(
            query=joined([each[:1] for each in rows]),
            target=joined([each[1:2] for each in rows]),
            negatives=joined([each[start:] for each, start in zip(rows, further, strict=True)]),
            positives=joined([each[2:start] for each, start in zip(rows, further, strict=True)]),
        )

    def _stored_divergence(
        self, pairs: list[int], query: Tensor, temperature: float | Tensor, distill: DistillSection
    ) -> Tensor:
        """Return (n,) KL divergences from the stored scores to the policy; the mean over objective.dimensions."""
        batch, objective = self.batch, self.objective
        keys = [(batch.target[i], *batch.positives[i], *batch.negatives[i]) for i in pairs]
        scores = [batch.scores[i] or () for i in pairs]  # mined negatives follow the others, and have none
        width = max(map(len, scores))
        rows = np.zeros((len(pairs), width), np.int64)
        given, present = np.zeros(rows.shape, np.float32), np.zeros(rows.shape, bool)
        for place, (candidates, of_pair) in enumerate(zip(keys, scores, strict=True)):
            count = len(of_pair)
            rows[place, :count] = [self.row[key] for key in candidates[:count]]
            given[place, :count], present[place, :count] = of_pair, True
        candidates_of = self.embeddings[self._sent(rows)]
        sizes = objective.dimensions or [query.shape[1]]
        weights = self._tensor(objective.dimension_weights or [1.0] * len(sizes), query.dtype)
        stored = partial(straight_through, kind=objective.quantized)
        of_sizes = [
            listwise_kl(
                (shortened(query, size)[:, None] * stored(shortened(candidates_of, size))).sum(dim=-1),
                self._sent(given),
                self._sent(present),
                temperature,
                distill.temperature,
            )
            for size in sizes
        ]
        return F.normalize(weights, p=1, dim=0) @ torch.stack(of_sizes)
