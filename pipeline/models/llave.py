"""LLaVE: LLaVA-OneVision as an embedder (arXiv 2503.04812).

An item's embedding is the language model's last hidden state at the prompt's last token, as a unit vector.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image as Picture
from PIL.Image import Resampling
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2Tokenizer,
    SiglipVisionConfig,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from pipeline.config import Architecture
from pipeline.data.collate import Encoded, Image, Packed, sent
from pipeline.data.resize import compiled
from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK, BadSample, Item
from pipeline.data.tiles import Tiling, decode_image
from pipeline.data.video import sample_frames
from pipeline.errors import PipelineError
from pipeline.models import loading
from pipeline.models.attention import Segments, implementation, pads
from pipeline.models.checkpointing import checkpoint_layers
from pipeline.models.files import fetched
from pipeline.models.loading import reads_as_stored, refuse_unknown, require_vocabulary
from pipeline.models.packing import check_packing
from pipeline.models.qwen2 import keep_less, pool_in_last_layer
from pipeline.models.tower import MEAN, STD, normalised, tower_features

# The published prompt: the assistant's turn is one newline, and so is the last token, which is pooled.
PREFIX = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n\n<|im_end|>\n"

NEWLINE_POSITIONS = ("one_token", "grid")
ORIGINAL = "LlavaQwenForCausalLM"  # the architecture of original checkpoints

Pinpoints = Sequence[tuple[int, int]]  # (height, width)

_TURNS = ("<|im_start|>", "<|im_end|>")
_MARKS = re.compile(f"({IMAGE_MARK}|{VIDEO_MARK})")


def prompt(text: str) -> str:
    return PREFIX + text.strip() + SUFFIX


@dataclass(frozen=True)
class Processor:
    """Items -> token ids and tiles, as LLaVE reads them; of a video, `video_frames` frames.  as_stored: see `rgb`."""

    tokenizer: PreTrainedTokenizerBase
    tiling: Tiling
    image_token_id: int
    video_token_id: int
    max_tokens: int
    video_frames: int = 8
    as_stored: bool = False

    @classmethod
    def load(
        cls,
        path: str,
        max_tokens: int,
        video_frames: int = 8,
        pinpoints: Pinpoints | None = None,
        newline: str | None = None,
        images: str | None = None,
    ) -> "Processor":
        """The processor of a model folder or hub name.

        pinpoints: sizes to tile images to, newline: where a video has newlines, images: how they are read, if not the
        model's own.
        """
        compiled()  # once, not in every worker
        config = load_config(path, pinpoints, newline)
        tokenizer = loading.tokenizer(path, config.text_config.vocab_size)
        _require_marks(path, config, tokenizer)
        _require_image_processor(path, config)
        ids = config.image_token_id, config.video_token_id
        return cls(tokenizer, tiling(config), *ids, max_tokens, video_frames, reads_as_stored(path, images))

    def encode(self, item: Item) -> Encoded:
        """Token ids with a placeholder for each image or video token. A text too long is cut at its end, images never.

        Raises `BadSample` if an image or the video is undecodable or does not fit `max_tokens`, or if the text's
        marks are not as many as they are.
        """
        images = [partial(decode_image, image, self.as_stored) for image in item.images]
        frames = None if item.video is None else partial(sample_frames, item.video, self.video_frames)
        return self.encode_parts(item.text, images, frames)

    def encode_parts(
        self, text: str, images: Sequence[Callable[[], Picture]], frames: Callable[[], Sequence[Picture]] | None
    ) -> Encoded:
        """The same of a text with RGB images, and a video's RGB frames, all of which are used.

        Each is called when its turn comes: one decoded image is in memory at a time, none where the marks are wrong.
        """
        pieces = _MARKS.split(prompt(text))
        for mark, name, count in (
            (IMAGE_MARK, "images", len(images)),
            (VIDEO_MARK, "videos", int(frames is not None)),
        ):
            if pieces.count(mark) != count:
                raise BadSample(f"{pieces.count(mark)} {mark} marks in the text, {count} {name}")
        anyres = len(images) == 1
        encoded, ids, pictures = [], [], (decode() for decode in images)
        for piece in pieces:
            if piece == IMAGE_MARK:
                picture = next(pictures)
                encoded.append(Image(self.tiling.cut(picture, anyres=anyres), picture.height, picture.width))
                ids += [self.image_token_id] * self.tiling.tokens(picture.height, picture.width, anyres=anyres)
            elif piece == VIDEO_MARK:
                shown = frames()
                encoded.append(Image(self.tiling.cut_frames(shown), shown[0].height, shown[0].width, video=True))
                ids += [self.video_token_id] * self.tiling.video_tokens(len(shown))
            else:
                ids += self._tokenize(piece)
        ids = np.array(ids, np.int32)
        if len(ids) > self.max_tokens:
            kept, cut = np.split(ids, [self.max_tokens - len(self._suffix)])
            if np.isin(cut, (self.image_token_id, self.video_token_id)).any():
                raise BadSample(f"{len(ids)} tokens with its images and video, of {self.max_tokens} at most")
            ids = np.concatenate([kept, self._suffix])
        return Encoded(ids, tuple(encoded))

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    @cached_property
    def _suffix(self) -> np.ndarray:
        return np.array(self._tokenize(SUFFIX), np.int32)


class Llave(LlavaOnevisionModel):
    """LLaVA-OneVision without an LM head, from packed items to unit vectors.

    always_with_images: every forward pass is as one with images (see `forward`), so that all it trains has a gradient.
    """

    always_with_images = False

    def __init__(self, config: LlavaOnevisionConfig) -> None:
        super().__init__(config)
        keep_less(self.language_model)
        pool_in_last_layer(self.language_model)

    @classmethod
    def load(
        cls,
        path: str,
        dtype: torch.dtype | Literal["auto"],
        pinpoints: Pinpoints | None = None,
        attention: str = "sdpa",
        newline: str | None = None,
    ) -> "Llave":
        """From a folder or hub name in transformers' format (under ZeRO-3 straight into its partitions).

        dtype: of the weights; "auto" is the one they are stored in.  attention: see pipeline/models/attention.py.
        pinpoints: sizes to tile images to, newline: where a video has newlines, if not the model's own.
        """
        config = cls.config_for(path, pinpoints, attention, newline)
        return loading.open_model(cls, path, config, dtype, None, check_language_model)

    @staticmethod
    def config_for(
        path: str, pinpoints: Pinpoints | None, attention: str, newline: str | None = None
    ) -> LlavaOnevisionConfig:
        """The config with which `load` builds the model."""
        config = load_config(path, pinpoints, newline)
        config.mm_newline_position = newline_position(config)
        config._attn_implementation = {"text_config": implementation(attention), "vision_config": "sdpa"}
        return config

    @property
    def pads(self) -> bool:
        return pads(self.language_model.config)

    @property
    def dimension(self) -> int:
        return self.config.text_config.hidden_size

    def checkpoint_activations(self) -> None:
        checkpoint_layers(self)

    def forward(self, packed: Packed, with_images: bool, features: torch.Tensor | None = None) -> torch.Tensor:
        """N packed items -> (N, hidden) float32 unit rows.

        with_images: whether any rank has an image or video in this forward pass. A rank that has none then sends one
        dummy tile through tower and projector, times zero: under ZeRO-3 every rank must run the same modules.
        features: (tiles, patches², width) of the tower, where it is not part of the model.
        """
        embeds = self.language_model.embed_tokens(packed.input_ids)
        if packed.images:
            # Found on the host, which else would wait until the device has done all that it was given before.
            marks = torch.tensor([self.config.image_token_id, self.config.video_token_id])
            placeholders = sent(torch.isin(packed.host_ids, marks).nonzero()[:, 0], embeds.device)
            if features is None:
                features = tower_features(self.vision_tower, normalised(packed.tiles, embeds.device, embeds.dtype))
            embeds = embeds.index_copy(0, placeholders, self.image_tokens(packed, features))
        elif with_images or self.always_with_images:
            dummy = self.multi_modal_projector(self._dummy_features(embeds))
            embeds = embeds + 0 * (dummy.sum() + self.image_newline.sum())
        hidden = self.language_model(
            inputs_embeds=embeds[None],
            position_ids=packed.position_ids[None],
            segments=Segments(packed.lengths, embeds.device),
            use_cache=False,
        ).last_hidden_state[0]
        return F.normalize(hidden.float(), dim=-1)

    def image_tokens(self, packed: Packed, features: torch.Tensor) -> torch.Tensor:
        """All images' and videos' rows, in the order of their placeholders: (placeholders, hidden)."""
        features = self.multi_modal_projector(features).split([len(image.tiles) for image in packed.images])
        rows = []
        for tiles, image in zip(features, packed.images, strict=True):
            if image.video and self.config.mm_newline_position == "grid":
                frames = self.apply_pooling(tiles)
                side = math.isqrt(frames.shape[1])
                newlines = self.image_newline.expand(len(frames), side, 1, -1)
                rows.append(torch.cat([frames.unflatten(1, (side, side)), newlines], dim=2).flatten(0, 2))
            elif image.video:
                rows += [self.apply_pooling(tiles).flatten(0, 1), self.image_newline[None]]
            else:
                rows += self.pack_image_features(
                    [tiles],
                    [(image.height, image.width)],
                    image_newline=self.image_newline,
                    vision_aspect_ratio=self.config.vision_aspect_ratio,
                )[0]
        return torch.cat(rows)

    def _dummy_features(self, like: torch.Tensor) -> torch.Tensor:
        """The tower's of one black tile, or zeros where the tower is not part of the model."""
        vision = self.config.vision_config
        if self.vision_tower is None:
            return like.new_zeros(1, 1, vision.hidden_size)
        return tower_features(self.vision_tower, like.new_zeros(1, 3, vision.image_size, vision.image_size))


