"""Shared by all families' exports: write Hugging Face folders that earlier versions of transformers can also read."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template

from pipeline.models.compact import SmallKind
from pipeline.models.loading import IMAGES, reads_as_stored
from pipeline.models.sentence_transformers import MODULES
from pipeline.storage.atomic import replacing

SIZES = "matryoshka_dimensions"  # the name that vLLM reads in config.json
_SMALLER = re.compile(r"\n## Smaller vectors\n.*?(?=\n#|\Z)", re.DOTALL)
_UNSCALED = ("rope_theta", "partial_rotary_factor")


def write_card(folder: Path, template: Path, base: str | None = None, **fields: object) -> None:
    """Write the model card from a jinja template.

    base: the model that training started from, which the card names if it is on the hub.
    """
    card = Template(template.read_text(), trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    named = base if base and not Path(base).exists() else None
    (folder / "README.md").write_text(card.render(base_model=named, **fields))


def finish(folder: Path, fields: dict[str, Any] | None = None) -> None:
    """Make a folder written by transformers readable by earlier versions and by other users of the machine.

    fields: config.json fields to override; None removes a field.

    Before version 5, transformers and other readers of these folders expect `rope_theta` and `rope_scaling`, and use
    defaults if they find only `rope_parameters`. They also expect the name `additional_special_tokens`.
    """
    config = json.loads((folder / "config.json").read_text())
    _replace(folder / "config.json", _for_earlier(config | (fields or {}), fields or {}))
    if (settings := folder / "tokenizer_config.json").is_file():
        tokenizer = json.loads(settings.read_text())
        if isinstance(tokenizer.get("extra_special_tokens"), list):
            earlier = {"extra_special_tokens": "additional_special_tokens"}
            _replace(settings, {earlier.get(name, name): value for name, value in tokenizer.items()})
    share(folder)


def note_images(folder: Path, source: str, images: str | None) -> None:
    """Record in config.json that a model reads images as stored, by `reads_as_stored`; upright is not recorded."""
    finish(folder, {IMAGES: "as_stored" if reads_as_stored(source, images) else None})


def note_sizes(folder: Path, dimension: int, sizes: Sequence[int], kind: SmallKind | None = None) -> None:
    """Record in config.json, and on the model card, how vectors can be made smaller; nothing, if they cannot.

    dimension: of the model's vectors.  sizes: to which they can be cut; may include all.  kind: the type to which they
    can be rounded.
    """
    finish(folder, {SIZES: list(sizes) or None})
    smaller = [str(size) for size in sizes if size < dimension]
    notes = []
    if smaller:
        note = (
            f"Vectors can be cut to their first {', '.join(smaller)} numbers, and normalised again. The model was "
            "trained at these sizes."
        )
        if (folder / MODULES).is_file():
            note += (
                f" With sentence-transformers: `model.encode(texts, truncate_dim={smaller[-1]}, "
                "normalize_embeddings=True)`."
            )
        notes.append(note)
    if kind:
        stored = {"int8": "a byte for each number (int8)", "binary": "a bit for each number, its sign (binary)"}[kind]
        notes.append(f"Vectors can be stored with {stored}. The model was trained with vectors rounded to this type.")
    if notes:
        with (folder / "README.md").open("a") as card:
            card.write("\n## Smaller vectors\n\n" + "\n\n".join(notes) + "\n")


def smaller_vectors(card: str) -> str:
    """Return the section that `note_sizes` wrote on a card; empty without one."""
    return found[0].strip() if (found := _SMALLER.search(card)) else ""


def without_smaller_vectors(card: str) -> str:
    """Return a card without the section that `note_sizes` writes."""
    return _SMALLER.sub("", card)


def _for_earlier(config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    def with_rope(part: Any) -> Any:
        return part | _earlier_rope(part.get("rope_parameters") or {}) if isinstance(part, dict) else part

    config = {name: with_rope(value) for name, value in with_rope(config).items()}
    if config.get("is_causal") is False:
        # Before version 5, transformers ignores is_causal and would attend causally. It parses the keys of pruned_heads
        # as numbers, so its error shows this text; later versions do not read the field.
        config["pruned_heads"] = {"the model attends both ways, which needs transformers 5 or later": []}
    return {name: value for name, value in config.items() if name not in fields or value is not None}


def _earlier_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that transformers used before `rope_parameters`, if these are the same for all layers."""
    if "rope_theta" not in parameters:
        return {}
    scaling = {name: value for name, value in parameters.items() if name not in _UNSCALED}
    earlier = {name: parameters[name] for name in _UNSCALED if name in parameters}
    plain = scaling.get("rope_type", "default") == "default" and "mrope_section" not in scaling
    return earlier | {"rope_scaling": None if plain else scaling}


def _replace(file: Path, values: dict[str, Any]) -> None:
    """Write a JSON file. It is replaced, not rewritten: it may be a link to someone else's."""
    if values == json.loads(file.read_text()):
        return
    with replacing(file, durable=False) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n")
        partial.chmod(file.stat().st_mode)


def share(folder: Path) -> None:
    """Give weights the permissions of config.json: safetensors writes files that only their owner can read."""
    for file in folder.glob("*.safetensors"):
        if file.stat().st_nlink == 1:  # a hard link may be someone else's file
            file.chmod((folder / "config.json").stat().st_mode)
