"""Trace an optimizer step of a model on the pretended device, as the first of eight ranks."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import streams
import torch
import torch.distributed as dist
from stand_ins import attention_kernels
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from tracer import CUDA, Record, Tracer

from pipeline.config import Recipe
from pipeline.data.batch import Batch
from pipeline.device import configure_device
from pipeline.models import chunks, kernels
from pipeline.models.chunks import Ahead, CachedFeatures, Packed, pack
from pipeline.models.staging import Staged, Staging
from pipeline.objectives.objective import Objective, objective_of
from pipeline.training.budget import Budget
from pipeline.training.engine import parameter_groups

WORLD = 8


class Optimizer:
    def __init__(self, groups: list[dict]) -> None:
        self.param_groups = groups


class Engine:
    """What a step uses of DeepSpeed's engine. Gradients are summed in the parameters' dtype; nothing is sharded."""

    def __init__(self, module: nn.Module, recipe: Recipe) -> None:
        self.module, self.device, self.optimizer = module, CUDA, Optimizer(parameter_groups(module, recipe))

    def __call__(self, *args: Any) -> torch.Tensor:
        return self.module(*args)

    def set_gradient_accumulation_boundary(self, last: bool) -> None: ...

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool = False) -> None:
        loss.backward()

    def step(self) -> None: ...

    def get_global_grad_norm(self) -> float:
        return 0.0


def start_ranks() -> None:
    """Start a process group of which this is the first rank, and in which nothing is sent, on an H100 with Triton."""
    configure_device(CUDA)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    kernels._why_not = lambda: ""  # the fused kernels cannot be tried
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())


def traced_step(
    tracer: Tracer,
    model: nn.Module,
    recipe: Recipe,
    batch: Batch,
    features: CachedFeatures | None,
    cut: Sequence[int],
) -> Record:
    """Trace the second step, when nothing is new, with its metrics; check each trained parameter's gradient.

    model: on the device.  cut: the chunks' tokens and the number of cached graphs.
    """
    with tracer, attention_kernels(tracer), streams.stand_ins(lambda: tracer.wait("event")):
        engine, objective = Engine(model, recipe), objective_of(recipe)(recipe, CUDA)
        budget = Budget(cut[0], cut[1], True, True, [], recipe.model.max_tokens)
        tiles_once = features is not None and features._frozen.reads_tiles
        tracer.reset()
        ahead = _fed(objective, model, batch, budget, tiles_once)
        prepared = tracer.record
        assert not prepared.collectives, f"another thread calls {prepared.collectives}"
        others = prepared.waits.keys() - {"event: staging._Buffer.of"}
        assert not others, f"another thread waits: {others}"
        tracer.reset()
        result = objective.step(
            engine,  # type: ignore[arg-type]
            batch,
            budget,
            1,
            lr=1e-5,
            features=features,
            ahead=ahead,
        )
        result.metrics(batch, ["a dataset", "another"])
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if not parameter.requires_grad:
            assert gradient is None, f"{name} is frozen, and has a gradient"
            continue
        assert gradient is not None, f"{name} is trained, and has no gradient"
        assert gradient.dtype == parameter.dtype and gradient.device == parameter.device, (
            f"{name} is {parameter.dtype} on {parameter.device}, its gradient {gradient.dtype} on {gradient.device}"
        )
    return tracer.record


def _fed(objective: Objective, model: nn.Module, batch: Batch, budget: Budget, tiles_once: bool) -> Ahead:
    """Prepare a step as the feed's thread does: with all its chunks on their way to the device."""
    items, staging = objective.items(model, batch, 1), Staging(CUDA)
    cuts = chunks.cut(items, budget.chunk_tokens, padded=model.pads)  # type: ignore[arg-type]
    packs = [pack([items[row] for row in rows]) for rows in cuts]
    passes = [range(len(cuts)), range(budget.kept_chunks, len(cuts))][: objective.passes]
    staged: deque[tuple[int, Staged]] = deque()
    for number, run in enumerate(passes):
        staged += [(chunk, staging.sent(packs[chunk], tiles=not (number and tiles_once))) for chunk in run]

    def take(chunk: int) -> Packed:
        number, given = staged.popleft()
        assert number == chunk, f"chunk {chunk} is run in place of {number}"
        return given.received()

    return Ahead(items, cuts, take)
