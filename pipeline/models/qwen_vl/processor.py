"""Qwen-VL's processor: encodes items as token ids, patches and positions."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from typing import Any, cast
from unicodedata import category

import numpy as np
from PIL.Image import Image as Picture
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipeline.data.batch import Encoded, Image
from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK, BadSample, Item, mended
from pipeline.data.tiles import decode_image
from pipeline.data.video import sample_frames
from pipeline.errors import PipelineError
from pipeline.models import loading
from pipeline.models.loading import reads_as_stored
from pipeline.models.qwen_vl import checks
from pipeline.models.qwen_vl.patches import Grid, Patches, positions
from pipeline.models.qwen_vl.prompts import CHAT, PROMPTS, Prompt
from pipeline.models.shown import View, shown_text

START, END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
SPECIAL = ("<|im_start|>", "<|im_end|>", START, END, IMAGE_PAD, VIDEO_PAD)

_FPS = 2  # of frames whose times are unknown, as in qwen-vl-utils

_MARK = re.compile(f"({IMAGE_MARK}|{VIDEO_MARK})")
# The chat template has nothing between an image and the text after it; a converted text has a newline there.
_MARK_AND_SPACE = re.compile(rf"{_MARK.pattern}\s*")


@dataclass(frozen=True)
class QwenVLProcessor:
    """Encodes items as token ids, patches and positions; samples `video_frames` frames of a video.

    positions_per_second: of a video; None: each two frames have one.  instruction: the system's turn, "" if the prompt
    has none.  as_stored: see `rgb`.  bare_images: whether an image or video without a text stays without one in
    `Embedder`, as in the code of Qwen3-VL-Embedding and GME. Models trained with this project learned from instructions
    in the texts.
    """

    tokenizer: PreTrainedTokenizerBase
    patches: Patches
    image_token_id: int
    video_token_id: int
    positions_per_second: int | None
    instruction: str
    max_tokens: int
    video_frames: int = 8
    as_stored: bool = False
    video_fps: float | None = None  # see sample_frames
    prompt: Prompt = PROMPTS[CHAT]
    bare_images: bool = False

    @classmethod
    def load(
        cls,
        path: str,
        max_tokens: int,
        video_frames: int = 8,
        config: Any = None,
        images: str | None = None,
        video_fps: float | None = None,
    ) -> "QwenVLProcessor":
        """Load from a folder or hub name.

        config: with a recipe's `Settings`; None is the folder's.  images: overrides how its config reads images.
        """
        config = config or checks.load_config(path)
        tokenizer = loading.tokenizer(path, config.text_config.vocab_size, Qwen2Tokenizer)
        settings = checks.Settings.of(config, path, max_tokens)
        prompt = PROMPTS[settings.prompt]
        _require_tokens(path, config, tokenizer, prompt)
        _require_image_processor(path, config)
        return cls(
            tokenizer,
            checks.patches(config, path, max_tokens),
            config.image_token_id,
            config.video_token_id,
            checks.positions_per_second(config),
            settings.instruction,
            max_tokens,
            video_frames,
            reads_as_stored(path, images),
            video_fps,
            prompt,
            prompt.instruction is not None and not checks.stores_instruction(config),
        )

    @property
    def system_turn(self) -> bool:
        """Whether an item's instruction stands in the system's turn of the prompt."""
        return self.prompt.instruction is not None

    def encode(self, item: Item) -> Encoded:
        """Encode an item, with a placeholder for each token of an image. Too long a text is cut at its end.

        Rows of MMEB may have a mark without an image, or one image without a mark. They are `mended`.

        Raises BadSample if an image or video cannot be decoded, is not supported, or does not fit in `max_tokens`, or
        if the numbers of marks and images or videos differ otherwise.
        """
        images = [partial(decode_image, image, self.as_stored) for image in item.images]
        frames = None if item.video is None else partial(sample_frames, item.video, self.video_frames, self.video_fps)
        return self.encode_parts(mended(item.text, len(images)), images, frames, item.instruction)

    def encode_parts(
        self,
        text: str,
        images: Sequence[Callable[[], Picture]],
        frames: Callable[[], Sequence[Picture]] | None,
        instruction: str = "",
    ) -> Encoded:
        """Encode a text with a mark for each of its RGB images and for its RGB frames. Raises BadSample as `encode`.

        Images are decoded one at a time to save memory, and not at all if the marks are wrong.

        instruction: replaces the processor's. With the prompt `chat` it ends in a point unless punctuation is there, as
        in Qwen3-VL-Embedding's code.
        """
        marks_in = _MARK_AND_SPACE if self.prompt.marked else _MARK
        if instruction := instruction.strip():
            if not self.system_turn:
                raise BadSample("an instruction apart from the text, for which the prompt has no turn")
            if self.prompt == PROMPTS[CHAT] and not category(instruction[-1]).startswith("P"):
                instruction += "."
        pieces = marks_in.split(self.prompt.prefix.format(instruction or self.instruction) + text)
        for mark, name, count in ((IMAGE_MARK, "images", len(images)), (VIDEO_MARK, "videos", int(frames is not None))):
            if (marks := pieces.count(mark)) != count:
                raise BadSample(f"{marks} {mark} marks in the text, {count} {name}")
        if any(pad in given for pad in (IMAGE_PAD, VIDEO_PAD) for given in (text, instruction)):
            raise BadSample(f"a text with {IMAGE_PAD} or {VIDEO_PAD}, which stand for parts of images")
        parts, encoded, pictures = list[str | _Placed](), list[Image](), (decode() for decode in images)
        for piece in pieces:
            if piece == IMAGE_MARK:
                encoded.append(Image(*self.patches.cut(next(pictures))))
                parts.append(_Placed(self.image_token_id, self._grid(encoded[-1])))
            elif piece == VIDEO_MARK and frames:
                shown = frames()
                encoded.append(Image(*self.patches.cut_frames(shown), video=True))
                parts += self._video(shown, self._grid(encoded[-1]))
            else:
                parts.append(piece)
        return self._joined(parts, tuple(encoded))

    def shown(self, item: Encoded) -> View:
        before, after = self.prompt.prefix.format(self.instruction), self.prompt.suffix
        placeholders = [self.image_token_id, self.video_token_id]
        text = shown_text(self.tokenizer, item.input_ids, placeholders=placeholders, before=before, after=after)
        text = text.replace(START + END, "")
        return View(text, *self.patches.joined(item.images[0])) if item.images else View(text)

    def _video(self, frames: Sequence[Picture], of_pair: Grid) -> "list[str | _Placed]":
        """Return the parts that stand for a video."""
        times = _pair_times(frames)
        if self.patches.stamped:
            placed = _Placed(self.video_token_id, of_pair)
            return [part for seconds in times for part in (f"<{seconds:.1f} seconds>", placed)]
        interval = 1
        if self.positions_per_second is not None:
            # Whole seconds of each two frames, as in transformers 5.17. Later versions round down the products instead.
            interval = self.positions_per_second * int(2 / frames[0].info.get("sampled_fps", _FPS))
        return [_Placed(self.video_token_id, replace(of_pair, pairs=len(times), interval=interval))]

    def _joined(self, parts: "Sequence[str | _Placed]", images: tuple[Image, ...]) -> Encoded:
        """Encode texts and images in this order, and the prompt's end. Texts that follow each other are one.

        Raises BadSample if the images do not fit in `max_tokens`, and if there is no token.
        """
        ids, places, end_of_images = list[int](), list[int | Grid](), 0
        for is_text, group in groupby(parts, lambda part: isinstance(part, str)):
            for part in ["".join(cast(Iterable[str], group))] if is_text else group:
                if isinstance(part, str):
                    tokens = self._tokenize(part)
                    places.append(len(tokens))
                else:
                    grid = part.grid
                    tokens = [part.token] * (grid.pairs * grid.rows * grid.columns)
                    if self.prompt.marked:
                        tokens = [self._start, *tokens, self._end]
                    places += [1, grid, 1] if self.prompt.marked else [grid]
                ids += tokens
                if not isinstance(part, str):
                    end_of_images = len(ids)
        places.append(len(self._suffix))
        row = np.array([*ids, *self._suffix], np.int32)
        axes = positions(places) if images and self.prompt.axes else None
        if not len(row):
            raise BadSample("an empty text without images, around which the prompt has no tokens")
        if len(row) > self.max_tokens:
            kept = max(self.max_tokens - len(self._suffix), 0)
            if kept < end_of_images:
                raise BadSample(f"{len(row)} tokens: its images do not fit in max_tokens={self.max_tokens}")
            row = np.array([*row[:kept], *self._suffix], np.int32)
            # The positions of the last tokens, which are text, follow each other.
            axes = None if axes is None else axes[:, : len(row)]
        return Encoded(row, images, positions=axes)

    def _grid(self, image: Image) -> Grid:
        side = int(self.patches.patch)
        return Grid(image.height // side, image.width // side)

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return ids

    @cached_property
    def _suffix(self) -> list[int]:
        """The prompt's end, with the tokenizer's own end tokens if it has some."""
        ids: list[int] = self.tokenizer(self.prompt.suffix)["input_ids"]
        return ids

    @cached_property
    def _start(self) -> int:
        return self._tokenize(START)[0]

    @cached_property
    def _end(self) -> int:
        return self._tokenize(END)[0]


@dataclass(frozen=True)
class _Placed:
    """A grid of placeholders, between marks.  token: the placeholder."""

    token: int
    grid: Grid


def _pair_times(frames: Sequence[Picture]) -> list[float]:
    """Return the mean time in seconds of each two frames, as Qwen3-VL writes it. The last frame may be repeated."""
    times = [float(frame.info.get("seconds", number / _FPS)) for number, frame in enumerate(frames)]
    times += times[-1:] * (len(times) % 2)
    return [(first + second) / 2 for first, second in zip(times[::2], times[1::2], strict=True)]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Train Qwen2's byte-level BPE, with special tokens and at most `vocab_size` tokens, on the texts in the prompt."""
    chat = PROMPTS[CHAT]
    before = chat.prefix.format(chat.instruction)
    return Qwen2Tokenizer().train_new_from_iterator(
        (before + _MARK_AND_SPACE.sub("", text) + chat.suffix for text in texts),
        vocab_size,
        new_special_tokens=list(SPECIAL),
        show_progress=False,
    )


