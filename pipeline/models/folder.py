"""What exports of all families share: a Hugging Face folder that earlier versions of transformers read, too."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.models import loading
from pipeline.storage.atomic import replacing

_PARTIAL = "partial_rotary_factor"


def base_of(base: str | None) -> str:
    """The line of a model card for what training began with, if that is of the hub."""
    return f"base_model: {base}\n" if base and not Path(base).exists() else ""


def finish(folder: Path, fields: dict[str, Any] | None = None) -> None:
    """Make what transformers wrote readable for its earlier versions and for other users.

    fields: of config.json that are to be other than transformers wrote them; None: to be left out.

    Before version 5, transformers and what else reads these folders look for `rope_theta` and `rope_scaling`, and
    would take defaults in place of `rope_parameters`; they also want additional_special_tokens by that name.
    """
    _change(folder / "config.json", partial(_for_earlier, fields=fields or {}))
    if (settings := folder / "tokenizer_config.json").is_file():
        _change(settings, _marks_for_earlier)
    share(folder)


def note_images(folder: Path, as_stored: bool) -> None:
    """Have the config.json in a folder say how the model takes images, where it is not upright."""
    finish(folder, {loading.IMAGES: "as_stored" if as_stored else None})


def _for_earlier(config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    def with_rope(part: Any) -> Any:
        return part | _earlier_rope(part.get("rope_parameters") or {}) if isinstance(part, dict) else part

    config = {name: with_rope(value) for name, value in with_rope(config | fields).items()}
    if config.get("is_causal") is False:
        # Before version 5 transformers ignores is_causal, and would have each token see those before it alone. It reads
        # these names as numbers, later versions do not read them: so they are what its error says.
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
    """The fields that transformers had before `rope_parameters`, for these, which Gemma 3 has by sorts of layers."""
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
    """A JSON file, where the change makes one. Anew: it may be a link to somebody else's."""
    before = json.loads(path.read_text())
    after = change(before)
    if after == before:
        return
    with replacing(path, durable=False) as partial:
        partial.write_text(json.dumps(after, indent=2) + "\n")
        partial.chmod(path.stat().st_mode)


def share(folder: Path) -> None:
    """Let those read the weights who may read the rest: safetensors writes them for their owner alone."""
    for file in folder.glob("*.safetensors"):
        if file.stat().st_nlink == 1:  # or it is somebody's own
            file.chmod((folder / "config.json").stat().st_mode)
