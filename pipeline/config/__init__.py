"""A recipe: what one run trains, on what, and how. Typed, validated, with `key=value` overrides.

A recipe is a YAML file (see `pipeline/recipes/`). Every value of it can be set on the command line
by its dotted name: `optimizer.lr=2e-5 data.url=s3://bucket/prefix`. An unknown name, a wrong type or
values that cannot work together are errors that name the field, before anything is started.

What a model or an objective needs of a recipe is declared in its own folder: see `ModelSection` and `ObjectiveSection`.
"""

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, field_validator, model_validator

from pipeline.config import former, typed
from pipeline.config.section import Fixed as Fixed
from pipeline.config.section import Local, OneOf, Place, Section, field_names, sections_of, tag_of
from pipeline.errors import PipelineError, shown

_PACKAGE = Path(__file__).resolve().parents[1]
ROOT = _PACKAGE.parent  # a checkout, or the folder that the package is installed in
_LEAST_RATE = 1e-12  # what a smaller one adds to a weight is lost in rounding


class Lora(Section):
    """Low-rank adapters in the language model (arXiv 2106.09685), without dropout: both passes must agree."""

    rank: int = Field(16, gt=0)
    alpha: float = Field(32.0, ge=1e-6, description="the adapters' product is scaled by alpha / rank")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="the linear layers that get one",
    )

    @field_validator("targets")
    @classmethod
    def targets_differ(cls, targets: list[str]) -> list[str]:
        if not all(targets) or len({*targets}) < max(len(targets), 1):
            raise ValueError(
                f"model.train.lora.targets is {targets}: name one layer at least, and each once, as [q_proj]"
            )
        return targets


class Prefixes(tuple[str, ...]):
    """Marks a field of `TrainSection`: the beginnings of the names of the part's parameters."""

    __slots__ = ()


class TrainSection(Section):
    """The parts of a model that can be trained: true, false, or a learning rate beside optimizer.lr.

    Each part is a field `Annotated[bool | float, Fixed(bool), Prefixes([...])]`. What is not trained is frozen.
    """

    @classmethod
    def parts(cls) -> dict[str, tuple[str, ...]]:
        """The beginnings of the parameters' names, by part."""
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
                    f"model.train.{name} is {value:g}: give true, false or a positive learning rate, as 1e-5"
                )
        if not any(getattr(self, name) for name in parts):
            raise ValueError(f"nothing is trained: set one of model.train.{', '.join(parts)}")
        return self


class LanguageModelTrain(TrainSection):
    """For a model whose part `language_model` can have adapters."""

    lora: Annotated[Lora | None, Fixed()] = Field(
        None, description="adapters take the place of the language model's own weights"
    )

    @property
    def adapters(self) -> Lora | None:
        return self.lora

    @model_validator(mode="after")
    def adapters_have_a_rate(self) -> "LanguageModelTrain":
        if self.lora and not getattr(self, "language_model", True):
            raise ValueError("model.train.lora needs model.train.language_model, whose learning rate the adapters have")
        return self


