"""Attention over a packed row: each item attends only to itself, without a mask of the whole row."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib import import_module
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig

from pipeline.errors import PipelineError, first_few
from pipeline.models.chunks import sent

HALF = (torch.bfloat16, torch.float16)
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


class PackingModel:
    """A model whose language model attends on packed rows, and gives the vectors."""

    language_model: Any

    @property
    def pads(self) -> bool:
        return pads(self.language_model.config)

    @property
    def dimension(self) -> int:
        return self.language_model.config.hidden_size


@dataclass(frozen=True)
class Kernel:
    """A variable-length kernel of an optional package. All arguments but query, key and value are passed by name.

    bounds: its parameters for the bounds of the queries' and the keys' items, and for the longest of each.
    options: (softmax scale, whether causal) -> its other arguments.
    heads: a GPU's major compute capability -> the sizes of heads that it computes with gradients there; none if the
        GPU is not supported.  gpus: these GPUs, for messages.
    """

    module: str
    name: str
    bounds: tuple[str, str, str, str]
    options: Callable[[float, bool], dict[str, Any]]
    heads: Callable[[int], Collection[int]]
    gpus: str

    @property
    def function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(import_module(self.module), self.name)
        return function

    def missing(self) -> str:
        """Return why the function cannot be called, or "" if it can."""
        try:
            module = import_module(self.module)
        except Exception as error:  # a build for another torch can raise anything
            absent = isinstance(error, ModuleNotFoundError) and f"{self.module}.".startswith(f"{error.name}.")
            return "it is not installed" if absent else f"it cannot be imported ({error})"
        if not hasattr(module, self.name):  # FlashAttention 4 alone makes `flash_attn` a package without functions
            return f"it is not installed ({self.module} has no {self.name})"
        known = _parameters(self.function)
        if unknown := [name for name in (*self.bounds, *self.options(1.0, True)) if name not in known]:
            return f"the installed version's {self.name} has no parameter {first_few(unknown)}"
        return ""


@cache
def _parameters(function: Callable[..., Any]) -> Collection[str]:
    return signature(function).parameters


def choose(wanted: str, device: str, dtype: torch.dtype | str, config: PreTrainedConfig | None = None) -> str:
    """Return the kind of attention, a key of KINDS: `wanted`, or for "auto" the fastest that runs the model there.

    device: "cuda" or "cpu".  dtype: "auto" is the config's.  config: the model's; None if heads of any size will do.
    Raises PipelineError if `wanted` does not run there.
    """
    head = head_size(config) if config else None
    if isinstance(dtype, str):
        dtype = config.dtype if config and isinstance(config.dtype, torch.dtype) else torch.float32
    if wanted == "auto":
        return next(kind for kind in KINDS if not _why_not(kind, device, dtype, head))
    if reason := _why_not(wanted, device, dtype, head):
        raise PipelineError(f"model.attention={wanted} cannot run here: {reason}; choose another, or auto")
    return wanted


def head_size(config: PreTrainedConfig) -> int | None:
    """Return the size of a model's heads, its language model's if it has one; None if the config does not say it.

    If layers differ, it is the largest.
    """
    text: Any = config.get_text_config(decoder=True)
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    if heads := getattr(text, "num_attention_heads", None):
        return max(getattr(layer, "head_dim", None) or text.hidden_size // heads for layer in layers)
    return None


def _why_not(kind: str, device: str, dtype: torch.dtype, head: int | None) -> str:
    """Return why a kind does not run on the device, or "" if it does."""
    if kind == "sdpa":
        return ""
    kernel = KERNELS[kind]
    if device != "cuda":
        return f"it needs a CUDA device, and this is a {device}"
    if torch.cuda.is_available():
        heads, gpu = kernel.heads(torch.cuda.get_device_capability()[0]), torch.cuda.get_device_name()
        if not heads:
            return f"it is for {kernel.gpus}, and this is a {gpu}"
        if head and head not in heads:
            return f"it has no heads of size {head} on this {gpu}"
    if dtype not in HALF:
        return "it is for bf16 only, and the precision is fp32"
    return kernel.missing()


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
        if len(x) < count * longest:
            x = x.new_zeros(count * longest, *x.shape[1:]).index_copy(0, places.slots, x)
        return x.unflatten(0, (count, longest)).transpose(1, 2)

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
    ).transpose(1, 2)
    rows = out.flatten(0, 1)
    return (rows if len(rows) == sum(queries.lengths) else rows[queries.slots])[None]


def _by_bounds(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float) -> Tensor:
    """Attend with a variable-length kernel, which reads (T, heads, d) query, key and value and the items' bounds."""
    if query.is_cuda and query.shape[-1] not in kernel.heads(torch.cuda.get_device_capability(query.device)[0]):
        raise PipelineError(
            f"this GPU's {kernel.module}.{kernel.name} has no heads of size {query.shape[-1]}: choose another "
            "kernel by model.attention, such as sdpa"
        )
    rows, queries = (x.squeeze(0).transpose(0, 1) for x in (query, key, value)), segments.queries
    # With one query per item the kernels would switch to their decoding path.
    longest = max(queries.longest, 2), segments.longest
    bounds = dict(zip(kernel.bounds, (queries.bounds, segments.bounds, *longest), strict=True))
    function, options = kernel.function, kernel.options(scaling, segments.causal)
    if "enable_gqa" in _parameters(function):  # torch 2.12 and newer need it for grouped queries
        options["enable_gqa"] = True
    out = function(*rows, **bounds, **options)
    # FlashAttention 4, and 3 before July 2025, also return the softmax's denominators.
    return (out[0] if isinstance(out, tuple) else out)[None]


