"""The sections of a recipe, and the options of an evaluation: their fields, defaults and checks.

What a model or an objective needs of a recipe is declared in its own folder: see `ModelSection` and `ObjectiveSection`.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from pipeline.config.data import Data, Video
from pipeline.config.section import Fixed, Local, OneOf, Place, Section

_LEAST_RATE = 1e-12  # a smaller one changes no weight: rounding removes the update


class Lora(Section):
    """Low-rank adapters in the language model (arXiv 2106.09685), without dropout: both passes must agree."""

    rank: int = Field(16, gt=0)
    alpha: float = Field(32.0, ge=1e-6, description="the adapters' product is scaled by alpha / rank")
    targets: list[Annotated[str, Field(min_length=1)]] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="the linear layers that get one",
    )


class Prefixes(tuple[str, ...]):
    """Marks a field of `TrainSection`: prefixes of the names of the part's parameters."""

    __slots__ = ()


class TrainSection(Section):
    """The parts of a model that can be trained: true, false, or a learning rate beside optimizer.lr.

    Each part is a field `Annotated[bool | float, Fixed(bool), Prefixes([...])]`. A part that is not trained is frozen.
    """

    @classmethod
    def parts(cls) -> dict[str, tuple[str, ...]]:
        """Prefixes of the parameters' names, by part."""
        marks = ((name, mark) for name, field in cls.model_fields.items() for mark in field.metadata)
        return {name: mark for name, mark in marks if isinstance(mark, Prefixes)}

    @property
    def adapters(self) -> Lora | None:
        """Adapters that are trained in place of the language model's own weights."""
        return None

    @model_validator(mode="after")
    def rates_are_positive(self) -> "TrainSection":
        parts = self.parts()
        for name in parts:
            value = getattr(self, name)
            if isinstance(value, float) and not _LEAST_RATE <= value < 1:
                raise ValueError(
                    f"model.train.{name} is {value:g}: give true, false or a positive learning rate, such as 1e-5"
                )
        if not any(getattr(self, name) for name in parts):
            raise ValueError(f"nothing is trained: set one of model.train.{', '.join(parts)}")
        return self


class LanguageModelTrain(TrainSection):
    """For a model whose part `language_model` can have adapters."""

    lora: Annotated[Lora | None, Fixed()] = Field(
        None, description="train adapters instead of the language model's own weights; its fields:"
    )

    @property
    def adapters(self) -> Lora | None:
        return self.lora

    @model_validator(mode="after")
    def adapters_have_a_rate(self) -> "LanguageModelTrain":
        if self.lora and not getattr(self, "language_model", True):
            raise ValueError(
                "model.train.lora needs model.train.language_model=true or a learning rate, which the adapters use"
            )
        return self


class ModelSection(Section):
    """Fields of every family's section. A family adds its own, and overrides `family`, `train` and others.

    objectives: those that can train the family.  text_part: the part that a text without images trains.
    """

    objectives: ClassVar[tuple[str, ...]] = ("contrastive",)
    text_part: ClassVar[str]
    hidden: ClassVar[tuple[str, ...]] = ("family",)

    family: Annotated[str, Fixed()]
    path: Annotated[Place | None, Fixed()] = Field(None, description="folder or hub name")
    architecture: Annotated[Section | None, Fixed()] = Field(
        None, description="train from random weights with this architecture, instead of model.path; its fields:"
    )
    attention: Literal["auto", "flash_attn_3", "flash_attn_4", "flash_attn", "varlen", "sdpa"] = Field(
        "auto",
        description="attention kernel for texts: FlashAttention 3 (Hopper), 4 (Hopper, Blackwell) or 2 (flash_attn), "
        "varlen (PyTorch) or sdpa; auto: the first of them that runs",
    )
    max_tokens: int = Field(4096, ge=64, description="longest item, in tokens; texts are cut to fit")
    train: TrainSection

    @property
    def other_folders(self) -> dict[str, str]:
        """Folders or hub names besides `path` that a run needs, by field."""
        return {}

    @property
    def texts_train(self) -> bool:
        """Whether a text without images trains anything."""
        return bool(getattr(self.train, self.text_part))

    @model_validator(mode="after")
    def one_source(self) -> "ModelSection":
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give exactly one of model.path and model.architecture")
        return self


