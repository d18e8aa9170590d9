"""The gradient norm of each part of a model, from what the optimizer gets."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

_PIECE = 1 << 14


class PartNorms:
    """Sums the squared gradients of each part at the optimizer's steps, on this rank, without waiting for the device.

    optimizer: has parameter groups with a "part". DeepSpeed may call it several times in a step, with some of its
        groups or pieces of them. Its gradients are already clipped, and the rank's partition only, so that of the
        squares only the ratios are used.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parts: Sequence[str]) -> None:
        self._squares: dict[str, Any] = dict.fromkeys(parts, 0.0)
        optimizer.register_step_pre_hook(self._add)

    def _add(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if gradients:
                norm = torch.nn.utils.get_total_norm([part for each in gradients for part in _parts(each)])
                self._squares[group["part"]] = self._squares[group["part"]] + norm.float().square()

    def take(self) -> dict[str, float]:
        """Return the sum of each part since the last call, on this rank; zeros if the step was skipped."""
        taken = {part: float(squares) for part, squares in self._squares.items()}
        self._squares = dict.fromkeys(self._squares, 0.0)
        return taken


def _parts(gradient: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return tensors that together have the gradient's norm.

    A CPU adds the squares of a tensor one after another, in float32: of a large one, get the norm of each row of
    `_PIECE` numbers first, in one operation with all threads.
    """
    if gradient.device.type != "cpu" or gradient.numel() <= _PIECE:
        return [gradient]
    flat = gradient.flatten()
    end = len(flat) // _PIECE * _PIECE
    rows = flat[:end].unflatten(0, (-1, _PIECE))
    return [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32), flat[end:]]


def norms(squares: Mapping[str, float], whole: float) -> dict[str, float]:
    """Return each part's norm from the sums over ranks, and the norm of the whole gradient before clipping.

    All gradients are clipped by one factor, and those of a part are partitioned or replicated like all others. So part
    k's share of the squared norm is that of its sum. Empty for a model of one part, and for a step that was skipped.
    """
    total = sum(squares.values())
    if not total or len(squares) == 1:
        return {}
    return {part: whole * (each / total) ** 0.5 for part, each in squares.items()}