class ModelSection(Section):
    """What every family's section has. A family adds its own fields, and overrides `family`, `train` and more.

    objectives: those that it can be trained with.  text_part: the part that a text without images trains.
    """

    objectives: ClassVar[tuple[str, ...]] = ("contrastive",)
    text_part: ClassVar[str]
    hidden: ClassVar[tuple[str, ...]] = ("family",)

    family: Annotated[str, Fixed()]
    path: Annotated[Place | None, Fixed()] = Field(None, description="folder or hub name")
    architecture: Annotated[Section | None, Fixed()] = Field(
        None, description="train from random weights with this architecture, instead of model.path"
    )
    attention: Literal["auto", "flash_attn", "varlen", "sdpa"] = Field(
        "auto",
        description="attention kernel of the language model: flash_attn, varlen (PyTorch) or sdpa; auto uses the first "
        "one available; the vision tower always uses SDPA",
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
    """What every objective's section has.  without: fields of `batch` that mean nothing to it."""

    without: ClassVar[tuple[str, ...]] = ()
    hidden: ClassVar[tuple[str, ...]] = ("name",)

    name: Annotated[str, Fixed()]


def _families() -> Mapping[str, type[Section]]:
    from pipeline.models.registry import FAMILIES  # here: their sections are made of those above

    return FAMILIES.sections()


def _objectives() -> Mapping[str, type[Section]]:
    from pipeline.objectives import OBJECTIVES

    return OBJECTIVES.sections()


class Store(Section):
    """How objects are read; endpoint and credentials come from the usual AWS environment."""

    timeout_s: float = Field(
        120, ge=0.1, le=24 * 3600, description="seconds without a byte after which a read is an error"
    )
    requester_pays: bool = Field(False, description="pay for reading from somebody else's requester-pays bucket")
    addressing: Literal["auto", "path", "virtual"] = Field(
        "auto", description="path: server/bucket/key; virtual: bucket.server/key; auto: path unless it is AWS"
    )

    def store(self) -> dict[str, Any]:
        """What `pipeline.storage.objects.configure` takes."""
        return self.model_dump(include=set(Store.model_fields))


class Part(Section):
    """A dataset in a mixture."""

    name: str = Field(pattern=r"^[^./][^/]*$", description="its folder below data.url")
    weight: float = Field(1.0, gt=0, description="how often an epoch takes each of its samples")
    cap: int | None = Field(
        None, gt=0, description="maximum samples per epoch, weighted or not; the next epoch takes others"
    )


class Data(Store):
    url: Place = Field(description="s3://bucket/prefix or a folder: an index.json, or one per dataset below it")
    datasets: Annotated[list[Part], Fixed()] = Field(
        [], description="datasets below url: NAME or {name: NAME, weight: 1, cap: 50000}; empty: url is itself one"
    )
    text_embeddings: Place | None = Field(
        None, description="vectors of the captions, by pipeline.embed --shards: its --out, or `beside`"
    )
    cap: Annotated[int | None, Fixed()] = Field(
        None, gt=0, description="maximum samples per dataset and epoch, unless the dataset has its own cap"
    )
    batches: Annotated[str, Fixed()] = Field(
        "mixed", description="mixed: from all datasets; homogeneous: from one; interleaved:K: K equal parts of one each"
    )
    lanes: Annotated[int, Fixed()] = Field(
        8, gt=0, description="parallel readers of an epoch; the world size must divide it"
    )
    block_samples: Annotated[int, Fixed()] = Field(
        64, gt=0, description="consecutive samples fetched by one ranged read"
    )
    window_blocks: Annotated[int, Fixed()] = Field(
        16, gt=0, description="blocks a lane shuffles together, and deals out in equal numbers of tokens"
    )
    memory_mb: int = Field(
        4096, gt=0, description="approximate MiB of encoded samples per rank, including prefetched ones"
    )
    workers: int = Field(2, ge=0, description="decoding processes per rank; 0: in the training process")
    max_bad_fraction: float = Field(
        0.001,
        ge=0,
        le=1,
        description="the run stops if a larger fraction of the samples so far is unusable (of at least 10,000 samples)",
    )

    @field_validator("datasets", mode="before")
    @classmethod
    def names_are_parts(cls, datasets: Any) -> Any:
        if not isinstance(datasets, list):
            return datasets
        return [{"name": each} if isinstance(each, str) else each for each in datasets]

    @field_validator("datasets")
    @classmethod
    def names_differ(cls, datasets: list[Part]) -> list[Part]:
        names = [part.name for part in datasets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"data.datasets names {', '.join(twice)} twice; to take more of it, give it a weight")
        return datasets

    @field_validator("batches", mode="before")
    @classmethod
    def batches_are_known(cls, batches: Any) -> Any:
        if isinstance(batches, dict) and len(batches) == 1:  # what YAML makes of `interleaved: 4`
            batches = ":".join(str(part) for part in next(iter(batches.items())))
        if not re.fullmatch(r"mixed|homogeneous|interleaved: *[1-9][0-9]*", str(batches)):
            raise ValueError(
                f"data.batches is {batches!r}; it can be mixed, homogeneous or interleaved:K, as interleaved:4"
            )
        return batches

    @property
    def parts(self) -> int | None:
        """Homogeneous parts of a batch; None: it is mixed."""
        if self.batches == "mixed":
            return None
        return 1 if self.batches == "homogeneous" else int(self.batches.partition(":")[2])


class Video(Section):
    frames: Annotated[int, Fixed()] = Field(8, gt=0, description="frames of a video that the model sees, evenly spaced")


class Batch(Section):
    global_batch: Annotated[int, Fixed()] = Field(
        gt=1, description="pairs per optimizer step, over all ranks: the contrastive batch"
    )
    sub_batch: Annotated[int | None, Fixed()] = Field(
        None, gt=1, description="pairs that are each other's negatives, if not the whole global batch's"
    )
    chunk_tokens: PositiveInt | Literal["auto"] = Field(
        description="maximum tokens per forward pass, including padding under SDPA; auto finds what fits in the first "
        "steps"
    )
    kept_chunks: NonNegativeInt | Literal["auto"] = Field(
        0, description="chunks whose graph is kept from the first pass: memory for time; auto: as many as fit"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass; use it if one chunk does not fit otherwise"
    )
    tower_tiles: int = Field(64, gt=0, description="tiles that a frozen vision tower sees at once")
    features_mb: int = Field(
        4096,
        ge=0,
        description="MiB of frozen features kept on the device; the rest are kept in CPU memory",
    )


class Optimizer(Section):
    lr: float = Field(gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="share of the steps in which lr rises linearly")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are scaled down to this norm; 0: never")


class Evaluation(Section):
    urls: list[Place] = Field(description="evaluation sets: URL or NAME=URL, as pipeline.evaluate takes them")
    every: int | None = Field(
        None,
        gt=0,
        description="steps between evaluations; a run also evaluates before the first and after the last step. "
        "llm2clip loads its text encoder then",
    )

    @field_validator("urls")
    @classmethod
    def urls_are_there(cls, urls: list[str]) -> list[str]:
        if not urls:
            raise ValueError("evaluation.urls is empty: name a set, or leave evaluation out (evaluation=null)")
        return urls


class Checkpoint(Section):
    every: int = Field(gt=0, description="steps between checkpoints")
    keep: int = Field(2, gt=0, description="how many of the newest stay on disk")


class Recipe(Section):
    # The schema is built when a recipe is first read, for the families' sections are made of classes of this module.
    model_config = ConfigDict(defer_build=True)

    run: Local = Field(description="the run directory: checkpoints, metrics, TensorBoard, the exported model")
    seed: Annotated[int, Fixed()] = Field(0, ge=0)
    steps: int | None = Field(None, gt=0, description="optimizer steps; or give epochs")
    epochs: float | None = Field(None, gt=0, le=1e6)
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
    ledger: bool = Field(False, description="write the sample keys of every step to RUN/ledger")
    timeout_minutes: float = Field(
        15, ge=0.01, le=7 * 24 * 60, description="a collective that waits longer ends the job"
    )

    @model_validator(mode="after")
    def objective_fits(self) -> "Recipe":
        model, objective = self.model, self.objective
        if objective.name not in model.objectives:
            raise ValueError(
                f"objective.name={objective.name} is not for model.family={model.family}, which is trained by "
                f"{', '.join(model.objectives)}"
            )
        for name in objective.without:
            if getattr(self.batch, name) != Batch.model_fields[name].default:
                raise ValueError(f"batch.{name} is not for objective.name={objective.name}: remove it")
        return self

    @model_validator(mode="after")
    def works_together(self) -> "Recipe":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if not _LEAST_RATE <= self.optimizer.lr < 1:
            raise ValueError(f"optimizer.lr is {self.optimizer.lr:g}: give a learning rate as 1e-5")
        if self.batch.global_batch % self.data.lanes:
            fitting = [n for n in range(1, self.batch.global_batch + 1) if self.batch.global_batch % n == 0]
            near = sorted(sorted(fitting, key=lambda n: abs(n - self.data.lanes))[:5])
            raise ValueError(
                f"data.lanes={self.data.lanes} does not divide batch.global_batch={self.batch.global_batch}; "
                f"lanes that do: {', '.join(map(str, near))}"
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


class EvaluationRun(Store):
    """The options of `python -m pipeline.evaluate`."""

    out: Local | None = Field(None, description="folder of embeddings and report (evaluation/MODEL)")
    against: Local | None = Field(
        None, description="another evaluation's folder, or its report.json, to show beside it"
    )
    part: str | None = Field(
        None,
        pattern=r"^[0-9]+/[1-9][0-9]*$",
        description="i/N: embed only every N-th dataset from the i-th on, counted from 0; a later call reports on all",
    )
    encoder: Place | None = Field(
        None, description="module:function or file.py:function that makes an Encoder (pipeline/evaluation/encoder.py)"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="bf16, fp32, or auto: the folder's own")
    chunk_tokens: int | None = Field(
        None, gt=0, description="maximum tokens per forward pass (16384, or 4096 where attention pads)"
    )
    max_tokens: int = Field(4096, ge=64, description="longest item, in tokens; texts are cut to fit")
    video: Video = Video()
    timeout_minutes: float = Field(
        15, ge=0.01, le=7 * 24 * 60, description="a collective that waits longer ends the job"
    )


SectionType = TypeVar("SectionType", bound=Section)

# A field set on the command line takes the place of its alternative in the recipe.
_ALTERNATIVES = {
    "steps": "epochs",
    "epochs": "steps",
    "model.path": "model.architecture",
    "model.architecture": "model.path",
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides (values are YAML). Errors name the field and a near miss.

    `variant=NAME` applies those that the recipe itself lists under `variants`, before all others.
    """
    path = _existing(path, "recipes", "recipe")
    values = _read(path)
    former.refuse(values, overrides, str(path))
    variants = _variants(values.pop("variants", None), path)
    for name in [override.removeprefix("variant=") for override in overrides if override.startswith("variant=")]:
        if name not in variants:
            raise PipelineError(f"{path} has no variant {name!r}; it has {', '.join(variants) or 'none'}")
        for key, value in variants[name].items():
            _override(values, key, value, f"{path}: variants.{name}: {key}")
    overrides = [override for override in overrides if not override.startswith("variant=")]
    return _validated(Recipe, _overridden(values, overrides), f"{path}: ")


def _existing(name: str | Path, folder: str, kind: str) -> Path:
    """The file `name`, or else the project's own file of that name, which any working directory finds.

    The project's own files can be named alone, or as a checkout has them: demo.yaml, pipeline/recipes/demo.yaml.
    """
    path, own = Path(name), {file.name: file for file in (_PACKAGE / folder).iterdir()}
    if os.path.exists(path):  # noqa: PTH110 (Path.exists raises for a name that is too long)
        return path
    if path.name in own and path.parent.as_posix() in (".", folder, f"pipeline/{folder}"):
        return own[path.name]
    raise PipelineError(f"no {kind} at {path}; the project's own are {', '.join(sorted(own))}")


def recipe_of_run(run: Path) -> Recipe:
    """The recipe that a run directory keeps, also of a run that an earlier version began."""
    path = run / "recipe.yaml"
    if not path.exists():
        raise PipelineError(f"no recipe at {path}: is {run} a run directory?")
    return _validated(Recipe, former.recipe(_read(path)), f"{path}: ")


def _read(path: Path) -> dict[str, Any]:
    values = typed.parse(typed.read_text(path), str(path))
    if not isinstance(values, dict):
        raise PipelineError(f"{path} is not a recipe: expected `key: value` lines")
    return values


def _variants(variants: Any, path: Path) -> dict[str, dict[str, Any]]:
    """What each sets by dotted names, all of them checked, whichever is chosen."""
    if not isinstance(variants, dict | None):
        raise PipelineError(f"{path}: variants is {shown(variants)}: expected names, below each what it sets")
    for name, fields in (variants or {}).items():
        if not isinstance(fields, dict):
            raise PipelineError(
                f"{path}: variants.{name} is {'empty' if fields is None else shown(fields)}: list below it what "
                "it sets, as optimizer.lr: 2e-5, or remove it"
            )
        for field in fields:
            if unknown := _unknown(Recipe, field.split(".")):
                raise PipelineError(f"{path}: variants.{name}: {unknown}")
    return variants or {}


def parse_options(section: type[SectionType], options: list[str]) -> SectionType:
    """`key=value` arguments as a section; errors as of `load_recipe`."""
    return _validated(section, _overridden({}, options), "")


def dump_recipe(recipe: Recipe) -> str:
    return typed.dump(recipe.model_dump(mode="json"))


def load_ds_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """Read the recipe's DeepSpeed config, fill each "auto" from the recipe, refuse what contradicts it.

    The contrastive batch is cut into chunks inside one optimizer step (pipeline/objectives/contrastive/step.py), so for
    DeepSpeed a rank's share of the global batch is one micro-batch.
    """
    from pipeline.config import (
        deepspeed as ds_config,  # which takes DeepSpeed: programs that only read recipes start without it
    )

    path = _existing(recipe.deepspeed, "ds_configs", "DeepSpeed config")
    config = ds_config.read(path)
    config.setdefault("zero_optimization", {}).setdefault("stage", 0)
    batch = recipe.batch.global_batch
    if batch % world_size:
        raise PipelineError(f"{world_size} processes do not divide batch.global_batch={batch}")
    filled = [
        (("train_batch_size",), batch, "batch.global_batch"),
        (("train_micro_batch_size_per_gpu",), batch // world_size, "batch.global_batch / processes"),
        (("gradient_accumulation_steps",), 1, "the gradient cache, which chunks the batch itself"),
        (("gradient_clipping",), recipe.optimizer.max_grad_norm, "optimizer.max_grad_norm"),
        (("bf16", "enabled"), recipe.precision == "bf16", "precision"),
        # In bf16 a sum of many chunks' gradients would lose more than any of them.
        (("data_types", "grad_accum_dtype"), "fp32", "the gradient cache, which sums the chunks' gradients"),
    ]
    for keys, value, source in filled:
        section = config
        for key in keys[:-1]:
            section = section.setdefault(key, {})
        given = section.get(keys[-1], "auto")
        if given not in ("auto", value):
            raise PipelineError(
                f"{path}: {'.'.join(keys)}={json.dumps(given)} contradicts the recipe, where {source} gives "
                f'{json.dumps(value)}; write "auto" there or change the recipe'
            )
        section[keys[-1]] = value
    _refuse_auto(config, path, ())
    zero = config["zero_optimization"]
    if config.get("communication_data_type", "fp32").lower() not in ("fp32", recipe.precision):
        raise PipelineError(
            f"{path}: communication_data_type={config['communication_data_type']} contradicts the recipe's "
            f"precision={recipe.precision}: gradients are summed in that, or in fp32; remove it"
        )
    if recipe.precision == "bf16" and zero["stage"] == 0:
        raise PipelineError(f"{path}: DeepSpeed cannot sum bf16 gradients in fp32 at ZeRO 0; use ds_configs/zero1.json")
    for name in ("offload_optimizer", "offload_param"):
        device = zero.get(name, {"device": "none"}).get("device")
        if device is None:
            raise PipelineError(f"{path}: zero_optimization.{name} has no device; set device: cpu")
        if device not in ("cpu", "none"):
            raise PipelineError(f"{path}: {name} to {device!r} is not supported; its device is cpu, or none")
    try:
        ds_config.check_zero(zero, recipe.precision, world_size)
    except ValueError as error:
        raise PipelineError(f"{path}: {error}") from None
    if is_offloaded(zero) and zero["stage"] < 2:
        raise PipelineError(f"{path}: offload_optimizer is for ZeRO 2 and 3; use ds_configs/zero3_offload.json")
    if is_offloaded(zero) and zero["stage"] == 2 and recipe.precision == "bf16":
        raise PipelineError(
            f"{path}: DeepSpeed cannot sum offloaded bf16 gradients in fp32 at ZeRO 2; "
            "use ds_configs/zero3_offload.json"
        )
    return config


def is_offloaded(zero: dict[str, Any]) -> bool:
    """Whether a DeepSpeed config's "zero_optimization" has the optimizer's state, and its work, on the host."""
    return zero.get("offload_optimizer", {}).get("device", "none") == "cpu"


def _overridden(values: dict, overrides: list[str]) -> dict:
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key or text.startswith("="):
            raise PipelineError(f"cannot read {override!r}: write it as key=value, e.g. optimizer.lr=2e-5")
        value = typed.parse(text, override)
        if " #" in text and "#" not in str(value):
            raise PipelineError(
                f"cannot read {override!r}: YAML takes what follows ' #' for a comment: use quotes in it"
            )
        _override(values, key.strip(), value, override)
    return values


def _override(values: dict, key: str, value: Any, override: str) -> None:
    _set(values, key.split("."), value, override)
    if value is not None and key in _ALTERNATIVES:
        _set(values, _ALTERNATIVES[key].split("."), None, override)


def _validated(section: type[SectionType], values: dict, where: str) -> SectionType:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise PipelineError(where + "; ".join(dict.fromkeys(_explain(section, e) for e in error.errors()))) from None


def _set(values: dict, keys: list[str], value: Any, override: str) -> None:
    if not all(keys):
        raise PipelineError(f"cannot set {override!r}: a name is missing beside a dot")
    for place, key in enumerate(keys[:-1], 1):
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if isinstance(values, list):
            raise PipelineError(
                f"cannot set {override!r}: {key} is a list: set all of it, {'.'.join(keys[:place])}=[...]"
            )
        if not isinstance(values, dict):
            raise PipelineError(f"cannot set {override!r}: {key} is a single value, not a section")
    values[keys[-1]] = value


def _explain(root: type[Section], error: Mapping[str, Any]) -> str:
    """One pydantic error as a sentence; for an unknown field, with the names that come near."""
    place: list[str | int] = []
    section: type[Section] | None = root
    section_above = root
    options: Mapping[str, type[Section]] = {}
    for part in error["loc"]:  # the tags and types of unions are among them
        if section is None and part in options:
            section = options[str(part)]
        elif isinstance(part, int) or (section and part in section.model_fields):
            place.append(part)
            if section and isinstance(part, str):
                options, section_above = sections_of(section, part), section
                section = options.get("")
        elif error["type"] == "extra_forbidden" and part == error["loc"][-1]:
            return _unknown(root, [*place, part], section)
    name, kind = ".".join(map(str, place)), error["type"]
    if kind == "missing":
        return f"{name} is missing"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tag = tag_of(section_above, str(place[-1]))
        given = error["input"].get(tag) if isinstance(error["input"], dict) else None
        wrong = "is missing" if given is None else f"is {shown(str(given))}"
        return f"{name}.{tag} {wrong}: set it to one of {', '.join(options)}"
    if kind == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    if kind == "typed":
        return f"{name}: {error['msg']}"
    if kind in ("model_type", "model_attributes_type"):
        fields = ", ".join(section.model_fields) if section else ", ".join(options)
        return f"{name or 'this'} is a section, of {fields}; got {shown(error['input'])}"
    return f"{name}: {error['msg']}, got {shown(error['input'])}"


def _unknown(root: type[Section], place: Sequence[str | int], last: type[Section] | None = None) -> str:
    """Why there is no field at this place, and what may be meant; empty where there is one.

    last: the section that has no such field, where the tag of a union says which one it is.
    """
    sections, is_free, names = [root], False, [str(part) for part in place]
    for depth, key in enumerate(place):
        if isinstance(key, int):  # a place in a list
            continue
        if not sections:
            return "" if is_free else f"{'.'.join(names[:depth])} has no fields"
        known = [section for section in sections if key in section.model_fields]
        if not known or (last and key is place[-1]):
            break
        is_free = any("dict" in str(section.model_fields[key].annotation) for section in known)
        sections = [option for section in known for option in sections_of(section, key).values()]
    else:
        return ""
    sections = [last] if last else sections
    fields, above = list(dict.fromkeys(name for section in sections for name in section.model_fields)), names[:depth]
    near = difflib.get_close_matches(key, fields, n=2, cutoff=0.5)
    elsewhere = [other for other in dict.fromkeys(field_names(root)) if other.split(".")[-1] == key]
    elsewhere = [other for other in elsewhere if other != ".".join(names)]
    hint = " or ".join(elsewhere or [".".join([*above, field]) for field in near])
    known_here = f"did you mean {hint}?" if hint else f"known here: {', '.join(fields)}"
    return f"unknown field {'.'.join([*above, key])}; {known_here}"


def _refuse_auto(config: dict, path: Path, above: tuple[str, ...]) -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_auto(value, path, (*above, key))
        elif value == "auto":
            raise PipelineError(
                f'{path}: the recipe has nothing for {".".join((*above, key))}="auto"; give a value, or remove it'
            )
