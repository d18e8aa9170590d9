"""Whether a model keeps packed items apart. No list of models says so: a small model of the same config is tried."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from textwrap import shorten

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pipeline.data.collate import Encoded, Packed, pack
from pipeline.errors import PipelineError

Build = Callable[[PreTrainedConfig], nn.Module]

_LENGTHS = (5, 7, 4)  # tokens of the items; the last one is what is looked at
_LAYERS, _WIDTH, _TOKENS, _HEADS, _EXPERTS, _CHUNK = 8, 256, 64, 2, 8, 16  # the most that the small model has
# Of unit vectors: float32 leaves 2e-6 after 8 layers; what layers mix, with these weights, moves them by 1e-2 or more.
_TOLERANCE = 1e-4
_SEEDS = (0, 1)  # rounding may choose another expert of a mixture once, but hardly twice


def check_packing(path: str, config: PreTrainedConfig, build: Build) -> None:
    """Raise PipelineError where an item's vector depends on the items that it is packed with.

    Each sort of layer that the config has runs, in float32 on the CPU, but narrow and with random weights: a leak is in
    what layers do, not in their weights. So neither precision nor ZeRO's partitions matter, a job can be refused before
    it loads anything, and it takes a fraction of a second, once a process.

    path: for errors.  build: a config -> a model of it, from packed items to unit vectors.
    """
    key = config.to_json_string(use_diff=False), build
    if key not in _problems:
        _problems[key] = _problem(config, build)
    if _problems[key]:
        raise PipelineError(f"{path} is {_problems[key]}")


_problems: dict[tuple[str, Build], str] = {}  # of configs, as JSON, that were tried


def _problem(config: PreTrainedConfig, build: Build) -> str:
    """What is wrong with models of this config; "" if nothing is."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            torch.manual_seed(0)
            small = _small(config)
            small.dtype = torch.float32
            model = build(small).float().eval()
            for parameter in model.parameters():
                if parameter.ndim > 1:  # as large as trained ones, so that each layer counts
                    parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5)
            vocabulary = min(small.vocab_size, _TOKENS)
            cosines = [_least_cosine(model, vocabulary, seed) for seed in _SEEDS]
            if None in cosines:
                return ""
            mixes = _mixer(model, vocabulary)
    except PipelineError as error:
        return f"a {config.model_type} model: {error}"
    except Exception as error:  # any, of any model's code
        first = shorten(str(error), 160)
        return (
            f"a {config.model_type} model, which cannot be tried on packed texts and so is not supported "
            f"({type(error).__name__}: {first}), unless its config.json is damaged"
        )
    return (
        f"a {config.model_type} model, and a text's vector by it depends on what the text is packed with (cosine "
        f"{min(cosines):.4f} of alone and beside others){mixes}; it is not supported: take a decoder that mixes tokens "
        "by attention alone"
    )


def _items(vocabulary: int, seed: int) -> list[Encoded]:
    draws = np.random.default_rng(seed)
    return [Encoded(draws.integers(vocabulary, size=length).astype(np.int32)) for length in _LENGTHS]


def _least_cosine(model: nn.Module, vocabulary: int, seed: int) -> float | None:
    """Of items' vectors together and apart; None if they are equal but for rounding."""
    items = _items(vocabulary, seed)
    together = model(pack(items), False)
    apart = torch.cat([model(pack([item]), False) for item in items])
    if not (together.isfinite().all() and apart.isfinite().all()):
        raise PipelineError("a small one of its config gives NaN or infinity for random tokens")
    return None if (together - apart).norm(dim=1).max() < _TOLERANCE else float((together * apart).sum(dim=1).min())


def _mixer(model: nn.Module, vocabulary: int) -> str:
    """Which class of layer it is: the first that gives the last item something else, of the same, where others change.

    "" if none is found.
    """
    items = _items(vocabulary, 0)
    others = [replace(item, input_ids=(item.input_ids + 1) % vocabulary) for item in items[:-1]] + items[-1:]
    (ours, theirs) = (_traced(model, pack(each)) for each in (items, others))
    for (name, before, after), (other_name, other_before, other_after) in zip(ours, theirs, strict=False):
        if name == other_name and torch.equal(before, other_before) and not torch.allclose(after, other_after):
            return f", for its {name} mixes them"
    return ""


def _traced(model: nn.Module, packed: Packed) -> list[tuple[str, Tensor, Tensor]]:
    """(class, input, output) of modules that take and give a row of tokens, the inner ones first; of the last item."""
    trace, tokens = [], len(packed.input_ids)

    def rows(values: Iterable[object]) -> Tensor | None:
        found = (x for x in values if isinstance(x, Tensor) and x.ndim == 3 and x.shape[1] == tokens)
        return next((x[:, -_LENGTHS[-1] :].clone() for x in found), None)

    def note(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        before = rows([*args, *kwargs.values()])
        after = rows([output] if isinstance(output, Tensor) else output if isinstance(output, tuple) else ())
        if before is not None and after is not None:
            trace.append((type(module).__name__, before, after))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    model(packed, False)
    for hook in hooks:
        hook.remove()
    return trace


def _small(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a narrow model that has each sort of layer. Heads keep their size, by which other fields go."""
    small, depth = copy.deepcopy(config), config.num_hidden_layers
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == depth}
    sorts = [tuple(map(str, each)) for each in zip(*lists.values(), strict=True)]
    # Without such lists layers differ by periods, of eight at most.
    depth = min(depth, max([_LAYERS, *(sorts.index(sort) + 1 for sort in set(sorts))]))
    for name, value in lists.items():
        setattr(small, name, value[:depth])
    small.num_hidden_layers = depth
    if getattr(config, "sliding_window", None):  # longer items are refused when they come
        small.sliding_window = max(config.sliding_window, _CHUNK)
    if config.hidden_size <= _WIDTH:
        return small
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    grouped = getattr(config, "num_key_value_heads", None) not in (None, heads)
    limits = {"hidden_size": _HEADS * size, "vocab_size": _TOKENS, "n_group": 1, "topk_group": 1}
    limits |= {"num_attention_heads": _HEADS, "num_key_value_heads": 1 if grouped else _HEADS}
    by_part = {"intermediate_size": _WIDTH, "per_tok": _HEADS, "experts": _EXPERTS, "token_id": _TOKENS - 1}
    by_part |= {"chunk_size": _CHUNK}
    for name, value in small.to_dict().items():
        if type(value) is int:
            limit = limits.get(name) or next((limit for part, limit in by_part.items() if part in name), value)
            setattr(small, name, min(value, limit))
    return small
