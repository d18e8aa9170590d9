"""Vectors with fewer numbers or fewer bits, for losses that prepare vectors for it."""

import torch
from torch import Tensor


def prefix(vectors: Tensor, size: int) -> Tensor:
    """Return the first `size` numbers of each vector (k, d), scaled to unit length: (k, size); zeros stay zero."""
    first = vectors[:, :size]
    norm = torch.linalg.vector_norm(first, dim=1, keepdim=True)
    return first / norm.where(norm > 0, 1)


def straight_through(vectors: Tensor, quantised: Tensor) -> Tensor:
    """Return the values of `quantised`, with the gradient of `vectors`, as if rounding were the identity.

    It is the straight-through estimator (Bengio et al., arXiv 1308.3432). Both have the same, any shape.
    """
    return quantised.detach() + (vectors - vectors.detach())  # the difference is exactly 0
