"""The interface of objectives, and the code that their steps share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from deepspeed import DeepSpeedEngine

from pipeline.config import Recipe
from pipeline.data.batch import Batch, Encoded
from pipeline.data.source import Source
from pipeline.models.chunks import Ahead, Chunk, Features, run_chunk
from pipeline.objectives import OBJECTIVES
from pipeline.phases import phase


class Cut(Protocol):
    """How a step cuts a batch.  chunk_tokens: the most per chunk.  kept_chunks: chunks with cached graphs."""

    chunk_tokens: int
    kept_chunks: int


@dataclass(frozen=True, kw_only=True)
class StepResult(ABC):
    """A step's result.

    grad_norm: before clipping; not finite if the step was skipped because of that.  tokens: of this rank's items.
    padded: tokens of its chunks, with padding.  largest_chunk: those of its largest chunk, as the budget counts them.
    logits: tokens for which this rank computed the vocabulary's logits.  embeddings: (items, hidden) of the batch's
    items, in a step with pictures.
    """

    grad_norm: float
    tokens: int
    padded: int
    largest_chunk: int
    logits: int = 0
    embeddings: torch.Tensor | None = None

    @abstractmethod
    def metrics(self, batch: Batch, datasets: Sequence[str]) -> tuple[dict, dict]:
        """Return the global batch's metrics, with `loss` and `valid` (pairs), and values for histograms, by name.

        If the loss is not finite, they may have `not_finite`, a list of the ranks from which that comes.
        Every rank calls it.  batch: this rank's part.  datasets: the names of the run's datasets.
        """


class Objective(ABC):
    """The interface of an objective. A run creates one from its recipe and device.

    An objective is a package with these modules:

        config.py   SECTION, its section of a recipe (see `ObjectiveSection`)
        step.py     OBJECTIVE, a class with this interface

    passes: how often a step runs a chunk without a cached graph.
    """

    passes: ClassVar[int] = 2

    @abstractmethod
    def __init__(self, recipe: Recipe, device: torch.device) -> None: ...

    @abstractmethod
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
    ) -> StepResult:
        """Take one optimizer step with this rank's part of the global batch.

        step: its number, from 0.  lr: default learning rate, for parts without their own.
        features: of the frozen part outside the engine.
        ahead: the result of `items`, cut and packed ahead for `cut`; None: this does it.
        """

    def items(self, model: Any, batch: Batch, step: int) -> Sequence[Encoded]:
        """Return the items that the step embeds. Another thread may call it ahead, so it must not change anything.

        model: the engine's module.
        """
        return list(batch.items.values())

    def state(self) -> dict[str, Any]:
        """Return the state to checkpoint."""
        return {}

    def load(self, state: dict[str, Any]) -> None:  # noqa: B027 (most objectives have no state)
        """Restore the state that `state` returned. The dict may hold other entries of the checkpoint."""

    @classmethod  # noqa: B027 (most objectives take all data)
    def check_data(cls, recipe: Recipe, source: Source) -> None:
        """Raise PipelineError for data that do not fit the objective, before a model is loaded."""

    @classmethod
    def conditions(cls) -> dict[str, Any]:
        """Return, by name, the values besides the recipe's fixed fields that must not change when a run resumes."""
        return {}


def objective_of(recipe: Recipe) -> type[Objective]:
    found: type[Objective] = OBJECTIVES.module(recipe.objective.name, "step").OBJECTIVE
    return found


def backward_chunks(
    engine: DeepSpeedEngine,
    cached: Sequence[Chunk],
    graphs: list[torch.Tensor],
    recomputed: Sequence[Chunk],
    gradient: torch.Tensor,
    features: Features | None,
) -> list[torch.Tensor]:
    """Backpropagate the embeddings' gradients (items, hidden) into the parameters, and empty `graphs`.

    cached: chunks with cached graphs, whose embeddings are `graphs`.  recomputed: the other chunks; their embeddings
    are returned.

    DeepSpeed averages gradients over ranks; each rank's loss is scaled so that the mean over ranks is the global
    batch's loss. Within a step the chunks' gradients are summed, not averaged.

    DeepSpeed's `engine.coalesce_grad_reduction()` would communicate once for all backward passes under ZeRO 2 and 3. It
    sums the chunks in the parameters' precision, inexact in bf16, and every rank holds all gradients. ZeRO 1 already
    communicates once.
    """
    surrogates = [(graph * gradient[chunk.rows]).sum() for chunk, graph in zip(cached, graphs, strict=True)]
    graphs.clear()
    if surrogates:
        # One backward pass for all, before any other: under ZeRO-3 any other order loses gradients.
        engine.set_gradient_accumulation_boundary(not recomputed)
        engine.backward(torch.stack(surrogates).sum(), scale_wrt_gas=False)
    parts = []
    for number, chunk in enumerate(recomputed, 1):
        engine.set_gradient_accumulation_boundary(number == len(recomputed))
        part = run_chunk(engine, chunk, features)
        engine.backward((part * gradient[chunk.rows]).sum(), scale_wrt_gas=False)
        parts.append(part.detach())
    return parts


def optimizer_step(engine: DeepSpeedEngine, lr: float) -> float:
    """Take the optimizer step, and return the gradient norm before clipping.

    If the norm is not finite, parameters and optimizer state stay as they are. DeepSpeed's optimizers see to that.

    lr: default learning rate, for parts without their own.
    """
    with phase("optimizer"):
        for group in engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        norm = None
        if isinstance(engine.optimizer, torch.optim.Optimizer):  # ZeRO 0 in fp32: DeepSpeed does not record the norm
            norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
            if not norm.isfinite():
                engine.zero_grad()
                return float(norm)
        engine.step()
        return float(engine.get_global_grad_norm() if norm is None else norm)
