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
