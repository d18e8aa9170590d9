"""Smaller forms of unit vectors: only their first numbers, and numbers stored in a byte or a bit.

Models trained at several sizes (Matryoshka representation learning, Kusupati et al., arXiv 2205.13147) give vectors
that can be cut. Numbers in bytes or bits need 4 or 32 times less memory than float32.

Lengths are computed in float64 by elementwise operations alone, added in a fixed order. So the result for a row does
not depend on the other rows or on threads.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import PipelineError

SmallKind = Literal["int8", "binary"]
VectorKind = Literal["float32", SmallKind]


@dataclass(frozen=True)
class Form:
    """How documents' vectors are kept for a search. Queries are as long, but stay float32 (asymmetric scoring).

    dimensions: numbers of a vector.  kind: their type.
    """

    dimensions: int
    kind: VectorKind = "float32"

    @property
    def bytes(self) -> int:
        """The bytes of a stored vector."""
        return {"float32": 4 * self.dimensions, "int8": self.dimensions, "binary": -(-self.dimensions // 8)}[self.kind]

    def query(self, vectors: Tensor) -> Tensor:
        """Return unit vectors (n, D) as a search compares them with documents: (n, dimensions)."""
        return shortened(vectors, self.dimensions)

    def document(self, vectors: Tensor) -> Tensor:
        """Return unit vectors (n, D) as they are found in the store: (n, dimensions) float32 unit rows."""
        cut = shortened(vectors, self.dimensions)
        return cut if self.kind == "float32" else quantized(cut, self.kind)

    def __str__(self) -> str:
        return f"{self.dimensions} {self.kind}"


def smaller_forms(dimension: int, sizes: Collection[int], kinds: Collection[SmallKind]) -> list[Form]:
    """Return the forms to score besides the full vectors, the largest size first, float32 before the other `kinds`.

    Raises PipelineError for a size that is larger than the model's dimension.
    """
    for size in sizes:
        check_size(size, dimension)
    chosen = [kind for kind in get_args(VectorKind) if kind == "float32" or kind in kinds]
    forms = [Form(size, kind) for size in sorted({dimension, *sizes}, reverse=True) for kind in chosen]
    return forms[1:]  # without the full vectors


def check_size(dimensions: int, of: int) -> None:
    """Raise PipelineError if vectors of `of` numbers cannot be cut to `dimensions`."""
    if not 1 <= dimensions <= of:
        raise PipelineError(f"dimensions={dimensions} must be from 1 to {of}, the size of the model's vectors")


def shortened(vectors: Tensor, dimensions: int) -> Tensor:
    """Cut unit vectors (..., D) to their first numbers, normalised again: (..., dimensions), of the same type.

    At full size they are returned as they are. If the first numbers are all zeros, they stay zeros. Gradients flow.
    Raises PipelineError for a size that is not from 1 to D.
    """
    check_size(dimensions, of := vectors.shape[-1])
    return vectors if dimensions == of else _unit(vectors[..., :dimensions]).to(vectors.dtype)


def quantized(vectors: Tensor, kind: SmallKind) -> Tensor:
    """Return what is left of vectors (..., d) after `packed`: float32 unit rows (..., d), without gradient.

    int8: each row's numbers are rounded, half to even, to multiples of its largest absolute value / 127. A row of zeros
    stays zeros.  binary: only signs are kept, and zero counts as positive: each number is 1/sqrt(d) or -1/sqrt(d).
    """
    return _unit(_codes(vectors, kind)).float()


def straight_through(vectors: Tensor, kind: SmallKind | None) -> Tensor:
    """Return vectors (..., d) rounded as by `quantized`, with the gradient of unrounded ones; None: as they are.

    It is the straight-through estimator (Bengio et al., arXiv 1308.3432).
    """
    return vectors if kind is None else quantized(vectors, kind) + (vectors - vectors.detach())  # + exactly 0


def packed(vectors: Tensor, kind: SmallKind) -> np.ndarray:
    """Return vectors (n, d) as they are stored. A row's scale is left out: `unpacked` normalises.

    int8: (n, d) int8.  binary: (n, ceil(d / 8)) uint8, a bit for each number as in numpy.packbits: 1 for positive.
    """
    codes = _codes(vectors, kind).to("cpu", torch.int8).numpy()
    return codes if kind == "int8" else np.packbits(codes > 0, axis=-1)


def unpacked(stored: np.ndarray, form: Form) -> Tensor:
    """Return the vectors that `packed` stored in a form, as `quantized` does: (n, dimensions) float32 unit rows."""
    if form.kind == "binary":
        stored = 2 * np.unpackbits(stored, axis=-1, count=form.dimensions).astype(np.int8) - 1
    return _unit(torch.from_numpy(np.array(stored))).float()


@torch.no_grad()
def _codes(vectors: Tensor, kind: SmallKind) -> Tensor:
    """Return whole numbers from -127 to 127, or signs, as float64."""
    wide = vectors.double()
    if kind == "binary":
        return torch.where(wide >= 0, 1.0, -1.0).double()
    scale = wide.abs().amax(dim=-1, keepdim=True) / 127
    return (wide / torch.where(scale > 0, scale, 1)).round()


def _unit(vectors: Tensor) -> Tensor:
    """Normalise vectors (..., d) to float64 unit vectors. Zeros stay zeros."""
    wide = vectors.double()
    sums = wide.square()
    while (width := sums.shape[-1]) > 1:  # a kernel's sum over a row would depend on its layout
        half = width // 2
        sums = torch.cat([sums[..., :half] + sums[..., half : 2 * half], sums[..., 2 * half :]], dim=-1)
    return wide / torch.where(sums > 0, sums, 1).sqrt()  # the root's gradient at zero would be infinite
