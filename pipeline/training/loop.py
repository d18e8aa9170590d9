"""The training loop: batches, steps, evaluation, checkpoints, until done."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from pipeline.config import Recipe
from pipeline.data.collate import Batch
from pipeline.data.order import Order
from pipeline.errors import PipelineError
from pipeline.evaluation.report import Report
from pipeline.losses.gather import all_gather_constant
from pipeline.training import checkpoint
from pipeline.training.engine import learning_rate
from pipeline.training.monitor import Monitor, StepLog
from pipeline.training.step import StepResult, train_step


@dataclass(frozen=True)
class Run:
    """What the loop needs besides the engine.

    batches: this rank's batches of a range of steps. evaluate: a report at the present weights, or None.
    """

    recipe: Recipe
    order: Order
    steps: int
    batches: Callable[[range], Iterator[Batch]]
    evaluate: Callable[[], Report | None]

    @property
    def folder(self) -> Path:
        return Path(self.recipe.run)


def train(engine: deepspeed.DeepSpeedEngine, run: Run) -> None:
    """Train to the last step, from the newest checkpoint if the run has one."""
    recipe, rank = run.recipe, dist.get_rank()
    checkpoints = run.folder / "checkpoints"
    found = checkpoint.latest(checkpoints)
    state = checkpoint.load(engine, found) if found else {"step": 0, "bad_samples": 0}
    start, bad_samples = state["step"], state["bad_samples"]
    monitor = Monitor(run.folder, start, run.steps) if rank == 0 else None
    ledger = StepLog(run.folder / "ledger" / f"rank{rank}.jsonl", start) if recipe.ledger else None
    bad_log = StepLog(run.folder / "bad_samples" / f"rank{rank}.jsonl", start)

    if start == 0:
        _evaluate(run, monitor, 0)
    batches = run.batches(range(start, run.steps))
    for step in range(start, run.steps):
        began = time.perf_counter()
        batch = next(batches)
        received = time.perf_counter()
        lr = learning_rate(step, run.steps, recipe.optimizer)
        result = train_step(engine, batch, recipe.loss, chunk_tokens=recipe.batch.chunk_tokens, lr=lr)
        done = step + 1

        metrics, histograms, tokens = _summary(run.order, done, lr, batch, result)
        seconds = time.perf_counter() - began
        speed = {
            "seconds": seconds,
            "waiting_for_data": received - began,
            "samples_per_second": recipe.batch.global_batch / seconds,
            "tokens_per_second": tokens / seconds,
        }
        if monitor:
            monitor.step(metrics, speed, histograms)
        if ledger:
            ledger.write({"step": done, "keys": batch.keys})
        for key, reason in batch.bad:
            bad_log.write({"step": done, "key": key, "reason": reason})
            print(f"bad sample {key}: {reason}", file=sys.stderr)
        bad_samples += recipe.batch.global_batch - metrics["valid"]
        _check(recipe, metrics, bad_samples, run.folder)

        last = done == run.steps
        if last or (recipe.evaluation and recipe.evaluation.every and done % recipe.evaluation.every == 0):
            _evaluate(run, monitor, done)
        if last or done % recipe.checkpoint.every == 0:
            checkpoint.save(engine, checkpoints, done, {"bad_samples": bad_samples}, recipe.checkpoint.keep)
    if monitor:
        monitor.close()


def _summary(order: Order, done: int, lr: float, batch: Batch, result: StepResult) -> tuple[dict, dict, int]:
    """The global batch's metrics, the values of its similarities' histograms, and its number of tokens."""
    output = result.loss
    valid = torch.tensor(batch.valid, device=output.positive.device)
    of_rank = torch.stack([output.loss.detach(), output.loss.new_tensor(result.tokens)]).expand(len(valid), 2)
    rows = torch.stack([output.positive, output.hardest_negative, valid], dim=1)
    rows = all_gather_constant(torch.cat([rows, of_rank], dim=1))
    positive, hardest, valid, loss, tokens = rows.double().cpu().numpy().T
    positive, hardest = positive[valid == 1], hardest[(valid == 1) & (hardest > -math.inf)]
    metrics = {
        "step": done,
        "epoch": order.locate(done - 1)[0],
        "samples": done * order.global_batch,
        "loss": float(loss.mean()),
        "grad_norm": result.grad_norm,
        "lr": lr,
        "positive_similarity": float(positive.mean()) if len(positive) else None,
        "hardest_negative_similarity": float(hardest.mean()) if len(hardest) else None,
        "masked_pairs": float(output.masked_pairs),
        "valid": int(valid.sum()),
    }
    return metrics, {"positive": positive, "hardest_negative": hardest}, int(tokens[:: len(batch.keys)].sum())


def _check(recipe: Recipe, metrics: dict, bad_samples: int, folder: Path) -> None:
    """Stop a run that only burns hours."""
    if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
        raise PipelineError(
            f"step {metrics['step']}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; lower "
            "optimizer.lr or raise optimizer.warmup_ratio and start the same command: it goes on from the newest "
            "checkpoint"
        )
    # Counted as if of 10,000 samples at least: the first bad sample is not yet a rate.
    if bad_samples > recipe.data.max_bad_fraction * max(metrics["samples"], 10_000):
        raise PipelineError(
            f"{bad_samples} of {metrics['samples']} samples so far could not be used, more than "
            f"data.max_bad_fraction={recipe.data.max_bad_fraction}; {folder / 'bad_samples'} says which and why"
        )


def _evaluate(run: Run, monitor: Monitor | None, step: int) -> None:
    report = run.evaluate()
    if report and monitor:
        report.write(run.folder / "evaluation" / f"step-{step:08d}.json")
        datasets = {name: dataset.precision_at_1 for name, dataset in report.datasets.items()}
        monitor.evaluation(step, report.averages(), datasets)
        averages = ", ".join(f"{name} {value:.1%}" for name, value in report.averages().items())
        monitor.bar.write(f"step {step}, Precision@1: {averages}", file=sys.stderr)