class TowerlessLlave(Llave):
    """The model without its vision tower, whose features it is given."""

    _keys_to_ignore_on_load_unexpected = (r"^(model\.)?vision_tower",)

    def __init__(self, config: LlavaOnevisionConfig) -> None:
        super().__init__(config)
        self.vision_tower = None


# transformers finds a class's checkpoint names by the name of the class.
for name in ("Llave", "TowerlessLlave"):
    register_checkpoint_conversion_mapping(name, get_checkpoint_conversion_mapping("LlavaOnevisionModel"))


def build(architecture: Architecture, texts: Iterable[str], seed: int, folder: Path) -> None:
    """Write a model of random weights, with a tokenizer trained on `texts`, as a folder that `load` reads.

    It is written once and then loaded by every rank, which is also the one way to ZeRO-3's partitions.
    """
    tokenizer = train_tokenizer(texts, int(architecture.text["vocab_size"]))
    text = architecture.text | {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**architecture.vision, vision_use_head=False),
        text_config=Qwen2Config(**text),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_MARK),
        video_token_id=tokenizer.convert_tokens_to_ids(VIDEO_MARK),
        image_grid_pinpoints=[list(size) for size in architecture.image_grid_pinpoints],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlavaOnevisionModel(config).save_pretrained(folder, save_original_format=False)
    tokenizer.save_pretrained(folder)
    size = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
    LlavaOnevisionImageProcessorPil(
        size=size,
        image_grid_pinpoints=config.image_grid_pinpoints,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    ).save_pretrained(folder)


