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
from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK, BadSample, Item, mended
from pipeline.data.tiles import Tiling, decode_image
from pipeline.data.video import sample_frames
from pipeline.errors import PipelineError
from pipeline.models import loading
from pipeline.models.llave.checks import MEAN, STD, Pinpoints, load_config, sides_of, text_of, tiling
from pipeline.models.loading import image_reading
from pipeline.models.shown import View, shown_text, view

# The published prompt. The assistant's turn is one newline; the last token, also a newline, is pooled.
PREFIX = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n\n<|im_end|>\n"

MARKS = "mark_reading"  # config.json's field for `model.marks`
_TURNS = ("<|im_start|>", "<|im_end|>")
_NOISE = "QA_GT_caption_based_noisy"  # LLaVE's code removes it from texts, after it has moved a mark
_MARK = re.compile(f"({IMAGE_MARK}|{VIDEO_MARK})")


def prompt(text: str) -> str:
    """Return the text in the published prompt. White space at its ends stays, but not if a single mark has to move.

    As in LLaVE's training code (preprocess_multimodal of llava/train/train.py), a single mark that does not begin the
    text moves to its front, followed by a newline and the stripped rest.
    """
    marks = _MARK.findall(text)
    if len(marks) == 1 and not text.startswith(marks[0]):
        text = f"{marks[0]}\n{text.replace(marks[0], '').strip()}".strip()
    return PREFIX + text + SUFFIX


