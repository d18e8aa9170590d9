"""What a kind of model has to say for itself."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from PIL.Image import Image as Picture
from torch import nn
from transformers import PreTrainedConfig

from pipeline.config import Model, Recipe
from pipeline.data.collate import Encoded
from pipeline.data.lengths import Lengths
from pipeline.data.sample import Draw, Item, Pair
from pipeline.data.source import Source
from pipeline.errors import PipelineError
from pipeline.models.attention import choose
from pipeline.models.chunks import Features
from pipeline.models.frozen import Frozen
from pipeline.models.loading import DTYPES

_PROBE = "A cat and a dog on a red sofa"


class Processor(Protocol):
    """Items -> what a model takes; BadSample for those that it cannot.

    as_stored: how it reads images, see `rgb`.
    """

    as_stored: bool

    def encode(self, item: Item) -> Encoded: ...

    def encode_parts(
        self, text: str, images: Sequence[Callable[[], Picture]], frames: Callable[[], Sequence[Picture]] | None
    ) -> Encoded: ...


class Kind(ABC):
    """A kind of model: of a recipe, or in a folder.

    parts: what can be trained or frozen, by fields of `train`: the beginnings of its parameters' names.
    unused: of parameters that no embedding depends on, which so have no gradient.
    text_part: the one that a text by itself trains.  instructed: whether its texts carry instructions.
    sees: whether it takes images.
    stages: of ZeRO.  contrastive: whether it learns from pairs, or else to predict masked tokens (training/masked.py).
    """

    parts: ClassVar[dict[str, tuple[str, ...]]]
    unused: ClassVar[tuple[str, ...]] = ()
    text_part: ClassVar[str]
    instructed: ClassVar[bool] = False
    sees: ClassVar[bool] = True
    stages: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)
    contrastive: ClassVar[bool] = True

    # Of a recipe.

    @abstractmethod
    def check(self, model: Model) -> None:
        """Raise PipelineError for what is wrong in a recipe's model, before anything of it is loaded."""

    def check_stage(self, stage: int) -> None:
        """Raise PipelineError for a stage of ZeRO that it does not train under."""
        if stage not in self.stages:
            known = ", ".join(map(str, self.stages))
            raise PipelineError(f"this kind of model trains under ZeRO {known}, not {stage}: set deepspeed= to one")

    def check_data(self, recipe: Recipe, source: Source) -> None:
        """Raise PipelineError for data that are not for the recipe's model."""
        if source.embedding_metadata:
            raise PipelineError(f"data.text_embeddings is for model.kind=llm2clip, and this is {recipe.model.kind}")

    @abstractmethod
    def lengths(self, recipe: Recipe) -> Lengths:
        """What samples take, in tokens."""

    def trained_on(self, pair: Pair, draw: Draw) -> Pair:
        """What a step takes of a sample."""
        return pair.one_text(draw)

    def resolve(self, path: str, cache: Path) -> str:
        """What to load of model.path; what has to be converted is, into `cache`."""
        return path

    @abstractmethod
    def build(self, model: Model, texts: Iterable[str], seed: int, folder: Path) -> None:
        """Write random weights of model.architecture, with a tokenizer of the texts if it has one, as a folder."""

    @abstractmethod
    def processor(self, recipe: Recipe, path: str) -> Processor:
        """For training."""

    @abstractmethod
    def load(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        """What the engine trains."""

    def empty(self, recipe: Recipe, path: str, attention: str) -> nn.Module:
        """The same without weights, for the partitions of ZeRO-3."""
        raise NotImplementedError

    def own_name(self, stored: str) -> str:
        """The name in the model of a tensor that is stored under another."""
        return stored

    def load_whole(self, recipe: Recipe, path: str) -> nn.Module:
        """With what is frozen and outside the engine, if an export holds it."""
        return self.load(recipe, path, "sdpa")

    def frozen(self, recipe: Recipe, path: str, device: torch.device) -> Frozen | None:
        """The part that is outside the engine, if there is one; to be loaded before it."""
        return None

    def exported(self, weights: dict[str, torch.Tensor], frozen: Frozen | None) -> dict[str, torch.Tensor]:
        """What an export holds: the engine's weights, and those of the frozen part if they belong to the model."""
        return weights

    def for_evaluation(
        self, recipe: Recipe, processor: Processor, frozen: Frozen | None, device: torch.device
    ) -> tuple[Processor, Features | None]:
        """With what evaluation sets are embedded, in training."""
        return processor, frozen.features_of if frozen else None

    @abstractmethod
    def save(
        self, recipe: Recipe, model: nn.Module, weights: dict[str, torch.Tensor], source: str, folder: Path
    ) -> None:
        """Write an export: `weights` with the tokenizer and image processor of `source`, and a model card."""

    # Of a folder.

    @abstractmethod
    def dimension(self, path: str) -> int: ...

    @abstractmethod
    def reader(self, path: str, max_tokens: int, video_frames: int) -> Processor:
        """To embed with."""

    @abstractmethod
    def open(self, path: str, precision: str, device: torch.device) -> tuple[nn.Module, Features | None]:
        """The model on a device, by the fastest attention that runs there, and a frozen part's features."""

    def open_trained(self, path: str) -> nn.Module:
        """The model on the CPU, in the precision that it is stored in, without a frozen part that is outside it."""
        return self.open(path, "auto", torch.device("cpu"))[0]

    def probe(self, path: str) -> list[Encoded]:
        """Items whose vectors tell whether an export is the model that was to be exported."""
        return [self.reader(path, 512, 8).encode(Item(_PROBE))]


def fastest(config: PreTrainedConfig, precision: str, device: torch.device) -> str:
    """The kind of attention for a model of this config on a device."""
    dtype = DTYPES[precision]
    return choose("auto", device.type, (config.dtype or torch.float32) if dtype == "auto" else dtype)
