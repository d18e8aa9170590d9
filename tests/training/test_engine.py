import math

import pytest

from pipeline.config import Optimizer
from pipeline.training.engine import learning_rate


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    optimizer = Optimizer(lr=2.0, warmup_ratio=0.1)
    rates = [learning_rate(step, 100, optimizer) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * n / 90) for n in range(90)])


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 1.0), (3, 1.0), (2, 0.03)])
def test_short_runs_have_a_rate_too(steps, warmup):
    optimizer = Optimizer(lr=1.0, warmup_ratio=warmup)
    assert all(0 < learning_rate(step, steps, optimizer) <= 1 for step in range(steps))
