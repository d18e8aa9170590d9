"""Convert vision encoders that LLM2CLIP's authors released into this project's folders, without rounding.

Two layouts are read; every name and shape is checked, since the files themselves cannot be had here:

- a state dict of the original code's CustomCLIP (eva_clip/model.py): a .pt file, such as LLM2CLIP-EVA02-L-14-336.pt.
  Its tower `visual.` is EVA02 (eva_vit_model.py), or the VisionTransformer of transformer.py, which OpenAI's CLIP is;
  its adapter is `text.text_adaptor.`.
- a folder in transformers' layout of CLIP, such as microsoft/LLM2CLIP-Openai-L-14-336: `vision_model.`,
  `visual_projection.`, and the adapter `text_adapter.adaptor.`. The folder's own code is not run.
"""

import json
import re
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from pipeline.errors import PipelineError, first_few
from pipeline.models.files import Tensors, fetched, read_json, read_tensors, survey, weight_files
from pipeline.models.llm2clip.model import TextAdapter, save_beside
from pipeline.models.loading import IMAGES, checked, reading
from pipeline.models.text_encoder import model as decoder
from pipeline.models.text_encoder.processor import load_config
from pipeline.models.vision import CLIPVisionModelWithProjection, image_processor
from pipeline.storage.atomic import replacing

Shapes = dict[str, tuple[int, ...]]

_HEAD = 64  # the width of a head in all of the original's configs
_PRETRAINED_GRID = 16  # pt_hw_seq_len: the grid that EVA02's rotary positions are scaled to, whatever the image's size

