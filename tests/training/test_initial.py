import shutil
import sys
from pathlib import Path

import pytest

from pipeline import export
from pipeline.config import load_recipe
from pipeline.errors import PipelineError
from pipeline.training import checkpoint, manifest
from pipeline.training.initial import check_sizes

GOLDEN = Path(__file__).parents[1] / "golden"


def test_sizes_must_end_with_all_of_the_models_numbers(tiny_model):
    def check(sizes: str) -> None:
        recipe = load_recipe(
            "pipeline/recipes/demo.yaml", [f"model.path={tiny_model}", f"objective.dimensions={sizes}"]
        )
        check_sizes(recipe, tiny_model)

    check("[]")
    check("[48]")
    check("[16,48]")
    with pytest.raises(PipelineError, match=r"objective.dimensions=\[16, 64\]: the model's vectors have 48 numbers"):
        check("[16,64]")
    with pytest.raises(PipelineError, match=r"dimensions=\[16, 32\] must end with the model's 48 numbers"):
        check("[16,32]")


def test_export_seals_the_copy_that_it_converts(tmp_path, monkeypatch):
    """As when RUN/init was deleted. A resumed run then checks it."""
    run, original = tmp_path / "run", shutil.copytree(GOLDEN, tmp_path / "original")
    recipe = load_recipe("pipeline/recipes/demo.yaml", [f"model.path={original}"])
    monkeypatch.setattr(export, "recipe_of_run", lambda folder: recipe)
    monkeypatch.setattr(export, "_checkpoint", lambda folder, step: folder)
    monkeypatch.setattr(sys, "argv", ["export", str(run), str(tmp_path / "out")])
    run.mkdir()
    (run / "recipe.yaml").touch()

    class ReadsTheCheckpoint(Exception):
        pass

    def conditions_of(folder: Path) -> None:
        raise ReadsTheCheckpoint

    monkeypatch.setattr(checkpoint, "conditions_of", conditions_of)
    with pytest.raises(ReadsTheCheckpoint):
        export.main.__wrapped__()
    (copy,) = (run / "init").iterdir()
    (copy / "config.json").write_text("{}")
    with pytest.raises(manifest.Damaged, match=r"config.json has 2 bytes"):
        export.main.__wrapped__()