def tiling(config: LlavaOnevisionConfig) -> Tiling:
    """How a model of this config cuts images."""
    vision = config.vision_config
    return Tiling(
        size=vision.image_size,
        patches=vision.image_size // vision.patch_size,
        pinpoints=tuple(tuple(size) for size in config.image_grid_pinpoints),
        max_tiles=int(config.vision_aspect_ratio.removeprefix("anyres_max_")),
        newline=newline_position(config),
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE and special tokens, with at most `vocab_size` tokens, of these texts in their prompt."""
    return Qwen2Tokenizer().train_new_from_iterator(
        (prompt(text) for text in texts),
        vocab_size,
        new_special_tokens=["<|im_start|>", "<|im_end|>", IMAGE_MARK, VIDEO_MARK],
        show_progress=False,
    )


def check_architecture(architecture: Architecture) -> None:
    """Refuse what transformers' configurations do not know: they would take it and ignore it."""
    refuse_unknown("vision", architecture.vision, SiglipVisionConfig())
    refuse_unknown("text", architecture.text, Qwen2Config())
    require_vocabulary(architecture.text)


def check_language_model(path: str, config: LlavaOnevisionConfig) -> None:
    """Raise PipelineError where the model would not keep packed items apart."""
    check_packing(path, config.text_config, _of_text)


def _of_text(text: Qwen2Config) -> Llave:
    """A model of this language model, and next to nothing else."""
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8
    )
    config = LlavaOnevisionConfig(vision_config=vision, text_config=text)
    config._attn_implementation = {"text_config": implementation("sdpa"), "vision_config": "sdpa"}
    return TowerlessLlave(config)


