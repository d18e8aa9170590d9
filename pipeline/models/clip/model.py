"""CLIP with both towers trained (arXiv 2103.00020), the baseline for LLM2CLIP."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from pipeline.data.batch import Encoded
from pipeline.models import loading, sentence_transformers
from pipeline.models.chunks import Packed
from pipeline.models.clip.config import ClipArchitecture
from pipeline.models.clip.processor import load_config, text_of
from pipeline.models.flops import StepFlops, Tower, attention_width, image_flops, per_row, trains
from pipeline.models.folder import finish
from pipeline.models.patches import embed_bytes
from pipeline.models.two_tower import TwoTower
from pipeline.models.vision import Pixels, image_processor


class Clip(TwoTower):
    def __init__(self, clip: CLIPModel, pixels: Pixels) -> None:
        super().__init__(pixels, cast(int, clip.config.projection_dim))
        del clip.logit_scale  # the loss owns the temperature
        embed_bytes(clip, pixels.mean, pixels.std)
        self.clip = clip

    @classmethod
    def load(cls, path: str, dtype: torch.dtype | Literal["auto"]) -> "Clip":
        """Load from a folder or hub name."""
        model = loading.open_model(CLIPModel, path, load_config(path), dtype)
        return cls(model, Pixels.load(path))

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.clip.get_image_features(pixel_values=pixels).pooler_output

    def texts(self, packed: Packed, features: torch.Tensor | None) -> torch.Tensor:
        each = zip(packed.input_ids.split(packed.lengths), packed.tiles_of, strict=True)
        # The end token is pooled. Attention is causal, so it ignores the padding. A dummy text is one end token.
        end = torch.full((1,), cast(int, text_of(self.clip.config).eos_token_id), device=packed.input_ids.device)
        ids = pad_sequence([ids for ids, tiles in each if not tiles] or [end], batch_first=True)
        return self.clip.get_text_features(input_ids=ids).pooler_output


def step_flops(model: Clip) -> StepFlops:
    clip: Any = model.clip
    image = image_flops(clip.vision_model, model.pixels.size, 1, clip.visual_projection)
    text = Tower.of(clip.text_model, attention_width(text_of(clip.config)))
    projection = per_row(clip.text_projection, inputs=trains(clip.text_model))

    def flops(items: Sequence[Encoded], _: int) -> float:
        texts = (len(item.input_ids) for item in items if not item.images)
        of_texts = sum(text.flops(tokens, causal=True) + projection for tokens in texts)
        return of_texts + image * sum(len(each.tiles) for item in items for each in item.images)

    return flops


def build(architecture: ClipArchitecture, texts: Iterable[str], seed: int, folder: Path) -> None:
    """Write a folder with a CLIP of random weights and a tokenizer trained on `texts`."""
    vision, text = dict(architecture.vision), dict(architecture.text)
    tokenizer = CLIPTokenizer().train_new_from_iterator(texts, int(text["vocab_size"]), show_progress=False)
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text |= {"vocab_size": len(tokenizer), **marks}
    dimension: Any = vision.get("projection_dim", CLIPVisionConfig().projection_dim)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=dimension)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.model_max_length = text_of(config).max_position_embeddings
    tokenizer.save_pretrained(folder)
    size = cast(int, cast(CLIPVisionConfig, config.vision_config).image_size)
    image_processor(size).save_pretrained(folder)


def save(model: Clip, source: str, folder: Path) -> None:
    """Write the model as a folder in transformers' format, with the tokenizer and image processor of `source`."""
    scale = torch.tensor(model.clip.config.logit_scale_init_value)  # transformers reports it missing otherwise
    model.clip.save_pretrained(folder, state_dict=model.clip.state_dict() | {"logit_scale": scale})
    loading.tokenizer(source).save_pretrained(folder)
    loading.image_processor(source, CLIPImageProcessorPil).save_pretrained(folder)
    (folder / "README.md").write_text(
        f"---\nlibrary_name: transformers\n---\n\n# CLIP\n\nA CLIP of {model.dimension} dimensions: "
        "`CLIPModel.from_pretrained(FOLDER)`, without a logit scale of its own. With sentence-transformers: "
        "`SentenceTransformer(FOLDER).encode(...)` for texts and pictures.\n"
    )
    context = text_of(model.clip.config).max_position_embeddings
    sentence_transformers.write(folder, sentence_transformers.towers(context), None, model.dimension)
    finish(folder)
