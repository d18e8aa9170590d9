"""Recipes of an earlier version are refused, with the replacement; those in run directories are still read."""

from pathlib import Path

import pytest
import yaml

from pipeline.config import load_recipe, recipe_of_run
from pipeline.errors import PipelineError

DEMO = Path("pipeline/recipes/demo.yaml")
FORMER = Path(__file__).parent / "former"  # recipe.yaml of earlier runs, one per former model type
NEW = {
    "llave": ("demo", "model.mm_newline_position=grid", "model.train.lora={rank: 4}", "batch.sub_batch=32"),
    "caption": ("demo_caption", "model.instruction=find"),
    "mntp": ("demo_masked",),
    "llm2clip": ("demo_llm2clip", "model.text_encoder=/tmp/none"),
    "clip": ("demo_clip",),
}


@pytest.mark.parametrize("kind", NEW)
def test_run_recipe_of_earlier_version_is_read(kind, tmp_path):
    name, *overrides = NEW[kind]
    (tmp_path / "recipe.yaml").write_text((FORMER / f"{kind}.yaml").read_text())
    assert recipe_of_run(tmp_path) == load_recipe(DEMO.with_name(f"{name}.yaml"), overrides)


@pytest.mark.parametrize("kind", NEW)
def test_earlier_recipe_is_refused_with_replacement_lines(kind, tmp_path):
    name, *overrides = NEW[kind]
    values = yaml.safe_load((FORMER / f"{kind}.yaml").read_text())
    with pytest.raises(PipelineError, match="are fields of an earlier version") as error:
        load_recipe(FORMER / f"{kind}.yaml", [])
    lines = yaml.safe_load(str(error.value).partition("as they are:\n")[2])
    wanted = load_recipe(DEMO.with_name(f"{name}.yaml"), overrides)
    new = {key: value for key, value in values.items() if key not in ("model", "train", "loss")}
    new["objective"] = lines["objective"]
    fields = type(wanted.model).model_fields
    model = {key: value for key, value in values["model"].items() if key in fields}
    if model["architecture"]:
        model["architecture"] = {part: value for part, value in model["architecture"].items() if value}
    new["model"] = model | lines["model"]
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(new))
    assert load_recipe(tmp_path / "new.yaml", []) == wanted


@pytest.mark.parametrize("section", ["train: {projector: false}", "loss: {alpha: 0}", "train: 5"])
def test_recipe_mixing_versions_is_refused_with_field_moves(section, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"{DEMO.read_text()}{section}\n")
    with pytest.raises(PipelineError, match=r"Move the fields of train to model\.train, and those of loss to obj"):
        load_recipe(tmp_path / "recipe.yaml", [])


@pytest.mark.parametrize("section", ["model: foo\nloss: x", "model: {kind: llave}\ntrain: 5", "loss: []"])
def test_malformed_earlier_sections_are_refused(section, tmp_path):
    (tmp_path / "recipe.yaml").write_text(section)
    with pytest.raises(PipelineError):
        load_recipe(tmp_path / "recipe.yaml", [])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.vision_tower=true", "write model.train.vision_tower=true"),
        ("train={projector: false}", "write model.train={projector: false}"),
        ("loss.alpha=0", "write objective.alpha=0"),
        ("model.kind=mntp", "write model.family=text_encoder objective.name=masked_next_token"),
        ("model.kind=clip", "write model.family=clip objective.name=contrastive"),
    ],
)
def test_earlier_override_is_refused_with_replacement(override, named):
    with pytest.raises(PipelineError) as error:
        load_recipe(DEMO, [override])
    assert named in str(error.value)