def load_config(path: str, pinpoints: Pinpoints | None = None, newline: str | None = None) -> LlavaOnevisionConfig:
    """The config of a folder or hub name; PipelineError if it is of no model that `Llave` reads.

    pinpoints: sizes to tile images to, newline: where a video has newlines, if not the model's own.
    """
    given = loading.config_dict(path)
    if is_original(given):
        raise PipelineError(f"{path} is an original checkpoint: convert it with tools/convert_weights.py")
    if (kind := given.get("model_type")) != "llava_onevision":
        raise PipelineError(f"{path} is a {kind} model; expected llava_onevision")
    config = loading.config(path, LlavaOnevisionConfig)
    if config.text_config.model_type != "qwen2":
        raise PipelineError(f"{path}: its language model is a {config.text_config.model_type}; expected qwen2")
    if config.vision_config.model_type != "siglip_vision_model":
        raise PipelineError(
            f"{path}: its vision tower is a {config.vision_config.model_type}; expected siglip_vision_model"
        )
    if config.vision_feature_layer != -1:
        raise PipelineError(f"{path}: only vision_feature_layer=-1, the tower's last layer, is supported")
    require_newline(path, newline_position(config))
    with loading.reading(fetched(path, weights=False) / "config.json"):
        require_tiles(path, config)
    return with_own(config, pinpoints, newline)


def require_tiles(path: str | Path, config: LlavaOnevisionConfig) -> None:
    """Raise PipelineError where a config does not say how images are cut."""

    def refuse(name: str, value: object, expected: str) -> None:
        raise PipelineError(f"{path}: {name}={value!r} in its config.json must be {expected}")

    vision, pinpoints, ratio = config.vision_config, config.image_grid_pinpoints, config.vision_aspect_ratio
    if not isinstance(ratio, str) or not re.fullmatch(r"anyres_max_[1-9]\d{0,5}", ratio):
        refuse("vision_aspect_ratio", ratio, "anyres_max_N")
    if vision.patch_size > vision.image_size:
        refuse("vision_config.patch_size", vision.patch_size, f"at most the image_size, {vision.image_size}")
    if config.vision_feature_select_strategy != "full":
        refuse("vision_feature_select_strategy", config.vision_feature_select_strategy, "full")
    pairs = bool(pinpoints) and all(isinstance(size, list | tuple) and len(size) == 2 for size in pinpoints)
    sizes = [side for size in pinpoints for side in size] if pairs else [0]
    if not all(type(side) is int and 0 < side <= 2**16 and side % vision.image_size == 0 for side in sizes):
        refuse("image_grid_pinpoints", pinpoints, f"pairs of multiples of the image_size, {vision.image_size}")


