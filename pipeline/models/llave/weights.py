"""Convert between original LLaVE checkpoints and Hugging Face folders, one weight file at a time.

The original format is LLaVA-NeXT's: a config.json with architecture LlavaQwenForCausalLM, and .safetensors or .bin
files with its tensor names. One file is in memory at a time, and only tensors are unpickled.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from transformers import (
    AddedToken,
    LlavaOnevisionConfig,
    LlavaOnevisionModel,
    Qwen2Config,
    Qwen2Tokenizer,
    SiglipVisionConfig,
)

from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK
from pipeline.errors import PipelineError, first_few
from pipeline.models import loading
from pipeline.models.files import (
    Stored,
    Tensors,
    fetched,
    read_json,
    read_tensors,
    survey,
    weight_files,
)
from pipeline.models.folder import finish
from pipeline.models.llave import checks
from pipeline.models.llave.checks import load_config, text_of, vision_of, with_own
from pipeline.models.llave.config import LlaveSection
from pipeline.models.llave.model import save_image_processor
from pipeline.models.llave.processor import MARKS
from pipeline.models.loading import IMAGES, checked, reading
from pipeline.storage.atomic import remove_leftovers, replacing

# Prefixes of the original's tensor names, and those that transformers saves. The first match applies.
_PREFIXES = (
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("model.", "language_model."),
)
_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Options of the original: (LLaVE's value, the original's default if its config lacks the field or has null).
_CHOICES = {
    "mm_projector_type": ("mlp2x_gelu", "linear"),
    "mm_patch_merge_type": ("spatial_unpad", "flat"),
    "mm_vision_select_layer": (-2, None),
    "mm_vision_select_feature": ("patch", "patch"),
    "mm_spatial_pool_mode": ("bilinear", "bilinear"),
    "mm_spatial_pool_stride": (2, 2),
    "mm_resampler_type": (None, None),
    "mm_use_im_start_end": (False, False),
    "add_faster_video": (False, False),
    "use_sliding_window": (False, False),
}
# Fields of the language model's shape. The original ignores rope_scaling.
_TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)
_SO400M = "siglip-so400m-patch14-384"
_SO400M_SHAPE = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
_VISION = (*_SO400M_SHAPE, "hidden_act", "layer_norm_eps")


def is_original(path: str | Path) -> bool:
    """Whether a folder or hub name is an original checkpoint. Raises PipelineError if its config.json is damaged."""
    config = fetched(str(path), weights=False) / "config.json"
    return config.is_file() and checks.is_original(read_json(config))


def readings(path: str | Path) -> dict[str, str]:
    """Return how an original checkpoint reads images and marks, as fields of a config.json.

    `export_original` writes these fields. A trained LLaVE, in whose config its own code writes alpha and logit_scale
    (llava/model/llava_arch.py:98), reads as that code does. The config of another checkpoint, such as the
    LLaVA-OneVision it began with, does not say it.
    """
    config = read_json(fetched(str(path), weights=False) / "config.json")
    trained = {IMAGES: "as_stored", MARKS: "published"} if {"alpha", "logit_scale"} <= config.keys() else {}
    return {name: config[name] for name in (IMAGES, MARKS) if name in config} or trained


def resolve(path: str, cache: Path) -> str:
    """Return a folder or hub name for `Llave.load`: `path`, or the folder in `cache` with the converted original.

    An original is converted once, and again if the size or time of one of its files changes.
    """
    if not is_original(path):
        return path
    source = fetched(path)
    files = [
        (str(file), file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(source.resolve().iterdir())
        if file.exists()
    ]
    fingerprint = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
    converted = cache / f"{Path(path).resolve().name}-{fingerprint}"
    if not converted.exists():
        remove_leftovers(cache)
        with replacing(converted, durable=False) as partial:
            convert_original(source, partial)
    return str(converted)


def config_of(model: LlaveSection) -> LlavaOnevisionConfig:
    """Return the config of the recipe's model without loading or building the model."""
    pinpoints, newline = model.image_grid_pinpoints, model.mm_newline_position
    if model.architecture:
        return with_own(checks.config_of_architecture(model.architecture), None, newline)
    assert model.path
    original = is_original(model.path)
    config = _config(fetched(model.path, weights=False)) if original else load_config(model.path)
    return with_own(config, pinpoints, newline)


