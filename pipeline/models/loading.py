"""What loading any model asks: its config, whether all its weights were there, which of given fields it knows."""

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig

from pipeline.errors import PipelineError

# A precision by its name in recipes and options; "auto" is the one that the weights are stored in.
DTYPES = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}

IMAGES = "image_reading"  # the config's field for `model.images`

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


def reads_as_stored(path: str, images: str | None = None) -> bool:
    """Whether the model in a folder or of a hub name takes images as they are stored, not upright; see `rgb`.

    images: a recipe's choice, if not what the model's config says.
    """
    images = images or config_dict(path).get(IMAGES, "upright")
    if images not in ("upright", "as_stored"):
        raise PipelineError(f"{path}: its config has {IMAGES}={images!r}; it can be upright or as_stored")
    return images == "as_stored"


def note_images(folder: Path, as_stored: bool) -> None:
    """Have the config.json in a folder say how the model takes images, where it is not upright."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.pop(IMAGES, None)
    config |= {IMAGES: "as_stored"} if as_stored else {}
    file.write_text(json.dumps(config, indent=2) + "\n")


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


def require_vocabulary(text: dict[str, Any]) -> None:
    """Raise PipelineError where model.architecture.text does not say how large a tokenizer is to be trained."""
    if "vocab_size" not in text:
        raise PipelineError("model.architecture.text.vocab_size is missing: the size of the tokenizer to train")


def refuse_missing(path: str, loaded: dict) -> None:
    """Raise PipelineError where from_pretrained's report lists weights that were not there."""
    if missing := sorted(loaded["missing_keys"]):
        raise PipelineError(f"{path} lacks {len(missing)} of the model's weights, {missing[0]} the first")
