import pytest

from pipeline.config import load_recipe
from pipeline.errors import PipelineError
from pipeline.training.initial import check_sizes


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