# EVA02's names in timm, as timm's own conversion gives them (timm/models/eva.py).
_EVA02 = (
    ("attn.inner_attn_ln.", "attn.norm."),
    ("mlp.ffn_ln.", "mlp.norm."),
    ("mlp.w1.", "mlp.fc1_g."),
    ("mlp.w2.", "mlp.fc1_x."),
    ("mlp.w3.", "mlp.fc2."),
)
_CLIP = (  # those of the original's VisionTransformer in transformers
    ("class_embedding", "vision_model.embeddings.class_embedding"),
    ("positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("conv1.", "vision_model.embeddings.patch_embedding."),
    ("ln_pre.", "vision_model.pre_layrnorm."),
    ("ln_post.", "vision_model.post_layernorm."),
    ("transformer.resblocks.", "vision_model.encoder.layers."),
)
_CLIP_BLOCK = (
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("attn.out_proj.", "self_attn.out_proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
)
_CLIP_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)


@dataclass(frozen=True)
class Tower:
    """A vision encoder's config.json and weights, as `VisionEncoder` loads them.  processor: None for timm."""

    config: dict[str, Any]
    weights: Tensors
    processor: CLIPImageProcessorPil | None


def convert_released(source: str, text_encoder: str, folder: Path) -> None:
    """Convert a released vision encoder with its adapter into a new folder.

    source: a .pt file, a folder or a hub name.  text_encoder: folder or hub name of the text encoder of this project
    whose vectors the adapter reads.

    Raises PipelineError for tensors that are unknown, missing or misshapen, for a text encoder of another width, or
    if `folder` exists.
    """
    if folder.exists():
        raise PipelineError(f"{folder} is there already; name a new folder or remove it")
    decoder.check_folder(text_encoder)
    file = Path(source)
    tower, adapter = _of_state_dict(file) if file.is_file() else _of_folder(source)
    adapter, width = _adapter(source, adapter)
    if width != (given := load_config(text_encoder).hidden_size):
        raise PipelineError(
            f"{source} was trained with text vectors {width} wide; those of {text_encoder} are {given} wide: name the "
            "text encoder that it was trained with"
        )
    with replacing(folder, durable=False) as partial:
        partial.mkdir()
        weights = {name: each.contiguous() for name, each in tower.weights.items()}
        save_file(weights, partial / "model.safetensors", {"format": "pt"})
        (partial / "config.json").write_text(json.dumps(tower.config | {IMAGES: "as_stored"}, indent=2) + "\n")
        if tower.processor:
            tower.processor.save_pretrained(partial)
        save_beside(adapter, width, text_encoder, partial, None if file.exists() else source)


def _of_state_dict(file: Path) -> tuple[Tower, Tensors]:
    """Return the tower and the adapter's tensors of the original code's CustomCLIP."""
    survey(file.parent, [file])
    source, tensors = str(file), read_tensors(file)
    tensors.pop("logit_scale", None)
    vision, adapter = _split(source, tensors, "visual.", "text.text_adaptor.")
    if "cls_token" in vision:
        return _eva02(source, vision), adapter
    if "class_embedding" in vision:
        return _clip(source, vision), adapter
    raise PipelineError(
        f"{source}: its tower is neither EVA02 nor OpenAI's CLIP, and no other is supported; the first names of its "
        f"tensors are {first_few(sorted(vision))}"
    )


def _of_folder(source: str) -> tuple[Tower, Tensors]:
    """Return the tower and the adapter's tensors of a folder in transformers' layout."""
    folder = fetched(source)
    file = folder / "config.json"
    if not file.is_file():
        raise PipelineError(f"{source} has no config.json: name a released LLM2CLIP's folder, or its .pt file")
    given = checked(file, read_json(file))
    named = given.get("model_type"), given.get("architectures")
    if named[0] != "clip" or "Eva" in str(named[1]) or not isinstance(given.get("vision_config"), dict):
        raise PipelineError(
            f"{file}: {named[0]} with architectures={named[1]} is not supported; expected is clip, with a "
            "vision_config. For an EVA02, name the .pt file beside it, which also holds the adapter"
        )
    survey(folder)
    tensors = {name: each for part in weight_files(folder) for name, each in read_tensors(part).items()}
    for name in ("logit_scale", "vision_model.embeddings.position_ids"):
        tensors.pop(name, None)
    prefix = "text_adapter.adaptor."
    adapter = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
    fields = {name: value for name, value in given["vision_config"].items() if name in _CLIP_FIELDS}
    with reading(file):
        config = CLIPVisionConfig(**fields | {"projection_dim": given.get("projection_dim", 512)})
    return _of_clip(source, config, tensors), adapter


def _split(source: str, tensors: Tensors, *prefixes: str) -> list[Tensors]:
    """Return the tensors by prefix, without it; PipelineError if there are others, or if a prefix has none."""
    parts = [
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in prefixes
    ]
    if unknown := sorted(name for name in tensors if not name.startswith(prefixes)):
        raise PipelineError(f"{source} has {len(unknown)} tensors that are not of this layout: {first_few(unknown)}")
    for prefix, part in zip(prefixes, parts, strict=True):
        if not part:
            raise PipelineError(f"{source} has no tensors {prefix}*: is it a released LLM2CLIP?")
    return parts


def _require(source: str, found: Tensors, expected: Shapes) -> None:
    """Raise PipelineError if names or shapes differ."""
    if missing := sorted(expected.keys() - found.keys()):
        raise PipelineError(f"{source} lacks {len(missing)} of the model's tensors: {first_few(missing)}")
    if unknown := sorted(found.keys() - expected.keys()):
        raise PipelineError(f"{source} has {len(unknown)} tensors that are not of this model: {first_few(unknown)}")
    wrong = [f"{n} {list(t.shape)} for {list(expected[n])}" for n, t in sorted(found.items()) if t.shape != expected[n]]
    if wrong:
        raise PipelineError(f"{source} has {len(wrong)} tensors of another shape than expected: {first_few(wrong)}")


def _shape(source: str, tensors: Tensors, name: str, dimensions: int) -> tuple[int, ...]:
    """Return the shape of a tensor that gives sizes; PipelineError if it is missing or has other `dimensions`."""
    if name not in tensors or tensors[name].ndim != dimensions:
        found = list(tensors[name].shape) if name in tensors else "missing"
        raise PipelineError(f"{source}: {name} is {found}; expected are {dimensions} dimensions")
    return tuple(tensors[name].shape)


def _blocks(source: str, tensors: Tensors, prefix: str) -> int:
    numbers = {int(found[1]) for name in tensors if (found := re.match(re.escape(prefix) + r"(\d+)\.", name))}
    if not numbers or numbers != set(range(len(numbers))):
        raise PipelineError(f"{source}: its blocks {prefix}* are {sorted(numbers)}; expected are 0, 1, 2 and so on")
    return len(numbers)


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    return next((ours + name.removeprefix(theirs) for theirs, ours in pairs if name.startswith(theirs)), name)


def _adapter(source: str, tensors: Tensors) -> tuple[Tensors, int]:
    """Return `TextAdapter`'s weights from those of TextProj (eva_clip/model.py), and the width of its input."""
    source = f"{source} (its adapter)"
    dimension, width = _shape(source, tensors, "5.weight", 2)
    blocks = (("ln.", "norm."), ("fn.0.", "up."), ("fn.3.", "down."))
    names: dict[str, str] = {}
    for name in tensors:
        number, _, rest = name.partition(".")
        if number in ("4", "5"):
            names[name] = f"{'norm' if number == '4' else 'projection'}.{rest}"
        else:
            names[name] = f"blocks.{number}.{_renamed(rest, blocks)}"
    with torch.device("meta"):
        expected = {name: tuple(each.shape) for name, each in TextAdapter(width, dimension).state_dict().items()}
    weights = {names[name]: tensor for name, tensor in tensors.items()}
    _require(source, weights, expected)
    return weights, width


def _eva02(source: str, tensors: Tensors) -> Tower:
    """Return timm's EVA02 with the weights of the original's EVAVisionTransformer with rope, SwiGLU and sub-LN."""
    width, _, patch, _ = _shape(source, tensors, "patch_embed.proj.weight", 4)
    dimension, _ = _shape(source, tensors, "head.weight", 2)
    hidden, _ = _shape(source, tensors, "blocks.0.mlp.w1.weight", 2)
    _, tokens, _ = _shape(source, tensors, "pos_embed", 3)
    grid, depth = isqrt(tokens - 1), _blocks(source, tensors, "blocks.")
    rotary = {name: tensor for name, tensor in tensors.items() if re.search(r"rope\.freqs_(cos|sin)$", name)}
    head = next(iter(rotary.values())).shape[-1] if rotary else _HEAD
    for name, tensor in rotary.items():
        _require_rotary(source, name, tensor, grid, head)
    weights = {name: tensor for name, tensor in tensors.items() if name not in rotary}
    _require(source, weights, _eva02_shapes(width, depth, hidden, patch, grid, dimension))
    size = grid * patch
    config = {
        "architecture": "eva02_large_patch14_clip_336",  # model_args has the sizes
        "architectures": ["TimmWrapperForImageClassification"],
        "model_type": "timm_wrapper",
        "num_classes": dimension,
        "model_args": {
            "img_size": size,
            "patch_size": patch,
            "embed_dim": width,
            "depth": depth,
            "num_heads": width // head,
            "mlp_ratio": (hidden + 0.5) / width,  # timm truncates the product to an integer
        },
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": OPENAI_CLIP_MEAN,
            "std": OPENAI_CLIP_STD,
        },
    }

    def of_timm(name: str) -> str:
        block = re.match(r"blocks\.\d+\.", name)
        begin = block[0] if block else ""
        return begin + _renamed(name.removeprefix(begin), _EVA02)

    return Tower(config, {of_timm(name): tensor for name, tensor in weights.items()}, None)


