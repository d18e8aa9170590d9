import math

import pytest
import torch

from pipeline.config import load_recipe
from pipeline.objectives.contrastive.step import Temperature


@pytest.mark.parametrize(("uphill", "bound"), [(1.0, 1.0), (-1.0, 0.01)])
def test_learned_temperature_stays_within_its_bounds(uphill, bound):
    """Take one step far across a bound: LLM2CLIP's training/train.py clamps log(1 / tau) to 0 ... ln 100."""
    recipe = load_recipe("pipeline/recipes/demo_llm2clip.yaml", [])
    temperature = Temperature(recipe, torch.device("cpu"))
    log_scale = temperature.state()["log_scale"]
    assert float(temperature.value.detach()) == pytest.approx(0.07)
    for lr, expected in ((0.5, math.log(1 / 0.07) - 0.5 * uphill), (10.0, -math.log(bound))):
        temperature._log_scale.grad = torch.tensor(uphill)
        temperature.step(lr)
        assert float(log_scale) == pytest.approx(expected, rel=1e-6, abs=1e-6)  # AdamW's first steps are lr long
    assert float(temperature.value.detach()) == pytest.approx(bound)
