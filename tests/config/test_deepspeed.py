"""A DeepSpeed config is validated like a recipe: errors name settings that DeepSpeed would ignore or fail on."""

import json
from pathlib import Path

import pytest

from pipeline.config import deepspeed as ds_config
from pipeline.config import is_offloaded, load_ds_config, load_recipe
from pipeline.errors import PipelineError
from pipeline.training.memory import state_bytes

DEMO = Path(__file__).parents[2] / "pipeline/recipes/demo.yaml"


@pytest.fixture
def loaded(tmp_path):
    """Return a function that loads a config from values or text."""

    def load(config: dict | str, *overrides: str) -> dict:
        file = tmp_path / "ds.json"
        file.write_text(config if isinstance(config, str) else json.dumps(config))
        overrides = ("batch.global_batch=128", "precision=fp32", *overrides)
        return load_ds_config(load_recipe(DEMO, [f"deepspeed={file}", *overrides]), 2)

    return load


@pytest.fixture
def refused(loaded):
    def why(config: dict | str, *overrides: str) -> str:
        with pytest.raises(PipelineError) as error:
            loaded(config, *overrides)
        return str(error.value)

    return why


def zero(stage: int = 3, **settings: object) -> dict:
    return {"zero_optimization": {"stage": stage, **settings}}


CPU = {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        # misplaced or misspelt
        ({"offload_optimizer": CPU, **zero()}, "unknown setting offload_optimizer; did you mean zero_optimization.off"),
        ({"stage": 3}, "unknown setting stage; did you mean zero_optimization.stage?"),
        ({"reduce_bucket_size": 5e8}, "did you mean zero_optimization.reduce_bucket_size?"),
        ({"enabled": True}, "did you mean bf16.enabled"),
        (zero(gradient_clipping=1.0), "unknown setting zero_optimization.gradient_clipping; did you mean gradient_"),
        (zero(offload_optimiser=CPU), "did you mean zero_optimization.offload_optimizer?"),
        (zero(offload_optimizer={"device": "cpu", "pinmemory": True}), "offload_optimizer.pin_memory?"),
        ({"gradient_cliping": 1.0}, "did you mean gradient_clipping?"),
        ({"comms_logger": {"enable": True}}, "did you mean comms_logger.enabled?"),
        ({"flops_profiler": {"profle_step": 1}}, "did you mean flops_profiler.profile_step?"),
        ({"of_mine": 1}, "unknown setting of_mine; known here: train_batch_size, "),
        # deprecated, removed, or not supported by this pipeline
        (zero(cpu_offload=True), "cpu_offload is deprecated: set zero_optimization.offload_optimizer"),
        (zero(cpu_offload_param=True), "cpu_offload_param is deprecated: set zero_optimization.offload_param"),
        (zero(stage3_gather_fp16_weights_on_model_save=True), "set zero_optimization.stage3_gather_16bit_weights"),
        ({"bfloat16": {"enabled": True}}, "'bfloat16' is not set here; it is called bf16"),
        ({"fp16": {"auto_cast": True}}, "'fp16' is not set here; the recipe's precision"),
        ({"compression_training": {}}, "unknown setting compression_training"),
        (zero(mics_shard_size=2), "unknown setting zero_optimization.mics_shard_size"),
        ({"activation_checkpointing": {}}, "batch.activation_checkpointing of the recipe decides it"),
        ({"scheduler": {"type": "WarmupLR"}}, "'scheduler' is not set here"),
        ({"aio": {"block_size": 1048576}}, "'aio' is not set here"),
        ({"checkpoint": {"load_universal": True}}, "unknown setting checkpoint.load_universal; known here: tag_"),
        # null, true, text and auto in unexpected places
        ({"zero_optimization": None}, "zero_optimization: Input should be a valid dictionary"),
        ({"zero_optimization": True}, "zero_optimization: Input should be a valid dictionary"),
        ({"zero_optimization": "auto"}, 'no recipe field fills zero_optimization="auto"'),
        (zero(offload_optimizer=True), "offload_optimizer: Input should be a valid dictionary"),
        (zero(offload_optimizer="auto"), 'no recipe field fills zero_optimization.offload_optimizer="auto"'),
        (zero(offload_optimizer={"device": None}), "offload_optimizer.device: Input should be 'none', 'cpu'"),
        (zero(offload_optimizer={"device": "auto"}), "zero_optimization.offload_optimizer.device"),
        (zero(offload_optimizer={"pin_memory": True}), "offload_optimizer.device is null: set it to cpu, or none"),
        (zero(offload_optimizer={"device": "gpu"}), "Input should be 'none', 'cpu' or 'nvme', got 'gpu'"),
        ({"bf16": True}, "bf16: Input should be a valid dictionary"),
        ({"bf16": None}, "bf16: Input should be a valid dictionary"),
        ({"bf16": {"enabled": "false"}}, 'bf16.enabled is "false": write true or false, without quotes'),
        ({"gradient_clipping": None}, "gradient_clipping: Input should be a valid number"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps is true: write a number"),
        ({"wall_clock_breakdown": "false"}, 'wall_clock_breakdown is "false": write true or false'),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: Input should be 0, 1, 2, 3"),
        (zero(zero_hpz_partition_size="2"), 'zero_hpz_partition_size is "2": write a number, without quotes'),
        (zero(allgather_bucket_size=4001), "allgather_bucket_size=4001: DeepSpeed needs an even number"),
        (zero(reduce_bucket_size=-1), "zero_optimization.reduce_bucket_size: Input should be greater than 0"),
        (zero(reduce_bucket_size="auto"), 'zero_optimization.reduce_bucket_size="auto"; give a value, or remove it'),
        ({"wall_clock_breakdown": "auto"}, 'wall_clock_breakdown="auto"'),
        (zero(max_live_parameters=1), "did you mean zero_optimization.stage3_max_live_parameters?"),
        # settings that contradict the recipe or the gradient cache's assumptions
        ({"communication_data_type": "fp16"}, "contradicts the recipe's precision=fp32"),
        ({"communication_data_type": "bf16"}, "contradicts the recipe's precision=fp32"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, 'data_types.grad_accum_dtype="bf16" contradicts the recipe'),
        ({"data_types": {"param_dtype": "bf16"}}, "'data_types.param_dtype' is not set here"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "is not supported: training needs the default, false"),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op="sum" is not supported'),
        ({"prescale_gradients": True}, "prescale_gradients=true is not supported"),
        (zero(zero_quantized_gradients=True), "zero_quantized_gradients=true is not supported"),
        (zero(zenflow={"topk_ratio": 0.1}), "zenflow"),
        (zero(2, compute_grad_norm=False), "compute_grad_norm=false is not supported"),
        (zero(2, offload_param=CPU), "offload_param needs ZeRO 3 or higher"),
        (zero(2, zero_hpz_partition_size=2), "zero_hpz_partition_size=2 needs ZeRO 3; remove it"),
        (zero(3, zero_hpz_partition_size=3), "zero_hpz_partition_size=3 does not divide 2 processes"),
        (zero(3, zero_hpz_partition_size=8), "zero_hpz_partition_size=8 does not divide 2 processes"),
        (zero(1, load_from_fp32_weights=False), "load_from_fp32_weights=false is not supported"),
        ({"log_level": "verbose"}, "log_level: Input should be 'debug', 'info', 'warning', 'error' or 'critical'"),
        ({"steps_per_print": 0}, "steps_per_print: Input should be greater than 0, got 0"),
        ({"steps_per_print": -1}, "steps_per_print: Input should be greater than 0, got -1"),
        ({"flops_profiler": {"profile_step": 0}}, "flops_profiler.profile_step: Input should be greater than 0"),
        ({"checkpoint": {"tag_validation": "never"}}, "checkpoint.tag_validation: Input should be 'ignore', 'warn' or"),
        ({"tensorboard": {"enabled": True}}, "'tensorboard' is not set here; it would log"),
    ],
)  # fmt: skip
def test_invalid_or_ineffective_settings_are_refused(refused, config, said):
    assert said in refused(config)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty, but should be JSON"),
        ("<html>", "but should be JSON"),
        ("[]", "has another form than expected"),
        ("null", "has another form than expected"),
        ("[" * 100_000, "nested too deeply"),
        ('{"bf16": {}, "bf16": {"enabled": true}}', "has the key 'bf16' twice"),
        ('{"gradient_clipping": NaN}', "has NaN, which is not a JSON number"),
        ('{"gradient_clipping": 1e999}', "gradient_clipping=Infinity contradicts the recipe"),
        ('{"steps_per_print": ' + "9" * 5000 + "}", "is not JSON"),
    ],
)
def test_invalid_config_file_is_refused(refused, text, said):
    assert said in refused(text)


