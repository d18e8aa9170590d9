"""Load the config of a LLaVA-OneVision, and check that this project supports it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

from pipeline.data.tiles import Tiling
from pipeline.errors import PipelineError
from pipeline.models import loading
from pipeline.models.files import fetched
from pipeline.models.llave.config import LlaveArchitecture
from pipeline.models.loading import refuse_unknown

Newline = Literal["one_token", "grid"]
MEAN = STD = 0.5  # SigLIP's normalisation of images
NEWLINES: tuple[Newline, ...] = get_args(Newline)
SIGLIP = "siglip_vision_model"
ORIGINAL = "LlavaQwenForCausalLM"  # the architecture of original checkpoints

Pinpoints = Sequence[tuple[int, int]]  # (height, width)


def text_of(config: LlavaOnevisionConfig) -> Qwen2Config:
    return cast(Qwen2Config, config.text_config)


def vision_of(config: LlavaOnevisionConfig) -> SiglipVisionConfig:
    return cast(SiglipVisionConfig, config.vision_config)


def sides_of(config: LlavaOnevisionConfig) -> tuple[int, int]:
    """Return the sides of a tile and of a patch, in pixels."""
    vision = vision_of(config)
    return cast(tuple[int, int], (vision.image_size, vision.patch_size))


def pinpoints_of(config: LlavaOnevisionConfig) -> list[Any]:
    return cast(list[Any], config.image_grid_pinpoints)


def tiling(config: LlavaOnevisionConfig) -> Tiling:
    """Return how a model with this config tiles images."""
    side, patch = sides_of(config)
    return Tiling(
        size=side,
        patches=side // patch,
        pinpoints=tuple(tuple(size) for size in pinpoints_of(config)),
        max_tiles=int(config.vision_aspect_ratio.removeprefix("anyres_max_")),
        newline=newline_position(config),
    )


def config_of_architecture(architecture: LlaveArchitecture) -> LlavaOnevisionConfig:
    """Return the config of model.architecture; PipelineError for a field that transformers would ignore."""
    refuse_unknown("vision", architecture.vision, SiglipVisionConfig())
    refuse_unknown("text", architecture.text, Qwen2Config())
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**architecture.vision, vision_use_head=False),  # type: ignore[call-arg]  # read, not declared
        text_config=Qwen2Config(**architecture.text),
        image_grid_pinpoints=[list(size) for size in architecture.image_grid_pinpoints],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def load_config(path: str, pinpoints: Pinpoints | None = None, newline: str | None = None) -> LlavaOnevisionConfig:
    """Return the config of a folder or hub name; PipelineError if `Llave` does not support the model.

    pinpoints, newline: override the config's tile sizes and newline position.
    """
    given = loading.config_dict(path)
    if is_original(given):
        raise PipelineError(f"{path} is an original checkpoint, not one that tools/convert_weights.py has converted")
    if (kind := given.get("model_type")) != "llava_onevision":
        raise PipelineError(f"{path} is a {kind} model; expected llava_onevision")
    config = loading.config(path, LlavaOnevisionConfig)
    require_supported(fetched(path, weights=False) / "config.json", config)
    return with_own(config, pinpoints, newline)


def require_supported(file: Path, config: LlavaOnevisionConfig) -> None:
    """Raise PipelineError if the config in a file is of parts, or of a tiling of images, that are not supported."""
    text, vision, strategy = text_of(config), vision_of(config), config.vision_feature_select_strategy
    ratio, pinpoints, newline = config.vision_aspect_ratio, pinpoints_of(config), newline_position(config)
    with loading.reading(file):
        side, patch = sides_of(config)
        lengths = [length for size in pinpoints for length in size]
        tiled = all(type(length) is int and 0 < length <= 2**16 and length % side == 0 for length in lengths)
        tiled = tiled and bool(lengths) and all(len(size) == 2 for size in pinpoints)
        fields = (  # (name, value, whether it is supported, what is)
            ("text_config.model_type", text.model_type, text.model_type == "qwen2", "qwen2, as in Qwen2 and Qwen2.5,"),
            ("vision_config.model_type", vision.model_type, vision.model_type == SIGLIP, SIGLIP),
            ("vision_config.patch_size", patch, patch <= side, f"at most the image_size, {side},"),
            ("vision_feature_layer", config.vision_feature_layer, config.vision_feature_layer == -1, "-1"),
            ("vision_feature_select_strategy", strategy, strategy == "full", "full"),
            ("vision_aspect_ratio", ratio, re.fullmatch(r"anyres_max_[1-9]\d{0,5}", ratio), "anyres_max_N"),
            ("image_grid_pinpoints", pinpoints, tiled, f"pairs of multiples of the image_size, {side},"),
            ("mm_newline_position", newline, newline in NEWLINES, "one_token or grid"),
        )
    for name, value, supported, expected in fields:
        if not supported:
            raise PipelineError(f"{file}: {name}={value!r} is not supported; {expected} is")


def is_original(config: dict) -> bool:
    """Whether it is the config of an original checkpoint. Some have the model_type llava, which other models share."""
    named = config.get("architectures")
    return config.get("model_type") == "llava_qwen" or (isinstance(named, list) and ORIGINAL in named)


def with_own(config: LlavaOnevisionConfig, pinpoints: Pinpoints | None, newline: str | None) -> LlavaOnevisionConfig:
    """Override fields of the config in place with a recipe's values, and return it."""
    if pinpoints:
        config.image_grid_pinpoints = [list(size) for size in pinpoints]
    if newline:
        config.mm_newline_position = newline
    return config


def newline_position(config: LlavaOnevisionConfig) -> Newline:
    """Return where a video has newlines: the original format's field, or one_token, as in transformers."""
    return getattr(config, "mm_newline_position", NEWLINES[0])
