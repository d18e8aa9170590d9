"""LLaVE's processor: encodes items as token ids and tiles."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from PIL.Image import Image as Picture
from PIL.Image import Resampling
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
)

from pipeline.data.batch import Encoded, Image
from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK, BadSample, Item
from pipeline.data.tiles import Tiling, decode_image
from pipeline.data.video import sample_frames
from pipeline.errors import PipelineError
from pipeline.models import loading
from pipeline.models.llave.checks import MEAN, STD, Pinpoints, load_config, sides_of, text_of, tiling
from pipeline.models.loading import reads_as_stored

# The published prompt. The assistant's turn is one newline; the last token, also a newline, is pooled.
PREFIX = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n\n<|im_end|>\n"

_TURNS = ("<|im_start|>", "<|im_end|>")
_MARKS = re.compile(f"({IMAGE_MARK}|{VIDEO_MARK})")


def prompt(text: str) -> str:
    return PREFIX + text.strip() + SUFFIX


@dataclass(frozen=True)
class LlaveProcessor:
    """Encodes items as token ids and tiles; samples `video_frames` frames of a video.  as_stored: see `rgb`."""

    tokenizer: PreTrainedTokenizerBase
    tiling: Tiling
    image_token_id: int
    video_token_id: int
    max_tokens: int
    video_frames: int = 8
    as_stored: bool = False
    video_fps: float | None = None  # see sample_frames

    @classmethod
    def load(
        cls,
        path: str,
        max_tokens: int,
        video_frames: int = 8,
        pinpoints: Pinpoints | None = None,
        newline: str | None = None,
        images: str | None = None,
        video_fps: float | None = None,
    ) -> "LlaveProcessor":
        """Load from a folder or hub name.

        pinpoints, newline, images: override the config's tile sizes, newline position and image reading.
        """
        config = load_config(path, pinpoints, newline)
        tokenizer = loading.tokenizer(path, text_of(config).vocab_size)
        _require_marks(path, config, tokenizer)
        _require_image_processor(path, config)
        ids = config.image_token_id, config.video_token_id
        as_stored = reads_as_stored(path, images)
        return cls(tokenizer, tiling(config), *ids, max_tokens, video_frames, as_stored, video_fps)

    def encode(self, item: Item) -> Encoded:
        """Encode an item, with a placeholder for each image or video token. Too long a text is cut at its end.

        Raises BadSample if an image or video cannot be decoded or does not fit in `max_tokens`, or if the text does not
        have one mark for each.
        """
        images = [partial(decode_image, image, self.as_stored) for image in item.images]
        frames = None if item.video is None else partial(sample_frames, item.video, self.video_frames, self.video_fps)
        return self.encode_parts(item.text, images, frames)

    def encode_parts(
        self, text: str, images: Sequence[Callable[[], Picture]], frames: Callable[[], Sequence[Picture]] | None
    ) -> Encoded:
        """Encode a text with RGB images and all given RGB frames of a video. Raises BadSample as `encode` does.

        Images are decoded one at a time to save memory, and not at all if the marks are wrong.
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
                assert frames
                shown = frames()
                encoded.append(Image(self.tiling.cut_frames(shown), shown[0].height, shown[0].width, video=True))
                ids += [self.video_token_id] * self.tiling.video_tokens(len(shown))
            else:
                ids += self._tokenize(piece)
        row = np.array(ids, np.int32)
        if len(row) > self.max_tokens:
            kept, cut = np.split(row, [self.max_tokens - len(self._suffix)])
            if np.isin(cut, (self.image_token_id, self.video_token_id)).any():
                raise BadSample(f"{len(ids)} tokens: its images or video do not fit in max_tokens={self.max_tokens}")
            row = np.concatenate([kept, self._suffix])
        return Encoded(row, tuple(encoded))

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    @cached_property
    def _suffix(self) -> np.ndarray:
        return np.array(self._tokenize(SUFFIX), np.int32)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Train Qwen2's byte-level BPE, with special tokens and at most `vocab_size` tokens, on the texts in the prompt."""
    return Qwen2Tokenizer().train_new_from_iterator(
        (prompt(text) for text in texts),
        vocab_size,
        new_special_tokens=["<|im_start|>", "<|im_end|>", IMAGE_MARK, VIDEO_MARK],
        show_progress=False,
    )


def _require_marks(path: str, config: LlavaOnevisionConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise PipelineError if the prompt's turn marks, or the image and video marks, are not separate tokens."""
    vocabulary = tokenizer.get_vocab()
    if missing := [mark for mark in _TURNS if mark not in vocabulary]:
        raise PipelineError(f"{path}: its tokenizer has no token {missing[0]}, of which the prompt is made")
    texts = vocabulary.values() - tokenizer.added_tokens_decoder.keys()
    rows = text_of(config).vocab_size
    ids = {name: getattr(config, name) for name in ("image_token_id", "video_token_id")}
    for name, value in ids.items():
        own = isinstance(value, int) and 0 <= value < rows and value not in texts
        if not own or len(set(ids.values())) == 1:
            raise PipelineError(
                f"{path}: {name}={value!r} in its config.json must be a token by itself, below {rows:,}: correct it"
            )


def _require_image_processor(path: str, config: LlavaOnevisionConfig) -> None:
    """Raise PipelineError if the model's image processor differs from the preprocessing implemented here."""
    its, (side, _) = loading.image_processor(path, LlavaOnevisionImageProcessorPil), sides_of(config)
    wanted: dict[str, Any] = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_pad"), True)
    wanted |= {"rescale_factor": 1 / 255, "resample": int(Resampling.BICUBIC), "image_mean": MEAN, "image_std": STD}
    for name, value in wanted.items():
        if not np.allclose(getattr(its, name), value, rtol=1e-6, atol=0):
            raise PipelineError(
                f"{path}: its image processor has {name}={getattr(its, name)}; only {value} is supported"
            )
    if (its.size.height, its.size.width) != (side, side):
        raise PipelineError(f"{path}: its image processor makes tiles of size {dict(its.size)}, its model takes {side}")
