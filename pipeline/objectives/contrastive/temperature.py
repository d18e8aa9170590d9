"""The loss's temperature: constant, or learned as in CLIP (arXiv 2103.00020)."""

import math

import torch
import torch.distributed as dist

from pipeline.config import Recipe
from pipeline.objectives.contrastive.config import ContrastiveSection

_LARGEST_SCALE = 100.0  # CLIP's upper bound of 1 / tau, above which training becomes unstable


class Temperature:
    """A constant temperature, or log(1 / tau) as a learned parameter that is replicated on every rank, outside ZeRO."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        objective = recipe.objective
        assert isinstance(objective, ContrastiveSection)
        self._constant = objective.temperature
        self._log_scale: torch.Tensor | None = None
        if objective.learn_temperature:
            self._log_scale = torch.tensor(-math.log(self._constant), device=device, requires_grad=True)
            betas, eps = recipe.optimizer.betas, recipe.optimizer.eps
            self._optimizer = torch.optim.AdamW([self._log_scale], betas=betas, eps=eps, weight_decay=0.0)

    @property
    def value(self) -> float | torch.Tensor:
        return self._constant if self._log_scale is None else torch.exp(-self._log_scale)

    def gradient(self, loss: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the gradient of this rank's loss by its embeddings; store the temperature's, averaged over ranks."""
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
            self._log_scale.clamp_(max=math.log(_LARGEST_SCALE))

    def state(self) -> dict | None:
        """Return the state to checkpoint, or None if the temperature is constant."""
        if self._log_scale is None:
            return None
        return {"log_scale": self._log_scale.detach(), "optimizer": self._optimizer.state_dict()}

    @torch.no_grad()
    def load(self, state: dict | None) -> None:
        if self._log_scale is not None and state is not None:
            self._log_scale.copy_(state["log_scale"])
            self._optimizer.load_state_dict(state["optimizer"])
