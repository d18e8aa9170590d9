"""Read an original LLaVE checkpoint's config and tokenizer, as transformers' config and this project's processor.

The original format is LLaVA-NeXT's: a config.json with architecture LlavaQwenForCausalLM, and .safetensors or .bin
files with its tensor names. LLaVA-OneVision's and Aquila-VL's checkpoints have it too.
"""

from pathlib import Path
from typing import Any, cast

from transformers import (
    AddedToken,
    LlavaOnevisionConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2Tokenizer,
    SiglipVisionConfig,
)

from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK
from pipeline.errors import PipelineError
from pipeline.models import loading
from pipeline.models.files import fetched, read_json
from pipeline.models.llave import checks
from pipeline.models.llave.checks import load_config, text_of, with_own
from pipeline.models.llave.config import LlaveSection
from pipeline.models.llave.processor import MARKS, LlaveProcessor, mark_reading
from pipeline.models.loading import IMAGES, checked, image_reading, reading

# Options of the original: (LLaVE's value, the original's default if its config lacks the field or has null).
CHOICES = {
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
TEXT = (
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
SO400M = "siglip-so400m-patch14-384"
_SO400M_SHAPE = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
VISION = (*_SO400M_SHAPE, "hidden_act", "layer_norm_eps")


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


def load_processor(path: str, max_tokens: int, video_frames: int = 8, video_fps: float | None = None) -> LlaveProcessor:
    """Return the processor of an original checkpoint, which is that of its converted copy.

    Only the config and the tokenizer are read, so no weights are converted for it.
    """
    source = fetched(path, weights=False)
    config, given = config_from(source), readings(source)
    tokenizer = marked_tokenizer(source, config)
    read = image_reading(None, given.get(IMAGES)), mark_reading(None, given.get(MARKS))
    return LlaveProcessor.assembled(path, config, tokenizer, read, max_tokens, video_frames, video_fps)


def open_config(path: str) -> LlavaOnevisionConfig:
    """Return the config of a folder or hub name in either format. The language model's rows may lack the marks'."""
    return config_from(fetched(path, weights=False)) if is_original(path) else load_config(path)


def config_of(model: LlaveSection) -> LlavaOnevisionConfig:
    """Return the config of the recipe's model without loading or building the model."""
    pinpoints, newline = model.image_grid_pinpoints, model.mm_newline_position
    if model.architecture:
        return with_own(checks.config_of_architecture(model.architecture), None, newline)
    assert model.path
    return with_own(open_config(model.path), pinpoints, newline)


def config_from(source: Path) -> LlavaOnevisionConfig:
    """Return transformers' config for an original checkpoint, without the token ids of the image and video marks."""
    file = source / "config.json"
    original = checked(file, read_json(file))
    for name, (supported, default) in CHOICES.items():
        given = default if original.get(name) is None else original[name]
        if given != supported:
            raise PipelineError(f"{file}: {name}={given!r} is not supported; {supported!r} is")
    pinpoints = original.get("image_grid_pinpoints")
    if not isinstance(pinpoints, list) or not all(isinstance(size, list) for size in pinpoints):
        raise PipelineError(f"{file}: image_grid_pinpoints is not a list of [width, height]")
    if missing := [name for name in (*TEXT, "rope_theta") if name not in original]:
        raise PipelineError(f"{file} lacks {', '.join(missing)}")
    rope = {"rope_type": "default", "rope_theta": original["rope_theta"]}
    tokens: dict[str, Any] = {name: original.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with reading(file):
        config = LlavaOnevisionConfig(
            vision_config=_tower_config(source, original),
            text_config=Qwen2Config(**{name: original[name] for name in TEXT}, rope_parameters=rope, **tokens),
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


def marked_tokenizer(source: Path, config: LlavaOnevisionConfig) -> PreTrainedTokenizerBase:
    """Return an original's tokenizer with the image and video marks; their ids, and rows for them, go into `config`."""
    text = text_of(config)
    tokenizer = loading.tokenizer(str(source), text.vocab_size, Qwen2Tokenizer)
    marks = [AddedToken(mark, special=True, normalized=False) for mark in (IMAGE_MARK, VIDEO_MARK)]
    tokenizer.add_tokens(marks, special_tokens=True)
    ids = cast(list[int], tokenizer.convert_tokens_to_ids([IMAGE_MARK, VIDEO_MARK]))
    config.image_token_id, config.video_token_id = ids
    text.vocab_size = max(text.vocab_size, *(token + 1 for token in ids))
    return tokenizer


def _tower_config(source: Path, original: dict[str, Any]) -> SiglipVisionConfig:
    """Return the tower's config without the last layer, from vision_config.json or else with SO400M's shape."""
    file = source / "vision_config.json"
    name = str(original.get("mm_vision_tower"))
    if file.is_file():
        given = checked(file, read_json(file))
        shape = {name: given[name] for name in VISION if name in given}
    elif Path(name).name == SO400M:
        shape = _SO400M_SHAPE
    else:
        raise PipelineError(f"{source}: mm_vision_tower={name!r} is not {SO400M}; put its config at {file}")
    with reading(file if file.is_file() else source / "config.json"):
        config = SiglipVisionConfig(**shape, vision_use_head=False)  # type: ignore[call-arg]  # read, not declared
    config.num_hidden_layers -= 1
    return config