class ObjectiveSection(Section):
    """Fields of every objective's section.  without: fields of other sections that it does not use."""

    without: ClassVar[tuple[str, ...]] = ()
    hidden: ClassVar[tuple[str, ...]] = ("name",)

    name: Annotated[str, Fixed()]

    def check(self, recipe: "Recipe") -> None:
        """Raise ValueError if the objective does not fit the recipe's other sections."""

    @property
    def sizes(self) -> list[int]:
        """The sizes to which the trained vectors can be cut; an evaluation during training scores them, too."""
        return []

    @property
    def rounding(self) -> Literal["int8", "binary"] | None:
        """The type to which the trained vectors can be rounded, which an evaluation during training scores, too."""
        return None


def _families() -> Mapping[str, type[Section]]:
    from pipeline.models.registry import FAMILIES  # imported here: their sections use the classes above

    return FAMILIES.sections()


def _objectives() -> Mapping[str, type[Section]]:
    from pipeline.objectives import OBJECTIVES

    return OBJECTIVES.sections()


class Batch(Section):
    global_batch: Annotated[int, Fixed()] = Field(
        gt=1, description="pairs per optimizer step, over all ranks: the contrastive batch"
    )
    sub_batch: Annotated[int | None, Fixed()] = Field(
        None, gt=1, description="size of the groups of pairs that share negatives (default: the whole global batch)"
    )
    chunk_tokens: PositiveInt | Literal["auto"] = Field(
        description="maximum tokens per forward pass, including padding under SDPA; auto finds what fits in the first "
        "steps"
    )
    kept_chunks: NonNegativeInt | Literal["auto"] = Field(
        0,
        description="chunks whose graph is kept, so that they are not recomputed; auto: as many as fit in memory",
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass; use it if one chunk does not fit otherwise"
    )
    tower_tiles: int = Field(64, gt=0, description="tiles in one forward pass of a frozen vision tower")
    features_mb: int = Field(
        4096,
        ge=0,
        description="MiB of frozen features kept on the device; the rest are kept in CPU memory",
    )


class Optimizer(Section):
    lr: float = Field(gt=0, description="peak learning rate")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="fraction of the steps in which lr rises linearly")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are scaled down to this norm; 0: never")
    patience: int = Field(
        3,
        ge=0,
        description="steps in a row that are skipped because their gradient is not finite; one more ends the run",
    )


class Evaluation(Section):
    urls: list[Place] = Field(
        min_length=1, description="evaluation sets: URL or NAME=URL, as pipeline.evaluate takes them"
    )
    every: int | None = Field(
        None,
        gt=0,
        description="steps between evaluations; a run also evaluates before the first and after the last step. "
        "llm2clip loads its text encoder for each evaluation",
    )
    projector: int = Field(
        0,
        ge=0,
        description="each evaluation writes this many queries of each dataset (of captions: in each direction), with "
        "one right answer to each, for TensorBoard's embedding projector; 0: none",
    )


class Checkpoint(Section):
    every: int = Field(gt=0, description="steps between checkpoints")
    keep: int = Field(2, gt=0, description="how many of the newest to keep, besides the best")


class Profile(Section):
    step: int = Field(gt=0, description="the first step to profile; after the first ten, which also warm up")
    steps: int = Field(3, gt=0, le=10, description="how many; a trace of a step may have a hundred MB in memory")

    @property
    def last(self) -> int:
        return self.step + self.steps - 1


