import json

import pytest

from pipeline.config import dump_recipe, is_offloaded, load_ds_config, load_recipe
from pipeline.errors import PipelineError

DEMO = "pipeline/recipes/demo.yaml"
BATCH = ["batch.global_batch=128", "precision=fp32"]


def error_of(*overrides: str) -> str:
    with pytest.raises(PipelineError) as error:
        load_recipe(DEMO, list(overrides))
    return str(error.value)


def test_overrides_are_typed_and_survive_dump(tmp_path):
    recipe = load_recipe(DEMO, ["optimizer.lr=2e-5", "data.url=s3://b/p", "objective.margin=0.1", "evaluation=null"])
    assert recipe.optimizer.lr == 2e-5
    assert (recipe.data.url, recipe.objective.margin, recipe.evaluation) == ("s3://b/p", 0.1, None)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml", []) == recipe


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimiser.lr=1", "unknown field optimiser; did you mean optimizer?"),
        ("optimizer.learning_rate=1", "unknown field optimizer.learning_rate; known here: lr, betas"),
        ("lr=1", "unknown field lr; did you mean optimizer.lr?"),
        ("data.lane=4", "did you mean data.lanes?"),
        ("optimizer.lr=fast", "optimizer.lr: Input should be a valid number"),
        ("model.architecture=null", "one of model.path and model.architecture"),
        ("epochs=null", "one of steps and epochs"),
        ("data.lanes=6", "lanes that do: 1, 2, 4, 8"),
        ("data.lanes", "write it as key=value"),
        ("seed.x=1", "seed is a single value"),
        ("data.url=[", "cannot read"),
    ],
)
def test_override_errors_name_field_and_fix(override, named):
    assert named in error_of(override)


def test_override_replaces_its_alternative():
    recipe = load_recipe(DEMO, ["steps=7", "model.path=folder"])
    assert (recipe.steps, recipe.epochs) == (7, None)
    assert (recipe.model.path, recipe.model.architecture) == ("folder", None)
    again = load_recipe(DEMO, ["steps=7", "epochs=2"])
    assert (again.steps, again.epochs) == (None, 2)


def test_bf16_gradients_are_summed_in_fp32_or_refused():
    assert load_ds_config(load_recipe(DEMO, ["precision=bf16"]), 1)["data_types"] == {"grad_accum_dtype": "fp32"}
    with pytest.raises(PipelineError, match="ZeRO 0"):
        load_ds_config(load_recipe(DEMO, ["precision=bf16", "deepspeed=ds_configs/zero0.json"]), 1)


def test_offloaded_bf16_gradients_are_summed_in_fp32_or_refused():
    fields = ["precision=bf16", "deepspeed=ds_configs/zero{}_offload.json"]
    assert load_ds_config(load_recipe(DEMO, [field.format(3) for field in fields]), 1)
    with pytest.raises(PipelineError, match=r"ZeRO 2; use ds_configs/zero3_offload\.json"):
        load_ds_config(load_recipe(DEMO, [field.format(2) for field in fields]), 1)


def test_missing_recipe_error_lists_known_recipes():
    with pytest.raises(PipelineError, match=r"demo\.yaml"):
        load_recipe("nowhere.yaml", [])


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero3_hpz", "zero2_offload", "zero3_offload"])
def test_ds_configs_are_filled_from_recipe(name):
    recipe = load_recipe(DEMO, [f"deepspeed=ds_configs/{name}.json", "optimizer.max_grad_norm=0.5", *BATCH])
    config = load_ds_config(recipe, 16)
    assert config["zero_optimization"]["stage"] == int(name[4])
    assert is_offloaded(config["zero_optimization"]) == name.endswith("offload")
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (128, 8)
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"]["enabled"] is False
    assert "auto" not in json.dumps(config)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"gradient_clipping": 0.5}, ["gradient_clipping=0.5", "optimizer.max_grad_norm", "1.0"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled=true", "precision", "false"]),
        ({"train_batch_size": 64}, ["train_batch_size=64", "batch.global_batch", "128"]),
        ({"optimizer": {"type": "Adam"}}, ["'optimizer'", "recipe"]),
        ({"zero_optimization": {"stage": "auto"}}, ["zero_optimization.stage"]),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            ['offload_optimizer.device is "nvme"', "cpu"],
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ['offload_param.device is "nvme"']),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            ["ZeRO 2 or higher", "zero3_offload.json"],
        ),
    ],
)
def test_ds_config_contradicting_recipe_is_refused(tmp_path, changed, named):
    config = {"zero_optimization": {"stage": 1}} | changed
    (tmp_path / "ds.json").write_text(json.dumps(config))
    recipe = load_recipe(DEMO, [f"deepspeed={tmp_path / 'ds.json'}", *BATCH])
    with pytest.raises(PipelineError) as error:
        load_ds_config(recipe, 1)
    assert all(name in str(error.value) for name in named)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("data.datasets=[{name: a, wieght: 2}]", "unknown field data.datasets.0.wieght; did you mean"),
        ("data.datasets=[a, {name: a, weight: 2}]", "data.datasets names a twice"),
        ("data.datasets=[../other]", "data.datasets.0.name"),
        ("data.batches=interleaved", "it can be mixed, homogeneous, modality, neighbours or interleaved:K"),
        ("data.batches=interleaved:0", "it can be mixed"),
        (
            ["data.batches=neighbours", "batch.sub_batch=16"],
            "batch.sub_batch is not for data.batches=neighbours: it would separate the samples of a cluster",
        ),
        (
            ["data.batches=neighbours", "data.cap=9", "data.cap_rows=first"],
            "data.cap_rows=first is not for data.batches=neighbours, whose clusters are of all samples",
        ),
    ],
)
def test_mixture_errors_name_the_cause(override, reason):
    with pytest.raises(PipelineError) as error:
        load_recipe(DEMO, [override] if isinstance(override, str) else override)
    assert reason in str(error.value)


def test_mixture_weights_caps_and_parts_are_parsed():
    data = load_recipe(DEMO, ["data.datasets=[a, {name: b, weight: 2, cap: 9}]", "data.batches=interleaved: 4"]).data
    assert [(part.name, part.weight, part.cap) for part in data.datasets] == [("a", 1, None), ("b", 2, 9)]
    assert data.parts == 4
    assert load_recipe(DEMO, ["data.batches=homogeneous"]).data.parts == 1
    assert load_recipe(DEMO, []).data.parts is load_recipe(DEMO, ["data.batches=neighbours"]).data.parts is None


def test_field_unused_by_objective_is_refused():
    with pytest.raises(PipelineError, match=r"model\.instruction is not for objective\.name=masked_next_token"):
        load_recipe("demo_masked.yaml", ["model.instruction=find"])


def test_objectives_name_the_rounding_of_their_vectors():
    assert load_recipe(DEMO, []).objective.rounding is None
    assert load_recipe(DEMO, ["objective.quantized=binary"]).objective.rounding == "binary"
    assert load_recipe("demo_masked.yaml", []).objective.rounding is None


def test_sizes_of_vectors_are_ascending():
    assert load_recipe(DEMO, []).objective.sizes == []
    assert load_recipe(DEMO, ["objective.dimensions=[16,64]"]).objective.sizes == [16, 64]
    for wrong in ("[64,16]", "[16,16]"):
        with pytest.raises(PipelineError, match=r"objective\.dimensions: the sizes must be ascending and distinct"):
            load_recipe(DEMO, [f"objective.dimensions={wrong}"])
    with pytest.raises(PipelineError, match="greater than 0"):
        load_recipe(DEMO, ["objective.dimensions=[0]"])
