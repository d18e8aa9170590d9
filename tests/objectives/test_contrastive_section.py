"""The contrastive objective's section of a recipe: what fits together, and alpha's ramp."""

import pytest

from pipeline.config import load_recipe
from pipeline.errors import PipelineError

DEMO = "pipeline/recipes/demo.yaml"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (["objective.reward=teacher"], "need data.teacher"),
        (["objective.distill.scores=teacher"], "need data.teacher"),
        (["data.teacher=beside"], "nothing uses it: remove it, or set objective.reward=teacher"),
        (["data.teacher=beside", "objective.distill.scores=stored"], "nothing uses it"),
        (["objective.dimensions=[16,32]", "objective.dimension_weights=[1]"], "a positive number for each"),
        (["objective.dimensions=[16]", "objective.dimension_weights=[0]"], "a positive number for each"),
        (["objective.temperatures={vqa: 0}"], "objective.temperatures: Input should be greater"),
        (["objective.distill.weight=1"], "objective.distill.scores"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, reason):
    with pytest.raises(PipelineError) as error:
        load_recipe(DEMO, fields)
    assert reason in str(error.value)


def test_another_objective_has_no_teacher():
    with pytest.raises(PipelineError, match=r"data\.teacher is not for objective\.name=masked_next_token"):
        load_recipe("pipeline/recipes/demo_masked.yaml", ["data.teacher=beside"])


def test_alpha_rises_linearly_to_its_value():
    ramped = load_recipe(DEMO, ["objective.alpha=9", "objective.alpha_ramp=4"]).objective
    assert [ramped.alpha_at(step) for step in (0, 1, 4, 5, 100)] == [0, 2.25, 9, 9, 9]
    assert load_recipe(DEMO, []).objective.alpha_at(0) == 9
