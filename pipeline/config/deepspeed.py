"""Which settings a DeepSpeed config may have, and where: DeepSpeed ignores most of those that it does not know.

DeepSpeed's own models of its sections are used, where it has some. A setting that this pipeline cannot support is
refused. This imports DeepSpeed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from deepspeed.utils.logging import log_levels
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError
from pydantic.fields import FieldInfo

from pipeline.config import Recipe, is_offloaded, typed
from pipeline.config.section import suggestion
from pipeline.errors import PipelineError
from pipeline.storage.documents import explained, parse_json

_AnyCase = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)  # as DeepSpeed reads it


class _FlopsProfiler(DeepSpeedConfigModel):
    enabled: bool = False
    recompute_fwd_factor: float = 0.0
    profile_step: PositiveInt = 1
    module_depth: int = -1
    top_modules: PositiveInt = 1
    detailed: bool = True
    output_file: str | None = None


class _Timers(DeepSpeedConfigModel):
    throughput: DeepSpeedThroughputTimerConfig = Field(default_factory=DeepSpeedThroughputTimerConfig)


class _DataTypes(DeepSpeedConfigModel):
    grad_accum_dtype: str | None = None


class _Checkpoint(DeepSpeedConfigModel):
    tag_validation: Annotated[Literal["ignore", "warn", "fail"], _AnyCase] = "warn"


class _Config(DeepSpeedConfigModel):
    """Top-level settings that DeepSpeed reads one by one (deepspeed/runtime/config.py)."""

    model_config = ConfigDict(strict=True)

    train_batch_size: int = 1
    train_micro_batch_size_per_gpu: int = 1
    gradient_accumulation_steps: int = 1
    gradient_clipping: float = 1.0
    zero_optimization: DeepSpeedZeroConfig = Field(default_factory=DeepSpeedZeroConfig)
    bf16: DeepSpeedBF16Config = Field(default_factory=DeepSpeedBF16Config)
    data_types: _DataTypes = Field(default_factory=_DataTypes)
    communication_data_type: Annotated[Literal["fp32", "bf16", "fp16"], _AnyCase] | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: float = 1.0
    gradient_allreduce_op: Literal["mean", "sum"] = "mean"
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    checkpoint: _Checkpoint = Field(default_factory=_Checkpoint)
    steps_per_print: PositiveInt | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False
    log_level: Annotated[Literal[*log_levels], _AnyCase] | None = None  # type: ignore[valid-type]  # DeepSpeed's names
    comms_logger: CommsLoggerConfig = Field(default_factory=CommsLoggerConfig)
    flops_profiler: _FlopsProfiler = Field(default_factory=_FlopsProfiler)
    timers: _Timers = Field(default_factory=_Timers)


_PRECISION = "the recipe's precision decides it"
_MONITOR = "it would log the gradient cache's surrogate loss; the run has its own tensorboard"
_NOT_HERE = {
    **dict.fromkeys(("optimizer", "scheduler"), "the recipe's optimizer decides it"),
    **dict.fromkeys(("fp16", "amp", "torch_autocast"), f"{_PRECISION}: bf16 or fp32"),
    **dict.fromkeys(("data_types.param_dtype", "data_types.buffer_dtype"), _PRECISION),
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), _MONITOR),
    "data_types.keep_in_fp32_modules": _PRECISION,
    "bfloat16": "it is called bf16",
    "activation_checkpointing": "batch.activation_checkpointing of the recipe decides it",
    "aio": "it is for offloading to nvme, which is not supported",
}

# Another value than the default would make steps inexact, or checkpoints or logs incomplete.
_NEEDS_DEFAULT = (
    "bf16.bf16_master_weights_and_grads",
    "bf16.bf16_optimizer_states",
    "bf16.check_grad_overflow",
    "prescale_gradients",
    "gradient_predivide_factor",
    "gradient_allreduce_op",
    "zero_optimization.compute_grad_norm",
    "zero_optimization.elastic_checkpoint",
    "zero_optimization.ignore_unused_parameters",
    "zero_optimization.load_from_fp32_weights",
    "zero_optimization.offload_optimizer.ratio",
    "zero_optimization.offload_optimizer.super_offload",
    "zero_optimization.zenflow",
    "zero_optimization.zero_quantized_gradients",
    "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_optimization.zero_quantized_weights",
)


def _settings(model: type[BaseModel], above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The dotted names of all settings below a model."""
    for key, field in model.model_fields.items():
        place = above + (field.alias or key)
        yield place, field
        for option in (field.annotation, *get_args(field.annotation)):
            if isinstance(option, type) and issubclass(option, BaseModel):
                yield from _settings(option, f"{place}.")


_SETTINGS = dict(_settings(_Config))


