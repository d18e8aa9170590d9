"""Embed texts, images and videos with a trained model, from Python."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import inf
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NoReturn, TypedDict, cast

import torch
from PIL.Image import Image as Picture

from pipeline.data.batch import Encoded
from pipeline.data.sample import IMAGE_MARK, IMAGE_SUFFIXES, MEDIA_INSTRUCTION, VIDEO_MARK, VIDEO_SUFFIXES, BadSample
from pipeline.data.tiles import decode_image, image_format, rgb
from pipeline.data.video import sample_frames, video_format
from pipeline.device import configure_device
from pipeline.errors import PipelineError
from pipeline.models.chunks import Features, chunk_tokens_for, embed_chunks, plan_chunks, require_unit
from pipeline.models.compact import check_size, shortened
from pipeline.models.family import Processor, SavedModelInterface
from pipeline.models.loading import DTYPES
from pipeline.models.registry import FAMILIES, family_of

LEAST_TOKENS = 64  # enough for the prompt and some text

_GROUP = 256  # items embedded at a time, while as many are decoded
_THREADS = 16
_LOADING = Lock()  # Pillow reads an opened file's pixels at first use, which is not thread-safe


class Parts(TypedDict, total=False):
    """An item with several parts.  images: paths or pictures.  video: a path, or frames; all frames are used.

    instruction: what the item is compared for, in the system's turn of a Qwen-VL's prompt; for other models, and for
    those trained with this project, instructions belong into the text.
    """

    text: str
    images: Sequence[str | Path | Picture]
    video: str | Path | Sequence[Picture]
    instruction: str


Embeddable = str | Picture | Path | Parts


@dataclass(frozen=True)
class Embedder:
    """A model that maps texts, images and videos to vectors of one space."""

    model: torch.nn.Module
    processor: Processor
    device: torch.device
    chunk_tokens: int
    instructed: bool
    features: Features | None = None
    name: str = "the model"
    video_frames: int = 8
    video_fps: float | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        precision: Literal["auto", "bf16", "fp32"] = "auto",
        max_tokens: int = 4096,
        video_frames: int = 8,
        chunk_tokens: int | None = None,
        video_fps: float | None = None,
    ) -> "Embedder":
        """Load a model from a folder or hub name. A checkpoint in LLaVE's original format is converted once.

        device: None: the accelerator, or else the CPU.
        precision: of the weights; "auto": as stored.
        max_tokens: of an item, at least 64; a longer text is truncated, a longer image or video is an error.
        video_frames: number of frames sampled from a video file, evenly spaced.
        chunk_tokens: tokens in one forward pass; None: 16,384, or 4,096 if attention pads.
        video_fps: sample this many frames per second of a video file instead, at most `video_frames`.

        Raises `PipelineError` if the model does not exist, or for an option out of range.
        """
        if precision not in DTYPES:
            raise PipelineError(f"precision is {precision!r}; it can be {', '.join(DTYPES)}")
        if max_tokens < LEAST_TOKENS or video_frames < 1:
            raise PipelineError(
                f"max_tokens={max_tokens} must be {LEAST_TOKENS} or more, video_frames={video_frames} 1 or more"
            )
        if video_fps is not None and not 0 < video_fps < inf:
            raise PipelineError(f"video_fps={video_fps} must be more than 0")
        device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        configure_device(device)
        family = family_for(str(path))
        processor = family.reader(str(path), max_tokens, video_frames, video_fps)
        model, features = family.open(str(path), precision, device)
        tokens = chunk_tokens or chunk_tokens_for(bool(model.pads))
        return cls(model, processor, device, tokens, family.instructed, features, str(path), video_frames, video_fps)

    @property
    def dimension(self) -> int:
        return cast(int, self.model.dimension)

    def embed(self, items: Iterable[Embeddable], dimensions: int | None = None) -> torch.Tensor:
        """Embed N items, and return (N, D) float32 unit rows on the CPU, in the same order.

        dimensions: keep only the first numbers of each vector, normalised again (`shortened`), for models trained at
            this size; None: all.

        An item is a text, a picture, the `Path` of an image or video file (recognised by its content), or a dict of
        `Parts`. `<image>` and `<video>` mark the places of images and video in a text; without marks they come first.
        Images or a video without a text get MMEB's instruction, "Represent the given image.", if the model was trained
        with instructions in texts, as VLM2Vec was. For Qwen3-VL-Embedding, GME and other Qwen-VLs with a system's turn
        that were not trained with this project, they stay alone. LLM2CLIP and CLIP were trained without instructions;
        for them an item is either a text or pictures.

        Raises `PipelineError` with the item's number, from 0, if the item cannot be used or its vector is not a unit
        vector (for example, with NaN in the weights), and for a size that is not from 1 to the model's dimension. In a
        process group all ranks must embed the same number of items.
        """
        parts = list(self.stream(items, dimensions))
        return torch.cat([torch.empty(0, dimensions or self.dimension), *parts])

    def stream(self, items: Iterable[Embeddable], dimensions: int | None = None) -> Iterator[torch.Tensor]:
        """Embed any number of items like `embed`, and return an iterator over (n, D) rows, one group at a time.

        While the model embeds one group, threads read and decode the next.
        """
        if dimensions is None:
            return self._groups(items)
        check_size(dimensions, self.dimension)
        return (shortened(rows, dimensions) for rows in self._groups(items))

    def _groups(self, items: Iterable[Embeddable]) -> Iterator[torch.Tensor]:
        read = ((number, _checked(number, item)) for number, item in enumerate(items))
        pool = ThreadPoolExecutor(_THREADS)
        try:
            groups = (self._decoding(pool, group) for group in iter(lambda: list(islice(read, _GROUP)), []))
            following = next(groups, None)
            while following:
                group, following = following, next(groups, None)
                yield self._embedded(*group)
        finally:
            pool.shutdown(cancel_futures=True)

    def _decoding(
        self, pool: ThreadPoolExecutor, group: list[tuple[int, "Path | _Item"]]
    ) -> tuple[list[Future[Encoded]], int]:
        """Return (a future for each item, the same one for equal items; the first item's number)."""
        futures: dict[tuple, Future[Encoded]] = {}
        for number, item in group:
            if (key := _key(item)) not in futures:
                futures[key] = pool.submit(self._encode, number, item)
        return [futures[_key(item)] for _, item in group], group[0][0]

    def _embedded(self, group: list[Future[Encoded]], first: int) -> torch.Tensor:
        places = {future: place for place, future in enumerate(dict.fromkeys(group))}
        encoded = [future.result() for future in places]
        chunks = plan_chunks(encoded, self.chunk_tokens, self.device, padded=bool(self.model.pads))
        vectors = embed_chunks(self.model, chunks, len(encoded), self.features).cpu()[[places[each] for each in group]]
        require_unit(vectors, self.name, lambda row: f"item {first + row}")
        return vectors

    def _encode(self, number: int, item: "Path | _Item") -> Encoded:
        try:
            if isinstance(item, Path):
                item = _Item(video=item) if _from_file(item, _is_video) else _Item(images=(item,))
            images = [partial(_picture, image, self.processor.as_stored) for image in item.images]
            frames = None if item.video is None else partial(self._frames, item.video)
            # White space around a text is left to the processor: a template may keep what is before it.
            text = item.text if item.text.strip() else ""
            if self.instructed:
                text = item.marked_text(bare=getattr(self.processor, "bare_images", False))
            if not item.instruction:
                return self.processor.encode_parts(text, images, frames)
            if not getattr(self.processor, "system_turn", False):
                raise BadSample("it has an instruction, for which the model's prompt has no turn: put it into the text")
            encode: Callable[..., Encoded] = self.processor.encode_parts
            return encode(text, images, frames, item.instruction)
        except BadSample as reason:
            raise PipelineError(f"item {number}: {reason}") from None

    def _frames(self, video: "Path | tuple[Picture, ...]") -> list[Picture]:
        if isinstance(video, Path):
            return _from_file(video, lambda data: sample_frames(data, self.video_frames, self.video_fps))
        return [_picture(frame, self.processor.as_stored) for frame in video]


def family_for(path: str) -> SavedModelInterface:
    """Return the family of a model. Raises PipelineError if it does not exist, or is not of this project."""
    if family := family_of(path):
        return family
    raise PipelineError(f"{path} is not a model of this project; supported are {', '.join(FAMILIES)}")


@dataclass(frozen=True)
class _Item:
    """An item before it is read."""

    text: str = ""
    images: tuple[Path | Picture, ...] = ()
    video: Path | tuple[Picture, ...] | None = None
    instruction: str = ""

    def marked_text(self, *, bare: bool = False) -> str:
        """Return the text with marks added if it has none; without a text an instruction, or if `bare` only marks."""
        text = self.text if self.text.strip() else ""
        if not text and not bare:
            given = ["image" if len(self.images) == 1 else "images"] * bool(self.images) + ["video"] * bool(self.video)
            text = MEDIA_INSTRUCTION.format(" and ".join(given))
        marks = [IMAGE_MARK] * len(self.images) if IMAGE_MARK not in text else []
        marks += [VIDEO_MARK] if self.video and VIDEO_MARK not in text else []
        return "\n".join([*marks, text] if text else marks)


def _checked(number: int, given: Any) -> Path | _Item:
    """Convert a user's item; a path is of an image or a video. Raises PipelineError if it cannot be embedded."""

    def refuse(why: str) -> NoReturn:
        raise PipelineError(f"item {number}{why}")

    if isinstance(given, Path):
        return given
    if isinstance(given, str | Picture):
        given = {"text": given} if isinstance(given, str) else {"images": [given]}
    if not isinstance(given, dict):
        refuse(f" is a {type(given).__name__}, not a text, picture, Path or dict of text, images and video")
    if unknown := given.keys() - Parts.__annotations__.keys():
        refuse(f" has {min(map(repr, unknown))}; it can have {', '.join(Parts.__annotations__)}")
    text, images, video = given.get("text"), given.get("images"), given.get("video")
    text, images = "" if text is None else text, () if images is None else images
    instruction = given.get("instruction") or ""
    for name, value in (("text", text), ("instruction", instruction)):
        if not isinstance(value, str):
            refuse(f": its {name} is a {type(value).__name__}, not a str")
    if not isinstance(images, list | tuple) or not all(isinstance(image, str | Path | Picture) for image in images):
        refuse(": its images must be a list of paths or pictures")
    if isinstance(video, str):
        video = Path(video)
    elif isinstance(video, list | tuple) and video and all(isinstance(frame, Picture) for frame in video):
        video = tuple(video)
    elif not isinstance(video, Path | None):
        refuse(": its video must be a path, or a list of frames as pictures")
    if not (text.strip() or images or video):
        refuse(" is empty: it has no text, image or video")
    paths = tuple(Path(image) if isinstance(image, str) else image for image in images)
    return _Item(text, paths, video, instruction.strip())


def _key(item: Path | _Item) -> tuple:
    """A key that is equal only for equal items; pictures are compared by identity, while both are in memory."""
    if isinstance(item, Path):
        return (item,)
    parts = (
        item.text,
        item.instruction,
        *item.images,
        "video",
        *(item.video if isinstance(item.video, tuple) else (item.video,)),
    )
    return tuple(id(part) if isinstance(part, Picture) else part for part in parts)


def _picture(source: Path | Picture, as_stored: bool) -> Picture:
    """Return a picture as RGB; see `rgb`."""
    if isinstance(source, Path):
        return _from_file(source, partial(decode_image, as_stored=as_stored))
    try:
        with _LOADING:
            source.load()
        return rgb(source, as_stored)
    except Exception as error:  # Pillow's decoders raise various exceptions on damaged input
        raise BadSample(f"undecodable picture: {type(error).__name__}: {error}") from None


def _is_video(data: bytes) -> bool:
    if video_format(data) in VIDEO_SUFFIXES:
        return True
    if image_format(data)[0] in IMAGE_SUFFIXES.values():
        return False
    raise BadSample(f"no image or video in one of the formats {', '.join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))}")


def _from_file(path: Path, decode: Callable[[bytes], Any]) -> Any:
    """Decode a file. Raises BadSample with the file's name if it cannot be read or decoded."""
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise BadSample(f"{path}: {error.strerror}") from None
    except BadSample as reason:
        raise BadSample(f"{path}: {reason}: replace the file, or leave it out") from None
