"""Write a LLaVE as a Hugging Face folder with tokenizer, image processor and model card."""

import json
from pathlib import Path

import torch
from transformers import LlavaOnevisionImageProcessorPil, PreTrainedTokenizerBase

from pipeline.data.sample import IMAGE_MARK
from pipeline.models import loading, sentence_transformers
from pipeline.models.folder import finish, write_card
from pipeline.models.llave.checks import newline_position, pinpoints_of, sides_of
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
    tokenizer = loading.tokenizer(source)
    sees = _prepare_processor(model, tokenizer, folder)
    tokenizer.save_pretrained(folder)
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
        sees=sees,
    )
    finish(folder, {"architectures": ["LlavaOnevisionModel"]})


def _prepare_processor(model: Llave, tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Write what transformers' processor and sentence-transformers need of the prompt; return whether they see images.

    transformers' processor knows an image's placeholder by its name, the model by its number.
    """
    sees = tokenizer.convert_tokens_to_ids(IMAGE_MARK) == model.config.image_token_id
    image = f"{IMAGE_MARK}\n" if sees else ""
    tokenizer.chat_template = sentence_transformers.chat_template(PREFIX, SUFFIX, image=image)
    side, patch = sides_of(model.config)
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": (side // patch) ** 2,
        "vision_feature_select_strategy": model.config.vision_feature_select_strategy,
        "vision_aspect_ratio": model.config.vision_aspect_ratio,
    }
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    modalities = sentence_transformers.MODALITIES if sees else ("text",)
    # transformers' processor adds no tokens to a prompt that begins with the start token, and may not be asked to.
    bare = bool(tokenizer.bos_token) and PREFIX.startswith(str(tokenizer.bos_token))
    reads = sentence_transformers.messages(*modalities, special_tokens=bare)
    sentence_transformers.write(folder, reads, "lasttoken", model.dimension)
    return sees
