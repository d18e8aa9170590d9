"""Which settings a DeepSpeed config may have, and where: DeepSpeed ignores most of those that it does not know.

DeepSpeed's own models of its sections are used, where it has some. A setting that this pipeline cannot support is
refused with the reason. This imports DeepSpeed.
"""

import difflib
import json
from math import isfinite
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from deepspeed.utils.logging import log_levels
from pydantic import BaseModel, BeforeValidator, Field, PositiveInt, ValidationError
from pydantic.fields import FieldInfo

from pipeline.config import Recipe, is_offloaded, typed
from pipeline.errors import PipelineError, shown
from pipeline.storage.documents import parse_json

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
    tensorboard: TensorBoardConfig = Field(default_factory=TensorBoardConfig)
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    csv_monitor: CSVConfig = Field(default_factory=CSVConfig)
    comet: CometConfig = Field(default_factory=CometConfig)


_PRECISION = "the recipe's precision decides it"
_NVME = "it is for offloading to nvme, which is not supported"
_NOT_HERE = {
    **dict.fromkeys(("optimizer", "scheduler"), "the recipe's optimizer decides it"),
    **dict.fromkeys(("fp16", "amp", "torch_autocast"), f"{_PRECISION}: bf16 or fp32"),
    **dict.fromkeys(("data_types.param_dtype", "data_types.buffer_dtype"), _PRECISION),
    "data_types.keep_in_fp32_modules": _PRECISION,
    "bfloat16": "it is called bf16",
    "activation_checkpointing": "batch.activation_checkpointing of the recipe decides it",
    "aio": _NVME,
}


_SURROGATE = "it would log the gradient cache's surrogate; the run has its own tensorboard"
_ROUNDED = "what it rounds is to be exact"
_ONLY: dict[str, tuple[Any, str]] = {  # settings for which this project supports one value, and why
    "bf16.bf16_master_weights_and_grads": (False, "the gradient cache sums in fp32"),
    "bf16.bf16_optimizer_states": (False, "master weights and moments are fp32"),
    "prescale_gradients": (False, "the gradient cache scales gradients"),
    "gradient_predivide_factor": (1.0, "the gradient cache scales gradients"),
    "gradient_allreduce_op": ("mean", "the gradient cache counts on it"),
    "zero_optimization.allgather_partitions": (True, "DeepSpeed no longer reads it"),
    "zero_optimization.compute_grad_norm": (True, "the run logs it"),
    "zero_optimization.elastic_checkpoint": (False, "checkpoints load on any number of processes without it"),
    "zero_optimization.ignore_unused_parameters": (True, "a chunk without images has none of the tower's"),
    "zero_optimization.load_from_fp32_weights": (True, "a resumed run would begin with other weights"),
    "zero_optimization.legacy_stage1": (False, "DeepSpeed no longer has it"),
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": (0.8, "it is for super_offload"),
    "zero_optimization.offload_optimizer.ratio": (1.0, "all of the optimizer is on the host, or none"),
    "zero_optimization.offload_optimizer.super_offload": (False, "it is not supported"),
    "zero_optimization.pipeline_loading_checkpoint": (False, "there is no pipeline"),
    "zero_optimization.save_muon_momentum_buffer_in_memory": (False, "the optimizer is not Muon"),
    "zero_optimization.zenflow": (None, "it puts off updates"),
    "zero_optimization.zero_quantized_gradients": (False, _ROUNDED),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, _ROUNDED),
    "zero_optimization.zero_quantized_weights": (False, _ROUNDED),
    **{
        f"zero_optimization.{section}.{name}": (model.model_fields[name].default, _NVME)
        for section, model, names in (
            ("offload_param", DeepSpeedZeroOffloadParamConfig, "nvme_path buffer_count buffer_size max_in_cpu"),
            (
                "offload_optimizer",
                DeepSpeedZeroOffloadOptimizerConfig,
                "nvme_path buffer_count pipeline_read pipeline_write fast_init",
            ),
        )
        for name in names.split()
    },
    **{f"{monitor}.enabled": (False, _SURROGATE) for monitor in ("tensorboard", "wandb", "csv_monitor", "comet")},
}