_flash = partial(
    Kernel,
    name="flash_attn_varlen_func",
    bounds=("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
    options=lambda scaling, causal: {"softmax_scale": scaling, "causal": causal},
)
_HEADS, _HEADS_4 = range(8, 257, 8), range(8, 129, 8)

# The fastest first. Read at github.com/Dao-AILab/flash-attention, commit 0251105 of August 2026: 3 in hopper/
# (flash_attn_interface.py, flash_api.cpp); 4, fa4-v4.0.0.beta27, in flash_attn/cute/interface.py, whose backward pass
# runs on compute capabilities 9 to 12 and is tested for these sizes of heads; 2 at v2.8.3, which contains an early
# flash_attn.cute without max_seqlen_q. PyTorch's is that of 2.13; in 2.10 it had neither scale nor window.
KERNELS = {
    "flash_attn_3": _flash(
        "flash_attn_interface", heads=lambda major: _HEADS if major == 9 else (), gpus="Hopper GPUs"
    ),
    "flash_attn_4": _flash(
        "flash_attn.cute",
        heads=lambda major: (*_HEADS_4, 256) if major == 10 else _HEADS_4 if 9 <= major <= 12 else (),
        gpus="Hopper and Blackwell GPUs",
    ),
    "flash_attn": _flash("flash_attn", heads=lambda major: _HEADS if major >= 8 else (), gpus="Ampere GPUs and newer"),
    "varlen": Kernel(
        module="torch.nn.attention.varlen",
        name="varlen_attn",
        bounds=("cu_seq_q", "cu_seq_k", "max_q", "max_k"),
        options=lambda scaling, causal: {"scale": scaling, "window_size": (-1, 0 if causal else -1)},
        heads=lambda major: _HEADS if major >= 8 else (),
        gpus="Ampere GPUs and newer",
    ),
}
KINDS = {kind: partial(_attention, partial(_by_bounds, kernel)) for kind, kernel in KERNELS.items()}
KINDS["sdpa"] = partial(_attention, _sdpa)
for kind, function in KINDS.items():
    AttentionInterface.register(implementation(kind), function)
