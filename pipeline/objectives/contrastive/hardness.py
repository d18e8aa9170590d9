"""On how few negatives a query's weight lies."""

import torch
from torch import Tensor

HARDEST = 100  # one in so many negatives is among the hardest
_GROUP = 8


def effective_number(weights: Tensor, total: Tensor) -> Tensor:
    """Return (k,) 1 / sum_j w_j^2 for the shares w of `weights` (k, C) in their sum `total` (k,); 0 where it is 0.

    That many equal weights have the same sum of squares (Kish's effective sample size).
    """
    norm = torch.linalg.vector_norm(weights, dim=1)
    return (total / norm.clamp_(min=torch.finfo(norm.dtype).tiny)).square_()


def hardest_share(weights: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """Return (k,) the share in `total` (k,) of the ceil(count / 100) largest of `weights` (k, C), at least of one.

    count: int64 (k,), at most C: how many weights a row has; its others are 0.
    """
    columns = weights.shape[1]
    most, groups = -(-columns // HARDEST), columns // _GROUP
    if most > 1:
        # Sorting every row is slow on a CPU. The `most` largest weights are in the `most` groups with the largest
        # maxima: these maxima are weights, and those of other groups are no larger.
        first = weights[:, : groups * _GROUP].unflatten(1, (_GROUP, groups))
        best = first.amax(dim=1).topk(most, dim=1, sorted=False).indices
        inside = first.gather(2, best[:, None].expand(-1, _GROUP, -1)).flatten(1)
        weights = torch.cat([inside, weights[:, groups * _GROUP :]], dim=1)
    sums = weights.topk(most, dim=1).values.cumsum(dim=1)
    last = (count + (HARDEST - 1)).div_(HARDEST, rounding_mode="floor").sub_(1).clamp_(0, most - 1)
    return sums.gather(1, last[:, None])[:, 0] / total.clamp(min=torch.finfo(total.dtype).tiny)
