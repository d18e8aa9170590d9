"""The loss's temperature: constant or learned, one for all pairs or one for each task."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from pipeline.config import Recipe
from pipeline.models.chunks import sent
from pipeline.objectives.contrastive.config import ContrastiveSection

# Bounds of a learned 1 / tau: CLIP's, above which training becomes unstable; and that of open_clip and LLM2CLIP.
_LARGEST_SCALE, _SMALLEST_SCALE = 100.0, 1.0


class Temperature:
    """The temperature of each pair: constant, or learned as log(1 / tau), as in CLIP (arXiv 2103.00020).

    Number 0 is the temperature of all tasks but those in objective.temperatures, which follow, sorted by name.

    Learned temperatures are replicated on every rank, outside ZeRO. After each step 1 / tau is clamped to 1 ... 100, as
    by LLM2CLIP's training/train.py. Runs of versions without the lower bound may resume: it changes only those whose
    1 / tau falls below 1, where the loss hardly tells pairs apart.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        objective = recipe.objective
        assert isinstance(objective, ContrastiveSection)
        self._tasks = {task: number for number, task in enumerate(sorted(objective.temperatures), 1)}
        self._constant = [objective.temperature, *(objective.temperatures[task] for task in self._tasks)]
        self._device, self._log_scale = device, None
        if objective.learn_temperature:
            scales = [-math.log(tau) for tau in self._constant]
            # A scalar without tasks, as earlier versions store it.
            self._log_scale = torch.tensor(scales if self._tasks else scales[0], device=device, requires_grad=True)
            betas, eps = recipe.optimizer.betas, recipe.optimizer.eps
            self._optimizer = torch.optim.AdamW([self._log_scale], betas=betas, eps=eps, weight_decay=0.0)

    def of(self, tasks: Sequence[str]) -> float | torch.Tensor:
        """Return the temperature of pairs of these tasks: (n,), or one for all if no task has its own."""
        if not self._tasks:
            return self._constant[0] if self._log_scale is None else torch.exp(-self._log_scale)
        numbers = [self._tasks.get(task, 0) for task in tasks]
        if self._log_scale is None:
            return sent(torch.tensor([self._constant[number] for number in numbers]), self._device)
        return torch.exp(-self._log_scale)[sent(torch.tensor(numbers), self._device)]

    def learned(self) -> dict[str, float]:
        """Return the learned temperatures: "temperature", and "temperature/TASK" of each task with its own."""
        if self._log_scale is None:
            return {}
        names = ["temperature", *(f"temperature/{task}" for task in self._tasks)]
        return dict(zip(names, torch.exp(-self._log_scale.detach()).reshape(-1).tolist(), strict=True))

    def gradient(self, loss: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the gradient of this rank's loss by its embeddings; store the temperatures', averaged over ranks."""
        if self._log_scale is None:
            return torch.autograd.grad(loss, embeddings)[0]
        gradient, self._log_scale.grad = torch.autograd.grad(loss, (embeddings, self._log_scale))
        dist.all_reduce(self._log_scale.grad)
        self._log_scale.grad /= dist.get_world_size()
        return gradient

    @torch.no_grad()
    def step(self, lr: float) -> None:
        if self._log_scale is not None:
            self._optimizer.param_groups[0]["lr"] = lr
            self._optimizer.step()
            self._log_scale.clamp_(math.log(_SMALLEST_SCALE), math.log(_LARGEST_SCALE))

    def state(self) -> dict | None:
        """Return the state to checkpoint, or None if the temperatures are constant."""
        if self._log_scale is None:
            return None
        return {"log_scale": self._log_scale.detach(), "optimizer": self._optimizer.state_dict()}

    @torch.no_grad()
    def load(self, state: dict | None) -> None:
        if self._log_scale is not None and state is not None:
            self._log_scale.copy_(state["log_scale"])
            self._optimizer.load_state_dict(state["optimizer"])