@dataclass(frozen=True)
class LlaveProcessor:
    """Encodes items as token ids and tiles; samples `video_frames` frames of a video.  as_stored: see `rgb`.

    published: whether items whose marks and images do not match are read as by LLaVE's code; see `encode`.
    scaled_jpeg: whether the JPEG of an item with one image is decoded smaller if it is large; see `decode_image`.
    """

    tokenizer: PreTrainedTokenizerBase
    tiling: Tiling
    image_token_id: int
    video_token_id: int
    max_tokens: int
    video_frames: int = 8
    as_stored: bool = False
    video_fps: float | None = None  # see sample_frames
    published: bool = False
    scaled_jpeg: bool = False

    @classmethod
    def load(
        cls,
        path: str,
        max_tokens: int,
        video_frames: int = 8,
        pinpoints: Pinpoints | None = None,
        newline: str | None = None,
        images: str | None = None,
        marks: str | None = None,
        video_fps: float | None = None,
    ) -> "LlaveProcessor":
        """Load from a folder or hub name.

        pinpoints, newline, images, marks: override the config's tile sizes, newline position, and how it reads images
        and marks.
        """
        config = load_config(path, pinpoints, newline)
        tokenizer = loading.tokenizer(path, text_of(config).vocab_size)
        _require_image_processor(path, config)
        readings = image_reading(path, images), mark_reading(path, marks)
        return cls.assembled(path, config, tokenizer, readings, max_tokens, video_frames, video_fps)

    @classmethod
    def assembled(
        cls,
        path: str,
        config: LlavaOnevisionConfig,
        tokenizer: PreTrainedTokenizerBase,
        readings: tuple[str, str],
        max_tokens: int,
        video_frames: int,
        video_fps: float | None,
    ) -> "LlaveProcessor":
        """Make it of a config and a tokenizer.  path: for messages.  readings: `image_reading` and `mark_reading`.

        Raises PipelineError as `require_marks` does.
        """
        require_marks(path, config, tokenizer)
        return cls(
            tokenizer,
            tiling(config),
            config.image_token_id,
            config.video_token_id,
            max_tokens,
            video_frames,
            as_stored=readings[0] == "as_stored",
            video_fps=video_fps,
            published=readings[1] == "published",
        )

    @property
    def protocols(self) -> tuple[str, ...]:
        """The evaluations of LLaVE's paper that read items in this way: "mmeb", "video", both or none.

        Source of the video's settings: CLIP4Clip/main_task_retrieval.py:375, dataloader_msrvtt_retrieval.py:205-208.
        """
        if not (self.published and self.as_stored):
            return ()
        video = (self.video_fps, self.video_frames) == (3, 32) and self.max_tokens >= 8192
        return ("mmeb", "video") if video else ("mmeb",)

    def encode(self, item: Item) -> Encoded:
        """Encode an item, with a placeholder for each image or video token. Too long a text is cut at its end.

        Rows of MMEB may have a mark without an image, or one image without a mark. They are `mended`; if `published`,
        such a mark stands for a tile of zeros, and such an image is ignored.

        Raises BadSample if an image or video cannot be decoded or does not fit in `max_tokens`, or if the numbers of
        marks and images or videos differ otherwise.
        """
        needed = self.tiling.needed if self.scaled_jpeg and len(item.images) == 1 else None
        text, images = item.text, [partial(decode_image, image, self.as_stored, needed) for image in item.images]
        frames = None if item.video is None else partial(sample_frames, item.video, self.video_frames, self.video_fps)
        if self.published and IMAGE_MARK not in text:
            images = []
        elif not self.published:
            text = mended(text, len(images))
        return self.encode_parts(text, images, frames)

    def encode_parts(
        self, text: str, images: Sequence[Callable[[], Picture]], frames: Callable[[], Sequence[Picture]] | None
    ) -> Encoded:
        """Encode a text with RGB images and all given RGB frames of a video. Raises BadSample as `encode` does.

        There must be one mark for each, unless `published`: then a single mark may lack its image. Images are decoded
        one at a time to save memory, and not at all if the marks are wrong.
        """
        whole = prompt(text)
        pieces = _MARK.split(whole.replace(_NOISE, "") if self.published else whole)
        blank = self.published and not images and pieces.count(IMAGE_MARK) == 1
        for mark, name, count in (
            (IMAGE_MARK, "images", len(images) + blank),
            (VIDEO_MARK, "videos", int(frames is not None)),
        ):
            if pieces.count(mark) != count:
                raise BadSample(f"{pieces.count(mark)} {mark} marks in the text, {count} {name}")
        anyres = len(images) == 1
        encoded, ids, pictures = [], [], (decode() for decode in images)
        for piece in pieces:
            if piece == IMAGE_MARK and blank:
                side = self.tiling.size
                encoded.append(Image(np.zeros((1, 3, side, side), np.uint8), side, side, blank=True))
                ids += [self.image_token_id] * self.tiling.tokens(side, side, anyres=False)
            elif piece == IMAGE_MARK:
                picture = next(pictures)
                size = picture.height, picture.width
                tokens = self.tiling.tokens(*size, anyres=anyres, rounded=not self.published)
                unrounded = tokens != self.tiling.tokens(*size, anyres=anyres)
                encoded.append(Image(self.tiling.cut(picture, anyres=anyres), *size, unrounded=unrounded))
                ids += [self.image_token_id] * tokens
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

    def shown(self, item: Encoded) -> View:
        marks = self.image_token_id, self.video_token_id
        text = shown_text(self.tokenizer, item.input_ids, placeholders=marks, before=PREFIX, after=SUFFIX)
        return view(item, text)

    def _tokenize(self, text: str) -> list[int]:
        """Return the ids of a part of the prompt, without padding tokens, as by LLaVE's attention mask."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return [token for token in ids if token != self._padding]

    @cached_property
    def _padding(self) -> int | None:
        """The padding token's id; None if it is part of the prompt."""
        padding = self.tokenizer.pad_token
        return None if padding in _TURNS else self.tokenizer.pad_token_id

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


def mark_reading(path: str | None, marks: str | None = None) -> str:
    """Return how a model reads marks that do not match the images, `mended` or `published`; see `encode`.

    path: folder or hub name, or None for a model whose config does not say.  marks: a recipe's value, which overrides
    the config's.
    """
    return loading.recorded(path, MARKS, ("mended", "published"), marks)


def require_marks(path: str, config: LlavaOnevisionConfig, tokenizer: PreTrainedTokenizerBase) -> None:
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
