"""Write a LLaVE as a Hugging Face folder with tokenizer, image processor and model card."""

from pathlib import Path

import torch
from transformers import LlavaOnevisionImageProcessorPil

from pipeline.models import loading
from pipeline.models.folder import finish, write_card
from pipeline.models.llave.checks import newline_position, pinpoints_of
from pipeline.models.llave.model import Llave
from pipeline.models.llave.processor import PREFIX, SUFFIX


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
    write_card(
        folder,
        Path(__file__).with_name("card.md.jinja"),
        base,
        prefix=repr(PREFIX),
        suffix=repr(SUFFIX),
        ratio=model.config.vision_aspect_ratio,
        newline=newline_position(model.config),
    )
    finish(folder, {"architectures": ["LlavaOnevisionModel"]})