def convert_original(source: Path, folder: Path) -> None:
    """Convert an original checkpoint into a new folder in transformers' format, file by file and without rounding.

    The language model's head is dropped. The tower has one layer fewer than its config says: the original drops it, so
    the checkpoint lacks its tensors. The embedding gets rows of zeros for the image and video marks if it lacks them.
    config.json is written last: a folder without it is incomplete.

    Raises PipelineError for another LLaVA's config, missing, unknown or misshapen tensors, unreadable files, or if
    `folder` exists.
    """
    if not is_original(source):
        raise PipelineError(f"{source} is not an original checkpoint: its config.json is not of a {checks.ORIGINAL}")
    config = _config(source)
    text = text_of(config)
    files, stored = weight_files(source), survey(source)
    _check(source, config, {name: tensor for name, tensor in stored.items() if name != _LM_HEAD}, _original)
    tokenizer = loading.tokenizer(str(source), text.vocab_size, Qwen2Tokenizer)
    marks = [AddedToken(mark, special=True, normalized=False) for mark in (IMAGE_MARK, VIDEO_MARK)]
    tokenizer.add_tokens(marks, special_tokens=True)
    ids = cast(list[int], tokenizer.convert_tokens_to_ids([IMAGE_MARK, VIDEO_MARK]))
    config.image_token_id, config.video_token_id = ids
    rows = text.vocab_size
    text.vocab_size = max(rows, config.image_token_id + 1, config.video_token_id + 1)

    def renamed(tensors: Tensors) -> Tensors:
        tensors.pop(_LM_HEAD, None)
        if _EMBEDDING in tensors and rows < text.vocab_size:
            padding = 0, 0, 0, text.vocab_size - rows
            tensors[_EMBEDDING] = torch.nn.functional.pad(tensors[_EMBEDDING], padding)
        return {_transformers(name): tensor for name, tensor in tensors.items()}

    _new_folder(folder)
    _rewrite(files, folder, renamed)
    tokenizer.save_pretrained(folder)
    save_image_processor(config, folder)
    config.dtype = stored[_EMBEDDING].dtype  # taken as the whole model's
    config.save_pretrained(folder)
    finish(folder, readings(source))


def export_original(folder: Path, out: Path) -> None:
    """Convert a folder that `save_folder` wrote into an original checkpoint in the new folder `out`.

    The LM head is a copy of the embedding. vision_config.json counts the layer that the original drops, which has no
    tensors, as in original checkpoints.

    Raises PipelineError as `convert_original` does.
    """
    config = load_config(str(folder))
    text, vision = text_of(config), vision_of(config)
    rope = cast(dict[str, Any], text.rope_parameters)
    if rope["rope_type"] != "default" or text.use_sliding_window:
        raise PipelineError(f"{folder}: the original format has plain rotary embeddings and full attention only")
    files, stored = weight_files(folder), survey(folder)
    _check(folder, config, stored)

    def renamed(tensors: Tensors) -> Tensors:
        tensors = {_original(name): tensor for name, tensor in tensors.items()}
        if _EMBEDDING in tensors:
            tensors[_LM_HEAD] = tensors[_EMBEDDING].clone()
        return tensors

    _new_folder(out)
    _rewrite(files, out, renamed)
    loading.tokenizer(str(folder)).save_pretrained(out)
    tower = {name: getattr(vision, name) for name in _VISION}
    tower |= {"model_type": "siglip_vision_model", "num_hidden_layers": vision.num_hidden_layers + 1}
    _write_json(out / "vision_config.json", tower)
    original = {
        "architectures": [checks.ORIGINAL],
        "model_type": "llava_qwen",
        **{name: getattr(text, name) for name in _TEXT},
        "rope_theta": rope["rope_theta"],
        "torch_dtype": str(stored[_transformers(_EMBEDDING)].dtype).removeprefix("torch."),
        **{name: value for name, (value, _) in _CHOICES.items()},
        "use_mm_proj": True,
        "mm_use_im_patch_token": False,
        "mm_hidden_size": vision.hidden_size,
        "mm_vision_tower": f"google/{_SO400M}",
        # Without mm_vision_tower in this list the original reads the tower from the hub, not from the checkpoint.
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_newline_position": checks.newline_position(config),
        "image_aspect_ratio": config.vision_aspect_ratio,
        "image_grid_pinpoints": [[width, height] for height, width in checks.pinpoints_of(config)],
        "tokenizer_model_max_length": text.max_position_embeddings,
        "tokenizer_padding_side": "right",
        **{name: value for name in (IMAGES, MARKS) if (value := getattr(config, name, None))},
    }
    _write_json(out / "config.json", original)
    finish(out)


