"""CLIP, whose two towers are both trained (arXiv 2103.00020): what LLM2CLIP is compared with."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    PreTrainedTokenizerBase,
)

from pipeline.config import Architecture
from pipeline.data.collate import Encoded, Packed
from pipeline.errors import PipelineError
from pipeline.models import loading
from pipeline.models.checkpointing import checkpoint_layers
from pipeline.models.folder import finish
from pipeline.models.loading import refuse_unknown, require_vocabulary
from pipeline.models.two_tower import TwoTower
from pipeline.models.vision import Pixels


@dataclass(frozen=True)
class ClipTexts:
    """Texts -> token ids between the tokenizer's marks, cut at the model's context."""

    tokenizer: PreTrainedTokenizerBase
    context: int

    @classmethod
    def load(cls, path: str, max_tokens: int) -> "ClipTexts":
        config = load_config(path).text_config
        tokenizer = loading.tokenizer(path, config.vocab_size)
        require_end(path, tokenizer, config)
        return cls(tokenizer, min(config.max_position_embeddings, max_tokens))

    def tokenized(self, text: str) -> Encoded:
        ids = self.tokenizer(text, truncation=True, max_length=self.context)["input_ids"]
        return Encoded(np.array(ids, np.int32))


class Clip(TwoTower):
    """transformers' CLIP."""

    def __init__(self, clip: CLIPModel, pixels: Pixels) -> None:
        super().__init__(pixels)
        del clip.logit_scale  # the loss has the temperature
        self.clip = clip

    @classmethod
    def load(cls, path: str, dtype: torch.dtype | Literal["auto"]) -> "Clip":
        """From a folder or hub name."""
        model = loading.open_model(CLIPModel, path, load_config(path), dtype)
        return cls(model, Pixels.load(path))

    @property
    def dimension(self) -> int:
        return self.clip.config.projection_dim

    def checkpoint_activations(self) -> None:
        checkpoint_layers(self.clip)

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.clip.get_image_features(pixel_values=pixels).pooler_output

    def texts(self, packed: Packed, features: torch.Tensor | None) -> torch.Tensor:
        each = zip(packed.input_ids.split(packed.lengths), packed.tiles_of, strict=True)
        # The end of a text is pooled; attention is causal: nothing behind it is seen. A stand-in is an end alone.
        end = torch.full((1,), self.clip.config.text_config.eos_token_id, device=packed.input_ids.device)
        ids = pad_sequence([ids for ids, tiles in each if not tiles] or [end], batch_first=True)
        return self.clip.get_text_features(input_ids=ids).pooler_output


def load_config(path: str) -> CLIPConfig:
    """The config of a CLIP's folder or hub name; PipelineError if there is none."""
    if (kind := loading.config_dict(path).get("model_type")) != "clip":
        raise PipelineError(f"{path} is a {kind} model; expected clip")
    return loading.config(path, CLIPConfig)


def require_end(path: str, tokenizer: PreTrainedTokenizerBase, config: CLIPTextConfig) -> None:
    """Raise PipelineError where texts do not end with the token that CLIP pools: all would have the first one's vector.

    For configs of old, whose eos_token_id is 2, that is the one of the largest number.
    """
    ids, end = tokenizer("a")["input_ids"], config.eos_token_id
    if not ids or ids[-1] != (max(ids) if end == 2 else end):
        last = tokenizer.convert_ids_to_tokens(ids[-1:])
        raise PipelineError(
            f"{path}: its tokenizer ends texts with {last[0] if last else None!r}, and its model pools token {end} "
            f"(text_config.eos_token_id={end}): is the tokenizer another model's?"
        )


def check_architecture(architecture: Architecture) -> None:
    """Refuse what transformers' configurations do not know."""
    refuse_unknown("vision", architecture.vision, CLIPVisionConfig())
    refuse_unknown("text", architecture.text, CLIPTextConfig())
    require_vocabulary(architecture.text)


def build(architecture: Architecture, texts: Iterable[str], seed: int, folder: Path) -> None:
    """Write a CLIP of random weights, with a tokenizer trained on `texts`, as a folder."""
    vision, text = dict(architecture.vision), dict(architecture.text)
    tokenizer = CLIPTokenizer().train_new_from_iterator(texts, int(text["vocab_size"]), show_progress=False)
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text |= {"vocab_size": len(tokenizer), **marks}
    dimension: Any = vision.get("projection_dim", CLIPVisionConfig().projection_dim)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=dimension)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.model_max_length = config.text_config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    size = config.vision_config.image_size
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        folder
    )


def save(model: Clip, source: str, folder: Path) -> None:
    """Write it as a folder in transformers' format, with the tokenizer and image processor of `source`."""
    scale = torch.tensor(model.clip.config.logit_scale_init_value)  # which transformers misses where there is none
    model.clip.save_pretrained(folder, state_dict=model.clip.state_dict() | {"logit_scale": scale})
    loading.tokenizer(source).save_pretrained(folder)
    loading.image_processor(source, CLIPImageProcessorPil).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "README.md").write_text(
        f"---\nlibrary_name: transformers\n---\n\n# CLIP\n\nA CLIP of {config['projection_dim']} dimensions: "
        "`CLIPModel.from_pretrained(FOLDER)`, without a logit scale of its own.\n"
    )
    finish(folder)
