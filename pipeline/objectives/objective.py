"""What an objective implements, and what the steps of all objectives share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from deepspeed import DeepSpeedEngine

from pipeline.config import Recipe
from pipeline.data.batch import Batch
from pipeline.models.chunks import Chunk, Features, run_chunk
from pipeline.objectives import OBJECTIVES


class Cut(Protocol):
    """How a step cuts a batch. chunk_tokens: of a chunk.  kept_chunks: chunks whose graphs the first pass keeps."""

    chunk_tokens: int
    kept_chunks: int


@dataclass(frozen=True, kw_only=True)
class StepResult(ABC):
    """tokens: of this rank's items.  largest_chunk: tokens of its largest chunk, as the budget counts them."""

    grad_norm: float
    tokens: int
    largest_chunk: int

    @abstractmethod
    def metrics(self, batch: Batch) -> tuple[dict, dict]:
        """The global batch's metrics, `loss` and `valid` pairs among them, and values for histograms by name.

        batch: this rank's part; every rank calls it.
        """


class Objective(ABC):
    """What training asks of an objective. One is made for a run, from its recipe and device.

    An objective is a package with these modules:

        config.py   SECTION, its section of a recipe (see `ObjectiveSection`)
        step.py     OBJECTIVE, a class of this interface
    """

    @abstractmethod
    def __init__(self, recipe: Recipe, device: torch.device) -> None: ...

    @abstractmethod
    def step(
        self, engine: DeepSpeedEngine, batch: Batch, cut: Cut, step: int, *, lr: float, features: Features | None = None
    ) -> StepResult:
        """Take one optimizer step with this rank's part of the global batch.

        step: its number, from 0.  lr: default learning rate, for parts without their own.
        features: of a frozen part that is outside the engine.
        """

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {}

    def load(self, state: dict[str, Any]) -> None:  # noqa: B027 (most objectives keep nothing)
        """Restore what `state` returned.  state: a checkpoint's, with other entries beside it."""

    @classmethod
    def conditions(cls) -> dict[str, Any]:
        """What must not change when a run resumes, besides the recipe's fixed fields, by name."""
        return {}


def objective_of(recipe: Recipe) -> type[Objective]:
    found: type[Objective] = OBJECTIVES.module(recipe.objective.name, "step").OBJECTIVE
    return found


def backward_chunks(
    engine: DeepSpeedEngine,
    kept: Sequence[Chunk],
    graphs: list[torch.Tensor],
    again: Sequence[Chunk],
    gradient: torch.Tensor,
    features: Features | None,
) -> list[torch.Tensor]:
    """Backpropagate the embeddings' gradients (items, hidden) into the parameters; `graphs` is empty afterwards.

    kept: chunks whose embeddings are `graphs`.  again: chunks to embed once more; returns their embeddings.

    DeepSpeed averages gradients over ranks; each rank's loss is scaled so that the mean over ranks is the global
    batch's loss. Within a step nothing is averaged: the chunks' gradients are summed.
    """
    surrogates = [(graph * gradient[chunk.rows]).sum() for chunk, graph in zip(kept, graphs, strict=True)]
    graphs.clear()
    if surrogates:
        # All in one backward pass, before any other: under ZeRO-3 every other order loses gradients.
        engine.set_gradient_accumulation_boundary(not again)
        engine.backward(torch.stack(surrogates).sum(), scale_wrt_gas=False)
    parts = []
    for number, chunk in enumerate(again, 1):
        engine.set_gradient_accumulation_boundary(number == len(again))
        part = run_chunk(engine, chunk, features)
        engine.backward((part * gradient[chunk.rows]).sum(), scale_wrt_gas=False)
        parts.append(part.detach())
    return parts


def optimizer_step(engine: DeepSpeedEngine, lr: float) -> float:
    """Take the optimizer step; returns the gradient norm before clipping.

    lr: default learning rate, for parts without their own.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    norm = None
    if isinstance(engine.optimizer, torch.optim.Optimizer):  # ZeRO 0 in fp32, where DeepSpeed does not keep the norm
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    return float(engine.get_global_grad_norm() if norm is None else norm)
