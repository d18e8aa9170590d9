"""Encoders for the CLIP and SigLIP models of transformers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipImageProcessorPil,
    SiglipModel,
)
from transformers.image_processing_backends import PilBackend

from pipeline.config import Encoding
from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK, BadSample, Item, mended
from pipeline.data.tiles import decode_image
from pipeline.data.video import sample_frames
from pipeline.errors import PipelineError
from pipeline.evaluation.encoder import identity_of, model_folder, without_marks
from pipeline.models import loading
from pipeline.models.chunks import chunk_tokens_for
from pipeline.models.clip.processor import require_end
from pipeline.models.files import read_json
from pipeline.models.loading import DTYPES, reads_as_stored

# model_type in the config -> model and image processor.
PEERS: dict[str, tuple[type[PreTrainedModel], type[PilBackend]]] = {
    "clip": (CLIPModel, CLIPImageProcessorPil),
    "siglip": (SiglipModel, SiglipImageProcessorPil),
    "siglip2": (Siglip2Model, Siglip2ImageProcessorPil),
}


class Prepared(NamedTuple):
    """An item for a ClipEncoder.

    ids: (T,) int64 tokens of the text, or None.
    pictures: for each image and frame the model's inputs by name; pixels are uint8, not normalised.
    """

    ids: torch.Tensor | None
    pictures: tuple[dict[str, torch.Tensor], ...]


@dataclass(frozen=True)
class ClipEncoder:
    """transformers' CLIP (arXiv 2103.00020), SigLIP (2303.15343) and SigLIP 2 (2502.14786).

    A picture gives a unit vector; several images, or the frames of a video, give the normalised mean of theirs. A text
    is cut at the model's context length. For an item with text and pictures the vector is the normalised mean of the
    two, as in MMEB's baselines (arXiv 2410.05160). Marks are removed from texts, instructions are not.

    Each rank embeds its own items; nothing here is collective.
    """

    name: str
    identity: str
    dimension: int
    model: Callable[[], PreTrainedModel]
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    image_processor: PilBackend
    video_frames: int
    chunk_tokens: int
    device: torch.device
    as_stored: bool = False
    video_fps: float | None = None  # see sample_frames

    instructed: ClassVar[bool] = False

    @classmethod
    def load(cls, path: str, kind: str, options: Encoding, device: torch.device) -> "ClipEncoder":
        """Load a model with a model_type in PEERS from a folder or hub name. Raises the errors of `load_encoder`."""
        model_class, processor_class = PEERS[kind]
        folder = model_folder(path)
        config = loading.config(path, model_class.config_class)
        settings = folder / "tokenizer_config.json"
        named = read_json(settings).get("tokenizer_class") if settings.is_file() else None
        if named == "SiglipTokenizer" and not find_spec("sentencepiece"):
            # transformers would use another tokenizer, which does not remove punctuation.
            raise PipelineError(f"{path} has a SentencePiece tokenizer: pip install sentencepiece")
        loading.check_weights(path, model_class, config)
        try:
            tokenizer = loading.tokenizer(path, config.text_config.vocab_size)
            image_processor = loading.image_processor(path, processor_class)
        except PipelineError as error:
            raise PipelineError(f"no {kind} model at {path!r}: {error}") from None
        if kind == "clip":
            require_end(path, tokenizer, config.text_config)
        with loading.reading(folder / "preprocessor_config.json"):
            _require_sizes(path, config, image_processor)
        encoder = cls(
            name=path,
            identity=identity_of(folder, options.precision, *options.video.identity),
            dimension=config.projection_dim if kind == "clip" else config.text_config.projection_size,
            model=cache(partial(_peer, model_class, str(folder), options.precision, device)),
            config=config,
            tokenizer=tokenizer,
            image_processor=image_processor,
            video_frames=options.video.frames,
            video_fps=options.video.fps,
            chunk_tokens=options.chunk_tokens or chunk_tokens_for(padded=False),
            device=device,
            as_stored=reads_as_stored(str(folder)),
        )
        with loading.reading(folder / "tokenizer_config.json"):
            encoder._tokenize("")  # sets the tokenizer's truncation, which is not thread-safe
        with loading.reading(folder / "preprocessor_config.json"):
            encoder._pixels(Image.new("RGB", (8, 8)))
        return encoder

    def prepare(self, item: Item) -> Prepared:
        """Decode and tokenize an item. Raises BadSample if that fails, or if its marks do not match its pictures."""
        text = mended(item.text, len(item.images))
        for mark, count in ((IMAGE_MARK, len(item.images)), (VIDEO_MARK, int(item.video is not None))):
            if text.count(mark) != count:
                raise BadSample(f"{text.count(mark)} {mark} marks in the text, {count} expected")
        pictures = [decode_image(image, self.as_stored) for image in item.images]
        if item.video is not None:
            pictures += sample_frames(item.video, self.video_frames, self.video_fps)
        text = without_marks(text)
        ids = None if pictures and not text else self._tokenize(text)
        return Prepared(ids, tuple(map(self._pixels, pictures)))

    def _pixels(self, picture: Image.Image) -> dict[str, torch.Tensor]:
        prepared = self.image_processor(picture, do_rescale=False, do_normalize=False)
        return {name: torch.from_numpy(np.asarray(value[0])) for name, value in prepared.items()}

    @torch.no_grad()
    def embed(self, prepared: Sequence[Prepared]) -> torch.Tensor:
        rows = torch.zeros(len(prepared), self.dimension, device=self.device)
        texts = [(row, item.ids) for row, item in enumerate(prepared) if item.ids is not None]
        texts.sort(key=lambda text: -len(text[1]))
        for batch in _batches(texts, self.chunk_tokens // self._context):
            rows[[row for row, _ in batch]] = self._texts([ids for _, ids in batch])
        seen = torch.zeros_like(rows)
        pictures = [(row, picture) for row, item in enumerate(prepared) for picture in item.pictures]
        for batch in _batches(pictures, self.chunk_tokens // self._patches):
            owners = torch.tensor([row for row, _ in batch], device=self.device)
            seen.index_add_(0, owners, self._pictures([picture for _, picture in batch]))
        return F.normalize(rows + F.normalize(seen, dim=-1), dim=-1)

    @property
    def _context(self) -> int:
        return self.config.text_config.max_position_embeddings

    @property
    def _patches(self) -> int:
        vision = self.config.vision_config
        return vision.num_patches if "num_patches" in vision else (vision.image_size // vision.patch_size) ** 2

    def _tokenize(self, text: str) -> torch.Tensor:
        """Return (T,) int64 tokens. SigLIP was trained on lower-case texts, padded to its context length."""
        siglip = self.config.model_type != "clip"
        ids = self.tokenizer(
            text.lower() if siglip else text,
            truncation=True,
            max_length=self._context,
            padding="max_length" if siglip else False,
        )["input_ids"]
        return torch.tensor(ids)

    def _texts(self, texts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Embed texts as (n, D) unit rows."""
        # CLIP pools the first end-of-text token with causal attention, so padding needs no mask. SigLIP was trained
        # without a mask.
        model: Any = self.model()
        ids = pad_sequence(list(texts), batch_first=True).to(self.device)
        return F.normalize(model.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)

    def _pictures(self, pictures: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Embed pictures as (n, D) unit rows."""
        model: Any = self.model()
        inputs = {name: torch.stack([p[name] for p in pictures]).to(self.device) for name in pictures[0]}
        inputs["pixel_values"] = self._normalised(inputs["pixel_values"]).to(model.dtype)
        return F.normalize(model.get_image_features(**inputs).pooler_output.float(), dim=-1)

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise pixels like the image processor, but on the device: float32 needs four times the transfer of uint8.

        pixels: (n, 3, height, width); or for SigLIP 2 (n, patches, values) with the colour last in each patch.
        """
        settings: Any = self.image_processor  # its attributes come from preprocessor_config.json
        pixels = pixels.float()
        if settings.do_rescale:
            pixels *= settings.rescale_factor
        if settings.do_normalize:
            colours = pixels if pixels.ndim == 4 else pixels.unflatten(-1, (-1, 3)).movedim(-1, 1)
            mean, std = torch.tensor([settings.image_mean, settings.image_std], device=pixels.device)[..., None, None]
            colours.sub_(mean).div_(std)  # in place, through the view
        return pixels


def _batches(items: list, size: int) -> list[list]:
    size = max(size, 1)
    return [items[start : start + size] for start in range(0, len(items), size)]


def _peer(model_class: type[PreTrainedModel], path: str, precision: str, device: torch.device) -> PreTrainedModel:
    config = loading.config(path, model_class.config_class)
    dtype: Any = DTYPES[precision]  # a dtype or "auto"
    return loading.open_model(model_class, path, config, dtype).eval().to(device)


def _require_sizes(path: str, config: PreTrainedConfig, settings: Any) -> None:
    """Raise PipelineError if the image processor's output does not have the model's input size."""
    vision = config.vision_config
    if config.model_type == "siglip2":
        size, expected = (settings.patch_size, settings.patch_size), (vision.patch_size, vision.patch_size)
    else:
        crop = settings.crop_size if settings.do_center_crop else settings.size
        size, expected = (crop.height, crop.width), (vision.image_size, vision.image_size)
    if size != expected or not settings.do_resize:
        raise PipelineError(f"{path}: its image processor gives {size} pixels, its model expects {expected}")
