"""A recipe: what one run trains, on what, and how. Typed, validated, with `key=value` overrides.

A recipe is a YAML file (see `pipeline/recipes/`). Every value of it can be set on the command line
by its dotted name: `optimizer.lr=2e-5 data.url=s3://bucket/prefix`. An unknown name, a wrong type or
values that cannot work together are errors that name the field, before anything is started.
"""

import difflib
import json
import re
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.errors import PipelineError

ROOT = Path(__file__).resolve().parent.parent


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

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
    image_grid_pinpoints: list[tuple[int, int]] = Field(
        [], description="llave: sizes (height, width) an image is tiled to"
    )


class Model(Section):
    kind: Literal["llave", "caption", "mntp", "llm2clip", "clip"] = Field(
        "llave",
        description="llave; LLM2CLIP's stages, caption (a decoder as text encoder) and llm2clip (a vision encoder that "
        "it teaches); mntp, before them (a decoder learns to attend both ways by masked next-token prediction); clip, "
        "both of whose towers are trained",
    )
    path: str | None = Field(
        None,
        description="folder or hub name. llave: LLaVA-OneVision in transformers' format or an original LLaVE; caption "
        "and mntp: a decoder; llm2clip: a CLIP, SigLIP or timm vision tower; clip: a CLIP",
    )
    architecture: Architecture | None = Field(None, description="or: random weights of this shape")
    image_grid_pinpoints: list[tuple[int, int]] | None = Field(
        None, description="llave: sizes (height, width) an image is tiled to, if not those in the model's config"
    )
    # Where it is not set it is not among the conditions of a run: those that began before it was there go on.
    mm_newline_position: Literal["one_token", "grid"] | None = Field(
        None,
        exclude_if=lambda position: position is None,
        description="llave: where a video has newlines, at its end or after each row of each frame, if not where the "
        "model's config says",
    )
    instruction: str = Field("", description="caption: what stands before each text, seen and not pooled")
    text_encoder: str | None = Field(
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
            "instruction": "caption",
            "text_encoder": "llm2clip",
        }
        for name, kind in of_one_kind.items():
            if getattr(self, name) and self.kind != kind:
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

    timeout_s: float = Field(120, gt=0, description="seconds without a byte after which a read is an error")
    requester_pays: bool = Field(False, description="pay for reading from somebody else's requester-pays bucket")
    addressing: Literal["auto", "path", "virtual"] = Field(
        "auto", description="path: server/bucket/key; virtual: bucket.server/key; auto: path unless it is AWS"
    )

    def store(self) -> dict[str, Any]:
        """What `pipeline.data.objects.configure` takes."""
        return self.model_dump(include=set(Store.model_fields))


class Part(Section):
    """A dataset in a mixture."""

    name: str = Field(pattern=r"^[^./][^/]*$", description="its folder below data.url")
    weight: float = Field(1.0, gt=0, description="how often an epoch takes each of its samples")
    cap: int | None = Field(
        None, gt=0, description="samples an epoch takes at most, weighted or not; the next takes others"
    )


class Data(Store):
    url: str = Field(description="s3://bucket/prefix or a folder: an index.json, or one per dataset below it")
    datasets: list[Part] = Field(
        [], description="datasets below url: NAME or {name: NAME, weight: 1, cap: 50000}; empty: url is itself one"
    )
    text_embeddings: str | None = Field(
        None, min_length=1, description="vectors of the captions, by pipeline.embed --shards: its --out, or `beside`"
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
    alpha: float = Field(32.0, gt=0, description="the adapters' product is scaled by alpha / rank")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="the linear layers that get one",
    )


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
            if isinstance(value, float) and value <= 0:
                raise ValueError(f"train.{name} is {value}: give true, false or a positive learning rate")
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
    temperature: float = Field(0.02, ge=0.01, description="what similarities are divided by")
    learn_temperature: bool = Field(False, description="train it from there, at optimizer.lr; 0.01 is its lower bound")
    margin: float | None = Field(None, description="mask negatives more similar than the positive by this much")
    mask_rate: float = Field(0.2, gt=0, le=1, description="mntp: tokens that are hidden, to be predicted")
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
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="share of the steps in which lr rises linearly")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are scaled down to this norm; 0: never")


class Evaluation(Section):
    urls: list[str] = Field(description="evaluation sets: URL or NAME=URL, as pipeline.evaluate takes them")
    every: int | None = Field(
        None,
        gt=0,
        description="steps; besides, always before the first and after the last. llm2clip loads its text encoder then",
    )


class Checkpoint(Section):
    every: int = Field(gt=0, description="steps between checkpoints")
    keep: int = Field(2, gt=0, description="how many of the newest stay on disk")


