"""Triton's kernels of kernels.py. Each reads and writes every number once, and computes in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # elements of a program


def swiglu(gate: Tensor, up: Tensor, out: Tensor) -> None:
    count = gate.numel()
    with torch.cuda.device_of(gate):  # Triton launches on the current device
        _swiglu[(triton.cdiv(count, _BLOCK),)](gate, up, out, count, BLOCK=_BLOCK)


def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor, of_gate: Tensor, of_up: Tensor) -> None:
    count = gate.numel()
    with torch.cuda.device_of(gate):
        _swiglu_backward[(triton.cdiv(count, _BLOCK),)](gradient, gate, up, of_gate, of_up, count, BLOCK=_BLOCK)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, backward: bool) -> None:
    *_, heads, size = x.shape
    rows, width = x.numel() // size, triton.next_power_of_2(size // 2)
    height = max(_BLOCK // width, 1)
    with torch.cuda.device_of(x):
        _rotate[(triton.cdiv(rows, height),)](
            x, cos, sin, out, rows, HEADS=heads, HALF=size // 2, ROWS=height, WIDTH=width, BACKWARD=backward
        )


def rms_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float, total: Tensor, out: Tensor, scale: Tensor
) -> None:
    rows, width, height = _tiles(x)
    with torch.cuda.device_of(x):
        _rms_norm[(triton.cdiv(rows, height),)](
            *(x, x if branch is None else branch, weight, epsilon, total, out, scale, rows),
            *(x.shape[-1], height, width, branch is not None),
            num_warps=_warps(width),
        )


def rms_norm_backward(
    gradient: Tensor,
    of_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    out: Tensor,
    of_weight: Tensor | None,
) -> None:
    rows, width, height = _tiles(x)
    tiles = triton.cdiv(rows, height)
    programs = tiles if of_weight is None else len(of_weight)
    with torch.cuda.device_of(x):
        _rms_norm_backward[(programs,)](
            *(gradient, x if of_total is None else of_total, x, weight, scale, out),
            *(x if of_weight is None else of_weight, rows, triton.cdiv(tiles, programs)),
            *(x.shape[-1], height, width, of_total is not None, of_weight is not None),
            num_warps=_warps(width),
        )


def _tiles(x: Tensor) -> tuple[int, int, int]:
    """Return the number of rows, and the width and height of the tiles in which a norm's kernels read them."""
    width = triton.next_power_of_2(x.shape[-1])
    return x.numel() // x.shape[-1], width, max(_BLOCK // width, 1)


def _warps(width: int) -> int:
    return min(max(width // 512, 4), 16)  # a thread holds 16 elements of each tensor, as the registers allow


@triton.jit
def _rms_norm(  # type: ignore[no-untyped-def]
    x,
    branch,
    weight,
    epsilon,
    total,
    out,
    scale,
    rows,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    at, inside = row[:, None] * COUNT + column, (row[:, None] < rows) & (column < COUNT)
    a = tl.load(x + at, inside, 0).to(tl.float32)
    if ADD:
        # Rounded as the stored sum is, so that the norm is that of the stored sum.
        summed = (a + tl.load(branch + at, inside, 0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, summed, inside)
        a = summed.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(a * a, 1) / COUNT + epsilon)
    w = tl.load(weight + column, column < COUNT, 0).to(tl.float32)
    tl.store(out + at, (a * inverse[:, None] * w).to(out.dtype.element_ty), inside)
    tl.store(scale + row, inverse, row < rows)


@triton.jit
def _rms_norm_backward(  # type: ignore[no-untyped-def]
    gradient,
    of_total,
    x,
    weight,
    scale,
    out,
    of_weight,
    rows,
    tiles,  # of a program
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
):
    column = tl.arange(0, WIDTH)[None, :]
    w = tl.load(weight + column, column < COUNT, 0).to(tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    first = tl.program_id(0).to(tl.int64) * tiles * ROWS
    for tile in range(tiles):
        row = first + tile * ROWS + tl.arange(0, ROWS)
        at, inside = row[:, None] * COUNT + column, (row[:, None] < rows) & (column < COUNT)
        y = tl.load(gradient + at, inside, 0).to(tl.float32)
        inverse = tl.load(scale + row, row < rows, 0)[:, None]
        normalised = tl.load(x + at, inside, 0).to(tl.float32) * inverse
        if WEIGHT:
            sums += y * normalised
        y *= w
        y = inverse * (y - normalised * (tl.sum(y * normalised, 1) / COUNT)[:, None])
        if ADD:
            y += tl.load(of_total + at, inside, 0).to(tl.float32)
        tl.store(out + at, y.to(out.dtype.element_ty), inside)
    if WEIGHT:
        at = tl.program_id(0) * COUNT + column
        tl.store(of_weight + at, tl.sum(sums, 0)[None, :], column < COUNT)


@triton.jit
def _swiglu(gate, up, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, inside).to(tl.float32)
    u = tl.load(up + at, inside).to(tl.float32)
    tl.store(out + at, (g / (1 + tl.exp(-g)) * u).to(out.dtype.element_ty), inside)


@triton.jit
def _swiglu_backward(gradient, gate, up, of_gate, of_up, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    y = tl.load(gradient + at, inside).to(tl.float32)
    g = tl.load(gate + at, inside).to(tl.float32)
    u = tl.load(up + at, inside).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-g))
    slope = sigmoid * (1 + g * (1 - sigmoid))  # of SiLU
    tl.store(of_gate + at, (y * u * slope).to(of_gate.dtype.element_ty), inside)
    tl.store(of_up + at, (y * g * sigmoid).to(of_up.dtype.element_ty), inside)


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    x,
    cos,
    sin,
    out,
    rows,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # of a token and a head
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < HALF)
    first, angle = row * (2 * HALF) + column, row // HEADS * (2 * HALF) + column
    a = tl.load(x + first, inside).to(tl.float32)
    b = tl.load(x + first + HALF, inside).to(tl.float32)
    cos_a = tl.load(cos + angle, inside).to(tl.float32)
    cos_b = tl.load(cos + angle + HALF, inside).to(tl.float32)
    sin_a = tl.load(sin + angle, inside).to(tl.float32)
    sin_b = tl.load(sin + angle + HALF, inside).to(tl.float32)
    if BACKWARD:  # the transposed rotation
        sin_a, sin_b = -sin_b, -sin_a
    tl.store(out + first, (a * cos_a - b * sin_a).to(out.dtype.element_ty), inside)
    tl.store(out + first + HALF, (b * cos_b + a * sin_b).to(out.dtype.element_ty), inside)