# The ZeRO stages at which DeepSpeed reads a setting; "1 in bf16" has its own optimizer, which reads few settings.
_PARTITIONED = (1, 2, 3)
_STAGES = {
    **dict.fromkeys(("contiguous_gradients", "overlap_comm", "reduce_bucket_size", "reduce_scatter"), _PARTITIONED),
    "allgather_bucket_size": ("1 in bf16", 1, 2),
    **dict.fromkeys(("parameter_alignment", "round_robin_gradients", "use_multi_rank_bucket_allreduce"), (1, 2)),
    **{
        name: (3,)
        for key, field in DeepSpeedZeroConfig.model_fields.items()
        if (name := field.alias or key).startswith("stage3_")
    },
    **dict.fromkeys(
        (
            "enable_sanity_checks",
            "leaf_module",
            "log_trace_cache_warnings",
            "memory_efficient_linear",
            "offload_param",
            "override_module_apply",
            "sub_group_size",
            "zero_hpz_partition_size",
        ),
        (3,),
    ),
}


def completed(path: Path, recipe: Recipe, world_size: int) -> dict[str, Any]:
    """Return a DeepSpeed config without nulls, with each "auto" filled from the recipe.

    Raises ValueError for a setting that DeepSpeed would ignore or fail on, or that contradicts the recipe. Raises
    PipelineError for a file that cannot be read.
    """
    text = typed.read_text(path)
    config = _checked(_Config, parse_json(text, str(path), dict[str, Any], remedy="correct it", nan=True), "")
    config.setdefault("zero_optimization", {}).setdefault("stage", 0)
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
    for place, value, source in filled:
        above, _, name = place.rpartition(".")
        section = config.setdefault(above, {}) if above else config
        if section.get(name, "auto") not in ("auto", value):
            raise ValueError(
                f"{place}={json.dumps(section[name])} contradicts the recipe, where {source} gives "
                f'{json.dumps(value)}; write "auto" there or change the recipe'
            )
        section[name] = value
    _refuse_auto(config, "")
    if (sum_in := config.get("communication_data_type", "fp32")).lower() not in ("fp32", recipe.precision):
        raise ValueError(
            f"communication_data_type={sum_in} contradicts the recipe's precision={recipe.precision}: gradients are "
            "summed in that, or in fp32; remove it"
        )
    _check_zero(config["zero_optimization"], recipe.precision, world_size)
    return config


def _refuse_auto(config: dict[str, Any], above: str) -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_auto(value, f"{above}{key}.")
        elif value == "auto":
            raise ValueError(f'the recipe has nothing for {above}{key}="auto"; give a value, or remove it')


def _check_zero(zero: dict[str, Any], precision: str, world_size: int) -> None:
    """Raise ValueError for a setting that has no effect at this ZeRO stage, or on which DeepSpeed would fail."""
    if precision == "bf16" and zero["stage"] == 0:
        raise ValueError("DeepSpeed cannot sum bf16 gradients in fp32 at ZeRO 0; use ds_configs/zero1.json")
    for name in ("offload_optimizer", "offload_param"):
        device = zero.get(name, {"device": "none"}).get("device")
        if device is None:
            raise ValueError(f"zero_optimization.{name} has no device; set device: cpu")
        if device not in ("cpu", "none"):
            raise ValueError(f"{name} to {device!r} is not supported; its device is cpu, or none")
    stage = "1 in bf16" if (zero["stage"], precision) == (1, "bf16") else zero["stage"]
    defaults = DeepSpeedZeroConfig(stage=zero["stage"]).model_dump(by_alias=True)
    idle = [
        name
        for name, value in zero.items()
        if stage not in _STAGES.get(name, (stage,)) and value not in (defaults[name], {"device": "none"})
    ]
    if idle:
        stages = ", ".join(map(str, _STAGES[idle[0]]))
        raise ValueError(
            f"zero_optimization has {', '.join(idle)}, which would do nothing at ZeRO {stage} ({idle[0]} is for "
            f"{stages}): remove {'it' if len(idle) == 1 else 'them'}, or set another stage"
        )
    size = zero.get("allgather_bucket_size", 2)
    if size < 2 or size % 2:
        raise ValueError(f"zero_optimization.allgather_bucket_size={size}: DeepSpeed needs an even number, above 0")
    size = zero.get("zero_hpz_partition_size", 1)
    if size > 1 and world_size % size:
        raise ValueError(f"zero_optimization.zero_hpz_partition_size={size} does not divide {world_size} processes")
    if is_offloaded(zero) and zero["stage"] < 2:
        raise ValueError("offload_optimizer is for ZeRO 2 and 3; use ds_configs/zero3_offload.json")
    if precision == "bf16" and zero["stage"] == 2 and is_offloaded(zero):
        raise ValueError(
            "DeepSpeed cannot sum offloaded bf16 gradients in fp32 at ZeRO 2; use ds_configs/zero3_offload.json"
        )


