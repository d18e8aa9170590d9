"""The interfaces that a model family implements: one for training, one for saved models.

A family is a package with these modules:

    config.py   SECTION, the family's section of a recipe (see `ModelSection`); it does not import torch
    family.py   TRAINING, a `TrainingInterface` for each objective that the section lists, and SAVED, a
                `SavedModelInterface`

The model is a torch module that maps (packed items, with_images, features) to (N, D) float32 unit rows. It has
`dimension`; `pads`, whether attention pads a chunk's items to the longest; and `always_with_images`.
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
    from transformers import PreTrainedConfig

    from pipeline.data.batch import Encoded
    from pipeline.data.lengths import Lengths
    from pipeline.data.sample import ContentDraw, Draw, Item, Pair
    from pipeline.data.source import Source
    from pipeline.models.chunks import Features, Frozen
    from pipeline.models.files import Tensors
    from pipeline.models.flops import StepFlops
    from pipeline.models.shown import View

S = TypeVar("S", bound=ModelSection)

_PROBE = "A cat and a dog on a red sofa"


@dataclass(frozen=True)
class ChunkMemory:
    """Device memory of a chunk in bytes, without parameters.

    forward: peak of a forward pass without gradient.  graph: saved by autograd in a forward pass with gradient.
    backward: peak of the backward pass besides the graph.  features: the frozen part's output.
    sent: what the host sends of it, tokens and tiles.
    """

    forward: int
    graph: int
    backward: int
    features: int
    sent: int


@dataclass(frozen=True)
class ModelMemory:
    """The input of a memory estimate.

    model: the engine's model, on the meta device.  frozen: the part outside the engine, on the meta device, or None.
    chunk: number of tokens -> memory of a chunk that is full of images or of videos.
    """

    model: "nn.Module"
    frozen: "nn.Module | None"
    chunk: Callable[[int], ChunkMemory]


class Processor(Protocol):
    """Encodes items for a model. Raises BadSample for items that the model cannot read.

    as_stored: how it reads images, see `rgb`.
    """

    @property
    def as_stored(self) -> bool: ...

    def encode(self, item: "Item") -> "Encoded": ...

    def encode_parts(
        self, text: str, images: "Sequence[Callable[[], Picture]]", frames: "Callable[[], Sequence[Picture]] | None"
    ) -> "Encoded": ...

    def shown(self, item: "Encoded") -> "View":
        """Return an encoded item as people see it."""


class TrainingInterface(ABC, Generic[S]):
    """The training interface of a family whose recipe section is an S.

    A family needs the abstract methods, for ZeRO-3 also `empty`. The others are for models that need more: weights in
    another format, a frozen part outside the engine, a memory estimate.

    unused: prefixes of parameters that get no gradient, because no embedding depends on them.
    adapted: the model's attribute that gets LoRA adapters if a recipe sets them.
    stages: supported ZeRO stages.
    estimates_memory: whether `memory` is implemented.
    """

    unused: ClassVar[tuple[str, ...]] = ()
    adapted: ClassVar[str] = ""
    stages: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)
    estimates_memory: ClassVar[bool] = False

    def section(self, recipe: Recipe) -> S:
        return cast(S, recipe.model)

    @abstractmethod
    def check(self, model: S) -> None:
        """Raise PipelineError if a recipe's model is invalid, before any of it is loaded.

        Of a model on the hub this reads no weights.
        """

    @abstractmethod
    def build(self, model: S, texts: Iterable[str], seed: int, folder: Path) -> None:
        """Write a folder with random weights of model.architecture and any tokenizer, trained on `texts`."""

    @abstractmethod
    def processor(self, recipe: Recipe, path: str) -> Processor:
        """Return the processor for training."""

    @abstractmethod
    def lengths(self, recipe: Recipe) -> "Lengths":
        """Return the rule for the samples' lengths in tokens."""

    def decoder(self, recipe: Recipe) -> "PreTrainedConfig | None":
        """Return the config of the language model, which attends on packed rows; None if the model has none."""
        return None

    def towers(self, recipe: Recipe) -> "Sequence[PreTrainedConfig]":
        """Return the configs of the towers, whose attention is SDPA."""
        return ()

    @abstractmethod
    def load(self, recipe: Recipe, path: str, attention: str) -> "nn.Module":
        """Return the model that the engine trains.  attention: the kind for the language model."""

    @abstractmethod
    def save(self, recipe: Recipe, model: "nn.Module", weights: "Tensors", source: str, folder: Path) -> None:
        """Write an export: `weights` with the tokenizer and image processor of `source`, and a model card."""

    def adapter_prefix(self, recipe: Recipe, source: str) -> str:
        """Return the prefix of the model's parameters' names that the names in transformers' model lack.

        source: the model that adapters were trained on.  Raises PipelineError if adapters with transformers' model
        of `source` are not the trained model.
        """
        return ""

    def empty(self, recipe: Recipe, path: str, attention: str) -> "nn.Module":
        """Return the model of `load` without weights, to be partitioned by ZeRO-3."""
        raise NotImplementedError

    def own_name(self, stored: str) -> str:
        """Return the model's name for a tensor by its name in a stored checkpoint."""
        return stored

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

    def dimension(self, model: S, saved: int) -> int:
        """Return the dimension of the trained vectors.  saved: that of the initial model, by `SavedModelInterface`."""
        return saved

    def conditions(self, model: S) -> dict[str, Any]:
        """Return, by name, the values besides the recipe's fixed fields that must not change when a run resumes."""
        from pipeline.models.files import fingerprint

        return {"the model's fingerprint": fingerprint(model.path)}

    def trained_on(self, recipe: Recipe, pair: "Pair", draw: "Draw") -> "Pair":
        """Return the part of a sample that a step trains on."""
        return pair.one_text(draw)

    def augmented(self, recipe: Recipe, processor: Processor, draws: "ContentDraw") -> Processor:
        """Return the processor for a step, which may augment images.  draws: the step's random numbers."""
        return processor

    def rate_factors(self, model: S, names: "Sequence[str]") -> dict[str, float] | None:
        """Return a factor of the learning rate for each parameter, or None if there are none.

        With factors, `undecayed` says which matrices besides the vectors have no weight decay.
        """
        return None

    def undecayed(self, name: str) -> bool:
        """Whether a matrix is excluded from weight decay where `rate_factors` apply."""
        return False

    def resolve(self, path: str, cache: Path) -> str:
        """Return the folder or hub name to load for model.path; formats that need it are converted into `cache`."""
        return path

    def converts(self, path: str) -> bool:
        """Whether `resolve` writes a converted copy of the folder at `path`."""
        return False

    def memory(self, recipe: Recipe, videos: bool) -> ModelMemory:
        """Return the input of a memory estimate.  videos: chunks are full of videos instead of images."""
        raise NotImplementedError

    def flops(self, model: "nn.Module", frozen: "Frozen | None") -> "StepFlops | None":
        """Return what counts the FLOPs of a step, or None if they are unknown.

        model: the one that `load` or `empty` returned, as it is trained.  frozen: the part outside the engine.
        """
        return None

    def frozen(self, recipe: Recipe, path: str, device: "torch.device") -> "Frozen | None":
        """Load the frozen part outside the engine, or return None. It is called before the engine is created."""
        return None

    def load_whole(self, recipe: Recipe, path: str) -> "nn.Module":
        """Return the model, with the frozen part outside the engine if an export includes that."""
        return self.load(recipe, path, "sdpa")

    def exported(self, weights: "Tensors", frozen: "Frozen | None") -> "Tensors":
        """Return the weights of an export: the engine's, with those of the frozen part if it belongs to the model."""
        return weights

    def for_evaluation(
        self, recipe: Recipe, processor: Processor, frozen: "Frozen | None", device: "torch.device"
    ) -> "tuple[Processor, Features | None]":
        """Return the processor and the frozen part's features for embedding evaluation sets during training."""
        return processor, frozen.features_of if frozen else None