class Recipe(Section):
    run: str = Field(description="the run directory: checkpoints, metrics, TensorBoard, the exported model")
    seed: int = Field(0, ge=0)
    steps: int | None = Field(None, gt=0, description="optimizer steps; or give epochs")
    epochs: float | None = Field(None, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"
    deepspeed: str = Field(description="a DeepSpeed config; its `auto` values are filled from the recipe")
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
    timeout_minutes: float = Field(15, gt=0, description="a collective that waits longer ends the job")

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

    out: str | None = Field(None, description="folder of embeddings and report (evaluation/MODEL)")
    against: str | None = Field(None, description="another evaluation's folder, or its report.json, to show beside it")
    part: str | None = Field(
        None,
        pattern=r"^[0-9]+/[1-9][0-9]*$",
        description="i/N: embed only every N-th dataset from the i-th on, counted from 0; a later call reports on all",
    )
    encoder: str | None = Field(
        None, description="module:function or file.py:function that makes an Encoder (pipeline/evaluation/encoder.py)"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="bf16, fp32, or auto: the folder's own")
    chunk_tokens: int | None = Field(
        None, gt=0, description="tokens a forward pass holds at once (16384, or 4096 where attention pads)"
    )
    max_tokens: int = Field(4096, ge=64, description="longest item, in tokens; texts are cut to fit")
    video: Video = Video()
    timeout_minutes: float = Field(15, gt=0, description="a collective that waits longer ends the job")


SectionType = TypeVar("SectionType", bound=Section)

# A field set on the command line takes the place of its alternative in the recipe.
_ALTERNATIVES = {
    "steps": "epochs",
    "epochs": "steps",
    "model.path": "model.architecture",
    "model.architecture": "model.path",
}


def load_recipe(path: str | Path, overrides: list[str]) -> Recipe:
    """Read a recipe and apply `key=value` overrides (values are YAML). Errors name the field and a near miss.

    `variant=NAME` applies those that the recipe itself lists under `variants`, before all others.
    """
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "pipeline/recipes").glob("*.yaml")))
        raise PipelineError(f"no recipe at {path}; the project's own are {known}")
    values = _safe_yaml(path.read_bytes(), str(path))
    if not isinstance(values, dict):
        raise PipelineError(f"{path} is not a recipe: expected `key: value` lines")
    variants = values.pop("variants", None) or {}
    for name in [override.removeprefix("variant=") for override in overrides if override.startswith("variant=")]:
        if name not in variants:
            raise PipelineError(f"{path} has no variant {name!r}; it has {', '.join(variants) or 'none'}")
        values = _overridden(values, [f"{key}={json.dumps(value)}" for key, value in variants[name].items()])
    overrides = [override for override in overrides if not override.startswith("variant=")]
    return _validated(Recipe, _overridden(values, overrides), f"{path}: ")


def parse_options(section: type[SectionType], options: list[str]) -> SectionType:
    """`key=value` arguments as a section; errors as of `load_recipe`."""
    return _validated(section, _overridden({}, options), "")


def dump_recipe(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def load_ds_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """Read the recipe's DeepSpeed config, fill each "auto" from the recipe, refuse what contradicts it.

    The contrastive batch is cut into chunks inside one optimizer step (pipeline/training/step.py), so for
    DeepSpeed a rank's share of the global batch is one micro-batch.
    """
    path = Path(recipe.deepspeed)
    path = path if path.is_file() else ROOT / recipe.deepspeed
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in (ROOT / "ds_configs").glob("*.json")))
        raise PipelineError(f"no DeepSpeed config at {recipe.deepspeed}; ds_configs/ holds {known}")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise PipelineError(f"{path} is not JSON: {error}") from None
    for name in ("optimizer", "scheduler", "fp16"):
        if name in config:
            raise PipelineError(f"{path}: {name!r} is not set here; the recipe's optimizer and precision decide it")

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
    if recipe.precision == "bf16" and zero["stage"] == 0:
        raise PipelineError(f"{path}: DeepSpeed cannot sum bf16 gradients in fp32 at ZeRO 0; use ds_configs/zero1.json")
    for name in ("offload_optimizer", "offload_param"):
        device = zero.get(name, {}).get("device", "none")
        if device not in ("cpu", "none"):
            raise PipelineError(f"{path}: {name} to {device!r} is not supported; its device is cpu, or none")
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
        if not sign or not key:
            raise PipelineError(f"cannot read {override!r}: write it as key=value, e.g. optimizer.lr=2e-5")
        value = _safe_yaml(text, override)
        _set(values, key.split("."), value, override)
        if value is not None and key in _ALTERNATIVES:
            _set(values, _ALTERNATIVES[key].split("."), None, override)
    return values


def _validated(section: type[SectionType], values: dict, where: str) -> SectionType:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise PipelineError(where + "; ".join(_explain(section, e) for e in error.errors())) from None


def _safe_yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PipelineError(f"cannot read {where}: {' '.join(str(error).split())}") from None


def _set(values: dict, keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise PipelineError(f"cannot set {override!r}: {key} is a single value, not a section")
    values[keys[-1]] = value


def _explain(root: type[Section], error: dict) -> str:
    """One pydantic error as a sentence; for an unknown field, with the names that come near."""
    place = [str(part) for part in error["loc"]]
    name = ".".join(place)
    if error["type"] == "extra_forbidden":
        fields = list(_fields_at(root, place[:-1]))
        near = difflib.get_close_matches(place[-1], fields, n=2, cutoff=0.5)
        elsewhere = [other for other in _all_fields(root) if other.split(".")[-1] == place[-1]]
        hint = " or ".join(elsewhere or [".".join([*place[:-1], field]) for field in near])
        known = f"did you mean {hint}?" if hint else f"known here: {', '.join(fields)}"
        return f"unknown field {name}; {known}"
    if error["type"] == "missing":
        return f"{name} is missing"
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    return f"{name}: {error['msg']}, got {error['input']!r}"


def _section_of(annotation: Any) -> type[Section] | None:
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)


def _fields_at(section: type[Section] | None, place: list[str]) -> list[str]:
    for key in (key for key in place if not key.isdecimal()):  # a number is a place in a list
        section = _section_of(section.model_fields[key].annotation) if section else None
    return list(section.model_fields) if section else []


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
            raise PipelineError(f'{path}: the recipe has nothing for {".".join((*above, key))}="auto"; give a value')
