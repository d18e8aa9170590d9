"""A run is continued only with the batches that it began with: also where the code that orders them has changed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import train
from pipeline.config import load_recipe
from pipeline.data import lengths, order
from pipeline.errors import PipelineError
from pipeline.training import checkpoint

DEMO = Path(__file__).parents[2] / "pipeline/recipes/demo.yaml"
MASKED = DEMO.with_name("demo_masked.yaml")
VERSIONS = {"the order's version": "ORDER_VERSION", "the token lengths' version": "LENGTHS_VERSION"}


def conditions_of(recipe: Path, *overrides: str) -> dict:
    source = SimpleNamespace(fingerprint="of these data")
    return train.conditions_of_run(load_recipe(recipe, list(overrides)), source, {"stage": 1})


@pytest.fixture
def conditions() -> dict:
    return conditions_of(DEMO)


def begun(folder: Path, conditions: dict) -> Path:
    """A checkpoint's folder, as far as it says how its run began."""
    (folder / "conditions.json").write_text(json.dumps(conditions | {checkpoint.PROCESSES: 1}))
    return folder


def test_a_run_from_before_versions_were_noted_began_with_the_first(tmp_path, conditions, monkeypatch):
    before = begun(tmp_path, {name: value for name, value in conditions.items() if name not in VERSIONS})
    monkeypatch.setattr(train, "ORDER_VERSION", 1)
    monkeypatch.setattr(train, "LENGTHS_VERSION", 1)
    checkpoint.check(before, conditions_of(DEMO))
    for name, constant in VERSIONS.items():
        with monkeypatch.context() as changed, pytest.raises(PipelineError, match=f"{name} is 2 and was 1"):
            changed.setattr(train, constant, 2)
            checkpoint.check(before, conditions_of(DEMO))


def test_a_run_from_before_images_were_turned_goes_on_as_it_read_them(tmp_path, conditions):
    before = begun(tmp_path, {name: value for name, value in conditions.items() if name != "model.images"})
    with pytest.raises(PipelineError, match=r"model\.images is upright and was as_stored. Change it back"):
        checkpoint.check(before, conditions)
    stored = conditions_of(DEMO, "model.images=as_stored")
    checkpoint.check(before, stored)
    of_the_model = {"model": stored["model"] | {"images": "as_stored"}}  # where it was noted once
    checkpoint.check(begun(tmp_path, json.loads(before.joinpath("conditions.json").read_text()) | of_the_model), stored)
    assert conditions["model.images"] == "upright"
    assert "model.images" not in conditions_of(MASKED)


@pytest.mark.parametrize(
    ("config", "read"),
    [
        ({"model_type": "llava_onevision"}, "upright"),
        ({"model_type": "llava_onevision", "image_reading": "as_stored"}, "as_stored"),
        ({"model_type": "llava_qwen", "auto_map": {"AutoModel": "code.Model"}}, "upright"),  # an original one
    ],
)
def test_how_images_are_read_is_the_models_own_way_unless_the_recipe_says(tmp_path, config, read):
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = f"model.path={tmp_path}"
    assert train._images(load_recipe(DEMO, [path])) == read
    assert train._images(load_recipe(DEMO, [path, "model.images=as_stored"])) == "as_stored"


def test_a_run_that_drew_its_masks_otherwise_is_not_continued(tmp_path):
    masked = conditions_of(MASKED)
    checkpoint.check(begun(tmp_path, masked), masked)
    with pytest.raises(PipelineError, match="the masks' version is 2 and was 1"):
        checkpoint.check(begun(tmp_path, {n: v for n, v in masked.items() if n != "the masks' version"}), masked)


def test_an_older_program_does_not_continue_what_a_newer_one_began(tmp_path, conditions):
    assert [conditions[name] for name in VERSIONS] == [order.VERSION, lengths.VERSION]
    checkpoint.check(begun(tmp_path, conditions), conditions)
    for name in VERSIONS:
        with pytest.raises(PipelineError, match=f"{name} is 1 and was 2"):
            checkpoint.check(begun(tmp_path, conditions | {name: 2}), conditions | {name: 1})
