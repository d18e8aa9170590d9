"""The model, its training interface and its saved-model interface."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image as Picture
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.config import ModelSection, Recipe
from pipeline.data.batch import Encoded
from pipeline.data.lengths import Lengths, Square
from pipeline.data.sample import Item
from pipeline.data.tiles import decode_image
from pipeline.models.chunks import Packed
from pipeline.models.family import SavedModelInterface, TrainingInterface
from pipeline.models.loading import DTYPES, config_dict
from pipeline.models.shown import View


@dataclass(frozen=True)
class BagOfWordsProcessor:
    """Map words to rows of the table; an image counts as one word, its colour."""

    rows: int
    lower_case: bool
    as_stored: bool = False

    def encode(self, item: Item) -> Encoded:
        return self.encode_parts(item.text, [partial(decode_image, image) for image in item.images], None)

    def encode_parts(
        self, text: str, images: Sequence[Callable[[], Picture]], frames: Callable[[], Sequence[Picture]] | None
    ) -> Encoded:
        words = re.findall(r"\w+", text.lower() if self.lower_case else text)
        words += [str(decode().resize((2, 2)).tobytes()) for decode in images]
        return Encoded(np.array([crc32(word.encode()) % self.rows for word in words or ["nothing"]], np.int32))

    def shown(self, item: Encoded) -> View:
        return View("")


class BagOfWords(nn.Module):
    always_with_images = pads = False

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.dimension, self.table, self.projection = width, nn.Embedding(rows, width), nn.Linear(width, width)

    @classmethod
    def load(cls, path: str, dtype: torch.dtype | str) -> "BagOfWords":
        weights = load_file(Path(path, "model.safetensors"))
        model = cls(*weights["table.weight"].shape)
        model.load_state_dict(weights)
        return model if isinstance(dtype, str) else model.to(dtype)

    def forward(self, packed: Packed, with_images: bool, features: torch.Tensor | None = None) -> torch.Tensor:
        vectors = self.table(packed.input_ids)
        owner = torch.arange(len(packed.lengths)).repeat_interleave(torch.tensor(packed.lengths))
        sums = vectors.new_zeros(len(packed.lengths), self.dimension).index_add(0, owner, vectors)
        return F.normalize(self.projection(sums).float(), dim=-1)


def write(folder: Path, weights: dict[str, torch.Tensor], lower_case: bool) -> None:
    folder.mkdir(parents=True)
    rows, width = weights["table.weight"].shape
    config = {"model_type": "bag_of_words", "rows": rows, "width": width, "lower_case": lower_case}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, folder / "model.safetensors")


class BagOfWordsTraining(TrainingInterface):
    def check(self, model: ModelSection) -> None:
        pass

    def lengths(self, recipe: Recipe) -> Lengths:
        return Lengths(Square(1), recipe.video.frames)

    def build(self, model: Any, texts: Iterable[str], seed: int, folder: Path) -> None:
        torch.manual_seed(seed)
        untrained = BagOfWords(model.architecture.words, model.architecture.width)
        write(folder, untrained.state_dict(), model.lower_case)

    def processor(self, recipe: Recipe, path: str) -> BagOfWordsProcessor:
        return SAVED.reader(path, recipe.model.max_tokens, recipe.video.frames)

    def load(self, recipe: Recipe, path: str, attention: str) -> BagOfWords:
        return BagOfWords.load(path, DTYPES[recipe.precision])

    def empty(self, recipe: Recipe, path: str, attention: str) -> BagOfWords:
        config = config_dict(path)
        return BagOfWords(config["rows"], config["width"])

    def save(self, recipe: Any, model: nn.Module, weights: dict[str, torch.Tensor], source: str, folder: Path) -> None:
        write(folder, weights, recipe.model.lower_case)


class SavedBagOfWords(SavedModelInterface):
    def owns(self, path: str, config: dict[str, Any]) -> bool:
        return config.get("model_type") == "bag_of_words"

    def dimension(self, path: str) -> int:
        return config_dict(path)["width"]

    def reader(
        self, path: str, max_tokens: int, video_frames: int, video_fps: float | None = None
    ) -> BagOfWordsProcessor:
        config = config_dict(path)
        return BagOfWordsProcessor(config["rows"], config["lower_case"])

    def open(self, path: str, precision: str, device: torch.device) -> tuple[BagOfWords, None]:
        return BagOfWords.load(path, DTYPES[precision]).to(device), None


TRAINING = {"contrastive": BagOfWordsTraining()}
SAVED = SavedBagOfWords()
