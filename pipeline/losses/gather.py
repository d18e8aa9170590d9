"""Rows of all ranks on every rank, with the gradient that brings them home."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# torch 2.13 renamed both and warns at the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def rank_and_world(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """(rank, world size) in the group; (0, 1) where no process group was initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    return 0, 1


def all_gather_rows(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """x (n, ...) of every rank, in rank order: (W*n, ...). Without a process group or others: x itself.

    The gradient is the sum over ranks: each rank's x takes part in every rank's result. So either no
    rank's x requires grad, or every rank's does and every rank runs the backward pass; n must be the same.
    """
    return x if rank_and_world(group)[1] == 1 else _AllGatherRows.apply(x, group)


@torch.no_grad()
def all_gather_constant(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The same for what has no gradient, such as hashes (int64) and masks (bool): (n, ...) -> (W*n, ...)."""
    _, world = rank_and_world(group)
    if world == 1:
        return x.detach()
    gathered = x.new_empty(world * x.shape[0], *x.shape[1:])
    _all_gather(gathered, x.contiguous(), group=group)
    return gathered


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return all_gather_constant(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        rank, world = rank_and_world(ctx.group)
        own = grad.shape[0] // world
        if grad.is_cuda:
            result = grad.new_empty(own, *grad.shape[1:])
            _reduce_scatter(result, grad.contiguous(), group=ctx.group)
        else:  # gloo has learnt to reduce-scatter only lately
            result = grad.clone(memory_format=torch.contiguous_format)  # autograd may still use `grad` elsewhere
            dist.all_reduce(result, group=ctx.group)
            result = result[rank * own : (rank + 1) * own].clone()  # frees the other ranks' rows
        return result, None
