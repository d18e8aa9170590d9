"""Distillation of scores that are stored with samples, such as a judge's."""

import torch
from torch import Tensor


def listwise_kl(
    similarities: Tensor,
    scores: Tensor,
    present: Tensor,
    temperature: float | Tensor,
    distill_temperature: float,
) -> Tensor:
    """Return for each query KL(p || q) over its own candidates (its target, positives and negatives): (n,).

    p = softmax(scores / distill_temperature) and q = softmax(similarities / temperature), as in ListNet (Cao et al.,
    ICML 2007). The gradient goes to similarities and temperature, not to scores.

    similarities, scores: (n, k), any values where absent.  present: bool (n, k).  temperature: a number or (n,).
    A query with fewer than two candidates gives 0.
    """
    tau = temperature[:, None] if isinstance(temperature, Tensor) and temperature.ndim else temperature
    alone = present.sum(dim=1, keepdim=True) < 2
    # A row of only -inf would be NaN, so those that count for nothing are all 0.
    absent = ~present & ~alone
    log_p, log_q = (
        (x.masked_fill(~present | alone, 0) / t).masked_fill(absent, -torch.inf).log_softmax(dim=1)
        for x, t in ((scores.detach().to(similarities.dtype), distill_temperature), (similarities, tau))
    )
    return (log_p.exp() * (log_p - log_q).masked_fill(absent, 0)).sum(dim=1)
