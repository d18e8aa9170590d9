"""Attention over a packed row: each item attends only to itself, without a mask of the whole row."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib import import_module
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig

from pipeline.errors import PipelineError
from pipeline.models.chunks import sent

HALF = (torch.bfloat16, torch.float16)
_AMPERE = (8, 0)  # compute capability
_MODULES = {"flash_attn": "flash_attn", "varlen": "torch.nn.attention.varlen"}  # with the kernel, by kind
# What layers can pass to their attention and these kernels would ignore. transformers makes no mask for a packed row,
# but some layers do, as Doge's; Gemma 2 caps logits, gpt-oss has sinks.
_UNSUPPORTED = {"attention_mask": "a mask", "softcap": "a cap on logits", "s_aux": "sinks", "position_bias": "a bias"}


def implementation(kind: str) -> str:
    """Return the name that transformers knows a kind by. It treats any name with "flash" as one of its own kernels."""
    return "packed_" + kind.removeprefix("flash_")


def pads(config: PreTrainedConfig) -> bool:
    """Whether attention pads a chunk's items to the longest of them; variable-length kernels do not.

    config: the language model's config.
    """
    return config._attn_implementation == implementation("sdpa")


def choose(wanted: str, device: str, dtype: torch.dtype) -> str:
    """Return the kind of attention, a key of KINDS: `wanted`, or for "auto" the fastest that runs on the device.

    device: "cuda" or "cpu".  Raises PipelineError if `wanted` does not run there.
    """
    if wanted == "auto":
        return next(kind for kind in KINDS if not _why_not(kind, device, dtype))
    if reason := _why_not(wanted, device, dtype):
        raise PipelineError(f"model.attention={wanted} cannot run here: {reason}; choose another, or auto")
    return wanted


def fastest(config: PreTrainedConfig, dtype: torch.dtype | str, device: torch.device) -> str:
    """Return the fastest kind of attention for a model on a device.  dtype: "auto" is the stored dtype."""
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return choose("auto", device.type, stored if isinstance(dtype, str) else dtype)


def _why_not(kind: str, device: str, dtype: torch.dtype) -> str:
    """Return why a kind does not run on the device, or "" if it does."""
    if kind == "sdpa":
        return ""
    if device != "cuda":
        return f"it needs a CUDA device, and this is a {device}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < _AMPERE:
        return f"it needs an Ampere GPU or a newer one, and this is a {torch.cuda.get_device_name()}"
    if dtype not in HALF:
        return "it is for bf16 only, and the precision is fp32"
    try:
        import_module(_MODULES[kind])
    except Exception as error:  # a build for another torch can raise anything
        missing = isinstance(error, ModuleNotFoundError) and error.name == _MODULES[kind]
        return "it is not installed" if missing else f"it cannot be imported ({error})"
    return ""


@dataclass(frozen=True)
class Segments:
    """The items of a packed row of T tokens, and how they attend.

    lengths: tokens of each item; their sum is T.  causal: a token attends to itself and earlier tokens of its item,
    otherwise to its whole item.  by_last: only each item's last token has a query.
    """

    lengths: tuple[int, ...]
    device: torch.device
    causal: bool = True
    by_last: bool = False

    def asked_by_last(self) -> "Segments":
        """Return the same items with last-token queries, each over its whole item."""
        return replace(self, causal=False, by_last=True)

    @cached_property
    def queries(self) -> "Segments":
        """The segments of the row of queries."""
        return Segments((1,) * len(self.lengths), self.device) if self.by_last else self

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def bounds(self) -> torch.Tensor:
        """(items + 1,) int32: the start of each item, and the end of the row."""
        return sent(F.pad(torch.tensor(self.lengths).cumsum(0, dtype=torch.int32), (1, 0)), self.device)

    @cached_property
    def last(self) -> torch.Tensor:
        """(items,) int64: the index of each item's last token in the row."""
        return self.bounds[1:].long() - 1

    @cached_property
    def slots(self) -> torch.Tensor:
        """(T,) int64: the index of each token in the flattened (items, longest) padded layout."""
        lengths = torch.tensor(self.lengths)
        # Token i moves to i plus the padding of the items before its own.
        shift = torch.arange(len(lengths)) * self.longest - (lengths.cumsum(0) - lengths)
        return sent(torch.arange(sum(self.lengths)) + shift.repeat_interleave(lengths), self.device)

    @cached_property
    def filled(self) -> torch.Tensor:
        """(items, 1, 1, longest) bool: which positions of the padded layout hold a token."""
        lengths = torch.tensor(self.lengths)
        return sent((torch.arange(self.longest) < lengths[:, None])[:, None, None], self.device)


