"""Write a Qwen-VL embedder as a Hugging Face folder with tokenizer, image processor and model card."""

import json
import shutil
from pathlib import Path

import torch
from transformers import Qwen2Tokenizer

from pipeline.models import loading, sentence_transformers
from pipeline.models.files import fetched
from pipeline.models.folder import finish, write_card
from pipeline.models.qwen_vl import checks
from pipeline.models.qwen_vl.model import QwenVL
from pipeline.models.qwen_vl.processor import END, IMAGE_PAD, START, image_processor
from pipeline.models.qwen_vl.prompts import PROMPTS

_VIDEOS = "video_preprocessor_config.json"  # transformers' own processor reads it


def save_folder(
    model: QwenVL, weights: dict[str, torch.Tensor], source: str, folder: Path, base: str | None = None
) -> None:
    """Write `weights` (the model's parameters by name) as a folder in transformers' format, with a model card.

    source: folder or hub name of the tokenizer.  base: the model that training started from; the card names it if it is
    on the hub. The model's config has the `Settings` by which it was trained.
    """
    settings, whole = checks.Settings.of(model.config, source), checks.version(model.config).whole.__name__
    model.save_pretrained(folder, state_dict=weights, save_original_format=False)  # names do not depend on ZeRO
    prompt, tokenizer = PROMPTS[settings.prompt], loading.tokenizer(source, kind=Qwen2Tokenizer)
    sees = prompt.axes and prompt.marked  # transformers always gives an image's tokens rows and columns as positions
    tokenizer.chat_template = sentence_transformers.chat_template(
        prompt.prefix, prompt.suffix, settings.instruction, START + IMAGE_PAD + END if sees else "", strips=True
    )
    tokenizer.save_pretrained(folder)
    image_processor(model.config, source).save_pretrained(folder)
    # Beside adapters there is no config.json, by which transformers would find the processor.
    processor = {"processor_class": f"{whole.removesuffix('Model')}Processor"}
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    if (videos := fetched(source, weights=False) / _VIDEOS).is_file():
        shutil.copyfile(videos, folder / _VIDEOS)
    modalities = sentence_transformers.MODALITIES if sees else ("text",)
    reads = sentence_transformers.messages(*modalities, special_tokens=True)
    sentence_transformers.write(folder, reads, "lasttoken", model.dimension, settings.instruction)
    card = Path(__file__).with_name("card.md.jinja")
    prefix, suffix = repr(prompt.prefix.format(settings.instruction)), repr(prompt.suffix)
    shown = {"marked": prompt.marked, "axes": prompt.axes, "system": prompt.instruction is not None, "sees": sees}
    write_card(folder, card, base, whole=whole, prefix=prefix, suffix=suffix, **shown)
    finish(folder, {"architectures": [whole], checks.SETTINGS: vars(settings)})
