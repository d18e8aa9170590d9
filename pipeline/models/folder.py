"""Shared by all families' exports: write Hugging Face folders that earlier versions of transformers can also read."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.models import loading
from pipeline.storage.atomic import replacing

_PARTIAL = "partial_rotary_factor"


def base_of(base: str | None) -> str:
    """Return the model card's base_model line if `base`, the model that training started from, is on the hub."""
    return f"base_model: {base}\n" if base and not Path(base).exists() else ""


def finish(folder: Path, fields: dict[str, Any] | None = None) -> None:
    """Make a folder written by transformers readable by earlier versions and by other users of the machine.

    fields: config.json fields to override; None removes a field.

    Before version 5, transformers and other readers of these folders expect `rope_theta` and `rope_scaling`, and use
    defaults if they find only `rope_parameters`. They also expect the name `additional_special_tokens`.
    """
    _change(folder / "config.json", partial(_for_earlier, fields=fields or {}))
    if (settings := folder / "tokenizer_config.json").is_file():
        _change(settings, _marks_for_earlier)
    share(folder)


def note_images(folder: Path, as_stored: bool) -> None:
    """Record in a folder's config.json that the model reads images as stored; nothing is recorded for upright."""
    finish(folder, {loading.IMAGES: "as_stored" if as_stored else None})


def _for_earlier(config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    def with_rope(part: Any) -> Any:
        return part | _earlier_rope(part.get("rope_parameters") or {}) if isinstance(part, dict) else part

    config = {name: with_rope(value) for name, value in with_rope(config | fields).items()}
    if config.get("is_causal") is False:
        # Before version 5, transformers ignores is_causal and would attend causally. It parses the keys of pruned_heads
        # as numbers, so its error shows this text; later versions do not read the field.
        config["pruned_heads"] = {"the model attends both ways, which needs transformers 5 or later": []}
    return {name: value for name, value in config.items() if name not in fields or value is not None}


def _marks_for_earlier(tokenizer: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(tokenizer.get("extra_special_tokens"), list):
        return tokenizer
    return {
        "additional_special_tokens" if name == "extra_special_tokens" else name: value
        for name, value in tokenizer.items()
    }


def _earlier_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that transformers used before `rope_parameters`, which Gemma 3 has for each layer type."""
    if "rope_theta" in parameters:
        scaling = {name: value for name, value in parameters.items() if name not in ("rope_theta", _PARTIAL)}
        earlier = {name: parameters[name] for name in ("rope_theta", _PARTIAL) if name in parameters}
        return earlier | {"rope_scaling": scaling if scaling.get("rope_type", "default") != "default" else None}
    earlier = {}
    if full := parameters.get("full_attention"):
        earlier = _earlier_rope(full)
        if sliding := parameters.get("sliding_attention"):
            earlier["rope_local_base_freq"] = sliding["rope_theta"]
    return earlier


def _change(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Apply a change to a JSON file. The file is replaced, not rewritten: it may be a link to someone else's."""
    before = json.loads(path.read_text())
    after = change(before)
    if after == before:
        return
    with replacing(path, durable=False) as partial:
        partial.write_text(json.dumps(after, indent=2) + "\n")
        partial.chmod(path.stat().st_mode)


def share(folder: Path) -> None:
    """Give weights the permissions of config.json: safetensors writes files that only their owner can read."""
    for file in folder.glob("*.safetensors"):
        if file.stat().st_nlink == 1:  # a hard link may be someone else's file
            file.chmod((folder / "config.json").stat().st_mode)
