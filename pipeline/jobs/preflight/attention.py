"""Whether attention on this device gives what its definition gives, forward and backward."""

import time
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Recipe
from pipeline.jobs.preflight.check import Check, check, green, red, yellow
from pipeline.jobs.preflight.nodes import is_cpu_wanted
from pipeline.models.attention import KERNELS, KINDS, Segments, choose
from pipeline.models.loading import DTYPES

Shape = tuple[tuple[int, ...], tuple[int, int], int]

# Lengths of items; heads of queries, and of keys and values; size of a head. Kernels have failed for items that are 64
# tokens longer than a multiple of 128, for items of one token, for a long item among short ones, for groups of query
# heads, and for sizes of heads that are no powers of two (SigLIP has 72, ViT-H 80). The most common ones are first.
SHAPES: list[Shape] = [
    ((192, 1, 65), (4, 2), 64),
    ((1, 3, 320), (4, 1), 128),
    ((192, 1, 65), (2, 2), 72),
    ((1, 3, 320), (2, 2), 80),
    ((1, 1), (4, 2), 128),
    ((64, 64), (2, 2), 64),
    ((320, 130), (4, 2), 72),
    ((192, 2), (4, 2), 80),
]
LOOKS = ("causal", "both ways", "last-token queries")

_SECONDS = 60  # no comparison begins later: FlashAttention 4 compiles a kernel for each head size and kind of shape

# Allowed root mean square of an item's errors, relative to that of its values, or to _LEAST if it is more: with one
# key, the gradient of a query is zero. All are about 1 for one key, and smaller for more. bf16 rounds probabilities,
# their gradients and results by up to 2^-9 each. float32 rounds by 2^-24, but in long sums and differences. TF32,
# which rounds by 2^-11, is not allowed: see `configure_device`.
_TOLERANCE = {torch.bfloat16: 2.0**-5, torch.float32: 2.0**-14}
_LEAST = 0.1


@check("attention", if_late="model.attention=sdpa needs no compiled extensions", seconds=300)
def attention(recipe: Recipe, place: torch.device, slurm: bool) -> Check:
    """Compare the attention that training will use, and SDPA, which vision towers use, with its definition."""
    wanted, dtype = recipe.model.attention, DTYPES[recipe.precision]
    assert isinstance(dtype, torch.dtype)  # "auto" is only for evaluation
    if place.type == "cpu" and wanted in KERNELS and not (slurm or is_cpu_wanted()):
        kind = choose(wanted, "cuda", dtype)
        return yellow(f"{kind}, which runs on GPUs only", "there is no GPU here: check again on a node with GPUs")
    kind = choose(wanted, place.type, dtype)
    shapes = list(product(SHAPES if place.type == "cuda" else SHAPES[:1], LOOKS))
    kinds = list(dict.fromkeys((kind, "sdpa")))
    compared, began = 0, time.monotonic()
    for each in kinds:
        for shape, looks in shapes:
            if time.monotonic() - began > _SECONDS:
                break
            if wrong := _tried(each, shape, looks, dtype, place):
                other = "another version, or set model.attention=sdpa" if each in KERNELS else "another torch"
                return (red if each == kind else yellow)(f"{each}: {wrong}", f"install {other}")
            compared += 1
    return green(f"{kind}: {compared} of {len(kinds) * len(shapes)} comparisons with float64")


def _tried(*arguments: Any) -> str:
    try:
        return error(*arguments)
    except Exception as failed:  # a kernel can raise anything
        return f"{type(failed).__name__}: {failed}"


def error(kind: str, shape: Shape, looks: str, dtype: torch.dtype, place: torch.device) -> str:
    """Return which result or gradient of a kind is wrong, or "" if none is.  looks: one of LOOKS."""
    lengths, heads, size = shape
    segments = Segments(lengths, place, causal=looks == LOOKS[0])
    segments = segments.asked_by_last() if looks == LOOKS[2] else segments
    random = torch.Generator().manual_seed(0)

    def drawn(segments: Segments, heads: int) -> Tensor:
        numbers = torch.randn(1, heads, sum(segments.lengths), size, generator=random)
        return numbers.to(place, dtype).requires_grad_()

    query, key, value = drawn(segments.queries, heads[0]), drawn(segments, heads[1]), drawn(segments, heads[1])
    weights = drawn(segments.queries, heads[0]).detach().transpose(1, 2)
    scaling = 1.5 * size**-0.5  # not the default of kernels
    result, _ = KINDS[kind](torch.nn.Identity(), query, key, value, None, segments=segments, scaling=scaling)
    q, k, v = (x.detach().double().requires_grad_() for x in (query, key, value))
    exact = defined(q, k, v, segments, scaling)
    names = ("result", "gradient of queries", "gradient of keys", "gradient of values")
    got = result.transpose(1, 2), *torch.autograd.grad(result, (query, key, value), weights)
    right = exact.transpose(1, 2), *torch.autograd.grad(exact, (q, k, v), weights.double())
    places = segments.queries, segments.queries, segments, segments
    for name, mine, expected, where in zip(names, got, right, places, strict=True):
        errors, sizes = (_rms(each.detach(), where.lengths) for each in (mine.double() - expected, expected))
        off = float((errors / sizes.clamp(min=_LEAST)).max())
        if not off <= _TOLERANCE[dtype]:  # also for NaN
            return f"the {name} is off by {off:.2%} ({looks}, lengths {lengths}, {heads} heads of {size} numbers)"
    return ""


def _rms(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """x (1, heads, T, d) -> (items,), the root mean square of each item's values."""
    return torch.stack([part.square().mean().sqrt() for part in x.split(lengths, dim=2)])


def defined(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float) -> Tensor:
    """Attention by its definition, softmax(scaling q k^T) v, item by item, of and to shapes as for KINDS."""
    rows = []
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    parts = query.split(segments.queries.lengths, 2), key.split(segments.lengths, 2), value.split(segments.lengths, 2)
    for q, k, v in zip(*parts, strict=True):
        logits = q @ k.transpose(2, 3) * scaling
        if segments.causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
        rows.append(logits.softmax(-1) @ v)
    return torch.cat(rows, dim=2).transpose(1, 2)
