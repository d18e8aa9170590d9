"""A model as a Hugging Face folder, with its tokenizer, image processor and model card."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaOnevisionImageProcessorPil

from pipeline.models import loading
from pipeline.models.llave import PREFIX, SUFFIX, Llave, newline_position

_PARTIAL = "partial_rotary_factor"

_CARD = """\
---
library_name: transformers
pipeline_tag: feature-extraction
{base_model}tags:
- llave
- multimodal
- embedding
---

# LLaVE embedder

A LLaVE ([arXiv 2503.04812](https://arxiv.org/abs/2503.04812)) embedder of texts, images and videos: the unit vector
along the last hidden state at the prompt's last token. The dot product of two is their similarity.

```python
import torch
from transformers import AutoTokenizer, LlavaOnevisionModel

FOLDER = "."  # this folder, or its name on the hub
tokenizer, model = AutoTokenizer.from_pretrained(FOLDER), LlavaOnevisionModel.from_pretrained(FOLDER).eval()

def embed(text: str) -> torch.Tensor:
    prompt = {prefix!r} + text.strip() + {suffix!r}
    with torch.no_grad():
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        hidden = model(**ids, use_cache=False).last_hidden_state
    return torch.nn.functional.normalize(hidden[0, -1].float(), dim=-1)

print(embed("A cat and a dog") @ embed("Two animals"))
```

With an image, the text begins with a line `<image>`, in whose place stand as many `<image>` as the image has tokens,
and the model also takes the `pixel_values` and `image_sizes` of the folder's `LlavaOnevisionImageProcessor`.
Images are tiled as the config's `{ratio}`; a video has newlines by `mm_newline_position: {newline}`.{grid}
"""


def save_folder(
    model: Llave, weights: dict[str, torch.Tensor], source: str, folder: Path, base: str | None = None
) -> None:
    """Write `weights` (the model's parameters by name) as a folder in transformers' format, with a model card.

    Tokenizer and image processor are those of `source`, a folder or hub name.  base: the model that training began
    with, which the card names if it is of the hub.
    """
    model.save_pretrained(folder, state_dict=weights, save_original_format=False)  # names do not depend on ZeRO
    loading.tokenizer(source).save_pretrained(folder)
    pinpoints = [list(size) for size in model.config.image_grid_pinpoints]
    processor = loading.image_processor(source, LlavaOnevisionImageProcessorPil, image_grid_pinpoints=pinpoints)
    processor.save_pretrained(folder)
    newline = newline_position(model.config)
    card = _CARD.format(
        base_model=base_of(base),
        prefix=PREFIX,
        suffix=SUFFIX,
        ratio=model.config.vision_aspect_ratio,
        newline=newline,
        grid="\ntransformers itself knows only `one_token`." if newline == "grid" else "",
    )
    (folder / "README.md").write_text(card)
    finish(folder, {"architectures": ["LlavaOnevisionModel"]})


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
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(after, indent=2) + "\n")
    unfinished.chmod(path.stat().st_mode)
    unfinished.rename(path)


def share(folder: Path) -> None:
    """Let those read the weights who may read the rest: safetensors writes them for their owner alone."""
    for file in folder.glob("*.safetensors"):
        if file.stat().st_nlink == 1:  # or it is somebody's own
            file.chmod((folder / "config.json").stat().st_mode)
