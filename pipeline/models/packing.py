"""Check that a model keeps packed items independent, by running a small model of its config."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from textwrap import shorten
from traceback import walk_tb
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig
from transformers.initialization import no_init_weights

from pipeline.data.batch import Encoded
from pipeline.errors import PipelineError
from pipeline.models.chunks import Packed, pack

Build = Callable[[PreTrainedConfig], nn.Module]

_LENGTHS = (5, 7, 4)  # tokens of the items; layers are traced on the last one
_LAYERS, _WIDTH, _TOKENS, _HEADS, _EXPERTS, _CHUNK = 8, 256, 64, 2, 8, 16  # upper bounds for the small model
# Distance of unit vectors. A layer that mixes items moves them by 1e-3 or more with these weights. Rounding moves them
# by 2e-6 in float32, by 1e-4 where attention is sharp (Gemma 4), by more if an expert choice flips; by 1e-7 in float64.
_TOLERANCE = 1e-5


def check_packing(path: str, config: PreTrainedConfig, build: Build) -> None:
    """Raise PipelineError if an item's embedding depends on the items that it is packed with.

    A narrow model with random weights and every layer type of the config runs in float32 on the CPU. A leak is in the
    layers' code, not in their weights, so precision and ZeRO do not matter. The check runs before anything is loaded
    and takes a second at most, once per process.

    path: for errors.  build: config -> model that maps packed items to unit vectors.
    """
    key = config.to_json_string(use_diff=False), build
    if key not in _problems:
        _problems[key] = _problem(config, build)
    if _problems[key]:
        raise PipelineError(f"{path} is {_problems[key]}")


_problems: dict[tuple[str, Build], str] = {}  # results by config as JSON


def _problem(config: PreTrainedConfig, build: Build) -> str:
    """Return what is wrong with models of this config, or "" if nothing is."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            torch.manual_seed(0)
            small = _small(config)
            small.dtype, small._experts_implementation = torch.float32, "eager"  # only eager supports float64
            model = build(small).float().eval()
            for parameter in model.parameters():
                if parameter.ndim > 1:  # of the size of trained weights, so that every layer has an effect
                    parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5)
            vocabulary = min(small.vocab_size, _TOKENS)
            for dtype in (torch.float32, torch.float64):  # float64 is slower; it rules out rounding
                moved = _moved(model.to(dtype), vocabulary)
                if moved < _TOLERANCE:
                    return ""
            mixes = _mixer(model, vocabulary)
    except PipelineError as error:
        return f"a {config.model_type} model: {error}"
    except Exception as error:  # model code can raise anything
        return f"a {config.model_type} model, which is not supported, because it fails on packed texts: " + _why(
            config, error
        )
    return (
        f"a {config.model_type} model, which is not supported: a text's embedding depends on the texts packed with "
        f"it (it moves by {moved:.1e}){mixes}; use a decoder in which only attention mixes tokens"
    )


def _why(config: PreTrainedConfig, error: Exception) -> str:
    """Return why the small model does not run, judged by the full model on the meta device."""
    try:
        with no_init_weights(), torch.device("meta"):
            model = AutoModel.from_config(copy.deepcopy(config))
    except Exception as whole:
        return f"transformers makes no model of its config.json ({_said(whole)}): is it damaged?"
    for module in model.modules():
        if any(isinstance(child, nn.Conv1d) and child.kernel_size[0] > 1 for child in module.children()):
            return f"its {type(module).__name__} mixes neighbouring tokens of a row by a convolution"
    if not model._supports_attention_backend:
        return f"{type(model).__name__} computes attention with its own code, which cannot separate packed texts"
    modules = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
    names = [type(each).__name__ for each in modules if type(each).__module__.startswith("transformers.models")]
    name = names[-1] if names else type(model).__name__
    return f"its {name} does not run on them ({_said(error)}); or is its config.json damaged?"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {shorten(str(error), 160)}"


def _items(vocabulary: int) -> list[Encoded]:
    draws = np.random.default_rng(0)
    return [Encoded(draws.integers(vocabulary, size=length).astype(np.int32)) for length in _LENGTHS]


def _moved(model: nn.Module, vocabulary: int) -> float:
    """Return the largest distance between an item's embedding when packed with others and when alone."""
    items = _items(vocabulary)
    together = model(pack(items), False)
    apart = torch.cat([model(pack([item]), False) for item in items])
    if not (together.isfinite().all() and apart.isfinite().all()):
        raise PipelineError("a small one of its config gives NaN or infinity for random tokens")
    return float((together - apart).norm(dim=1).max())


