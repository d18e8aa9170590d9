"""Write a LLaVE as a Hugging Face folder with tokenizer, image processor and model card."""

from pathlib import Path

import torch
from transformers import LlavaOnevisionImageProcessorPil

from pipeline.models import loading
from pipeline.models.folder import base_of, finish
from pipeline.models.llave.checks import newline_position, pinpoints_of
from pipeline.models.llave.model import Llave
from pipeline.models.llave.processor import PREFIX, SUFFIX

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

    source: folder or hub name of the tokenizer and image processor.  base: the model that training started from; the
    card names it if it is on the hub.
    """
    model.save_pretrained(folder, state_dict=weights, save_original_format=False)  # names do not depend on ZeRO
    loading.tokenizer(source).save_pretrained(folder)
    pinpoints = [list(size) for size in pinpoints_of(model.config)]
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
