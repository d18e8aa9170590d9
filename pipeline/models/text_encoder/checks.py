"""The config of a decoder that is to encode texts, checked for what this project supports."""

import re
from typing import Any

from transformers import PreTrainedConfig

from pipeline.errors import PipelineError
from pipeline.models import loading

SETTINGS = "text_encoder"  # the field of config.json that tells a text encoder from any decoder


def load_config(path: str) -> PreTrainedConfig:
    """The config of a decoder's folder or hub name; PipelineError if there is none."""
    config = loading.config(path)
    require_decoder(path, config)
    settings = getattr(config, SETTINGS, {})
    if not isinstance(settings, dict) or settings.get("pooling", "mean") != "mean":
        raise PipelineError(f"{path}: {SETTINGS}={settings!r} in its config.json must be of pooling mean")
    if not isinstance(settings.get("instruction", ""), str):
        raise PipelineError(f"{path}: {SETTINGS}.instruction in its config.json must be a text: {settings!r}")
    if unknown := sorted(settings.keys() - {"pooling", "instruction"}):
        raise PipelineError(
            f"{path}: {SETTINGS}.{unknown[0]} in its config.json is unknown; pooling and instruction are known: was it "
            "written by a later version?"
        )
    return config


def require_decoder(where: str, config: PreTrainedConfig) -> None:
    parts = [name for name in type(config).sub_configs if re.search("text|vision|audio", name)]
    if parts or not hasattr(config, "num_hidden_layers") or not hasattr(type(config), "rope_parameters"):
        raise PipelineError(f"{where} is a {config.model_type} model; expected a decoder of texts, as llama or qwen2")


def text_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """How a text encoder's folder says that it pools; empty for any other decoder."""
    return getattr(config, SETTINGS, {})