def _mixer(model: nn.Module, vocabulary: int) -> str:
    """Return the layer class that mixes items: the first whose output for the last item changes with the other items.

    If no layer does, but the embedding depends on the item's position in the row, say so; "" if neither is found.
    """
    items = _items(vocabulary)
    others = [replace(item, input_ids=(item.input_ids + 1) % vocabulary) for item in items[:-1]] + items[-1:]
    (ours, theirs) = (_traced(model, pack(each)) for each in (items, others))
    for (name, before, after), (other_name, other_before, other_after) in zip(ours, theirs, strict=False):
        if name == other_name and torch.equal(before, other_before) and not torch.allclose(after, other_after):
            return f", because its {name} mixes them"
    ours, theirs = (model(pack(each), False)[-1] for each in (items, others))
    return ", because its place in the row changes it" if (ours - theirs).norm() < _TOLERANCE else ""


def _traced(model: nn.Module, packed: Packed) -> list[tuple[str, Tensor, Tensor]]:
    """Return (class, input, output) for the last item of each module that maps token rows to rows, inner ones first."""
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
    """Return the config of a narrow model with each layer type. Heads keep their size: other fields depend on it."""
    small, layers = copy.deepcopy(config), _some_layers(config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(small, name, [value[layer] for layer in layers])
    small.num_hidden_layers = len(layers)
    if shared := getattr(config, "num_kv_shared_layers", None):
        small.num_kv_shared_layers = sum(layer >= config.num_hidden_layers - shared for layer in layers)
    for name in ("sliding_window", "attention_chunk_size"):  # attention refuses longer items
        if limit := getattr(config, name, None):
            setattr(small, name, max(limit, _CHUNK))
    if getattr(config, "floor_scale", None):  # the step, in positions, of Llama 4's attention temperature
        small.floor_scale = 1
    narrow = _narrowing(config) if config.hidden_size > _WIDTH else lambda name, value: value
    names = {field: name for name, field in config.attribute_map.items()}
    for field, value in list(vars(small).items()):
        setattr(small, field, narrow(names.get(field, field), value))
    if by_layer := config.to_dict().get("per_layer_config"):  # Gemma 4's fields that differ between layers
        fields = {int(layer): {name: narrow(name, v) for name, v in own.items()} for layer, own in by_layer.items()}
        small.per_layer_config = {new: fields[layer] for new, layer in enumerate(layers) if layer in fields}
    return small


def _some_layers(config: PreTrainedConfig) -> list[int]:
    """Return the first layers, which cover periodic layer types, and the first of each type in the config's lists."""
    depth = config.num_hidden_layers
    lists = [value for value in vars(config).values() if isinstance(value, list) and len(value) == depth]
    lists = [value for value in lists if value != list(range(depth))]  # not a list of layer indices
    own = depth - (getattr(config, "num_kv_shared_layers", None) or 0)  # later layers share others' keys and values
    sorts = [(layer < own, *map(str, each)) for layer, *each in zip(range(depth), *lists, strict=True)]
    return sorted({*range(min(depth, _LAYERS)), *(sorts.index(sort) for sort in set(sorts))})


def _narrowing(config: PreTrainedConfig) -> Callable[[str, Any], Any]:
    """Return a function that maps a field's name and value to its value in the narrow model."""
    before, layer = config.num_attention_heads, getattr(config, "per_layer_config", [config])[0]
    size = getattr(layer, "head_dim", None) or config.hidden_size // before
    grouped = getattr(layer, "num_key_value_heads", None) not in (None, before)
    heads = min(_HEADS, before)
    exact = {"hidden_size": heads * size, "num_attention_heads": heads, "num_key_value_heads": 1 if grouped else heads}
    exact |= {"n_group": 1, "topk_group": 1, "num_layers": _LAYERS}
    by_part = {"intermediate_size": _WIDTH, "ffn": _WIDTH, "vocab_size": _TOKENS, "token_id": _TOKENS - 1}
    by_part |= {"per_tok": _HEADS, "topk": _HEADS, "top_k": _HEADS, "expert": _EXPERTS}
    by_part |= {"chunk_size": _CHUNK, "d_state": _CHUNK}

    def narrow(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [narrow(name, each) for each in value]
        if type(value) is not int:
            return value
        return min(value, exact.get(name) or next((limit for part, limit in by_part.items() if part in name), value))

    return narrow