def _require_marks(path: str, config: LlavaOnevisionConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise PipelineError where the prompt's marks, or those of images and videos, are not tokens of their own."""
    vocabulary = tokenizer.get_vocab()
    if missing := [mark for mark in _TURNS if mark not in vocabulary]:
        raise PipelineError(f"{path}: its tokenizer has no token {missing[0]}, of which the prompt is made")
    texts = vocabulary.values() - tokenizer.added_tokens_decoder.keys()
    rows = config.text_config.vocab_size
    ids = {name: getattr(config, name) for name in ("image_token_id", "video_token_id")}
    for name, value in ids.items():
        if not isinstance(value, int) or not 0 <= value < rows:
            raise PipelineError(
                f"{path}: {name}={value!r} in its config.json is no row of the embedding ({rows:,} rows)"
            )
        if value in texts or len(set(ids.values())) == 1:
            raise PipelineError(f"{path}: {name}={value} in its config.json stands for something else, too: correct it")


def _require_image_processor(path: str, config: LlavaOnevisionConfig) -> None:
    """Raise PipelineError where images have another size than here. An export holds the processor."""
    its, side = loading.image_processor(path, LlavaOnevisionImageProcessorPil), config.vision_config.image_size
    if (its.size.height, its.size.width) != (side, side):
        raise PipelineError(f"{path}: its image processor makes tiles of size {dict(its.size)}, its model takes {side}")


def require_normalisation(path: str) -> None:
    """Raise PipelineError where the model was trained with pictures that are made otherwise than here."""
    its = loading.image_processor(path, LlavaOnevisionImageProcessorPil)
    for name in ("do_resize", "do_rescale", "do_normalize", "do_pad"):
        if not getattr(its, name):
            raise PipelineError(f"{path}: its image processor has {name}={getattr(its, name)}; only true is supported")
    if not math.isclose(its.rescale_factor, 1 / 255, rel_tol=1e-6) or its.resample != Resampling.BICUBIC:
        raise PipelineError(
            f"{path}: its image processor has rescale_factor={its.rescale_factor}, resample={its.resample}; only 1/255 "
            f"and {int(Resampling.BICUBIC)} (bicubic) are supported"
        )
    if {*its.image_mean} != {MEAN} or {*its.image_std} != {STD}:
        raise PipelineError(
            f"{path}: its image processor has image_mean={its.image_mean}, image_std={its.image_std}; only {MEAN} and "
            f"{STD} are supported"
        )


def is_original(config: dict) -> bool:
    """Whether it is of an original checkpoint. The model_type of some is llava, which is also that of others."""
    named = config.get("architectures")
    return config.get("model_type") == "llava_qwen" or (isinstance(named, list) and ORIGINAL in named)


def with_own(config: LlavaOnevisionConfig, pinpoints: Pinpoints | None, newline: str | None) -> LlavaOnevisionConfig:
    """The config itself, with what a recipe sets in place of the model's own."""
    if pinpoints:
        config.image_grid_pinpoints = [list(size) for size in pinpoints]
    if newline:
        config.mm_newline_position = newline
    return config


def newline_position(config: LlavaOnevisionConfig) -> str:
    """Where a video has its newlines: the original's field, without which transformers' checkpoints are one_token."""
    return getattr(config, "mm_newline_position", NEWLINE_POSITIONS[0])


def require_newline(path: str | Path, position: Any) -> None:
    """Raise PipelineError for an mm_newline_position, of the config at `path`, that is none of ours."""
    if position not in NEWLINE_POSITIONS:
        known = " and ".join(NEWLINE_POSITIONS)
        raise PipelineError(f"{path}: mm_newline_position={position!r} is not supported; {known} are")
