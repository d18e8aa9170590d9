"""Load the config of a decoder for encoding texts, and check that this project supports it."""

import re

from transformers import PreTrainedConfig

from pipeline.errors import PipelineError
from pipeline.models import loading

SETTINGS = "text_encoder"  # the field of config.json that marks a text encoder


def load_config(path: str) -> PreTrainedConfig:
    """Return the config of a folder or hub name; PipelineError if it is not a supported decoder."""
    config: PreTrainedConfig = loading.config(path)
    require_decoder(path, config)
    settings = getattr(config, SETTINGS, {})
    right = isinstance(settings, dict) and settings.keys() <= {"pooling", "instruction"}
    if not right or settings.get("pooling", "mean") != "mean" or not isinstance(settings.get("instruction", ""), str):
        raise PipelineError(
            f"{path}: {SETTINGS}={settings!r} in its config.json is not supported; expected are pooling, as mean, "
            "and instruction, a text: was it written by a later version?"
        )
    return config


def require_decoder(where: str, config: PreTrainedConfig) -> None:
    parts = [name for name in type(config).sub_configs if re.search("text|vision|audio", name)]
    if parts or not hasattr(config, "num_hidden_layers") or not hasattr(type(config), "rope_parameters"):
        raise PipelineError(f"{where} is a {config.model_type} model; expected a decoder of texts, as llama or qwen2")
