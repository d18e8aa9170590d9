"""Two-tower models: a vision tower embeds images and a text tower embeds texts in one vector space."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image as Picture
from torch import nn

from pipeline.data.batch import Encoded, Image
from pipeline.data.sample import BadSample, Item, mended
from pipeline.data.tiles import decode_image
from pipeline.data.video import sample_frames
from pipeline.models.chunks import Packed, sent
from pipeline.models.shown import View, shown_text, view
from pipeline.models.vision import Pixels, RandomCrops


class TwoTower(nn.Module, ABC):
    """Embeds images with the vision tower and texts with the text tower, as unit vectors.

    An item with several images or frames gets the normalised mean of their unit vectors.

    pixels: how images are prepared.  dimension: of the vectors.
    pads: whether attention pads the texts of a chunk to the longest.
    always_with_images: run the vision tower in every forward pass (see `forward`), so all parameters get gradients.
    """

    always_with_images = False
    pads = False

    def __init__(self, pixels: Pixels, dimension: int) -> None:
        super().__init__()
        self.pixels, self.dimension = pixels, dimension

    @abstractmethod
    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map (n, 3, size, size) pixels, uint8 or normalised, to (n, dimension)."""

    @abstractmethod
    def texts(self, packed: Packed, features: torch.Tensor | None) -> torch.Tensor:
        """Return (texts, dimension) for the items without images, or (1, dimension) for a dummy if all have images."""

    def forward(self, packed: Packed, with_images: bool, features: torch.Tensor | None = None) -> torch.Tensor:
        """Map N packed items to (N, dimension) float32 unit rows.

        with_images: whether any rank has an image in this forward pass. A rank without images then runs a dummy image
        multiplied by zero; a rank without texts always runs a dummy text. ZeRO-3 needs the same modules on all ranks.
        features: (texts, width) vectors of the items without images, from a text encoder outside the model.
        """
        device = packed.input_ids.device
        tiles = torch.tensor(packed.tiles_of)
        numbers = torch.arange(len(tiles))
        texts, owners = sent(numbers[tiles == 0], device), sent(numbers.repeat_interleave(tiles), device)
        rows = torch.zeros(len(tiles), self.dimension, device=device)
        told = F.normalize(self.texts(packed, features).float(), dim=-1)
        rows = rows.index_add(0, texts, told) if len(texts) else rows + 0 * told.sum()
        if packed.images:
            seen = self.images(sent(packed.tiles, device))
            rows = rows.index_add(0, owners, F.normalize(seen.float(), dim=-1))
        elif with_images or self.always_with_images:
            black = torch.zeros(1, 3, self.pixels.size, self.pixels.size, dtype=torch.uint8, device=device)
            rows = rows + 0 * self.images(black).float().sum()
        return F.normalize(rows, dim=-1)


class Texts(Protocol):
    """Tokenizes texts.  tokenizer: transformers'."""

    @property
    def tokenizer(self) -> Any: ...

    def tokenized(self, text: str) -> Encoded: ...


@dataclass(frozen=True)
class TwoTowerProcessor:
    """Encodes items as tiles or tokens. An image counts as `tokens` tokens, so that chunk sizes reflect compute.

    texts: tokenizes texts; the tokens identify a text even if its vector comes with the data.
    with_vectors: whether the data has the texts' vectors.
    crops: random crops of a training step; None: none.
    scaled_jpeg: whether large JPEGs are decoded smaller, if they are not cropped; see `decode_image`.
    """

    pixels: Pixels
    tokens: int
    texts: Texts
    video_frames: int = 8
    with_vectors: bool = False
    crops: RandomCrops | None = None
    video_fps: float | None = None  # see sample_frames
    scaled_jpeg: bool = False

    @property
    def as_stored(self) -> bool:
        return self.pixels.as_stored

    def encode(self, item: Item) -> Encoded:
        """Encode an item's images or video if it has any, otherwise its text. Text beside images is ignored.

        Such text is an instruction for other models. Raises BadSample for an image or video that cannot be decoded, and
        for a text whose vector is missing.
        """
        needed = self.pixels.resized if self.scaled_jpeg and not self.crops else None
        images = [partial(decode_image, image, self.as_stored, needed) for image in item.images]
        if images or item.video is not None:
            frames = (
                None if item.video is None else partial(sample_frames, item.video, self.video_frames, self.video_fps)
            )
            return self._tiled(images, frames, item)
        told = self.texts.tokenized(mended(item.text, 0))  # a mark stands for an image that the item lacks
        if not self.with_vectors:
            return told
        if item.vector is None and item.text:
            raise BadSample("its text has no vector in data.text_embeddings: embed the shards again")
        return Encoded(np.zeros(1, np.int32), vector=item.vector, text=told.input_ids.tobytes())

    def encode_parts(
        self, text: str, images: Sequence[Callable[[], Picture]], frames: Callable[[], Sequence[Picture]] | None
    ) -> Encoded:
        """Encode a text, or RGB images and a video's frames; BadSample for both at once."""
        if not images and frames is None:
            return self.texts.tokenized(text)
        if text:
            raise BadSample("a text beside an image: for this model they are two items")
        return self._tiled(images, frames)

    def shown(self, item: Encoded) -> View:
        ids = np.frombuffer(item.text, np.int32) if item.text else item.input_ids
        return view(item, "" if item.images else shown_text(self.texts.tokenizer, ids))

    def _tiled(
        self,
        images: Sequence[Callable[[], Picture]],
        frames: Callable[[], Sequence[Picture]] | None,
        item: Item | None = None,
    ) -> Encoded:
        shown = [decode() for decode in images] + list(frames() if frames else [])
        boxes = self.crops.boxes(item, shown) if self.crops and item else [None] * len(shown)
        tiles = np.stack([self.pixels.prepare(picture, box) for picture, box in zip(shown, boxes, strict=True)])
        image = Image(tiles, tiles.shape[2], tiles.shape[3], video=frames is not None)
        return Encoded(np.zeros(len(tiles) * self.tokens, np.int32), (image,))
