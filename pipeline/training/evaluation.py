"""Evaluation of the model while it trains."""

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from pipeline.config import Recipe
from pipeline.distributed import on_first_rank
from pipeline.evaluation.encode import embed_collection
from pipeline.evaluation.encoders import ModelEncoder
from pipeline.evaluation.measure import measure
from pipeline.evaluation.projector import write_projector
from pipeline.evaluation.report import Report
from pipeline.evaluation.sets import Collection
from pipeline.evaluation.store import MemoryStore
from pipeline.models.chunks import Features, Frozen
from pipeline.models.compact import smaller_forms
from pipeline.models.family import Processor
from pipeline.models.registry import training_of
from pipeline.training.monitor import evaluation_of

logger = logging.getLogger(__name__)


class Evaluation:
    """Evaluates the engine's weights on a recipe's evaluation sets.

    collection: None without any.  steps: of the run.  interrupted: whether to stop.
    """

    def __init__(
        self,
        recipe: Recipe,
        collection: Collection | None,
        steps: int,
        engine: deepspeed.DeepSpeedEngine,
        processor: Processor,
        frozen: Frozen | None,
        interrupted: Callable[[], bool],
    ) -> None:
        self.recipe, self.collection, self.steps, self.engine = recipe, collection, steps, engine
        self.processor, self.frozen, self.interrupted = processor, frozen, interrupted

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after `step` steps: at the start, at the end, and every `evaluation.every` steps."""
        if (evaluation := self.recipe.evaluation) is None:
            return False
        return step in (0, self.steps) or bool(evaluation.every and step % evaluation.every == 0)

    def is_missing(self, step: int) -> bool:
        """Whether there is no report yet for the step from which this start continues. Collective."""
        due = torch.tensor(evaluation_of(Path(self.recipe.run), step) is None, device=self.engine.device)
        dist.broadcast(due, 0)  # on a shared file system another rank may not yet see it
        return bool(due)

    def report(self, step: int, chunk_tokens: int) -> Report | None:
        """Return a report on the weights after `step` steps, on the first rank, and write the vectors that TensorBoard
        shows. None on others, and if interrupted. Collective.

        chunk_tokens: as in training, which has room for them.
        """
        collection, (reader, features) = self.collection, self._reader_and_features
        assert collection
        name, dimension, device = self.recipe.run, self.engine.module.dimension, self.engine.device
        encoder = ModelEncoder(name, "", dimension, lambda: (self.engine, features), reader, chunk_tokens, device)
        store = MemoryStore(len(collection.items), dimension) if dist.get_rank() == 0 else None
        if not embed_collection(encoder, collection, store, interrupted=self.interrupted):
            return None
        objective = self.recipe.objective
        forms = smaller_forms(dimension, objective.sizes, [objective.rounding] if objective.rounding else [])

        def score() -> Report | None:
            if store is None:
                return None
            result = measure(name, collection, store.take, forms=forms, device=device)
            if self.recipe.evaluation and (queries := self.recipe.evaluation.projector):
                try:
                    write_projector(Path(name, "tensorboard"), f"step-{step:08d}", collection, store.take, queries)
                except Exception as error:  # the other ranks wait, and no picture is worth a run
                    logger.warning("the embedding projector does not show step %d: %r", step, error)
            return result

        report = on_first_rank(score, "the scores")
        return report if store else None

    @cached_property
    def _reader_and_features(self) -> tuple[Processor, Features | None]:
        return training_of(self.recipe).for_evaluation(self.recipe, self.processor, self.frozen, self.engine.device)