def _attention(
    attend: Callable[..., Tensor],
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls, with the kernel `attend`. No token attends to another item.

    It maps query (1, heads, T, d), key and value (1, key-value heads, T, d) to (1, T, heads, d). With last-token
    queries, query and result have one row per item instead of T.

    Raises PipelineError for attention features that the kernels would silently ignore.
    """
    if segments is None:
        raise PipelineError("the model's layers do not tell its attention where items begin, which is not supported")
    given = others | {"attention_mask": attention_mask}
    if named := [what for name, what in _UNSUPPORTED.items() if given.get(name) is not None]:
        raise PipelineError(f"the model's layers give their attention {named[0]}, which is not supported")
    config: Any = getattr(module, "config", None)
    # Llama 4's chunked layers pass no sliding_window; the limit is in their config.
    window = others.get("sliding_window") or getattr(config, "attention_chunk_size", None)
    changes = {"attends within a window": window, "changes the rotary frequencies of all items": _rope_limit(config)}
    for change, limit in changes.items():
        if limit and segments.longest > limit:
            raise PipelineError(
                f"beyond {limit} tokens the model {change}, which is not supported: lower max_tokens to {limit}"
            )
    return attend(query, key, value, segments, scaling), None


def _rope_limit(config: Any) -> int | None:
    """Return the length beyond which rotary frequencies depend on the longest item of a row, or None."""
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if each.get("rope_type") in ("dynamic", "longrope"):
            return each.get("original_max_position_embeddings") or config.max_position_embeddings
    return None


def _sdpa(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float) -> Tensor:
    """Attend with torch's SDPA on items padded to the longest.

    Chunks are cut so that there is little padding (see chunks.py). It is at the end of a row, where causal attention
    does not look.
    """

    def spread(x: Tensor, places: Segments) -> Tensor:
        x = x.squeeze(0).transpose(0, 1)
        count, longest = len(places.lengths), places.longest
        rows = x.new_zeros(count * longest, *x.shape[1:]).index_copy(0, places.slots, x)
        return rows.view(count, longest, *x.shape[1:]).transpose(1, 2)

    if query.is_cuda and (query.dtype not in HALF or not segments.causal):
        # Of SDPA's CUDA kernels only FlashAttention supports grouped queries, and it supports neither fp32 nor masks.
        # The fallback would materialise T x T scores.
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    queries = segments.queries
    out = F.scaled_dot_product_attention(
        spread(query, queries),
        spread(key, segments),
        spread(value, segments),
        attn_mask=None if segments.causal else segments.filled,
        is_causal=segments.causal,
        scale=scaling,
        enable_gqa=key.shape[1] < query.shape[1],
    )
    return out.transpose(1, 2).flatten(0, 1)[queries.slots][None]


def _by_bounds(
    kernel: Callable[[float, bool], Callable[..., Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
) -> Tensor:
    """Attend with a variable-length kernel, which reads (T, heads, d) query, key and value and the items' bounds."""
    rows, queries = (x.squeeze(0).transpose(0, 1) for x in (query, key, value)), segments.queries
    # With one query per item the kernels would switch to their decoding path.
    most_queries = max(queries.longest, 2)
    attend = kernel(scaling, segments.causal)
    return attend(*rows, queries.bounds, segments.bounds, most_queries, segments.longest)[None]


@cache
def _varlen(scaling: float, causal: bool) -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn  # not in every build of torch

    # From torch 2.12 on, grouped queries need a flag.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    return partial(varlen_attn, scale=scaling, window_size=(-1, 0 if causal else -1), **grouped)


@cache
def _flash_attn(scaling: float, causal: bool) -> Callable[..., Tensor]:
    from flash_attn import flash_attn_varlen_func  # optional

    return partial(flash_attn_varlen_func, softmax_scale=scaling, causal=causal)


KINDS = {
    "flash_attn": partial(_attention, partial(_by_bounds, _flash_attn)),
    "varlen": partial(_attention, partial(_by_bounds, _varlen)),
    "sdpa": partial(_attention, _sdpa),
}
for kind, function in KINDS.items():
    AttentionInterface.register(implementation(kind), function)
