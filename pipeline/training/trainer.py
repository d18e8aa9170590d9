"""One training run: checks, loading, steps, evaluation and export."""

import logging
import os
import platform
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.config import Recipe, dump_recipe, load_ds_config
from pipeline.data.lengths import Lengths
from pipeline.data.order import Order
from pipeline.data.plan import Stop
from pipeline.data.source import Source
from pipeline.data.stream import Stream
from pipeline.distributed import on_first_rank, start_distributed
from pipeline.errors import PipelineError, disk_errors
from pipeline.evaluation import sets
from pipeline.evaluation.sets import Collection
from pipeline.jobs import limits, status
from pipeline.models.chunks import CachedFeatures
from pipeline.models.registry import saved, training_of
from pipeline.objectives.objective import StepResult, objective_of
from pipeline.phases import phase
from pipeline.storage.atomic import write_file
from pipeline.training import checkpoint, profiler, resume, trackers
from pipeline.training.budget import MEMORY, NOTE, Budget, Meter, out_of_memory_noted, record_of, restored_budget
from pipeline.training.conditions import check, conditions_of_run
from pipeline.training.engine import build_engine, learning_rate, load_frozen, set_hyperparameters
from pipeline.training.evaluation import Evaluation
from pipeline.training.export import export
from pipeline.training.feed import Feed, Prepared
from pipeline.training.initial import check_sizes, initial_model
from pipeline.training.monitor import Monitor, shorten_ledgers
from pipeline.training.part_norms import PartNorms
from pipeline.training.partitions import check_nodes
from pipeline.training.preemption import Preemption
from pipeline.training.profiler import Profiler
from pipeline.training.saving import Saver
from pipeline.training.speed import Speed
from pipeline.training.step_report import StepReport
from pipeline.training.universal import for_this_world
from pipeline.training.watchdog import Watchdog, record_collectives

_PACKAGES = ("torch", "deepspeed", "transformers", "webdataset")

logger = logging.getLogger(__name__)


def plan(recipe: Recipe, source: Source, lengths: Lengths, world: int) -> tuple[Order, int]:
    """Return a run's order and number of steps. Raises PipelineError if they do not suit `world` processes."""
    order = source.order(recipe.batch.global_batch, recipe.seed, lengths)
    order.check_world(world)
    source.check_memory(order, world)
    steps = recipe.steps or round((recipe.epochs or 0) * order.steps_per_epoch)
    if steps < 1:
        raise PipelineError(
            f"epochs={recipe.epochs} of {order.steps_per_epoch} steps is less than a step: raise it, or set steps"
        )
    return order, steps


