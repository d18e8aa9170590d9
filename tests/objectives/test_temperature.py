import math

import pytest
import torch

from pipeline.config import load_recipe
from pipeline.objectives.contrastive.temperature import Temperature


@pytest.mark.parametrize(("uphill", "bound"), [(1.0, 1.0), (-1.0, 0.01)])
def test_learned_temperature_stays_within_its_bounds(uphill, bound):
    """Take one step far across a bound: LLM2CLIP's training/train.py clamps log(1 / tau) to 0 ... ln 100."""
    recipe = load_recipe("pipeline/recipes/demo_llm2clip.yaml", [])
    temperature = Temperature(recipe, torch.device("cpu"))
    log_scale = temperature.state()["log_scale"]
    assert float(temperature.of([])) == pytest.approx(0.07)
    for lr, expected in ((0.5, math.log(1 / 0.07) - 0.5 * uphill), (10.0, -math.log(bound))):
        temperature._log_scale.grad = torch.tensor(uphill)
        temperature.step(lr)
        assert float(log_scale) == pytest.approx(expected, rel=1e-6, abs=1e-6)  # AdamW's first steps are lr long
    assert float(temperature.of([])) == pytest.approx(bound)


def test_tasks_have_their_own_learned_temperatures():
    """A task's temperature learns from its own pairs; a checkpoint restores all of them."""
    fields = ["objective.temperatures={vqa: 0.05, grounding: 0.5}"]
    recipe = load_recipe("pipeline/recipes/demo_llm2clip.yaml", fields)
    temperature = Temperature(recipe, torch.device("cpu"))
    of_pairs = temperature.of(["vqa", "retrieval", "grounding", "vqa"])
    assert of_pairs.tolist() == pytest.approx([0.05, 0.07, 0.5, 0.05])
    (gradient,) = torch.autograd.grad(of_pairs @ torch.tensor([1.0, 0.0, 2.0, 3.0]), temperature._log_scale)
    assert gradient.tolist() == pytest.approx([0, -2 * 0.5, -4 * 0.05])  # the others, grounding, vqa
    temperature._log_scale.grad = gradient
    temperature.step(0.1)
    found = temperature.learned()
    assert found == pytest.approx(
        {"temperature": 0.07, "temperature/grounding": 0.5 * math.exp(-0.1), "temperature/vqa": 0.05 * math.exp(-0.1)}
    )
    restored = Temperature(recipe, torch.device("cpu"))
    restored.load(temperature.state())
    assert restored.learned() == found


def test_constant_temperatures_of_tasks():
    recipe = load_recipe("pipeline/recipes/demo.yaml", ["objective.temperatures={vqa: 0.05}"])
    temperature = Temperature(recipe, torch.device("cpu"))
    assert temperature.of(["vqa", "retrieval"]).tolist() == pytest.approx([0.05, 0.02])
    assert temperature.learned() == {}
    assert Temperature(load_recipe("pipeline/recipes/demo.yaml", []), torch.device("cpu")).of(["vqa"]) == 0.02
