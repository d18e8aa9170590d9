"""The functions of pipeline/models/triton_kernels.py by torch's operators, which run anywhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import models
from pipeline.models import kernels


@contextmanager
def installed() -> Iterator[None]:
    """Make models run the way that they run on a GPU."""
    here = sys.modules[__name__]
    with (
        mock.patch.dict(sys.modules, {"pipeline.models.triton_kernels": here}),
        mock.patch.object(models, "triton_kernels", here, create=True),
        mock.patch.object(kernels, "usable", lambda x: True),
    ):
        yield


def swiglu(gate: Tensor, up: Tensor, out: Tensor) -> None:
    out.copy_(F.silu(gate.float()) * up.float())


def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor, of_gate: Tensor, of_up: Tensor) -> None:
    of_gate.copy_(torch.ops.aten.silu_backward(gradient.float() * up.float(), gate.float()))
    of_up.copy_(gradient.float() * F.silu(gate.float()))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, backward: bool) -> None:
    a, b = x.float().chunk(2, dim=-1)
    (cos_a, cos_b), (sin_a, sin_b) = (angles.float()[:, :, None].chunk(2, dim=-1) for angles in (cos, sin))
    if backward:
        sin_a, sin_b = -sin_b, -sin_a
    out.copy_(torch.cat([a * cos_a - b * sin_a, b * cos_b + a * sin_b], dim=-1))


def rms_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float, total: Tensor, out: Tensor, scale: Tensor
) -> None:
    if branch is not None:
        x = total.copy_(x.float() + branch.float())
    scale.copy_((x.float().square().mean(-1) + epsilon).rsqrt())
    out.copy_(x.float() * scale[..., None] * weight.float())


def rms_norm_backward(
    gradient: Tensor,
    of_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    out: Tensor,
    of_weight: Tensor | None,
) -> None:
    normalised, y = x.float() * scale[..., None], gradient.float()
    if of_weight is not None:
        of_weight.zero_()[0] = (y * normalised).flatten(0, -2).sum(0)
    y = y * weight.float()
    y = scale[..., None] * (y - normalised * (y * normalised).mean(-1, keepdim=True))
    out.copy_(y if of_total is None else y + of_total.float())