def test_directory_as_config_is_refused(tmp_path):
    recipe = load_recipe(DEMO, [f"deepspeed={tmp_path}"])
    with pytest.raises(PipelineError, match="Is a directory"):
        load_ds_config(recipe, 1)


def test_second_partition_over_all_ranks_is_left_out(loaded):
    assert loaded(zero(3, zero_hpz_partition_size=2))["zero_optimization"] == {"stage": 3}


def test_transformers_example_config_loads(loaded):
    """Load the ZeRO-3 example of transformers' documentation, with numbers for values that only its Trainer can set."""
    sizes = {"reduce_bucket_size": 1e6, "stage3_prefetch_bucket_size": 1e6, "stage3_param_persistence_threshold": 1e4}
    config = loaded(
        {
            "bf16": {"enabled": "auto"},
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": CPU,
                "offload_param": CPU,
                "overlap_comm": True,
                "contiguous_gradients": True,
                "sub_group_size": 1e9,
                "stage3_max_live_parameters": 1e9,
                "stage3_max_reuse_distance": 1e9,
                "stage3_gather_16bit_weights_on_model_save": True,
                **sizes,
            },
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "steps_per_print": 2000,
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "wall_clock_breakdown": False,
            "zero_allow_untested_optimizer": True,
            "communication_data_type": "bf16",
            "comms_logger": {"enabled": False, "verbose": False, "prof_all": True, "debug": False},
            "flops_profiler": {"enabled": False, "profile_step": 1, "module_depth": -1, "output_file": None},
            "timers": {"throughput": {"enabled": True, "synchronized": False}},
        },
        "precision=bf16",
    )
    assert config["zero_optimization"] | sizes == config["zero_optimization"]
    assert config["train_micro_batch_size_per_gpu"] == 64


def test_unknown_settings_are_refused_in_every_section(refused):
    for place in {place.rpartition(".")[0] for place in ds_config._SETTINGS}:
        section = config = {}
        for name in filter(None, place.split(".")):
            section[name] = section = {}
        section["of_mine"] = 1
        assert "of_mine" in refused(config), place


def test_enum_values_are_case_insensitive(loaded):
    for word in ("Ignore", "ignore", "IGNORE"):
        assert loaded({"checkpoint": {"tag_validation": word}})["checkpoint"] == {"tag_validation": word}
    assert loaded({"communication_data_type": "FP32"})


def test_null_offload_means_no_offload(loaded):
    config = loaded(zero(offload_optimizer=None, offload_param=None, overlap_comm=None))
    assert config["zero_optimization"] == {"stage": 3}
    assert not is_offloaded(config["zero_optimization"])
    assert state_bytes([], stage=3, gpus=1, width=4, zero=config["zero_optimization"]).total == 4 * int(5e8)