def _extra(field: FieldInfo) -> dict[str, Any]:
    """Return DeepSpeed's own annotations of a pydantic field."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _checked(model: type[BaseModel], config: dict[str, Any], above: str) -> dict[str, Any]:
    """Return the settings under the names in DeepSpeed's documentation. Raises ValueError."""
    fields = {name: field for key, field in model.model_fields.items() for name in (key, field.alias) if name}
    checked: dict[str, Any] = {}
    for key, value in config.items():
        place = above + key
        if key not in fields or place in _NOT_HERE:
            raise ValueError(_unknown(place))
        field, extra = fields[key], _extra(fields[key])
        if extra.get("deprecated"):
            names = extra["new_param"].split(" or ")
            new = " or ".join(above + (model.model_fields[name].alias or name) for name in names)
            raise ValueError(f"{place} is deprecated: set {new}")
        if field.alias in config and key != field.alias:
            raise ValueError(f"{place} is there twice, as {field.alias}, too")
        supported, why = _ONLY.get(place, (value, ""))
        if value not in (supported, "auto"):
            raise ValueError(f"{place}={json.dumps(value)} is not supported: {why}; remove it")
        if value is not None:
            checked[field.alias or key] = _checked_value(typed.options(field.annotation), value, place)
        elif NoneType not in typed.options(field.annotation):
            raise ValueError(f"{place} is null: give a value, or remove it")
    try:
        model(**config)
    except ValidationError as error:
        first = error.errors()[0]
        place = above + ".".join(map(str, first["loc"]))
        raise ValueError(f"{place.rstrip('.')}: {first['msg']}, got {shown(first['input'])}") from None
    return checked


def _checked_value(options: list[Any], value: Any, place: str) -> Any:
    for option in options:
        if isinstance(option, type) and issubclass(option, BaseModel):
            if not isinstance(value, dict):
                raise ValueError(f"{place} is a section: expected {{...}}, got {json.dumps(value)}")
            return _checked(option, value, f"{place}.")
    # Pydantic accepts true and "1" as 1; DeepSpeed's other readers of the config do not.
    numbers = [option for option in options if isinstance(option, type) and issubclass(option, int | float)]
    if isinstance(value, bool) and numbers and bool not in options:
        raise ValueError(f"{place} is {json.dumps(value)}: expected a number")
    if isinstance(value, str) and value != "auto" and numbers and {*numbers, NoneType}.issuperset(options):
        raise ValueError(f"{place} is {json.dumps(value)}: write it without quotes")
    if isinstance(value, float) and not isfinite(value):
        raise ValueError(f"{place} is {value}, which is not finite")
    return value


def _unknown(place: str) -> str:
    """Explain why DeepSpeed has no setting at this place."""
    if why := _NOT_HERE.get(place):
        return f"{place!r} is not set here; {why}"
    section, _, name = place.rpartition(".")
    removed = deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS | deepspeed_config._REMOVED_ZERO_CONFIG_KEYS
    if name in removed:
        return f"{place!r}: {removed[name].partition('. ')[0]}"
    places = _places(_Config, "")
    meant = [other for other in (*places, *_NOT_HERE) if other.rpartition(".")[2] == name]
    if not meant:
        here = {other.rpartition(".")[2]: other for other in places if other.rpartition(".")[0] == section}
        names = {other.rpartition(".")[2]: other for other in reversed(places)}
        near = difflib.get_close_matches(name, here, 1, 0.7) or difflib.get_close_matches(name, names, 2, 0.7)
        meant = [here.get(each, names[each]) for each in near]
    hint = f"did you mean {' or '.join(meant)}?" if meant else "nothing here uses it: remove it"
    return f"unknown setting {place}; {hint}"


def _places(model: type[BaseModel], above: str) -> list[str]:
    """Return the places of all settings, top-level ones first."""
    places, inner = [], []
    for key, field in model.model_fields.items():
        place = above + (field.alias or key)
        if not _extra(field).get("deprecated"):
            places.append(place)
        for option in typed.options(field.annotation):
            if isinstance(option, type) and issubclass(option, BaseModel):
                inner += _places(option, f"{place}.")
    return places + inner
