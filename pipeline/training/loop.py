"""The training loop: batches, steps, checkpoints, evaluation, until done or asked to stop."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pipeline.config import Recipe
from pipeline.data.batch import Batch
from pipeline.data.order import Order
from pipeline.distributed import all_gather_constant
from pipeline.errors import PipelineError, disk_errors, printable
from pipeline.evaluation.report import Report
from pipeline.jobs import status
from pipeline.models.frozen import KeptFeatures
from pipeline.objectives.objective import StepResult, objective_of
from pipeline.training import checkpoint
from pipeline.training.budget import MEMORY, NOTE, Budget, found, found_before, out_of_memory_noted
from pipeline.training.engine import learning_rate, set_hyperparameters
from pipeline.training.meter import Memory, Meter
from pipeline.training.monitor import Monitor, score_of
from pipeline.training.preemption import Preemption


@dataclass(frozen=True)
class Run:
    """What the loop needs besides the engine.

    start: the checkpoint to continue from, or None. conditions: see conditions.py.
    batches: this rank's batches of a range of steps. evaluate: a report at the present weights, on rank 0, by
        chunks of so many tokens.
    features: anew for each step, where a frozen part is not of the engine.
    preemption: notes the signals that ask to stop.
    """

    recipe: Recipe
    order: Order
    steps: int
    start: Path | None
    conditions: dict
    batches: Callable[[range], Iterator[Batch]]
    evaluate: Callable[[int], Report | None]
    features: Callable[[], KeptFeatures | None]
    preemption: Preemption

    @property
    def folder(self) -> Path:
        return Path(self.recipe.run)


def train(engine: deepspeed.DeepSpeedEngine, run: Run) -> bool:
    """Train to the last step, or until some rank is asked to stop: False. A checkpoint of the last step is there."""
    recipe = run.recipe
    state = {"step": 0, "bad_samples": 0}
    if run.start:
        state = checkpoint.load(engine, run.start)
        set_hyperparameters(engine, recipe)
    start, bad_samples = state["step"], state["bad_samples"]
    objective = objective_of(recipe)(recipe, engine.device)
    if run.start:
        objective.load(state)
    meter = Meter(int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())))
    conditions = _conditions_of_budget(run, engine, meter)
    budget = _budget(run, state.get("budget"), conditions)
    monitor = Monitor(run.folder, dist.get_rank(), start, run.steps, ledger=recipe.ledger)
    with monitor, run.preemption.steps():
        if monitor.leads:
            status.note(run.folder, "running", step=start, steps=run.steps)
        if _is_evaluated(run, start) and _evaluation_is_missing(run, start):
            _evaluate(run, monitor, start, budget)
        if asked := run.preemption.asked():
            monitor.stopped(asked)
            return False
        batches = run.batches(range(start, run.steps))
        for step in range(start, run.steps):
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            lr = learning_rate(step, run.steps, recipe.optimizer)
            if measuring := not budget.is_fixed:
                meter.start()
            with out_of_memory_noted(run.folder, step + 1, budget, conditions):
                result = objective.step(engine, batch, budget, step, lr=lr, features=run.features())
            if measuring:
                _learn(budget, *meter.stop(result.largest_chunk, len(batch.items)))

            done = step + 1
            monitor.consumed(done, batch.origins)
            place = {"step": done, "epoch": run.order.locate(step)[0], "samples": done * run.order.global_batch}
            metrics, histograms = result.metrics(batch)
            metrics = place | {"loss": metrics["loss"], "grad_norm": result.grad_norm, "lr": lr} | metrics
            if metrics["valid"] < recipe.batch.global_batch:
                _note_bad(monitor, done, batch)
            tokens, heaviest, received, waited = _over_ranks(result, batch, waited)
            bad_samples += recipe.batch.global_batch - metrics["valid"]
            _check(recipe, metrics, bad_samples, run.folder)
            seconds = time.perf_counter() - began
            speed = {
                "seconds": seconds,
                "waiting_for_data": waited,
                "samples_per_second": recipe.batch.global_batch / seconds,
                "tokens_per_second": tokens / seconds,
                "heaviest_rank": heaviest,
                "read_mb_per_second": received / 1e6 / seconds,
            }
            monitor.step(metrics, speed, histograms)

            asked, evaluation_is_due = run.preemption.asked(), _is_evaluated(run, done)
            # Also before an evaluation, which may be cut short: then it is made up for.
            if asked or evaluation_is_due or done == run.steps or done % recipe.checkpoint.every == 0:
                monitor.flush()
                kept = {"bad_samples": bad_samples, "budget": found(budget, conditions)} | objective.state()
                folder = run.folder / "checkpoints"
                checkpoint.save(engine, folder, done, kept, run.conditions, recipe.checkpoint.keep)
                if monitor.leads:
                    with disk_errors(run.folder / NOTE):
                        (run.folder / NOTE).unlink(missing_ok=True)  # from here on the checkpoint knows
            if evaluation_is_due and not asked:
                _evaluate(run, monitor, done, budget)
                asked = run.preemption.asked()
            if asked:
                monitor.stopped(asked)
                return False
    return True


def _conditions_of_budget(run: Run, engine: deepspeed.DeepSpeedEngine, meter: Meter) -> dict:
    """What decides how much fits, besides the cut itself."""
    recipe = run.recipe
    settings = recipe.batch.model_dump(include={"activation_checkpointing", "tower_tiles", "features_mb"})
    settings |= {"max_tokens": recipe.model.max_tokens, "padded": engine.module.pads}
    settings |= {"zero_optimization": engine.config["zero_optimization"]}
    return run.conditions | settings | {checkpoint.PROCESSES: dist.get_world_size(), MEMORY: meter.total}


def _budget(run: Run, of_checkpoint: dict | None, conditions: dict) -> Budget:
    """The recipe's, with what was found before; the first rank's word counts, as of the checkpoint."""
    before = [found_before(run.folder, of_checkpoint, conditions) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(before)
    budget = Budget.of(run.recipe.batch, run.recipe.model.max_tokens, before[0])
    if before[0] and budget.auto and dist.get_rank() == 0:
        print(f"as found before: {budget}")
    return budget


def _over_ranks(result: StepResult, batch: Batch, waited: float) -> tuple[float, float, float, float]:
    """(tokens of all ranks, the heaviest's by the mean, bytes read by all, seconds the slowest waited for data)."""
    device = get_accelerator().current_device_name()
    ours = torch.tensor([[result.tokens, batch.received, waited]], device=device)
    tokens, received, waited = all_gather_constant(ours).double().cpu().T
    return float(tokens.sum()), float(tokens.max() / tokens.mean()), float(received.sum()), float(waited.max())


def _note_bad(monitor: Monitor, step: int, batch: Batch) -> None:
    """Bring all ranks' bad samples of a step to the first rank, which keeps them."""
    ranks = [None] * dist.get_world_size() if monitor.leads else None
    dist.gather_object(batch.bad, ranks)
    if monitor.leads:
        monitor.bad(step, [bad for rank in ranks for bad in rank])


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
            f"data.max_bad_fraction={recipe.data.max_bad_fraction}; {folder / 'bad_samples.jsonl'} says which and why"
        )