class SavedModelInterface(ABC):
    """The interface of a family's saved models, a folder or hub name, for evaluation and embedding.

    instructed: whether its texts carry instructions.
    """

    instructed: ClassVar[bool] = False

    @abstractmethod
    def owns(self, path: str, config: dict[str, Any]) -> bool:
        """Whether the model belongs to this family.  config: its config.json."""

    def as_baseline(self, config: dict[str, Any]) -> bool:
        """Whether evaluation embeds its items as MMEB's baselines do, not as training.  config: its config.json."""
        return False

    def folder(self, path: str) -> Path:
        """Return the local folder with the model in transformers' format; a published one may be converted for it."""
        from pipeline.models.files import fetched

        return fetched(path)

    @abstractmethod
    def dimension(self, path: str) -> int: ...

    @abstractmethod
    def reader(self, path: str, max_tokens: int, video_frames: int, video_fps: float | None = None) -> Processor:
        """Return the processor for embedding.  video_frames, video_fps: see `sample_frames`."""

    @abstractmethod
    def open(self, path: str, precision: str, device: "torch.device") -> "tuple[nn.Module, Features | None]":
        """Return the model on a device, with the fastest attention that runs there, and the frozen part's features."""

    def open_trained(self, path: str) -> "nn.Module":
        """Return the model on the CPU in its stored precision, without a frozen part outside it."""
        import torch

        return self.open(path, "auto", torch.device("cpu"))[0]

    def probe(self, path: str) -> "list[Encoded]":
        """Return items whose embeddings are compared to verify an export."""
        from pipeline.data.sample import Item

        return [self.reader(path, 512, 8).encode(Item(_PROBE))]
