"""What loading any model asks: its config, whether all its weights were there, which of given fields it knows."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig

from pipeline.errors import PipelineError

# A precision by its name in recipes and options; "auto" is the one that the weights are stored in.
DTYPES = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}

Config = TypeVar("Config")


def read_config(path: str, read: Callable[[str], Config]) -> Config:
    """What `read` makes of the config.json of a folder or hub name; PipelineError where there is no model."""
    if Path(path).is_dir() and not Path(path, "config.json").is_file():
        raise PipelineError(f"no model at {path!r}: it has no config.json")  # transformers would take its defaults
    try:
        return read(path)
    except (OSError, ValueError) as error:
        raise PipelineError(f"no model at {path!r}: {str(error).splitlines()[0]}") from None


def config_dict(path: str) -> dict[str, Any]:
    """The config.json of a folder or hub name; errors as of `read_config`."""
    return read_config(path, PreTrainedConfig.get_config_dict)[0]


def refuse_unknown(name: str, given: dict[str, Any], config: PreTrainedConfig) -> None:
    """Raise PipelineError for a field of model.architecture.NAME that is none of the config's.

    transformers would take it and ignore it.
    """
    known = config.to_dict()
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise PipelineError(f"unknown field model.architecture.{name}.{key}{hint}")
        if key.endswith(("size", "layers", "heads", "channels")) and isinstance(given[key], int) and given[key] < 1:
            raise PipelineError(f"model.architecture.{name}.{key} is {given[key]}: give a positive number")
    try:
        type(config)(**{key: value for key, value in given.items() if key != "model_type"})
    except Exception as error:  # each config checks in its own way
        why = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise PipelineError(f"model.architecture.{name}: {why}") from None


def require_vocabulary(text: dict[str, Any]) -> None:
    """Raise PipelineError where model.architecture.text does not say how large a tokenizer is to be trained."""
    if "vocab_size" not in text:
        raise PipelineError("model.architecture.text.vocab_size is missing: the size of the tokenizer to train")


def refuse_missing(path: str, loaded: dict) -> None:
    """Raise PipelineError where from_pretrained's report lists weights that were not there."""
    if missing := sorted(loaded["missing_keys"]):
        raise PipelineError(f"{path} lacks {len(missing)} of the model's weights, {missing[0]} the first")
