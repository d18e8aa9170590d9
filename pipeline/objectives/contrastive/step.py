"""One optimizer step over the whole global batch: the gradient cache (GradCache, arXiv 2101.06983) inside DeepSpeed.

The contrastive loss couples all pairs of the global batch, whose activations do not fit in memory. So a step embeds
everything without a graph, computes the loss's gradient with respect to the embeddings, then embeds again chunk by
chunk and backpropagates each chunk's rows of that gradient. The sum of the chunks' gradients is the batch's gradient.
Chunks with cached graphs need no second pass.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from pipeline.config import Recipe
from pipeline.data.batch import Batch
from pipeline.distributed import all_gather_constant
from pipeline.models.chunks import Features, in_order, plan_chunks, run_chunk
from pipeline.objectives.contrastive.config import ContrastiveSection
from pipeline.objectives.contrastive.loss import LossOutput, hardness_weighted_loss
from pipeline.objectives.objective import Cut, Objective, StepResult, backward_chunks, optimizer_step

# Bounds of a learned 1 / tau: CLIP's, above which training becomes unstable; and that of open_clip and LLM2CLIP.
_LARGEST_SCALE, _SMALLEST_SCALE = 100.0, 1.0


@dataclass(frozen=True, kw_only=True)
class ContrastiveResult(StepResult):
    """A step's result.  loss: this rank's part.  temperature: the loss's temperature if it is learned, or None."""

    loss: LossOutput
    temperature: float | None

    def metrics(self, batch: Batch) -> tuple[dict, dict]:
        output = self.loss
        valid = torch.tensor(batch.valid, device=output.positive.device)
        loss = output.loss.detach().expand(len(valid))
        rows = torch.stack([output.positive, output.hardest_negative, valid, loss], dim=1)
        positive, hardest, valid, loss = all_gather_constant(rows).double().cpu().numpy().T
        positive, hardest = positive[valid == 1], hardest[(valid == 1) & (hardest > -math.inf)]
        metrics = {
            "loss": float(loss.mean()),
            "positive_similarity": float(positive.mean()) if len(positive) else None,
            "hardest_negative_similarity": float(hardest.mean()) if len(hardest) else None,
            "masked_pairs": float(output.masked_pairs),
            "valid": int(valid.sum()),
        }
        if self.temperature is not None:
            metrics["temperature"] = self.temperature
        return metrics, {"positive": positive, "hardest_negative": hardest}


class Temperature:
    """The loss's temperature: constant, or learned as log(1 / tau), as in CLIP (arXiv 2103.00020).

    A learned temperature is replicated on every rank, outside ZeRO. After each step 1 / tau is clamped to 1 ... 100, as
    by LLM2CLIP's training/train.py. Runs of versions without the lower bound may resume: it changes only those whose
    1 / tau falls below 1, where the loss hardly tells pairs apart.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        objective = recipe.objective
        assert isinstance(objective, ContrastiveSection)
        self._constant = objective.temperature
        self._log_scale: torch.Tensor | None = None
        if objective.learn_temperature:
            self._log_scale = torch.tensor(-math.log(self._constant), device=device, requires_grad=True)
            betas, eps = recipe.optimizer.betas, recipe.optimizer.eps
            self._optimizer = torch.optim.AdamW([self._log_scale], betas=betas, eps=eps, weight_decay=0.0)

    @property
    def value(self) -> float | torch.Tensor:
        return self._constant if self._log_scale is None else torch.exp(-self._log_scale)

    def gradient(self, loss: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the gradient of this rank's loss by its embeddings; store the temperature's, averaged over ranks."""
        if self._log_scale is None:
            return torch.autograd.grad(loss, embeddings)[0]
        gradient, self._log_scale.grad = torch.autograd.grad(loss, (embeddings, self._log_scale))
        dist.all_reduce(self._log_scale.grad)
        self._log_scale.grad /= dist.get_world_size()
        return gradient

    @torch.no_grad()
    def step(self, lr: float) -> None:
        if self._log_scale is not None:
            self._optimizer.param_groups[0]["lr"] = lr
            self._optimizer.step()
            self._log_scale.clamp_(math.log(_SMALLEST_SCALE), math.log(_LARGEST_SCALE))

    def state(self) -> dict | None:
        """Return the state to checkpoint, or None if the temperature is constant."""
        if self._log_scale is None:
            return None
        return {"log_scale": self._log_scale.detach(), "optimizer": self._optimizer.state_dict()}

    @torch.no_grad()
    def load(self, state: dict | None) -> None:
        if self._log_scale is not None and state is not None:
            self._log_scale.copy_(state["log_scale"])
            self._optimizer.load_state_dict(state["optimizer"])


