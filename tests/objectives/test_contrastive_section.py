"""The contrastive objective's section of a recipe: what fits together, and alpha's ramp."""

from dataclasses import replace

import pytest

from pipeline.config import Data, load_recipe
from pipeline.data.sample import Item, Pair
from pipeline.data.shards import write_shards
from pipeline.data.source import Source
from pipeline.errors import PipelineError
from pipeline.objectives.contrastive.step import Contrastive

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
        (["objective.alpha=0", "objective.alpha_ramp=5"], "weights no negative by its hardness"),
        (["objective.alpha=0", "objective.reward=teacher", "data.teacher=beside"], "weights no negative"),
        (["objective.learn_temperature=true", "objective.temperatures={vqa: 2}"], "learned temperature is at most 1"),
        (["data.neighbours=/elsewhere"], "only data.batches=neighbours uses it"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, reason):
    with pytest.raises(PipelineError) as error:
        load_recipe(DEMO, fields)
    assert reason in str(error.value)


def test_data_without_the_tasks_or_scores_of_a_recipe_are_refused(tmp_path):
    texts = [Item(f"text {i}") for i in range(3)]
    for scores in (None, (1.0, 0.5)):
        folder = tmp_path / str(scores is not None)
        pair = Pair("0", "d", "vqa", texts[0], texts[1], (texts[2],), scores=scores)
        write_shards([pair, replace(pair, key="1", scores=None)], folder, dataset="d")
    without, scored = (Source.open(Data(url=str(tmp_path / name))) for name in ("False", "True"))
    margins = load_recipe(DEMO, ["objective.margins={vqa: 0.1, grounding: 0.1}"])
    with pytest.raises(PipelineError, match=r"margins names grounding, but the data's tasks are: vqa"):
        Contrastive.check_data(margins, scored)
    stored = load_recipe(DEMO, ["objective.distill.scores=stored", "objective.temperatures={vqa: 0.1}"])
    Contrastive.check_data(stored, scored)
    with pytest.raises(PipelineError, match="the first sample of no dataset has scores"):
        Contrastive.check_data(stored, without)


def test_another_objective_has_no_teacher():
    with pytest.raises(PipelineError, match=r"data\.teacher is not for objective\.name=masked_next_token"):
        load_recipe("pipeline/recipes/demo_masked.yaml", ["data.teacher=beside"])


def test_alpha_rises_linearly_to_its_value():
    ramped = load_recipe(DEMO, ["objective.alpha=9", "objective.alpha_ramp=4"]).objective
    assert [ramped.alpha_at(step) for step in (0, 1, 4, 5, 100)] == [0, 2.25, 9, 9, 9]
    assert load_recipe(DEMO, []).objective.alpha_at(0) == 9