class Recipe(Section):
    # The schema is built when a recipe is first read, because the families' sections use classes of this module.
    model_config = ConfigDict(defer_build=True)

    run: Local = Field(description="the run directory: checkpoints, metrics, TensorBoard, the exported model")
    seed: Annotated[int, Fixed()] = Field(0, ge=0, lt=1 << 63)
    steps: int | None = Field(None, gt=0, description="optimizer steps; set either steps or epochs")
    epochs: float | None = Field(None, gt=0, le=1e6, description="passes over the data")
    precision: Annotated[Literal["bf16", "fp32"], Fixed()] = "bf16"
    deepspeed: Local = Field(description="a DeepSpeed config; its `auto` values are filled from the recipe")
    model: Annotated[ModelSection, OneOf("family", _families)]
    data: Data
    video: Video = Video()
    batch: Batch
    objective: Annotated[ObjectiveSection, OneOf("name", _objectives)]
    optimizer: Optimizer
    checkpoint: Checkpoint
    evaluation: Evaluation | None = None
    profile: Profile | None = Field(None, description="write a trace of some steps to RUN/profile; its fields:")
    pictures_every: int = Field(
        200, ge=0, description="steps between pictures of queries and their hardest negatives in TensorBoard; 0: none"
    )
    trackers: list[Literal["wandb", "mlflow"]] = Field(
        [], description="experiment trackers that also get TensorBoard's scalars, if they are installed"
    )
    ledger: bool = Field(False, description="write the sample keys of every step to RUN/ledger")
    timeout_minutes: float = Field(
        15, ge=0.01, le=7 * 24 * 60, description="a collective that waits longer ends the job"
    )

    def has_pictures(self, step: int) -> bool:
        """Whether a step, counted from 1, writes pictures: the first, and every `pictures_every`."""
        return bool(self.pictures_every) and (step == 1 or step % self.pictures_every == 0)

    @model_validator(mode="after")
    def objective_fits(self) -> "Recipe":
        model, objective = self.model, self.objective
        if objective.name not in model.objectives:
            raise ValueError(
                f"objective.name={objective.name} is not for model.family={model.family}, which is trained by "
                f"{', '.join(model.objectives)}"
            )
        for place in objective.without:
            name, field = place.split(".")
            fields = type(section := getattr(self, name)).model_fields
            if field in fields and getattr(section, field) != fields[field].default:
                raise ValueError(f"{place} is not for objective.name={objective.name}: remove it")
        objective.check(self)
        return self

    @model_validator(mode="after")
    def works_together(self) -> "Recipe":
        if self.data.neighbours != "beside" and self.data.batches != "neighbours":
            raise ValueError("data.neighbours is set, but only data.batches=neighbours uses it: remove it, or set that")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if not _LEAST_RATE <= self.optimizer.lr < 1:
            raise ValueError(f"optimizer.lr is {self.optimizer.lr:g}: give a learning rate such as 1e-5")
        if self.batch.global_batch % self.data.lanes:
            fitting = [n for n in range(1, self.batch.global_batch + 1) if self.batch.global_batch % n == 0]
            near = sorted(sorted(fitting, key=lambda n: abs(n - self.data.lanes))[:5])
            raise ValueError(
                f"data.lanes={self.data.lanes} does not divide batch.global_batch={self.batch.global_batch}; "
                f"lanes that do: {', '.join(map(str, near))}"
            )
        if self.data.batches == "neighbours" and self.batch.sub_batch:
            raise ValueError(
                "batch.sub_batch is not for data.batches=neighbours: it would separate the samples of a cluster; set "
                "it to null"
            )
        if self.data.batches == "neighbours" and self.data.cap_rows == "first":
            raise ValueError(
                "data.cap_rows=first is not for data.batches=neighbours, whose clusters are of all samples: make a "
                "dataset of the first ones, and mine it"
            )
        if self.batch.sub_batch and self.batch.sub_batch % self.data.lanes:
            raise ValueError(
                f"batch.sub_batch={self.batch.sub_batch} must be a multiple of data.lanes={self.data.lanes}, "
                "because every lane contributes equally"
            )
        if self.batch.sub_batch and self.batch.global_batch % self.batch.sub_batch:
            raise ValueError(
                f"batch.sub_batch={self.batch.sub_batch} does not divide batch.global_batch={self.batch.global_batch}"
            )
        return self