class Trainer:
    """One run, on one rank. Call `check`, `build`, `train` and, if that returns True, `finish`, in this order.

    preemption: notes the signals that ask the run to stop.
    """

    def __init__(self, recipe: Recipe, preemption: Preemption) -> None:
        self.recipe, self.preemption, self.family = recipe, preemption, training_of(recipe)
        self.folder = Path(recipe.run)
        self.checkpoints = self.folder / "checkpoints"

    def check(self, *, resumes: bool) -> None:
        """Raise PipelineError for anything wrong, on every rank, before the process group starts and a model is loaded.

        resumes: whether to resume from a checkpoint in the run directory; otherwise a checkpoint is an error.
        """
        recipe, world = self.recipe, int(os.environ.get("WORLD_SIZE", 1))
        self.family.check(recipe.model)
        self.source = Source.open(recipe.data)
        self.family.check_data(recipe, self.source)
        objective_of(recipe).check_data(recipe, self.source)
        lengths = self.family.lengths(recipe)
        self.order, self.steps = plan(recipe, self.source, lengths, world)
        profiler.check(recipe.profile, self.steps)
        trackers.check(recipe.trackers)
        self.ds_config = load_ds_config(recipe, world)
        self.family.check_stage(self.ds_config["zero_optimization"]["stage"])
        check_nodes(self.ds_config["zero_optimization"], int(os.environ.get("LOCAL_WORLD_SIZE", world)))
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        limits.require_shared_memory(recipe, self.source, lengths, world, ranks)
        limits.raise_open_files()
        self.conditions = conditions_of_run(recipe, self.source, self.ds_config["zero_optimization"])
        if newest := resume.whole(self.checkpoints, quiet=True):
            if not resumes:
                raise PipelineError(f"{self.folder} has a checkpoint already; set run= to another directory, or resume")
            check(newest, self.conditions)
        instructed = saved(recipe.model.family).instructed
        urls = recipe.evaluation.urls if recipe.evaluation else []
        self.collection: Collection | None = sets.load(urls, instructed=instructed) if urls else None

    def build(self) -> None:
        """Start the process group, and load the model, its frozen part and the engine."""
        recipe, minutes = self.recipe, self.recipe.timeout_minutes
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the loader's forks
        record_collectives(self.folder)
        device = start_distributed(minutes)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.start = resume.choose(self.checkpoints, self.conditions)
        if self.rank == 0:
            with disk_errors(self.folder / "recipe.yaml"):
                write_file(self.folder / "recipe.yaml", self._resolved_recipe().encode())
        self.model_path = on_first_rank(
            lambda: initial_model(recipe, self.source, self.folder / "init", anew=self.start is None),
            "the model to begin with",
        )
        check_sizes(recipe, self.model_path)
        if as_saved := self.start:
            if self.rank == 0:
                shorten_ledgers(self.folder, self.world, checkpoint.step_of(as_saved))
            self.start = for_this_world(as_saved, minutes)
            if self.start != as_saved:
                self.ds_config.setdefault("checkpoint", {})["load_universal"] = True
        self.processor = self.family.processor(recipe, self.model_path)
        self.frozen = load_frozen(recipe, self.model_path, device)
        self.engine = build_engine(recipe, self.ds_config, self.model_path)
        asked = lambda: self.preemption.asked() > 0  # noqa: E731
        self.evaluation = Evaluation(
            recipe, self.collection, self.steps, self.engine, self.processor, self.frozen, interrupted=asked
        )
        flops = self.family.flops(self.engine.module, self.frozen)
        self.speed = Speed(recipe.batch.global_batch, flops, recipe.precision)

    def train(self) -> bool:
        """Take the remaining steps and return True, or return False if a rank is asked to stop. All steps are saved."""
        with Watchdog(self.folder, dist.get_rank(), dist.get_world_size(), self.recipe.timeout_minutes):
            return self._train()

    def _train(self) -> bool:
        with phase("restore", 0):
            done = self._restore()
        with self.monitor, self.preemption.steps(), self.saver:
            if self.monitor.leads:
                status.note(self.folder, "running", step=done, steps=self.steps)
            if self.evaluation.is_due(done) and self.evaluation.is_missing(done):
                with phase("evaluation", done):
                    self._evaluate(done)
            if asked := self.preemption.asked():
                self.monitor.stopped(asked)
                return False
            finished = self._take(range(done, self.steps))
            if finished and self.monitor.leads:
                self.monitor.board.finished()
            return finished

    def _take(self, steps: range) -> bool:
        """Take the steps; see `train`."""
        stop = Stop()
        with closing(self._stream(steps, stop)) as stream, self._feed(stream, steps, stop) as feed:
            feed.next_cut(replace(self.budget))
            for step in steps:
                done = step + 1
                with self.profiler.step(done):
                    began, waited = time.perf_counter(), feed.waited
                    with phase("data", done):
                        prepared = feed.next()
                    result, lr = self._step(step, prepared, feed)
                    with phase("report"):
                        self.report.of_step(
                            done,
                            prepared.batch,
                            result,
                            self.budget,
                            lr=lr,
                            began=began,
                            waited=feed.waited - waited,
                        )
                self.saver.raise_failure()
                asked, evaluates = self.preemption.asked(), self.evaluation.is_due(done)
                # Also save before an evaluation: if that is interrupted, the next start repeats it.
                if asked or evaluates or done == self.steps or done % self.recipe.checkpoint.every == 0:
                    self.profiler.end()
                    with phase("checkpoint"):
                        self._save(done)
                if evaluates and not asked:
                    with phase("evaluation"):
                        self._evaluate(done)
                    asked = self.preemption.asked()
                if asked:
                    with phase("checkpoint"):
                        self._finish_save()
                    self.monitor.stopped(asked)
                    return False
            with phase("checkpoint"):
                self._finish_save()
        return True

    def finish(self) -> None:
        """Export the model."""
        export(self.engine, self.frozen, self.recipe, self.model_path, self.folder / "export")
        if self.rank == 0:
            status.note(self.folder, "finished", reason="")
            print(f"the model: {self.folder}/export    the curves: tensorboard --logdir {self.folder}/tensorboard")

    def _restore(self) -> int:
        """Load the checkpoint to resume from, if there is one. Returns the number of steps that the run has taken."""
        state: dict[str, Any] = {"step": 0, "bad_samples": 0}
        self.objective = objective_of(self.recipe)(self.recipe, self.engine.device)
        if self.start:
            state = checkpoint.load(self.engine, self.start)
            set_hyperparameters(self.engine, self.recipe)
            self.objective.load(state)
        self.meter = Meter(int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())))
        self.budget_conditions = self._conditions_of_budget()
        self.budget = self._restored_budget(state.get("budget"))
        done = int(state["step"])
        self.saver = Saver(self.engine, self.checkpoints, self.conditions, self.recipe.checkpoint.keep)
        self.profiler = Profiler(self.recipe.profile, self.folder, dist.get_rank())
        self.monitor = Monitor(self.folder, dist.get_rank(), done, self.steps, ledger=self.recipe.ledger)
        self.monitor.describe(self.recipe, self.world, self._resolved_recipe())
        trained = [part for part in self.recipe.model.train.parts() if getattr(self.recipe.model.train, part)]
        self.report = StepReport(
            self.recipe,
            self.order,
            self.source.names,
            self.processor,
            self.monitor,
            self.speed,
            self.meter,
            PartNorms(self.engine.basic_optimizer, trained),
            int(state["bad_samples"]),
        )
        return done

    def _conditions_of_budget(self) -> dict[str, Any]:
        """Return what determines how much fits in memory, besides the budget itself."""
        recipe = self.recipe
        settings = recipe.batch.model_dump(include={"activation_checkpointing", "tower_tiles", "features_mb"})
        settings |= {"max_tokens": recipe.model.max_tokens, "padded": self.engine.module.pads}
        settings |= {"zero_optimization": self.engine.config["zero_optimization"]}
        return self.conditions | settings | {checkpoint.PROCESSES: dist.get_world_size(), MEMORY: self.meter.total}

    def _restored_budget(self, of_checkpoint: dict[str, Any] | None) -> Budget:
        """Return the recipe's budget, with results of an earlier start from the first rank's note or checkpoint."""
        before: list[Budget | None] = [None]
        if dist.get_rank() == 0:
            before = [restored_budget(self.folder, of_checkpoint, self.budget_conditions)]
        dist.broadcast_object_list(before)
        budget = Budget.of(self.recipe.batch, self.recipe.model.max_tokens, before[0])
        if before[0] and budget.auto and dist.get_rank() == 0:
            logger.info("restored budget: %s", budget)
        return budget

    def _stream(self, steps: range, stop: Stop) -> Stream:
        """Return this rank's slices of the steps' batches."""
        return Stream(
            self.source,
            self.order,
            self.processor.encode,
            steps,
            rank=self.rank,
            world=self.world,
            timeout=60 * self.recipe.timeout_minutes,
            trained_on=partial(self.family.trained_on, self.recipe),
            augmented=lambda draws: self.family.augmented(self.recipe, self.processor, draws).encode,
            stop=stop,
        )

    def _feed(self, stream: Stream, steps: range, stop: Stop) -> Feed:
        model = self.engine.module
        return Feed(
            stream,
            steps,
            stop,
            self.engine.device,
            partial(self.objective.items, model),
            padded=model.pads,
            passes=self.objective.passes,
            tiles_once=self.frozen is not None and self.frozen.reads_tiles,
        )

    def _step(self, step: int, prepared: Prepared, feed: Feed) -> tuple[StepResult, float]:
        batch, ahead = prepared.batch, prepared.ahead
        lr = learning_rate(step, self.steps, self.recipe.optimizer)
        features = CachedFeatures(self.frozen, self.recipe.batch.features_mb << 20) if self.frozen else None
        self.meter.start()
        if not (measuring := not self.budget.is_fixed):
            feed.next_cut(replace(self.budget))
        with out_of_memory_noted(self.folder, step + 1, self.budget, self.budget_conditions):
            result = self.objective.step(self.engine, batch, self.budget, step, lr=lr, features=features, ahead=ahead)
        if measuring:
            memory, largest_chunk, items = self.meter.stop(result.largest_chunk, len(batch.items))
            self.budget.measured(memory, largest_chunk, items)
            feed.next_cut(replace(self.budget))
            if dist.get_rank() == 0:
                how = "from now on" if self.budget.is_fixed else "next"
                used = f"{memory.peak / 1e9:.1f} GB of {memory.total / 1e9:.1f}"
                logger.info("a step took %s; %s %s", used, how, self.budget)
        return result, lr

    def _save(self, done: int) -> None:
        """Begin to write a checkpoint; `_finish_save` waits until it is whole."""
        self._finish_save()
        self.monitor.flush()
        state = self.objective.state() | {"bad_samples": self.report.bad_samples}
        self.saver.begin(done, state | {"budget": record_of(self.budget, self.budget_conditions)})

    def _finish_save(self) -> None:
        if self.saver.finish() and self.monitor.leads:
            with disk_errors(self.folder / NOTE):
                (self.folder / NOTE).unlink(missing_ok=True)  # the checkpoint has the budget now

    def _evaluate(self, step: int) -> None:
        report = self.evaluation.report(step, self.budget.chunk_tokens)
        self._finish_save()
        if report:
            if report.collapsed:
                logger.warning("step %d: %s", step, report.remarks()[0])
            elif step:  # step 0 has no checkpoint
                checkpoint.keep_best(self.checkpoints, step, report.score, list(report.results))
            self.monitor.evaluation(step, report)

    def _resolved_recipe(self) -> str:
        """Return the content of recipe.yaml: the number of processes, the packages' versions, the resolved recipe."""
        versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
        return f"# {self.world} processes; Python {platform.python_version()}, {versions}\n{dump_recipe(self.recipe)}"
