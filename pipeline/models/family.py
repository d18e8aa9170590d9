"""What a family of models implements: one interface for training, one for its saved folders.

A family is a package with these modules:

    config.py   SECTION, its section of a recipe (see `ModelSection`), without torch
    family.py   TRAINING, a `TrainingInterface` for each objective that the section lists, and SAVED, a
                `SavedModelInterface`

Its model is a torch module that maps (packed items, with_images, features) to (N, D) float32 unit rows. The module has
`dimension`; `pads`, whether attention pads a chunk's items to its longest; `always_with_images`; and
`checkpoint_activations()`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, cast

from pipeline.config import ModelSection, Recipe
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image as Picture
    from torch import nn

    from pipeline.data.collate import Encoded
    from pipeline.data.lengths import Lengths
    from pipeline.data.sample import Draw, Item, Pair
    from pipeline.data.source import Source
    from pipeline.models.chunks import Features
    from pipeline.models.frozen import Frozen

S = TypeVar("S", bound=ModelSection)

_PROBE = "A cat and a dog on a red sofa"


@dataclass(frozen=True)
class ChunkMemory:
    """Bytes that a chunk takes on a device, parameters not counted.

    forward: the most during a forward pass without gradient.  graph: what autograd keeps of one with gradient.
    backward: the most during the backward pass, besides the graph.  features: of the frozen part.
    """

    forward: int
    graph: int
    backward: int
    features: int


@dataclass(frozen=True)
class ModelMemory:
    """What an estimate of memory needs.

    model: the engine's, on the meta device.  frozen: the part that is outside the engine, likewise, or None.
    chunk: number of tokens -> their memory, if the chunk is full of images, or of videos.
    """

    model: "nn.Module"
    frozen: "nn.Module | None"
    chunk: Callable[[int], ChunkMemory]


class Processor(Protocol):
    """Items -> what a model takes; BadSample for those that it cannot take.

    as_stored: how it reads images, see `rgb`.
    """

    @property
    def as_stored(self) -> bool: ...

    def encode(self, item: "Item") -> "Encoded": ...

    def encode_parts(
        self, text: str, images: "Sequence[Callable[[], Picture]]", frames: "Callable[[], Sequence[Picture]] | None"
    ) -> "Encoded": ...


class TrainingInterface(ABC, Generic[S]):
    """What training needs of a family, whose section of a recipe is an S.

    unused: prefixes of parameters that get no gradient, because no embedding depends on them.
    adapted: the part, an attribute of the model, that gets adapters where a recipe asks for them.
    stages: supported ZeRO stages.
    checks_config_alone: whether `check` downloads no weights of a model on the hub.
    estimates_memory: whether it has `memory`.
    """

    unused: ClassVar[tuple[str, ...]] = ()
    adapted: ClassVar[str] = ""
    stages: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)
    checks_config_alone: ClassVar[bool] = False
    estimates_memory: ClassVar[bool] = False

    def section(self, recipe: Recipe) -> S:
        return cast(S, recipe.model)

    @abstractmethod
    def check(self, model: S) -> None:
        """Raise PipelineError for what is wrong in a recipe's model, before anything of it is loaded."""

    def check_stage(self, stage: int) -> None:
        """Raise PipelineError for a ZeRO stage that is not supported."""
        if stage not in self.stages:
            known = ", ".join(map(str, self.stages))
            raise PipelineError(f"this family trains under ZeRO {known}, not {stage}: set deepspeed= to one of them")

    def check_data(self, recipe: Recipe, source: "Source") -> None:
        """Raise PipelineError for data that the model cannot be trained on."""
        if source.embedding_metadata:
            raise PipelineError(
                "data.text_embeddings is for a model with a frozen text encoder, and "
                f"model.family={recipe.model.family} has none: remove it"
            )

    def conditions(self, model: S) -> dict[str, Any]:
        """What must not change when a run resumes, besides the recipe's fixed fields, by name."""
        from pipeline.models.files import fingerprint

        return {"the model's fingerprint": fingerprint(model.path)}

    @abstractmethod
    def lengths(self, recipe: Recipe) -> "Lengths":
        """The samples' lengths in tokens."""

    def trained_on(self, pair: "Pair", draw: "Draw") -> "Pair":
        """The part of a sample that a step trains on."""
        return pair.one_text(draw)

    def resolve(self, path: str, cache: Path) -> str:
        """The folder or hub name to load for model.path; a format that must be converted is, into `cache`."""
        return path

    def converts(self, path: str) -> bool:
        """Whether `resolve` writes a converted copy of the folder at `path`."""
        return False

    def preflight(self, recipe: Recipe, path: str) -> None:
        """Raise PipelineError for what is wrong in the folder of the recipe's model, as far as no GPU is needed."""
        self.check(self.section(recipe))
        self.processor(recipe, path)

    def memory(self, recipe: Recipe, videos: bool) -> ModelMemory:
        """For an estimate of memory.  videos: chunks are full of videos, not of images."""
        raise NotImplementedError

    @abstractmethod
    def build(self, model: S, texts: Iterable[str], seed: int, folder: Path) -> None:
        """Write random weights of model.architecture, with a tokenizer of the texts if it has one, as a folder."""

    @abstractmethod
    def processor(self, recipe: Recipe, path: str) -> Processor:
        """The processor for training."""

    @abstractmethod
    def load(self, recipe: Recipe, path: str, attention: str) -> "nn.Module":
        """The model that the engine trains."""

    def empty(self, recipe: Recipe, path: str, attention: str) -> "nn.Module":
        """The same without weights, for the partitions of ZeRO-3."""
        raise NotImplementedError

    def own_name(self, stored: str) -> str:
        """The name in the model of a tensor that is stored under another."""
        return stored

    def load_whole(self, recipe: Recipe, path: str) -> "nn.Module":
        """The model with its frozen part that is outside the engine, if an export holds that."""
        return self.load(recipe, path, "sdpa")

    def frozen(self, recipe: Recipe, path: str, device: "torch.device") -> "Frozen | None":
        """The part that is outside the engine, if there is one. It is loaded before the engine."""
        return None

    def exported(self, weights: "dict[str, torch.Tensor]", frozen: "Frozen | None") -> "dict[str, torch.Tensor]":
        """What an export holds: the engine's weights, and those of the frozen part if they belong to the model."""
        return weights

    def for_evaluation(
        self, recipe: Recipe, processor: Processor, frozen: "Frozen | None", device: "torch.device"
    ) -> "tuple[Processor, Features | None]":
        """The processor and the frozen part's features with which evaluation sets are embedded during training."""
        return processor, frozen.features_of if frozen else None

    @abstractmethod
    def save(
        self, recipe: Recipe, model: "nn.Module", weights: "dict[str, torch.Tensor]", source: str, folder: Path
    ) -> None:
        """Write an export: `weights` with the tokenizer and image processor of `source`, and a model card."""


