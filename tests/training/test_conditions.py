"""A run is only continued with the batches that it started with, even if the code that orders them has changed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config import load_recipe
from pipeline.data import lengths, order
from pipeline.errors import PipelineError
from pipeline.models.registry import training_of
from pipeline.training import checkpoint
from pipeline.training import conditions as conditions_module

DEMO = Path(__file__).parents[2] / "pipeline/recipes/demo.yaml"
MASKED = DEMO.with_name("demo_masked.yaml")
FURTHER = tuple(f"the {what}' fingerprint" for what in ("teacher vectors", "mined negatives", "neighbours"))
VERSIONS = {"the order's version": "ORDER_VERSION", "the token lengths' version": "LENGTHS_VERSION"}


def conditions_of(recipe: Path, *overrides: str) -> dict:
    source = SimpleNamespace(fingerprints={"the data's fingerprint": "of these data"} | dict.fromkeys(FURTHER))
    return conditions_module.conditions_of_run(load_recipe(recipe, list(overrides)), source, {"stage": 1})


@pytest.fixture
def conditions() -> dict:
    return conditions_of(DEMO)


def begun(folder: Path, conditions: dict) -> Path:
    """Write a checkpoint folder with only the conditions that its run started with."""
    (folder / "conditions.json").write_text(json.dumps(conditions | {checkpoint.PROCESSES: 1}))
    return folder


def test_run_without_recorded_versions_counts_as_version_1(tmp_path, conditions, monkeypatch):
    before = begun(tmp_path, {name: value for name, value in conditions.items() if name not in VERSIONS})
    monkeypatch.setattr(conditions_module, "ORDER_VERSION", 1)
    monkeypatch.setattr(conditions_module, "LENGTHS_VERSION", 1)
    conditions_module.check(before, conditions_of(DEMO))
    for name, constant in VERSIONS.items():
        with monkeypatch.context() as changed, pytest.raises(PipelineError, match=f"{name} was 1 and is now 2"):
            changed.setattr(conditions_module, constant, 2)
            conditions_module.check(before, conditions_of(DEMO))


def test_run_without_image_condition_resumes_only_as_stored(tmp_path, conditions):
    before = begun(tmp_path, {name: value for name, value in conditions.items() if name != "model.images"})
    with pytest.raises(PipelineError, match=r"model\.images was as_stored and is now upright. Restore it"):
        conditions_module.check(before, conditions)
    stored = conditions_of(DEMO, "model.images=as_stored")
    conditions_module.check(before, stored)
    assert conditions["model.images"] == "upright"
    assert "model.images" not in conditions_of(MASKED)


def test_run_without_prompt_condition_resumes_only_with_chat(tmp_path):
    qwen = DEMO.with_name("demo_qwen.yaml")
    chat = conditions_of(qwen)
    before = begun(tmp_path, {name: value for name, value in chat.items() if name != "model.prompt"})
    conditions_module.check(before, chat)
    with pytest.raises(PipelineError, match=r"model\.prompt was chat and is now vlm2vec. Restore it"):
        conditions_module.check(before, conditions_of(qwen, "model.prompt=vlm2vec"))


@pytest.mark.parametrize(
    ("config", "read"),
    [
        ({"model_type": "llava_onevision"}, "upright"),
        ({"model_type": "llava_onevision", "image_reading": "as_stored"}, "as_stored"),
        ({"model_type": "llava_qwen", "auto_map": {"AutoModel": "code.Model"}}, "upright"),  # an original checkpoint
    ],
)
def test_recipe_overrides_image_reading_of_the_model(tmp_path, config, read):
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = f"model.path={tmp_path}"

    def images(*overrides: str) -> str:
        recipe = load_recipe(DEMO, list(overrides))
        return training_of(recipe).conditions(recipe.model)["model.images"]

    assert images(path) == read
    assert images(path, "model.images=as_stored") == "as_stored"


def test_run_with_older_mask_version_is_not_resumed(tmp_path):
    masked = conditions_of(MASKED)
    conditions_module.check(begun(tmp_path, masked), masked)
    with pytest.raises(PipelineError, match="the masks' version was 1 and is now 2"):
        conditions_module.check(begun(tmp_path, {n: v for n, v in masked.items() if n != "the masks' version"}), masked)


@pytest.mark.parametrize("name", FURTHER)
def test_run_without_a_further_source_resumes_only_without_it(tmp_path, conditions, name):
    for before in ({n: v for n, v in conditions.items() if n not in FURTHER}, conditions):
        begun(tmp_path, before)
        conditions_module.check(tmp_path, conditions)
        with pytest.raises(PipelineError, match=rf"from \S+: {name} was None and is now f. Restore it"):
            conditions_module.check(tmp_path, conditions | {name: "f"})
    with pytest.raises(PipelineError, match=rf"from \S+: {name} was f and is now None. Restore it"):
        conditions_module.check(begun(tmp_path, conditions | {name: "f"}), conditions)


def test_run_of_newer_version_is_not_resumed(tmp_path, conditions):
    assert [conditions[name] for name in VERSIONS] == [order.VERSION, lengths.VERSION]
    conditions_module.check(begun(tmp_path, conditions), conditions)
    for name in VERSIONS:
        with pytest.raises(PipelineError, match=f"{name} was 2 and is now 1"):
            conditions_module.check(begun(tmp_path, conditions | {name: 2}), conditions | {name: 1})


FORMER = json.loads(Path(__file__).with_name("former_conditions.json").read_text())
AS_FORMER = {
    "llave": ("demo", "model.mm_newline_position=grid", "model.train.lora={rank: 4}", "batch.sub_batch=32"),
    "caption": ("demo_caption", "model.instruction=find"),
    "mntp": ("demo_masked",),
    "llm2clip": ("demo_llm2clip", "model.text_encoder=/tmp/none"),
    "clip": ("demo_clip",),
}


def as_former(kind: str, monkeypatch, *overrides: str) -> dict:
    """Return the conditions of the recipe that corresponds to an earlier version's run, with the same model weights."""
    # In this order: the family keeps the function that it imports.
    monkeypatch.setattr("pipeline.models.llm2clip.family.fingerprint", lambda path, **_: path and "f")
    monkeypatch.setattr("pipeline.models.files.fingerprint", lambda path: path and "f")
    name, *own = AS_FORMER[kind]
    return conditions_of(DEMO.with_name(f"{name}.yaml"), *own, *overrides)