def _config(source: Path) -> LlavaOnevisionConfig:
    """Return transformers' config for an original checkpoint, without the token ids of the image and video marks."""
    file = source / "config.json"
    original = checked(file, read_json(file))
    for name, (supported, default) in _CHOICES.items():
        given = default if original.get(name) is None else original[name]
        if given != supported:
            raise PipelineError(f"{file}: {name}={given!r} is not supported; {supported!r} is")
    pinpoints = original.get("image_grid_pinpoints")
    if not isinstance(pinpoints, list) or not all(isinstance(size, list) for size in pinpoints):
        raise PipelineError(f"{file}: image_grid_pinpoints is not a list of [width, height]")
    if missing := [name for name in (*_TEXT, "rope_theta") if name not in original]:
        raise PipelineError(f"{file} lacks {', '.join(missing)}")
    rope = {"rope_type": "default", "rope_theta": original["rope_theta"]}
    tokens: dict[str, Any] = {name: original.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with reading(file):
        config = LlavaOnevisionConfig(
            vision_config=_tower_config(source, original),
            text_config=Qwen2Config(**{name: original[name] for name in _TEXT}, rope_parameters=rope, **tokens),
            # The original writes width before height, transformers height before width.
            image_grid_pinpoints=[size[::-1] for size in pinpoints],
            vision_aspect_ratio=str(original.get("image_aspect_ratio")),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            architectures=["LlavaOnevisionModel"],
        )
    config.mm_newline_position = original.get("mm_newline_position", checks.NEWLINES[0])
    checks.require_supported(file, config)
    return config


def _tower_config(source: Path, original: dict[str, Any]) -> SiglipVisionConfig:
    """Return the tower's config without the last layer, from vision_config.json or else with SO400M's shape."""
    file = source / "vision_config.json"
    name = str(original.get("mm_vision_tower"))
    if file.is_file():
        given = checked(file, read_json(file))
        shape = {name: given[name] for name in _VISION if name in given}
    elif Path(name).name == _SO400M:
        shape = _SO400M_SHAPE
    else:
        raise PipelineError(f"{source}: mm_vision_tower={name!r} is not {_SO400M}; put its config at {file}")
    with reading(file if file.is_file() else source / "config.json"):
        config = SiglipVisionConfig(**shape, vision_use_head=False)  # type: ignore[call-arg]  # read, not declared
    config.num_hidden_layers -= 1
    return config


def _check(
    source: Path, config: LlavaOnevisionConfig, found: dict[str, Stored], renamed: Callable[[str], str] = str
) -> None:
    """Raise PipelineError if the tensors are not those of the config's model.  renamed: changes expected names."""
    with reading(source / "config.json"), torch.device("meta"):
        model = LlavaOnevisionModel(config)
    expected = {renamed(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if missing := sorted(expected.keys() - found.keys()):
        raise PipelineError(f"{source} lacks {len(missing)} of the model's tensors: {first_few(missing)}")
    if unknown := sorted(found.keys() - expected.keys()):
        raise PipelineError(f"{source} has {len(unknown)} tensors that are not of this model: {first_few(unknown)}")
    for name, tensor in found.items():
        if tensor.shape != expected[name]:
            raise PipelineError(
                f"{source}: {name} has shape {list(tensor.shape)}, but its config needs {list(expected[name])}"
            )


def _transformers(name: str) -> str:
    theirs, ours = next(pair for pair in _PREFIXES if name.startswith(pair[0]))
    return ours + name.removeprefix(theirs)


def _original(name: str) -> str:
    theirs, ours = next(pair for pair in _PREFIXES if name.startswith(pair[1]))
    return theirs + name.removeprefix(ours)


def _rewrite(files: list[Path], folder: Path, renamed: Callable[[Tensors], Tensors]) -> None:
    """Write a .safetensors file with `renamed` tensors for each file, and an index if there are several."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, 1):
        single = len(files) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {key: tensor.contiguous() for key, tensor in renamed(read_tensors(file)).items()}
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        del tensors  # before the next file is mapped
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _new_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise PipelineError(f"{folder} is there already; name a new folder or remove it") from None


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")