class SavedModelInterface(ABC):
    """What evaluation and embedding need of a saved folder, or of a hub name.

    instructed: whether its texts carry instructions.  as_clip: whether evaluation reads it as it reads any CLIP.
    """

    instructed: ClassVar[bool] = False
    as_clip: ClassVar[bool] = False

    @abstractmethod
    def owns(self, path: str, config: dict[str, Any]) -> bool:
        """Whether the model is of this family.  config: its config.json."""

    @abstractmethod
    def dimension(self, path: str) -> int: ...

    @abstractmethod
    def reader(self, path: str, max_tokens: int, video_frames: int) -> Processor:
        """The processor to embed with."""

    @abstractmethod
    def open(self, path: str, precision: str, device: "torch.device") -> "tuple[nn.Module, Features | None]":
        """The model on a device, with the fastest attention that runs there, and a frozen part's features."""

    def open_trained(self, path: str) -> "nn.Module":
        """The model on the CPU, in the precision that it is stored in, without a frozen part that is outside it."""
        import torch

        return self.open(path, "auto", torch.device("cpu"))[0]

    def probe(self, path: str) -> "list[Encoded]":
        """Items whose vectors tell whether an export is the model that was to be exported."""
        from pipeline.data.sample import Item

        return [self.reader(path, 512, 8).encode(Item(_PROBE))]