@pytest.mark.parametrize("kind", AS_FORMER)
def test_run_of_earlier_version_resumes_only_with_same_recipe(kind, tmp_path, monkeypatch):
    if kind == "llave":  # its texts were stripped: resumed, the run would go on with other tokens
        with pytest.raises(PipelineError, match=r"^[^;]*: white space around texts was stripped and is now kept\. Re"):
            conditions_module.check(begun(tmp_path, FORMER[kind]), as_former(kind, monkeypatch))
    before = begun(tmp_path, {"white space around texts": "kept"} | FORMER[kind])
    conditions_module.check(before, as_former(kind, monkeypatch))
    for override, named in (
        ("batch.global_batch=16", r"batch.global_batch was \d+ and is now 16"),
        ("model.architecture.text={vocab_size: 900, hidden_size: 8}", "model.architecture was"),
        ("objective.alpha=3", r"objective.alpha was .+ and is now 3.0"),
        ("objective.mask_rate=0.5", "objective.mask_rate was 0.2 and is now 0.5"),
        ("model.train.language_model=false", "model.train.language_model was True and is now False"),
        ("model.train.lora={rank: 8}", "model.train.lora was"),
        ("model.query_instructions={images: find}", "model.query_instructions was None and is now {'images': 'find'}"),
    ):
        try:
            other = as_former(kind, monkeypatch, override)
        except PipelineError:  # the recipe has no such field
            continue
        with pytest.raises(PipelineError, match=named):
            conditions_module.check(before, other)


def test_new_field_blocks_resume_only_if_set(tmp_path, conditions):
    new = ("objective.margin", "model.mm_newline_position", "video.frames", "data.cap_rows", "data.hard_negatives")
    new += ("data.scaled_jpeg",)
    before = {name: value for name, value in conditions.items() if name not in new}
    before["data.datasets"] = [{"name": part["name"]} for part in conditions["data.datasets"]]
    conditions_module.check(begun(tmp_path, before), conditions)
    for override, named in (
        ("objective.margin=0.1", "objective.margin was None and is now 0.1"),
        ("model.mm_newline_position=grid", "model.mm_newline_position was None and is now grid"),
        ("video.frames=4", "video.frames was None and is now 4"),
        ("data.cap_rows=first", "data.cap_rows was None and is now first"),
        ("data.hard_negatives=false", "data.hard_negatives was None and is now False"),
        ("data.scaled_jpeg=true", "data.scaled_jpeg was None and is now True"),
        ("data.datasets=[{name: Scene-CLS, cap: 3}]", "data.datasets was"),
    ):
        with pytest.raises(PipelineError, match=named):
            conditions_module.check(tmp_path, conditions_of(DEMO, override))