def completed(path: Path, recipe: Recipe, world_size: int) -> dict[str, Any]:
    """Return a DeepSpeed config without nulls, with each "auto" filled from the recipe.

    Raises ValueError for a setting that DeepSpeed would ignore or fail on, or that contradicts the recipe. Raises
    PipelineError for a file that cannot be read.
    """
    config = parse_json(typed.read_text(path), str(path), dict[str, Any], remedy="correct it")
    stage = int(_checked(config).zero_optimization.stage)
    config = _without_nulls(config)
    batch = recipe.batch.global_batch
    if batch % world_size:
        raise PipelineError(f"{world_size} processes do not divide batch.global_batch={batch}")
    filled = [
        ("train_batch_size", batch, "batch.global_batch"),
        ("train_micro_batch_size_per_gpu", batch // world_size, "batch.global_batch / processes"),
        ("gradient_accumulation_steps", 1, "the gradient cache, which chunks the batch itself"),
        ("gradient_clipping", recipe.optimizer.max_grad_norm, "optimizer.max_grad_norm"),
        ("bf16.enabled", recipe.precision == "bf16", "precision"),
        # A sum of many chunks' gradients in bf16 would round away small ones.
        ("data_types.grad_accum_dtype", "fp32", "the gradient cache, which sums the chunks' gradients"),
    ]
    names = [place for place, _, _ in filled]
    if unknown := [place for place, value in _flat(config) if value == "auto" and place not in names]:
        raise ValueError(f'no recipe field fills {unknown[0]}="auto"; give a value, or remove it')
    config.setdefault("zero_optimization", {})["stage"] = stage
    for place, value, source in filled:
        above, _, name = place.rpartition(".")
        section = config.setdefault(above, {}) if above else config
        if section.get(name, "auto") not in ("auto", value):
            raise ValueError(
                f"{place}={json.dumps(section[name])} contradicts the recipe, where {source} gives "
                f'{json.dumps(value)}; write "auto" there or change the recipe'
            )
        section[name] = value
    if (sum_in := config.get("communication_data_type", "fp32")).lower() not in ("fp32", recipe.precision):
        raise ValueError(
            f"communication_data_type={sum_in} contradicts the recipe's precision={recipe.precision}: gradients are "
            "summed in that, or in fp32; remove it"
        )
    zero = config["zero_optimization"]
    _check_zero(zero, recipe.precision, world_size)
    if zero.get("zero_hpz_partition_size", 0) >= world_size:
        del zero["zero_hpz_partition_size"]  # one group of all: its partitions would equal the first ones
    return config


def _checked(config: dict[str, Any]) -> _Config:
    """A config as DeepSpeed reads it. Raises ValueError for a setting that is unknown, unsupported or wrong."""
    for place, value in _flat(config):
        if why := _NOT_HERE.get(place):
            raise ValueError(f"{place!r} is not set here; {why}")
        if place not in _SETTINGS:
            above = place.rpartition(".")[0]
            here = [other.rpartition(".")[2] for other in _SETTINGS if other.rpartition(".")[0] == above]
            raise ValueError(f"unknown setting {place}; {suggestion(place, here, _SETTINGS)}")
        field = _SETTINGS[place]
        if isinstance(extra := field.json_schema_extra, dict) and extra.get("deprecated"):
            names = [
                DeepSpeedZeroConfig.model_fields[name].alias or name for name in str(extra["new_param"]).split(" or ")
            ]
            raise ValueError(f"{place} is deprecated: set zero_optimization.{' or zero_optimization.'.join(names)}")
        # DeepSpeed also reads "2", "false" and true as numbers or booleans; what reads its config later does not.
        options = field.annotation, *get_args(field.annotation)
        kinds = [kind for kind in options if isinstance(kind, type) and kind is not type(None)]
        if value not in (None, "auto") and kinds == [bool] and not isinstance(value, bool):
            raise ValueError(f"{place} is {json.dumps(value)}: write true or false, without quotes")
        is_number = kinds and bool not in kinds and all(issubclass(kind, int | float) for kind in kinds)
        if value != "auto" and isinstance(value, str | bool) and is_number:
            raise ValueError(f"{place} is {json.dumps(value)}: write a number, without quotes")
        default = field.get_default(call_default_factory=True)
        if place in _NEEDS_DEFAULT and value not in (default, "auto"):
            raise ValueError(
                f"{place}={json.dumps(value)} is not supported: training needs the default, {json.dumps(default)}; "
                "remove it"
            )
    try:
        return _Config(**config)
    except ValidationError as error:
        raise ValueError(explained(error)) from None


def _flat(config: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """All settings and sections by dotted name."""
    for name, value in config.items():
        yield above + name, value
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")


def _without_nulls(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _without_nulls(each) for name, each in value.items() if each is not None}


def _check_zero(zero: dict[str, Any], precision: str, world_size: int) -> None:
    """Raise ValueError for an offload or a size that DeepSpeed cannot do."""
    stage, bf16 = zero["stage"], precision == "bf16"
    if bf16 and stage == 0:
        raise ValueError("DeepSpeed cannot sum bf16 gradients in fp32 at ZeRO 0; use ds_configs/zero1.json")
    for name, least in (("offload_optimizer", 2), ("offload_param", 3)):
        device = zero.get(name, {"device": "none"}).get("device")
        if device not in ("cpu", "none"):
            raise ValueError(f"zero_optimization.{name}.device is {json.dumps(device)}: set it to cpu, or none")
        if device == "cpu" and stage < least:
            raise ValueError(f"{name} needs ZeRO {least} or higher; use ds_configs/zero3_offload.json")
    if bf16 and stage == 2 and is_offloaded(zero):
        raise ValueError(
            "DeepSpeed cannot sum offloaded bf16 gradients in fp32 at ZeRO 2; use ds_configs/zero3_offload.json"
        )
    size = zero.get("allgather_bucket_size", 2)
    if size < 2 or size % 2:
        raise ValueError(f"zero_optimization.allgather_bucket_size={size}: DeepSpeed needs an even number, above 0")
    size = zero.get("zero_hpz_partition_size", 1)
    if size > 1 and stage < 3:
        raise ValueError(f"zero_optimization.zero_hpz_partition_size={size} needs ZeRO 3; remove it")
    if size > 1 and world_size % size:
        raise ValueError(
            f"zero_optimization.zero_hpz_partition_size={size} does not divide {world_size} processes; set it to the "
            "processes on a node, or use ds_configs/zero3.json"
        )