class Contrastive(Objective):
    """The hardness-weighted loss over the global batch, with a fixed or learned temperature.

    A step updates parameters as if one process had embedded the whole global batch at once, for any ZeRO stage, chunks,
    number of cached graphs, and number of ranks.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._recipe, self.temperature = recipe, Temperature(recipe, device)

    def step(
        self, engine: DeepSpeedEngine, batch: Batch, cut: Cut, step: int, *, lr: float, features: Features | None = None
    ) -> ContrastiveResult:
        items = list(batch.items.values())
        # If no trained part processes texts, a dummy image gives every chunk a gradient.
        all_with_images, padded = not self._recipe.model.texts_train, engine.module.pads
        chunks = plan_chunks(items, cut.chunk_tokens, engine.device, padded=padded, all_with_images=all_with_images)
        cached, recomputed = chunks[: cut.kept_chunks], chunks[cut.kept_chunks :]
        graphs = [run_chunk(engine, chunk, features) for chunk in cached]
        with torch.no_grad():
            parts = graphs + [run_chunk(engine, chunk, features) for chunk in recomputed]
        embeddings = in_order(chunks, parts, len(items)).requires_grad_()
        tau = self.temperature.value
        output = contrastive_loss(embeddings, batch, self._recipe, tau)
        gradient = self.temperature.gradient(output.loss, embeddings)
        del parts
        backward_chunks(engine, cached, graphs, recomputed, gradient, features)
        norm = optimizer_step(engine, lr)
        self.temperature.step(lr)
        return ContrastiveResult(
            grad_norm=norm,
            tokens=sum(len(item.input_ids) for item in items),
            largest_chunk=max(chunk.size for chunk in chunks),
            loss=output,
            temperature=float(tau.detach()) if isinstance(tau, torch.Tensor) else None,
        )

    def state(self) -> dict[str, Any]:
        return {"temperature": self.temperature.state()}

    def load(self, state: dict[str, Any]) -> None:
        self.temperature.load(state["temperature"])


def contrastive_loss(
    embeddings: torch.Tensor, batch: Batch, recipe: Recipe, temperature: float | torch.Tensor
) -> LossOutput:
    """Compute the batch's loss from the embeddings of its distinct items, (items, hidden).

    If the recipe sets batch.sub_batch, it is the mean of the sub-batches' losses, each with only its own negatives.
    Without objective.mask_duplicates, an item that occurs twice is embedded once, and is nevertheless a negative.
    """
    row = {content: i for i, content in enumerate(batch.items)}
    device, objective = embeddings.device, recipe.objective
    assert isinstance(objective, ContrastiveSection)
    masked = objective.mask_duplicates

    def of(hashes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.tensor([row[h] for h in hashes], dtype=torch.long, device=device)
        return embeddings[rows], torch.from_numpy(np.array(hashes, np.uint64).view(np.int64)).to(device)

    def part(pairs: np.ndarray) -> LossOutput:
        query, query_ids = of([batch.query[i] for i in pairs])
        target, target_ids = of([batch.target[i] for i in pairs])
        negatives, negative_ids = of([negative for i in pairs for negative in batch.negatives[i]])
        return hardness_weighted_loss(
            query,
            target,
            alpha=objective.alpha,
            temperature=temperature,
            margin=objective.margin,
            directions=objective.directions,
            negatives=negatives,
            query_ids=query_ids if masked else None,
            target_ids=target_ids if masked else None,
            negative_ids=negative_ids if masked else None,
            valid=torch.tensor([batch.valid[i] for i in pairs], device=device),
        )

    count = recipe.batch.global_batch // (recipe.batch.sub_batch or recipe.batch.global_batch)
    # Each sub-batch has equally many pairs of every lane, so it is the same for any number of ranks.
    share = recipe.batch.global_batch // recipe.data.lanes
    parts = np.arange(len(batch.query)).reshape(-1, count, share // count).swapaxes(0, 1).reshape(count, -1)
    outputs = [part(pairs) for pairs in parts]
    back = torch.from_numpy(np.argsort(parts.ravel())).to(device)
    return LossOutput(
        loss=torch.stack([output.loss for output in outputs]).mean(),
        positive=torch.cat([output.positive for output in outputs])[back],
        hardest_negative=torch.cat([output.hardest_negative for output in outputs])[back],
        masked_pairs=torch.stack([output.masked_pairs for output in outputs]).mean(),
        valid_count=torch.stack([output.valid_count for output in outputs]).sum(),
    )


OBJECTIVE = Contrastive
