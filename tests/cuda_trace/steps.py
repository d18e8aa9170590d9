"""Trace an optimizer step of a model on the pretended device, as the first of eight ranks."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from stand_ins import attention_kernels
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from tracer import CUDA, Record, Tracer

from pipeline.config import Recipe
from pipeline.data.batch import Batch
from pipeline.device import configure_device
from pipeline.models import kernels
from pipeline.models.chunks import Features
from pipeline.objectives.objective import objective_of
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
    tracer: Tracer, model: nn.Module, recipe: Recipe, batch: Batch, features: Features | None, cut: Sequence[int]
) -> Record:
    """Trace the second step, when nothing is new, with its metrics; check each trained parameter's gradient.

    model: on the device.  cut: the chunks' tokens and the number of cached graphs.
    """
    with tracer, attention_kernels(tracer):
        engine, objective = Engine(model, recipe), objective_of(recipe)(recipe, CUDA)
        budget = Budget(cut[0], cut[1], True, True, [], recipe.model.max_tokens)
        tracer.reset()
        result = objective.step(engine, batch, budget, 1, lr=1e-5, features=features)  # type: ignore[arg-type]
        result.metrics(batch)
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
