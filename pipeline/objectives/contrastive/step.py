"""One optimizer step over the whole global batch: the gradient cache (GradCache, arXiv 2101.06983) inside DeepSpeed.

The contrastive loss couples all pairs of the global batch, whose activations do not fit in memory. So a step embeds
everything without a graph, computes the loss's gradient with respect to the embeddings, then embeds again chunk by
chunk and backpropagates each chunk's rows of that gradient. The sum of the chunks' gradients is the batch's gradient.
Chunks with cached graphs need no second pass.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from deepspeed import DeepSpeedEngine

from pipeline.config import Recipe
from pipeline.data.batch import Batch
from pipeline.data.source import Source
from pipeline.distributed import all_gather_constant, rank_and_world
from pipeline.errors import PipelineError
from pipeline.models.chunks import Ahead, Features, in_order, plan_chunks, run_chunk, sent
from pipeline.objectives.contrastive.batch_loss import contrastive_loss
from pipeline.objectives.contrastive.config import ContrastiveSection
from pipeline.objectives.contrastive.loss import LossOutput
from pipeline.objectives.contrastive.temperature import Temperature
from pipeline.objectives.objective import Cut, Objective, StepResult, backward_chunks, optimizer_step
from pipeline.phases import phase


@dataclass(frozen=True, kw_only=True)
class ContrastiveResult(StepResult):
    """A step's result.

    loss: this rank's part.  finite: bool scalar tensor, whether all of this rank's embeddings are.
    settings: what the recipe changes or learns during a run: alpha, temperatures.
    distills: whether the loss contains a teacher's distribution.  has_margin: whether a margin masks pairs.
    """

    loss: LossOutput
    finite: torch.Tensor
    settings: dict[str, float]
    distills: bool
    has_margin: bool

    def metrics(self, batch: Batch, datasets: Sequence[str]) -> tuple[dict, dict]:
        """See `StepResult`. Means are over the valid queries that have a negative; `positive_similarity` over all.

        precision: the fraction of these queries that are more similar to their target than to any negative.
        """
        output = self.loss
        on_host = torch.tensor([batch.valid, [origin.dataset for origin in batch.origins]], dtype=torch.float32)
        parts = [output.loss.detach(), output.contrastive, output.distillation]
        parts += [output.masked_pairs, output.masked_by_margin, self.finite.to(output.loss)]
        of_pairs = [output.positive, output.hardest_negative, output.mean_negative]
        of_pairs += [output.effective_negatives, output.hardest_share]
        rows = torch.stack(
            [*of_pairs, *sent(on_host, output.positive.device), *(part.expand(len(batch.valid)) for part in parts)],
            dim=1,
        )
        columns = all_gather_constant(rows).double().cpu().numpy().T
        (valid, dataset), (loss, contrastive, distillation, masked, by_margin, finite) = columns[5:7], columns[7:]
        compared = (valid == 1) & (columns[1] > -math.inf)  # pairs with a negative
        positive = columns[0][valid == 1]
        right = columns[0] > columns[1]
        _, hardest, mean_negative, effective, share = columns[:5, compared]
        metrics: dict[str, Any] = {
            "loss": float(loss.mean()),
            "precision": _mean(right[compared]),
            "positive_similarity": _mean(positive),
            "hardest_negative_similarity": _mean(hardest),
            "negative_similarity": _mean(mean_negative),
            "effective_negatives": _mean(effective),
            "hardest_percent_weight": _mean(share),
            "masked_pairs": float(masked[0]),  # the same on all ranks
            "valid": int(valid.sum()),
        }
        if self.distills:
            metrics |= {"loss/contrastive": float(contrastive.mean()), "loss/distillation": float(distillation.mean())}
        if self.has_margin:
            metrics["masked_pairs/margin"] = float(by_margin[0])
        if not math.isfinite(metrics["loss"]):
            # Embeddings that are not finite are in the loss of every rank; only their own rank is named.
            metrics["not_finite"] = _ranks_without(finite == 1) or _ranks_without(np.isfinite(loss))
        if len(datasets) > 1:
            of_datasets = {name: right[compared & (dataset == number)] for number, name in enumerate(datasets)}
            metrics |= {f"precision/{name}": _mean(each) for name, each in of_datasets.items() if len(each)}
        return metrics | self.settings, {"positive": positive, "hardest_negative": hardest}


def _ranks_without(rows: np.ndarray) -> list[int]:
    """Return the ranks that have a row which is False."""
    return np.flatnonzero(~rows.reshape(rank_and_world()[1], -1).all(axis=1)).tolist()


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


class Contrastive(Objective):
    """The hardness-weighted loss over the global batch, with fixed or learned temperatures.

    A step updates parameters as if one process had embedded the whole global batch at once, for any ZeRO stage, chunks,
    number of cached graphs, and number of ranks.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        assert isinstance(recipe.objective, ContrastiveSection)
        self._recipe, self._objective, self.temperature = recipe, recipe.objective, Temperature(recipe, device)

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
    ) -> ContrastiveResult:
        model, device = engine.module, engine.device
        items = ahead.items if ahead else self.items(model, batch, step)
        # If no trained part processes texts, a dummy image gives every chunk a gradient.
        all_with_images = not self._recipe.model.texts_train
        chunks = plan_chunks(
            items, cut.chunk_tokens, device, padded=model.pads, all_with_images=all_with_images, ahead=ahead
        )
        cached, recomputed = chunks[: cut.kept_chunks], chunks[cut.kept_chunks :]
        with phase("first_pass"):
            graphs = [run_chunk(engine, chunk, features) for chunk in cached]
            with torch.no_grad():
                parts = graphs + [run_chunk(engine, chunk, features) for chunk in recomputed]
            embeddings = in_order(chunks, parts, len(items)).requires_grad_()
        with phase("loss"):
            alpha = self._objective.alpha_at(step)
            output = contrastive_loss(embeddings, batch, self._recipe, self.temperature.of(batch.tasks), alpha)
            gradient = self.temperature.gradient(output.loss, embeddings)
        del parts
        with phase("second_pass"):
            backward_chunks(engine, cached, graphs, recomputed, gradient, features)
        norm = optimizer_step(engine, lr)
        learned = self.temperature.learned()  # waits for the device, and so is not read before all work is queued
        if math.isfinite(norm):
            self.temperature.step(lr)
        return ContrastiveResult(
            grad_norm=norm,
            tokens=sum(len(item.input_ids) for item in items),
            padded=sum(chunk.size for chunk in chunks),
            largest_chunk=max(chunk.size for chunk in chunks),
            embeddings=embeddings.detach() if self._recipe.has_pictures(step + 1) else None,
            loss=output,
            finite=embeddings.detach().isfinite().all(),
            settings=learned | ({"alpha": alpha} if self._objective.alpha_ramp else {}),
            distills=self._objective.distill is not None,
            has_margin=self._objective.margin is not None or bool(self._objective.margins),
        )

    @classmethod
    def check_data(cls, recipe: Recipe, source: Source) -> None:
        """Refuse tasks that no dataset has, and labels that the first sample of no dataset has."""
        objective = recipe.objective
        assert isinstance(objective, ContrastiveSection)
        found = {task for _, shard in source.shards for task in shard.tasks}
        for name in ("temperatures", "margins"):
            if unknown := sorted(getattr(objective, name).keys() - found):
                known = ", ".join(sorted(filter(None, found))) or "none"
                raise PipelineError(f"objective.{name} names {', '.join(unknown)}, but the data's tasks are: {known}")
        stored = objective.distill is not None and objective.distill.scores == "stored"
        if stored and not any(pair and pair.scores for pair in source.first_pairs()):
            raise PipelineError(
                "objective.distill.scores=stored, but the first sample of no dataset has scores: give each candidate "
                "a `score` (make_shards jsonl --help), or remove objective.distill"
            )

    def state(self) -> dict[str, Any]:
        return {"temperature": self.temperature.state()}

    def load(self, state: dict[str, Any]) -> None:
        self.temperature.load(state["temperature"])


OBJECTIVE = Contrastive
