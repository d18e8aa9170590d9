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
        ({"of_mine": 1}, "unknown setting of_mine; nothing here uses it: remove it"),
        # deprecated, removed, or not supported by this pipeline
        (zero(cpu_offload=True), "cpu_offload is deprecated: set zero_optimization.offload_optimizer"),
        (zero(cpu_offload_param=True), "cpu_offload_param is deprecated: set zero_optimization.offload_param"),
        (zero(stage3_gather_fp16_weights_on_model_save=True), "set zero_optimization.stage3_gather_16bit_weights"),
        ({"bfloat16": {"enabled": True}}, "'bfloat16' is not set here; it is called bf16"),
        ({"fp16": {"auto_cast": True}}, "'fp16' is not set here; the recipe's precision"),
        ({"compression_training": {}}, "'compression_training': The DeepSpeed compression library has been removed"),
        (zero(mics_shard_size=2), "MiCS ZeRO-3 sharding has been removed"),
        ({"activation_checkpointing": {}}, "batch.activation_checkpointing of the recipe decides it"),
        ({"scheduler": {"type": "WarmupLR"}}, "'scheduler' is not set here"),
        ({"aio": {"block_size": 1048576}}, "'aio' is not set here"),
        ({"checkpoint": {"load_universal": True}}, "unknown setting checkpoint.load_universal; nothing here uses it"),
        # null, true, text and auto in unexpected places
        ({"zero_optimization": None}, "zero_optimization is null"),
        ({"zero_optimization": True}, "zero_optimization is a section: expected {...}, got true"),
        ({"zero_optimization": "auto"}, 'zero_optimization is a section: expected {...}, got "auto"'),
        (zero(offload_optimizer=True), "zero_optimization.offload_optimizer is a section"),
        (zero(offload_optimizer="auto"), "zero_optimization.offload_optimizer is a section"),
        (zero(offload_optimizer={"device": None}), "zero_optimization.offload_optimizer.device is null"),
        (zero(offload_optimizer={"device": "auto"}), "zero_optimization.offload_optimizer.device"),
        (zero(offload_optimizer={"pin_memory": True}), "zero_optimization.offload_optimizer has no device"),
        (zero(offload_optimizer={"device": "gpu"}), "Input should be 'none', 'cpu' or 'nvme', got 'gpu'"),
        ({"bf16": True}, "bf16 is a section"),
        ({"bf16": None}, "bf16 is null"),
        ({"bf16": {"enabled": "false"}}, 'bf16.enabled is "false": write it without quotes'),
        ({"gradient_clipping": None}, "gradient_clipping is null"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps is true: expected a number"),
        ({"zero_optimization": {"stage": "3"}}, 'zero_optimization.stage is "3": write it without quotes'),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is true"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: Input should be 0, 1, 2, 3"),
        (zero(reduce_bucket_size=-1), "zero_optimization.reduce_bucket_size: Input should be greater than 0"),
        (zero(reduce_bucket_size="auto"), 'zero_optimization.reduce_bucket_size="auto"; give a value, or remove it'),
        ({"wall_clock_breakdown": "auto"}, 'wall_clock_breakdown="auto"'),
        (zero(max_live_parameters=1, stage3_max_live_parameters=2), "max_live_parameters is there twice"),
        # settings that contradict the recipe or the gradient cache's assumptions
        ({"communication_data_type": "fp16"}, "contradicts the recipe's precision=fp32"),
        ({"communication_data_type": "bf16"}, "contradicts the recipe's precision=fp32"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, 'data_types.grad_accum_dtype="bf16" contradicts the recipe'),
        ({"data_types": {"param_dtype": "bf16"}}, "'data_types.param_dtype' is not set here"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "the gradient cache sums in fp32"),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op="sum" is not supported'),
        ({"prescale_gradients": True}, "prescale_gradients=true is not supported"),
        (zero(zero_quantized_gradients=True), "zero_quantized_gradients=true is not supported"),
        (zero(zenflow={"topk_ratio": 0.1}), "zenflow"),
        (zero(2, compute_grad_norm=False), "compute_grad_norm=false is not supported"),
        (zero(2, offload_param=CPU), "has offload_param, which would do nothing at ZeRO 2 (offload_param is for 3):"),
        (zero(1, zero_hpz_partition_size=8), "zero_hpz_partition_size, which would do nothing at ZeRO 1"),
        (zero(2, stage3_max_live_parameters=5, sub_group_size=5), "has stage3_max_live_parameters, sub_group_size, wh"),
        (zero(2, max_live_parameters=5), "stage3_max_live_parameters, which would do nothing"),
        (zero(3, allgather_bucket_size=4e8), "would do nothing at ZeRO 3 (allgather_bucket_size is for 1 in bf16"),
        (zero(0, reduce_bucket_size=4e8), "would do nothing at ZeRO 0"),
        (zero(1, allgather_bucket_size=0), "allgather_bucket_size=0: DeepSpeed needs an even number"),
        (zero(1, allgather_bucket_size=4001), "allgather_bucket_size=4001: DeepSpeed needs an even number"),
        (zero(3, zero_hpz_partition_size=3), "zero_hpz_partition_size=3 does not divide 2 processes"),
        (zero(3, zero_hpz_partition_size=8), "zero_hpz_partition_size=8 does not divide 2 processes"),
        (zero(offload_param=CPU | {"nvme_path": "/scratch"}), "offload_param.nvme_path=\"/scratch\" is not supported"),
        (zero(offload_optimizer=CPU | {"pipeline_read": True}), "pipeline_read=true is not supported: it is for offlo"),
        (zero(2, allgather_partitions=False), "allgather_partitions=false is not supported: DeepSpeed no longer"),
        (zero(1, legacy_stage1=True), "legacy_stage1=true is not supported"),
        (zero(1, load_from_fp32_weights=False), "load_from_fp32_weights=false is not supported: a resumed run"),
        ({"log_level": "verbose"}, "log_level: Input should be 'debug', 'info', 'warning', 'error' or 'critical'"),
        ({"steps_per_print": 0}, "steps_per_print: Input should be greater than 0, got 0"),
        ({"steps_per_print": -1}, "steps_per_print: Input should be greater than 0, got -1"),
        ({"flops_profiler": {"profile_step": 0}}, "flops_profiler.profile_step: Input should be greater than 0"),
        ({"checkpoint": {"tag_validation": "never"}}, "checkpoint.tag_validation: Input should be 'ignore', 'warn' or"),
        ({"tensorboard": {"enabled": True}}, "tensorboard.enabled=true is not supported"),
    ],
)  # fmt: skip
def test_what_would_be_ignored_or_die_later_is_refused(refused, config, said):
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
        ('{"gradient_clipping": NaN}', "gradient_clipping is nan, which is not finite"),
        ('{"gradient_clipping": 1e999}', "gradient_clipping is inf, which is not finite"),
        ('{"steps_per_print": ' + "9" * 5000 + "}", "is not JSON"),
    ],
)
def test_a_file_that_is_no_config_is_refused(refused, text, said):
    assert said in refused(text)


