"""Write a Qwen-VL embedder as a Hugging Face folder with tokenizer, image processor and model card."""

import shutil
from pathlib import Path

import torch
from transformers import Qwen2Tokenizer

from pipeline.models import loading
from pipeline.models.files import fetched
from pipeline.models.folder import finish, write_card
from pipeline.models.qwen_vl import checks
from pipeline.models.qwen_vl.model import QwenVL
from pipeline.models.qwen_vl.processor import image_processor
from pipeline.models.qwen_vl.prompts import PROMPTS

# Files that transformers' own processor reads besides tokenizer and image processor.
_OTHERS = ("video_preprocessor_config.json", "chat_template.json", "chat_template.jinja")


def save_folder(
    model: QwenVL, weights: dict[str, torch.Tensor], source: str, folder: Path, base: str | None = None
) -> None:
    """Write `weights` (the model's parameters by name) as a folder in transformers' format, with a model card.

    source: folder or hub name of the tokenizer.  base: the model that training started from; the card names it if it is
    on the hub. The model's config has the `Settings` by which it was trained.
    """
    settings, whole = checks.Settings.of(model.config, source), checks.version(model.config).whole.__name__
    model.save_pretrained(folder, state_dict=weights, save_original_format=False)  # names do not depend on ZeRO
    loading.tokenizer(source, kind=Qwen2Tokenizer).save_pretrained(folder)
    image_processor(model.config, source).save_pretrained(folder)
    files = fetched(source, weights=False)
    for name in _OTHERS:
        if (files / name).is_file():
            shutil.copyfile(files / name, folder / name)
    card = Path(__file__).with_name("card.md.jinja")
    prompt = PROMPTS[settings.prompt]
    prefix, suffix = repr(prompt.prefix.format(settings.instruction)), repr(prompt.suffix)
    write_card(folder, card, base, whole=whole, prefix=prefix, suffix=suffix, marked=prompt.marked, axes=prompt.axes)
    finish(folder, {"architectures": [whole], checks.SETTINGS: vars(settings)})
