"""Stand-ins for attention kernels that a torch without CUDA does not choose. They check what the real ones check."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import varlen
from tracer import Tracer, aten

_HALF = (torch.bfloat16, torch.float16)
_sdpa, _varlen_attn = F.scaled_dot_product_attention, varlen.varlen_attn


@contextmanager
def attention_kernels(tracer: Tracer) -> Iterator[None]:
    """Replace SDPA, torch's variable-length attention, and flash-attn."""
    from pipeline.models import attention

    caches = [x for x in vars(attention).values() if hasattr(x, "cache_clear")]  # they may hold the kernels
    flash_attn, before = ModuleType("flash_attn"), sys.modules.get("flash_attn")

    def sdpa(query: Tensor, *others: Any, **options: Any) -> Tensor:
        if not isinstance(query, FakeTensor):
            return _sdpa(query, *others, **options)
        return _of_sdpa(tracer, query, *others, **options)

    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        causal = window_size == (-1, 0)
        _of_varlen(tracer, "varlen", query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), causal)
        return _varlen_attn(
            *(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k),
            scale=scale,
            window_size=window_size,
            enable_gqa=enable_gqa,
        )

    def flash_attn_varlen_func(  # version 2.8.3
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        _of_varlen(tracer, "flash_attn", q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), causal)
        window = [-1, 0] if causal else [-1, -1]
        bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return torch.ops.torch_attn._varlen_attn(q, k, v, *bounds, causal, softmax_scale, window, True)[0]

    flash_attn.flash_attn_varlen_func = flash_attn_varlen_func
    sys.modules["flash_attn"] = flash_attn
    varlen.varlen_attn, F.scaled_dot_product_attention = varlen_attn, sdpa
    for each in caches:
        each.cache_clear()
    try:
        yield
    finally:
        varlen.varlen_attn, F.scaled_dot_product_attention = _varlen_attn, _sdpa
        del sys.modules["flash_attn"]
        if before:
            sys.modules["flash_attn"] = before
        for each in caches:
            each.cache_clear()


def chosen_by_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, gqa: bool) -> str:
    """Return the kernel of SDPA on an H100 by torch 2.13 (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)."""
    half, width, backends = query.dtype in _HALF, query.shape[-1], torch.backends.cuda
    same = width == key.shape[-1] == value.shape[-1]
    grouped = query.shape[1] != key.shape[1]
    cudnn, flash = half and width % 8 == 0 and width <= 128, half and width <= 256
    efficient = width % (8 if half else 4) == 0
    if backends.cudnn_sdp_enabled() and cudnn and key.shape[2] != 1 and (gqa or not grouped):
        return "cudnn"
    square = not causal or query.shape[2] == key.shape[2]
    if backends.flash_sdp_enabled() and flash and same and mask is None and square and (gqa or not grouped):
        return "flash"
    if backends.mem_efficient_sdp_enabled() and efficient and same and not grouped:
        return "efficient"
    return "math"


def _of_sdpa(
    tracer: Tracer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    dtypes = {x.dtype for x in (query, key, value)}
    assert len(dtypes) == 1, f"SDPA of {dtypes}"
    assert attn_mask is None or not is_causal, "SDPA refuses a mask with is_causal"
    assert attn_mask is None or attn_mask.dtype in (torch.bool, query.dtype), f"SDPA: a mask of {attn_mask.dtype}"
    assert attn_mask is None or attn_mask.is_cuda, "SDPA: a mask on the host"
    kernel = chosen_by_sdpa(query, key, value, attn_mask, is_causal, enable_gqa)
    groups = query.shape[1] // key.shape[1]
    masked = "causal" if is_causal else "full" if attn_mask is None else "masked"
    what = f"sdpa {kernel}: {str(query.dtype)[6:]}, {query.shape[-1]} wide, {groups} queries a key, {masked}"
    tracer.record.attention[what] += 1
    if groups > 1:  # the operators below know no groups; cuDNN and FlashAttention do
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if attn_mask is not None or query.dtype not in _HALF:
        bias = attn_mask
        if bias is not None and bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, -torch.inf)
        if bias is not None:
            bias = bias.expand(*query.shape[:3], key.shape[2])
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]
    flash = aten._scaled_dot_product_flash_attention
    return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]


def _of_varlen(
    tracer: Tracer,
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    causal: bool,
) -> None:
    """Check as mha_varlen_fwd does, and that the bounds are those of the rows."""
    rows, heads, width = query.shape
    for x in (query, key, value, *bounds):
        assert x.is_cuda, f"{kernel}: a tensor on the {x.device}"
    dtypes = {x.dtype for x in (query, key, value)}
    assert len(dtypes) == 1 and dtypes < {*_HALF}, f"{kernel} of {dtypes}"
    assert all(x.stride(-1) == 1 for x in (query, key, value)), f"{kernel}: the last dimension is not contiguous"
    assert width % 8 == 0 and width <= 256 and heads % key.shape[1] == 0 and key.shape == value.shape
    lengths = []
    for name, x, count, most in zip(("queries", "keys"), bounds, (rows, len(key)), longest, strict=True):
        assert x.dtype == torch.int32 and x.is_contiguous(), f"{kernel}: bounds of {name} are {x.dtype}"
        assert type(most) is int, f"{kernel}: the longest of the {name} is a {type(most)}"
        values = getattr(x, "known", None)
        assert values is not None, f"{kernel}: the bounds of {name} were computed on the device"
        lengths.append(values.diff())
        assert int(values[-1]) == count and int(lengths[-1].max()) <= most, f"{kernel}: wrong bounds of {name}"
    assert causal or longest[0] > 1, f"{kernel}: with one query per item it would take its decoding path"
    pairs = int((lengths[0].long() * lengths[1]).sum()) // (2 if causal else 1)
    groups = heads // key.shape[1]
    queries = "causal" if causal else "full" if rows == len(key) else "last queries"
    what = f"{kernel}: {str(query.dtype)[6:]}, {width} wide, {groups} queries a key, {queries}"
    tracer.attention(pairs, rows, len(key), what)