def _learn(budget: Budget, memory: Memory, largest_chunk: int, items: int) -> None:
    budget.measured(memory, largest_chunk, items)
    if dist.get_rank() == 0:
        how = "from now on" if budget.is_fixed else "next"
        print(f"a step took {memory.peak / 1e9:.1f} GB of {memory.total / 1e9:.1f}; {how} {budget}")


def _is_evaluated(run: Run, step: int) -> bool:
    """Before the first step, after the last, and between as the recipe says."""
    evaluation = run.recipe.evaluation
    return bool(evaluation) and (step in (0, run.steps) or bool(evaluation.every and step % evaluation.every == 0))


def _evaluation_is_missing(run: Run, step: int) -> bool:
    """Whether it is still to be made, of the step that a start continues from."""
    missing = score_of(run.folder, step) is None
    due = torch.tensor(missing, device=get_accelerator().current_device_name())
    dist.broadcast(due, 0)  # on a shared file system another rank may not yet see it
    return bool(due)


def _evaluate(run: Run, monitor: Monitor, step: int, budget: Budget) -> None:
    if report := run.evaluate(budget.chunk_tokens):
        if report.collapsed:
            print(printable(f"step {step}: {report.remarks()[0]}"), file=sys.stderr, flush=True)
        elif step:  # after which there is a checkpoint
            checkpoint.keep_best(run.folder / "checkpoints", step, report.score, list(report.results))
        monitor.evaluation(step, report)
