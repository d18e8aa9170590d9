"""Distillation of scores that are stored with samples."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.objectives.contrastive.listwise import listwise_kl

PRESENT = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
TEMPERATURES = torch.tensor([0.05, 0.1, 0.2, 0.3], dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.1, TEMPERATURES], ids=["number", "of pairs"])
def test_listwise_kl_is_that_of_the_candidates_alone(temperature):
    similarities, scores = random(4, 4), 3 * random(4, 4, seed=1)
    found = listwise_kl(similarities, scores, PRESENT, temperature, 0.5)
    tau = torch.as_tensor(temperature).expand(4)
    for i in (0, 1):
        own, judged = similarities[i, PRESENT[i]] / tau[i], scores[i, PRESENT[i]] / 0.5
        right = F.kl_div(own.log_softmax(0), judged.softmax(0), reduction="sum")
        torch.testing.assert_close(found[i], right)
        assert right > 0.1
    assert found[2:].tolist() == [0, 0]


def test_listwise_kl_has_finite_gradients_for_any_absent_value():
    similarities = random(4, 4).masked_fill(~PRESENT, torch.nan).requires_grad_()
    scores = random(4, 4, seed=1).masked_fill(~PRESENT, torch.nan).requires_grad_()
    tau = TEMPERATURES.clone().requires_grad_()
    listwise_kl(similarities, scores, PRESENT, tau, 0.5).sum().backward()
    assert scores.grad is None
    assert similarities.grad.isfinite().all()
    assert not similarities.grad[~PRESENT].any()
    assert not similarities.grad[2:].any()
    assert not tau.grad[2:].any()
    inputs = (random(4, 4).requires_grad_(), tau)
    assert torch.autograd.gradcheck(lambda x, t: listwise_kl(x, scores, PRESENT, t, 0.5), inputs, fast_mode=True)