def test_a_folder_is_no_config(tmp_path):
    recipe = load_recipe(DEMO, [f"deepspeed={tmp_path}"])
    with pytest.raises(PipelineError, match="Is a directory"):
        load_ds_config(recipe, 1)


def test_what_people_use_elsewhere_still_works(loaded):
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
            "wandb": {"enabled": False},
        },
        "precision=bf16",
    )
    assert config["zero_optimization"] | sizes == config["zero_optimization"]
    assert config["train_micro_batch_size_per_gpu"] == 64


def test_in_bf16_stage_1_has_an_optimizer_of_its_own(loaded, refused):
    settings = {"overlap_comm": True, "reduce_bucket_size": 5e8, "reduce_scatter": False}
    assert loaded(zero(1, **settings))
    said = "has overlap_comm, reduce_scatter, which would do nothing at ZeRO 1 in bf16"
    assert said in refused(zero(1, **settings), "precision=bf16")


def test_no_section_takes_what_it_does_not_know(refused):
    for place in {place.rpartition(".")[0] for place in ds_config._places(ds_config._Config, "")}:
        section = config = {}
        for name in filter(None, place.split(".")):
            section[name] = section = {}
        section["of_mine"] = 1
        assert "of_mine" in refused(config), place


def test_words_are_read_as_deepspeed_reads_them(loaded):
    for word in ("Ignore", "ignore", "IGNORE"):
        assert loaded({"checkpoint": {"tag_validation": word}})["checkpoint"] == {"tag_validation": word}
    assert loaded({"communication_data_type": "FP32"})


def test_an_offload_of_null_is_none(loaded):
    config = loaded(zero(offload_optimizer=None, offload_param=None, overlap_comm=None))
    assert config["zero_optimization"] == {"stage": 3}
    assert not is_offloaded(config["zero_optimization"])
    assert state_bytes([], stage=3, gpus=1, width=4, zero=config["zero_optimization"]).total == 4 * int(5e8)


def test_settings_are_read_by_either_of_their_names(loaded):
    assert loaded(zero(max_live_parameters=5))["zero_optimization"] == {"stage": 3, "stage3_max_live_parameters": 5}
