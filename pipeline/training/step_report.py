"""What is recorded of a step, and what ends a run: gradients that are not finite, and too many bad samples."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.config import Recipe
from pipeline.data.batch import Batch
from pipeline.data.order import Order
from pipeline.errors import PipelineError, first_few
from pipeline.evaluation.report import Similarities
from pipeline.models.family import Processor
from pipeline.objectives.objective import StepResult
from pipeline.phases import take_seconds
from pipeline.training import checkpoint, part_norms, pictures, resume
from pipeline.training.alarms import Alarms
from pipeline.training.budget import Budget, Meter
from pipeline.training.engine import part_rates
from pipeline.training.monitor import Monitor
from pipeline.training.part_norms import PartNorms
from pipeline.training.speed import Speed

logger = logging.getLogger(__name__)


class StepReport:
    """Reports the steps of one start. All ranks create one and call it together; the first rank writes.

    datasets: the names of the run's datasets.  bad_samples: unusable so far, in all starts; a checkpoint stores them.
    """

    def __init__(
        self,
        recipe: Recipe,
        order: Order,
        datasets: tuple[str, ...],
        processor: Processor,
        monitor: Monitor,
        speed: Speed,
        meter: Meter,
        norms: PartNorms,
        bad_samples: int,
    ) -> None:
        self._recipe, self._order, self._datasets, self._processor = recipe, order, datasets, processor
        self._monitor, self._speed, self._meter, self._norms = monitor, speed, meter, norms
        self._alarms, self._skipped, self.bad_samples = Alarms(recipe.batch.global_batch), 0, bad_samples

    def of_step(
        self, done: int, batch: Batch, result: StepResult, budget: Budget, *, lr: float, began: float, waited: float
    ) -> None:
        """Write the step's metrics and pictures. Raises PipelineError if the run must stop.

        done: the step's number, from 1.  began, waited: see `Speed.of_step`.
        """
        recipe, monitor, global_batch = self._recipe, self._monitor, self._recipe.batch.global_batch
        monitor.consumed(done, batch.origins)
        place = {"step": done, "epoch": self._order.locate(done - 1)[0], "samples": done * global_batch}
        metrics, histograms = result.metrics(batch, self._datasets)
        not_finite = metrics.pop("not_finite", [])
        metrics = place | {"loss": metrics["loss"], "grad_norm": result.grad_norm, "lr": lr} | metrics
        if metrics["valid"] < global_batch:
            self._gather_bad(done, batch)
        squares, shares = self._norms.take(), self._counts(batch)
        peak, seconds = self._meter.peak(), take_seconds()
        speed, sums = self._speed.of_step(result, batch, began, waited, peak, seconds, squares | shares)
        norms = part_norms.norms({part: sums[part] for part in squares}, result.grad_norm)
        metrics |= {f"grad_norm/{part}": norm for part, norm in norms.items()}
        metrics |= {f"lr/{part}": rate for part, rate in part_rates(recipe, lr).items()}
        metrics |= {name: sums[name] / global_batch for name in shares}
        if histograms:
            metrics["overlap"] = Similarities.of(*histograms.values()).overlap
        self.bad_samples += global_batch - metrics["valid"]
        metrics["bad_samples"] = self.bad_samples
        speed |= {"peak_memory": speed["peak_memory_gb"] * 1e9 / self._meter.total}
        speed |= {"chunk_tokens": budget.chunk_tokens, "kept_chunks": budget.kept_chunks}
        monitor.step(metrics, speed, histograms)
        self._require_finite(metrics, not_finite)
        self._require_samples(metrics)
        if monitor.leads:
            for alarm in self._alarms.of_step(metrics, speed):
                logger.warning(alarm)
        if result.embeddings is not None:
            rows = pictures.hardest(batch, result.embeddings, self._processor.shown)
            if rows:
                monitor.pictures(done, rows)

    def _counts(self, batch: Batch) -> dict[str, float]:
        """Return this rank's pairs of each dataset, if there are several."""
        names, counts = self._datasets, Counter(origin.dataset for origin in batch.origins)
        return {f"share/{name}": float(counts[number]) for number, name in enumerate(names)} if len(names) > 1 else {}

    def _gather_bad(self, step: int, batch: Batch) -> None:
        """Gather a step's bad samples on the first rank, which records them."""
        ranks: list[Any] | None = [None] * dist.get_world_size() if self._monitor.leads else None
        dist.gather_object(batch.bad, ranks)
        self._monitor.bad(step, [bad for rank in ranks or [] for bad in rank])

    def _require_finite(self, metrics: dict[str, Any], ranks: Sequence[int]) -> None:
        """Log a step that was skipped because its loss or gradient is not finite.

        ranks: from which a loss that is not finite comes.  Raises PipelineError after more than optimizer.patience of
        them.
        """
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            self._skipped = 0
            return
        self._skipped += 1
        step, patience = metrics["step"], self._recipe.optimizer.patience
        is_skipped = not math.isfinite(metrics["grad_norm"])
        where = f" from rank{'s' * (len(ranks) > 1)} {first_few([*map(str, ranks)])}"
        where *= 0 < len(ranks) < dist.get_world_size()
        what = f"step {step}: loss {metrics['loss']:.4g}{where}, gradient norm {metrics['grad_norm']:.4g}"
        if self._skipped <= patience:
            if self._monitor.leads:
                then = (
                    "the step is skipped, and the weights stay as they are" if is_skipped else "the loss is not finite"
                )
                logger.warning(
                    f"{what}: {then} ({self._skipped} of optimizer.patience={patience} in a row); the batch's samples "
                    "are in RUN/ledger if ledger=true"
                )
            return
        before = step - self._skipped
        folder = Path(self._recipe.run, "checkpoints")
        good = [
            path
            for path in checkpoint.candidates(folder)
            if checkpoint.step_of(path) <= before and not resume.fault_of(path, thorough=False)
        ]
        kept = f"the last checkpoint before that is {good[0]}" if good else "there is no checkpoint before that"
        raise PipelineError(
            f"{what}, and so in {self._skipped} steps in a row, from step {before + 1} on, more than "
            f"optimizer.patience={patience}; {kept}. Lower optimizer.lr or raise optimizer.warmup_ratio and start the "
            "same command: it continues from the newest checkpoint"
        )

    def _require_samples(self, metrics: dict[str, Any]) -> None:
        """Raise PipelineError if there are too many bad samples."""
        # The rate is computed over at least 10,000 samples: one bad sample among the first few must not stop the run.
        most = self._recipe.data.max_bad_fraction
        if self.bad_samples > most * max(metrics["samples"], 10_000):
            raise PipelineError(
                f"{self.bad_samples} of {metrics['samples']} samples so far could not be used, more than "
                f"data.max_bad_fraction={most}; {Path(self._recipe.run, 'bad_samples.jsonl')} says which and why"
            )