def _eva02_shapes(width: int, depth: int, hidden: int, patch: int, grid: int, dimension: int) -> Shapes:
    """Return the shapes of EVAVisionTransformer's parameters by their names in the original."""

    def linear(name: str, out: int, into: int) -> Shapes:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    def norm(name: str, size: int) -> Shapes:
        return {f"{name}.weight": (size,), f"{name}.bias": (size,)}

    shapes: Shapes = {"cls_token": (1, 1, width), "pos_embed": (1, grid**2 + 1, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    for block in (f"blocks.{number}" for number in range(depth)):
        for name in ("q_proj", "k_proj", "v_proj", "proj"):
            shapes |= linear(f"{block}.attn.{name}", width, width)
        del shapes[f"{block}.attn.k_proj.bias"]
        shapes |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        shapes |= norm(f"{block}.attn.inner_attn_ln", width) | norm(f"{block}.mlp.ffn_ln", hidden)
        shapes |= linear(f"{block}.mlp.w1", hidden, width) | linear(f"{block}.mlp.w2", hidden, width)
        shapes |= linear(f"{block}.mlp.w3", width, hidden)
    return shapes | norm("norm", width) | linear("head", dimension, width)


def _require_rotary(source: str, name: str, stored: torch.Tensor, grid: int, head: int) -> None:
    """Raise PipelineError if a stored table of rotary positions is not what timm computes for this grid and head.

    Each axis has half of the head's channels, in pairs of one angle (VisionRotaryEmbeddingFast in rope.py). Places are
    scaled to a grid of 16: pt_hw_seq_len, with intp_freq.
    """
    half = head // 2
    rates = 10_000.0 ** -(torch.arange(0, half, 2) / half)
    places = torch.arange(grid) / grid * _PRETRAINED_GRID
    angles = (places[:, None] * rates).repeat_interleave(2, dim=1)
    table = torch.cat([angles.repeat_interleave(grid, 0), angles.repeat(grid, 1)], dim=1)
    expected = table.cos() if name.endswith("cos") else table.sin()
    if stored.shape != expected.shape or (stored.float() - expected).abs().max() > 0.01:  # bf16 rounds by 0.002
        raise PipelineError(
            f"{source}: {name} is not the table of rotary positions of a grid of {grid}x{grid} scaled to "
            f"{_PRETRAINED_GRID}x{_PRETRAINED_GRID}, as in the published configs; no other is supported"
        )


def _clip(source: str, tensors: Tensors) -> Tower:
    """Return transformers' CLIP tower with the weights of the original's VisionTransformer.

    Its activation is GELU, not the QuickGELU of OpenAI's weights: the original's configs do not set quick_gelu. The
    original crops images with torchvision.
    """
    tokens, width = _shape(source, tensors, "positional_embedding", 2)
    _, _, patch, _ = _shape(source, tensors, "conv1.weight", 4)
    _, dimension = _shape(source, tensors, "proj", 2)
    hidden, _ = _shape(source, tensors, "transformer.resblocks.0.mlp.c_fc.weight", 2)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=_blocks(source, tensors, "transformer.resblocks."),
        num_attention_heads=max(width // _HEAD, 1),
        image_size=isqrt(tokens - 1) * patch,
        patch_size=patch,
        hidden_act="gelu",
        projection_dim=dimension,
    )
    weights: Tensors = {}
    for name, tensor in tensors.items():
        ours = _renamed(name, _CLIP)
        block, rest = re.fullmatch(r"(vision_model\.encoder\.layers\.\d+\.)?(.*)", ours).groups()  # type: ignore[union-attr]
        if block and (stacked := re.fullmatch(r"attn\.in_proj_(weight|bias)", rest)):
            for part, one in zip("qkv", tensor.chunk(3), strict=True):
                weights[f"{block}self_attn.{part}_proj.{stacked[1]}"] = one
        elif name == "proj":
            weights["visual_projection.weight"] = tensor.T
        else:
            weights[block + _renamed(rest, _CLIP_BLOCK) if block else ours] = tensor
    tower = _of_clip(source, config, weights)
    return replace(tower, processor=image_processor(cast(int, config.image_size), to_even=True))


def _of_clip(source: str, config: CLIPVisionConfig, weights: Tensors) -> Tower:
    """Return transformers' CLIP tower after a check of all names and shapes."""
    with reading(Path(source)), torch.device("meta"):
        model = CLIPVisionModelWithProjection._from_config(config)
    _require(source, weights, {name: tuple(each.shape) for name, each in model.state_dict().items()})
    values = config.to_diff_dict() | {"architectures": ["CLIPVisionModelWithProjection"]}
    values["dtype"] = str(weights["visual_projection.weight"].dtype).removeprefix("torch.")
    assert isinstance(config.image_size, int)
    return Tower(values, weights, image_processor(config.image_size))
