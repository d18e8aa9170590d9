"""Whether attention on this device gives what its definition gives, forward and backward."""

import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from pipeline.config import Recipe
from pipeline.errors import PipelineError
from pipeline.jobs.preflight.check import Check, check, green, red, skipped, yellow
from pipeline.jobs.preflight.nodes import is_cpu_wanted
from pipeline.models.attention import KERNELS, KINDS, Segments, choose, head_size
from pipeline.models.loading import DTYPES
from pipeline.models.registry import training_of

Shape = tuple[tuple[int, ...], tuple[int, int], int]

# Lengths of items. Kernels have failed for items that are 64 tokens longer than a multiple of 128, for items of one
# token, and for a long item among short ones.
LENGTHS = ((192, 1, 65), (1, 3, 320), (1, 1), (64, 64), (320, 130), (192, 2))
LOOKS = ("causal", "both ways", "last-token queries")

_USUAL_SIZE = 64  # for timm's towers, whose configs do not say it
_SECONDS = 60  # no comparison begins later: FlashAttention 4 compiles a kernel for each head size and kind of shape

# Allowed root mean square of an item's errors, relative to that of its values, or to _LEAST if it is more: with one
# key, the gradient of a query is zero. All are about 1 for one key, and smaller for more. bf16 rounds probabilities,
# their gradients and results by up to 2^-9 each. float32 rounds by 2^-24, but in long sums and differences. TF32,
# which rounds by 2^-11, is not allowed: see `configure_device`.
_TOLERANCE = {torch.bfloat16: 2.0**-5, torch.float32: 2.0**-14}
_LEAST = 0.1


@check("attention", if_late="model.attention=sdpa needs no compiled extensions", seconds=300)
def attention(recipe: Recipe, place: torch.device, slurm: bool) -> Check:
    """Compare the attention that training will use, and SDPA, which towers use, with its definition.

    The heads are those of the recipe's model: their size, and how many queries share a key.
    """
    wanted, dtype, family = recipe.model.attention, DTYPES[recipe.precision], training_of(recipe)
    assert isinstance(dtype, torch.dtype)  # "auto" is only for evaluation
    try:
        decoder, towers = family.decoder(recipe), family.towers(recipe)
    except PipelineError:
        return skipped("the model cannot be read: its own check says why")
    if place.type == "cpu" and wanted in KERNELS and not (slurm or is_cpu_wanted()):
        kind = choose(wanted, "cuda", dtype, decoder)
        return yellow(f"{kind}, which runs on GPUs only", "there is no GPU here: check again on a node with GPUs")
    kind = choose(wanted, place.type, dtype, decoder)
    heads = [(kind, heads_of(decoder))] if decoder else []
    heads += [("sdpa", heads_of(tower)) for tower in towers]
    lengths = LENGTHS if place.type == "cuda" else LENGTHS[:1]
    comparisons = [(*each, of_items, looks) for each in dict.fromkeys(heads) for of_items in lengths for looks in LOOKS]
    compared, began = 0, time.monotonic()
    for each, (count, size), of_items, looks in comparisons:
        if time.monotonic() - began > _SECONDS:
            break
        if wrong := _tried(each, (of_items, count, size), looks, dtype, place):
            other = "another version, or set model.attention=sdpa" if each in KERNELS else "another torch"
            return (red if each == heads[0][0] else yellow)(f"{each}: {wrong}", f"install {other}")
        compared += 1
    sizes = "; ".join(f"{each}, heads of {size}" for each, (_, size) in dict.fromkeys(heads))
    return green(f"{sizes}: {compared} of {len(comparisons)} comparisons with float64")


def heads_of(config: PreTrainedConfig) -> tuple[tuple[int, int], int]:
    """Return (heads of queries, and of keys and values) in the model's proportion, and the size of a head."""
    text: Any = config.get_text_config(decoder=True)
    queries = getattr(text, "num_attention_heads", None) or 1
    shared = queries // (getattr(text, "num_key_value_heads", None) or queries)
    return (2 * shared, 2), head_size(config) or _USUAL_SIZE


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
