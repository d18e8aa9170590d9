"""A recipe: what one run trains, on what, and how. Typed, validated, with `key=value` overrides.

A recipe is a YAML file (see `pipeline/recipes/`). Every value of it can be set on the command line
by its dotted name: `optimizer.lr=2e-5 data.url=s3://bucket/prefix`. An unknown name, a wrong type or
values that cannot work together are errors that name the field, before anything is started.
"""

import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline import home
from pipeline.config import typed
from pipeline.errors import PipelineError, shown

_PACKAGE = Path(__file__).resolve().parents[1]
ROOT = _PACKAGE.parent  # a checkout, or the folder that the package is installed in
_LEAST_RATE = 1e-12  # what a smaller one adds to a weight is lost in rounding


def _place(text: str) -> str:
    try:
        return home.expanded(text)
    except ValueError as error:
        raise PydanticCustomError("typed", "{reason}", {"reason": str(error)}) from None


def _folder(path: str) -> str:
    if "://" in path:
        raise PydanticCustomError("typed", "it is a URL: name a file or a folder; only data may be on S3")
    return path


Place = Annotated[str, AfterValidator(_place)]  # a path, a URL or a name; of an evaluation set also NAME=URL
Local = Annotated[Place, AfterValidator(_folder)]  # a path


class Section(BaseModel):
    """Fields that are strict, of what each makes of what was typed (pipeline/config/typed.py)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        try:
            return typed.read(cls.model_fields[info.field_name].annotation, value)
        except ValueError as error:
            raise PydanticCustomError("typed", "{reason}", {"reason": str(error)}) from None

    @classmethod
    def describe(cls, prefix: str = "") -> str:
        """All fields with their defaults and meanings, a line each, for --help."""
        lines = []
        for name, field in cls.model_fields.items():
            default = "" if field.is_required() else json.dumps(field.get_default(), default=lambda _: None)
            if (section := _section_of(field.annotation)) and get_origin(field.annotation) is not list:
                lines.append(section.describe(f"{prefix}{name}."))
            else:
                lines.append(f"  {prefix + name + '=' + default:<34} {field.description or ''}".rstrip())
        return "\n".join(lines)


class Architecture(Section):
    """The shape of a model that starts from random weights, of the parts that its kind has."""

    vision: dict[str, Any] = Field(
        {}, description="transformers' SiglipVisionConfig; of clip and llm2clip CLIPVisionConfig"
    )
    text: dict[str, Any] = Field(
        {},
        description="transformers' Qwen2Config; of caption and mntp also another's, as {model_type: llama}; of clip "
        "CLIPTextConfig; vocab_size is the tokenizer's, trained",
    )
    image_grid_pinpoints: list[tuple[PositiveInt, PositiveInt]] = Field(
        [], description="llave: sizes (height, width) an image is tiled to"
    )


class Model(Section):
    kind: Literal["llave", "caption", "mntp", "llm2clip", "clip"] = Field(
        "llave",
        description="llave; LLM2CLIP's stages, caption (a decoder as text encoder) and llm2clip (a vision encoder that "
        "it teaches); mntp, before them (a decoder learns to attend both ways by masked next-token prediction); clip, "
        "both of whose towers are trained",
    )
    path: Place | None = Field(
        None,
        description="folder or hub name. llave: LLaVA-OneVision in transformers' format or an original LLaVE; caption "
        "and mntp: a decoder; llm2clip: a CLIP, SigLIP or timm vision tower; clip: a CLIP",
    )
    architecture: Architecture | None = Field(None, description="or: random weights of this shape")
    image_grid_pinpoints: list[tuple[PositiveInt, PositiveInt]] | None = Field(
        None,
        min_length=1,
        description="llave: sizes (height, width) an image is tiled to, if not those in the model's config",
    )
    # Where it is not set it is not among the conditions of a run: those that began before it was there go on.
    mm_newline_position: Literal["one_token", "grid"] | None = Field(
        None,
        exclude_if=lambda position: position is None,
        description="llave: where a video has newlines, at its end or after each row of each frame, if not where the "
        "model's config says",
    )
    images: Literal["upright", "as_stored"] | None = Field(
        None,
        exclude_if=lambda images: images is None,
        description="upright: turned by their EXIF orientation, 16 bits scaled to 8; as_stored: by Pillow's "
        "convert(\"RGB\") alone, as the papers' code; if not as the model's config says, or else upright",
    )
    instruction: str = Field("", description="caption: what stands before each text, seen and not pooled")
    text_encoder: Place | None = Field(
        None, description="llm2clip: folder or hub name of the frozen text encoder, a caption run's export"
    )
    attention: Literal["auto", "flash_attn", "varlen", "sdpa"] = Field(
        "auto",
        description="over texts and what is in them: flash-attn, torch's variable-length one, or SDPA; auto: the first "
        "of them that runs there; over an image's tiles, all of one size, it is SDPA",
    )
    max_tokens: int = Field(4096, ge=64, description="longest item, in tokens; texts are cut to fit")

    @model_validator(mode="after")
    def one_source(self) -> "Model":
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give either model.path or model.architecture, not both and not neither")
        if self.architecture and self.image_grid_pinpoints:
            raise ValueError("model.image_grid_pinpoints is for model.path; the architecture names its own")
        of_one_kind = {
            "image_grid_pinpoints": "llave",
            "mm_newline_position": "llave",
            "images": "llave, llm2clip or clip",
            "instruction": "caption",
            "text_encoder": "llm2clip",
        }
        for name, kind in of_one_kind.items():
            if getattr(self, name) and self.kind not in re.split(", | or ", kind):
                raise ValueError(f"model.{name} is for model.kind={kind}, and this is {self.kind}")
        if self.kind == "llm2clip" and not self.text_encoder:
            raise ValueError("model.text_encoder is missing: the export of a run of kind caption")
        if self.architecture:
            wanted = {
                "llave": ("vision", "text", "image_grid_pinpoints"),
                "caption": ("text",),
                "mntp": ("text",),
                "llm2clip": ("vision",),
                "clip": ("vision", "text"),
            }[self.kind]
            for name in Architecture.model_fields:
                if bool(getattr(self.architecture, name)) != (name in wanted):
                    what = "is missing" if name in wanted else f"is not for model.kind={self.kind}"
                    raise ValueError(f"model.architecture.{name} {what}")
        return self


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
        None, gt=0, description="samples an epoch takes at most, weighted or not; the next takes others"
    )


class Data(Store):
    url: Place = Field(description="s3://bucket/prefix or a folder: an index.json, or one per dataset below it")
    datasets: list[Part] = Field(
        [], description="datasets below url: NAME or {name: NAME, weight: 1, cap: 50000}; empty: url is itself one"
    )
    text_embeddings: Place | None = Field(
        None, description="vectors of the captions, by pipeline.embed --shards: its --out, or `beside`"
    )
    cap: int | None = Field(None, gt=0, description="samples an epoch takes at most of a dataset that names no cap")
    batches: str = Field(
        "mixed", description="mixed: from all datasets; homogeneous: from one; interleaved:K: K equal parts of one each"
    )
    lanes: int = Field(8, gt=0, description="parallel readers of an epoch; the world size must divide it")
    block_samples: int = Field(64, gt=0, description="consecutive samples fetched by one ranged read")
    window_blocks: int = Field(
        16, gt=0, description="blocks a lane shuffles together, and deals out in equal numbers of tokens"
    )
    memory_mb: int = Field(4096, gt=0, description="encoded samples that a rank holds, about, read ahead included")
    workers: int = Field(2, ge=0, description="decoding processes per rank; 0: in the training process")
    max_bad_fraction: float = Field(
        0.001, ge=0, le=1, description="of the samples so far, 10,000 at least; above it the run stops"
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
    frames: int = Field(8, gt=0, description="frames of a video that the model sees, evenly spaced")


class Batch(Section):
    global_batch: int = Field(gt=1, description="pairs per optimizer step, over all ranks: the contrastive batch")
    sub_batch: int | None = Field(
        None, gt=1, description="pairs that are each other's negatives, if not the whole global batch's"
    )
    chunk_tokens: PositiveInt | Literal["auto"] = Field(
        description="tokens a forward pass holds at once, with SDPA's padding; auto: what fits is found in the first "
        "steps"
    )
    kept_chunks: NonNegativeInt | Literal["auto"] = Field(
        0, description="chunks whose graph is kept from the first pass: memory for time; auto: as many as fit"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute each layer's activations in backward: for a chunk that fits only so"
    )
    tower_tiles: int = Field(64, gt=0, description="tiles that a frozen vision tower sees at once")
    features_mb: int = Field(
        4096,
        ge=0,
        description="what a frozen tower or text encoder gives, on the device; further ones wait in the host's memory",
    )


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
            raise ValueError(f"train.lora.targets is {targets}: name one layer at least, and each once, as [q_proj]")
        return targets


class Train(Section):
    """What is trained: true, false, or a learning rate of its own beside optimizer.lr. The rest is frozen."""

    projector: bool | float = Field(True, description="llave's, with the newline's embedding")
    language_model: bool | float = Field(True, description="its weights, or adapters")
    vision_tower: bool | float = Field(False, description="llave's, where frozen, runs outside the engine, once a step")
    adapter: bool | float = Field(True, description="llm2clip's, over the frozen text encoder's vectors")
    lora: Lora | None = Field(None, description="adapters take the place of the language model's own weights")

    @model_validator(mode="after")
    def rates_are_positive(self) -> "Train":
        for name in Train.model_fields:
            value = getattr(self, name)
            if isinstance(value, float) and not _LEAST_RATE <= value < 1:
                raise ValueError(f"train.{name} is {value:g}: give true, false or a positive learning rate, as 1e-5")
        if self.lora and not self.language_model:
            raise ValueError("train.lora needs train.language_model, whose learning rate the adapters have")
        return self


# Of each kind of model, the parts that can be trained: fields of Train.
TRAINED_PARTS = {
    "llave": ("projector", "language_model", "vision_tower"),
    "caption": ("language_model",),
    "mntp": ("language_model",),
    "llm2clip": ("vision_tower", "adapter"),
    "clip": ("vision_tower", "language_model"),
}


class Loss(Section):
    alpha: float = Field(9.0, ge=0, description="hardness weighting of LLaVE; 0 is plain InfoNCE")
    temperature: float = Field(0.02, ge=0.01, le=100, description="what similarities are divided by")
    learn_temperature: bool = Field(False, description="train it from there, at optimizer.lr; 0.01 is its lower bound")
    margin: float | None = Field(None, description="mask negatives more similar than the positive by this much")
    mask_rate: float = Field(0.2, ge=1e-3, le=1, description="mntp: tokens that are hidden, to be predicted")
    mask_random: float = Field(0.1, ge=0, le=1, description="mntp: of these, what any token takes the place of")
    mask_kept: float = Field(
        0.1, ge=0, le=1, description="mntp: of these, what stays as it is; a mask token hides the rest"
    )

    @model_validator(mode="after")
    def hidden_is_shared_out(self) -> "Loss":
        if self.mask_random + self.mask_kept > 1:
            raise ValueError(
                f"loss.mask_random={self.mask_random} and loss.mask_kept={self.mask_kept} are more than 1 together"
            )
        return self


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
        description="steps; besides, always before the first and after the last. llm2clip loads its text encoder then",
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
    run: Local = Field(description="the run directory: checkpoints, metrics, TensorBoard, the exported model")
    seed: int = Field(0, ge=0)
    steps: int | None = Field(None, gt=0, description="optimizer steps; or give epochs")
    epochs: float | None = Field(None, gt=0, le=1e6)
    precision: Literal["bf16", "fp32"] = "bf16"
    deepspeed: Local = Field(description="a DeepSpeed config; its `auto` values are filled from the recipe")
    model: Model
    data: Data
    video: Video = Video()
    batch: Batch
    train: Train = Train()
    loss: Loss = Loss()
    optimizer: Optimizer
    checkpoint: Checkpoint
    evaluation: Evaluation | None = None
    ledger: bool = Field(False, description="write the sample keys of every step to RUN/ledger")
    timeout_minutes: float = Field(
        15, ge=0.01, le=7 * 24 * 60, description="a collective that waits longer ends the job"
    )

    @model_validator(mode="after")
    def something_is_trained(self) -> "Recipe":
        """Of the parts that the kind of model has, and nothing is said of others."""
        parts, kind = TRAINED_PARTS[self.model.kind], self.model.kind
        every = {part for parts in TRAINED_PARTS.values() for part in parts}
        for name in sorted(every - set(parts)):
            if getattr(self.train, name) != Train.model_fields[name].default:
                raise ValueError(f"train.{name} is not for model.kind={kind}; its parts are {', '.join(parts)}")
        if kind in ("llm2clip", "clip") and "vision_tower" not in self.train.model_fields_set:
            raise ValueError(f"say whether train.vision_tower is trained: model.kind={kind} is mostly there for it")
        if not any(getattr(self.train, name) for name in parts):
            raise ValueError(f"nothing is trained: set one of train.{', '.join(parts)}")
        if self.train.lora and kind not in ("llave", "caption", "mntp"):
            raise ValueError("train.lora is for the language models of llave, caption and mntp")
        return self

    @model_validator(mode="after")
    def fields_are_of_the_loss(self) -> "Recipe":
        """Masked next-token prediction knows no negatives and needs one pass; the contrastive loss masks no tokens."""
        if self.model.kind == "mntp":
            fields = [f"loss.{name}" for name in Loss.model_fields if not name.startswith("mask_")]
            fields, whose = [*fields, "batch.sub_batch", "batch.kept_chunks"], "the contrastive losses"
        else:
            fields, whose = [f"loss.{name}" for name in Loss.model_fields if name.startswith("mask_")], "mntp"
        for field in fields:
            section, name = field.split(".")
            given = getattr(self, section)
            if getattr(given, name) != type(given).model_fields[name].default:
                raise ValueError(f"{field} is for {whose}, and model.kind is {self.model.kind}")
        return self

    @model_validator(mode="after")
    def works_together(self) -> "Recipe":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs, not both and not neither")
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
                f"batch.sub_batch={self.batch.sub_batch} is no multiple of data.lanes={self.data.lanes}, each of which "
                "gives as many pairs to it"
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
        None, gt=0, description="tokens a forward pass holds at once (16384, or 4096 where attention pads)"
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
    values = typed.parse(typed.read_text(path), str(path))
    if not isinstance(values, dict):
        raise PipelineError(f"{path} is not a recipe: expected `key: value` lines")
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

    The contrastive batch is cut into chunks inside one optimizer step (pipeline/training/step.py), so for
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
            raise PipelineError(f"{path}: zero_optimization.{name} names no device, and would do nothing: add one, cpu")
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


def _explain(root: type[Section], error: dict) -> str:
    """One pydantic error as a sentence; for an unknown field, with the names that come near."""
    if error["type"] == "extra_forbidden":
        return _unknown(root, error["loc"])
    place, section = [], root
    for part in error["loc"]:  # among them are names of a union's types, too
        if isinstance(part, int) or (section and part in section.model_fields):
            place.append(str(part))
        if isinstance(part, str) and section and part in section.model_fields:
            section = _section_of(section.model_fields[part].annotation)
    name = ".".join(place)
    if error["type"] == "missing":
        return f"{name} is missing"
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    if error["type"] == "typed":
        return f"{name}: {error['msg']}"
    if error["type"] == "model_type":
        fields = ", ".join(section.model_fields) if section else ""
        return f"{name or 'this'} is a section, of {fields}; got {shown(error['input'])}"
    return f"{name}: {error['msg']}, got {shown(error['input'])}"


def _unknown(root: type[Section], place: Sequence[str | int]) -> str:
    """Why there is no field at this place, and what may be meant; empty where there is one."""
    section: type[Section] | None = root
    is_free, names = False, [str(part) for part in place]
    for depth, key in enumerate(place):
        if isinstance(key, int):  # a place in a list
            continue
        if section is None:
            return "" if is_free else f"{'.'.join(names[:depth])} has no fields"
        if key not in section.model_fields:
            break
        annotation = section.model_fields[key].annotation
        section, is_free = _section_of(annotation), get_origin(annotation) is dict
    else:
        return ""
    fields, above = list(section.model_fields), names[:depth]
    near = difflib.get_close_matches(key, fields, n=2, cutoff=0.5)
    elsewhere = [other for other in _all_fields(root) if other.split(".")[-1] == key]
    hint = " or ".join(elsewhere or [".".join([*above, field]) for field in near])
    known = f"did you mean {hint}?" if hint else f"known here: {', '.join(fields)}"
    return f"unknown field {'.'.join([*above, key])}; {known}"


def _section_of(annotation: Any) -> type[Section] | None:
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)


def _all_fields(section: type[Section], prefix: str = "") -> list[str]:
    names = []
    for key, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        names += _all_fields(inner, f"{prefix}{key}.") if inner else [prefix + key]
    return names


def _refuse_auto(config: dict, path: Path, above: tuple[str, ...]) -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_auto(value, path, (*above, key))
        elif value == "auto":
            raise PipelineError(
                f'{path}: the recipe has nothing for {".".join((*above, key))}="auto"; give a value, or remove it'
            )