def image_processor(config: Any, path: str) -> Qwen2VLImageProcessorPil:
    """Return the image processor that fits a config.  path: for errors."""
    its, version = checks.patches(config, path, 0), checks.version(config)
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": its.min_pixels, "longest_edge": its.max_pixels},
        patch_size=its.side,
        merge_size=its.merge,
        temporal_patch_size=2,
        image_mean=list(version.mean),
        image_std=list(version.std),
    )


def _require_tokens(path: str, config: Any, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> None:
    """Raise PipelineError if the prompt's marks are not tokens, or not those that the config names."""
    vocabulary = tokenizer.get_vocab()
    its = re.findall(r"<\|\w+\|>", prompt.prefix + prompt.suffix)
    if missing := [mark for mark in (*SPECIAL, *its) if mark not in vocabulary]:
        raise PipelineError(f"{path}: its tokenizer has no token {missing[0]}, of which the prompt is made")
    for name, mark in (("image_token_id", IMAGE_PAD), ("video_token_id", VIDEO_PAD), ("vision_start_token_id", START)):
        if getattr(config, name) != vocabulary[mark]:
            raise PipelineError(
                f"{path}: {name}={getattr(config, name)!r} in its config.json, but its tokenizer has {mark} as "
                f"{vocabulary[mark]}: they are of different models"
            )


def _require_image_processor(path: str, config: Any) -> None:
    """Raise PipelineError if the model's image processor differs from the preprocessing implemented here."""
    its, ours = loading.image_processor(path, Qwen2VLImageProcessorPil), image_processor(config, path)
    names = ("do_resize", "do_rescale", "do_normalize", "rescale_factor", "image_mean", "image_std")
    for name in (*names, "resample", "patch_size", "merge_size", "temporal_patch_size"):
        given, wanted = getattr(its, name), getattr(ours, name)
        if not np.allclose(given, wanted, rtol=1e-6, atol=0):
            raise PipelineError(f"{path}: its image processor has {name}={given}; only {wanted} is supported")
