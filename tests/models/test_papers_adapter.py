"""LLM2CLIP's text adapter compared with the published code's outputs, loss and gradients (tests/papers/llm2clip)."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pipeline.models.llm2clip.model import TextAdapter
from pipeline.objectives.contrastive.loss import hardness_weighted_loss

FOLDER = Path(__file__).parents[1] / "papers/llm2clip"

# The original computed in float32. Ours is computed in float64 here, so that the comparison is the same on every
# processor, and only its roundings count: of the hundred or so sums of each value, 2**-24 each, at random.
RELATIVE = 5e-6


def ours(name: str) -> str:
    """Return our name of a parameter of the original."""
    _, index, *rest = name.split(".")
    if index in "45":
        return ".".join([{"4": "norm", "5": "projection"}[index], *rest])
    layer, leaf = ".".join(rest[:-1]), rest[-1]
    return ".".join(["blocks", index, {"ln": "norm", "fn.0": "up", "fn.3": "down"}[layer], leaf])


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in load_file(FOLDER / "adapter.safetensors").items()}


@pytest.fixture(scope="module")
def numbers() -> dict:
    return json.loads((FOLDER / "adapter.json").read_text())


@pytest.fixture
def adapter(given, numbers) -> TextAdapter:
    dimension, width = given["state.text_adaptor.5.weight"].shape
    adapter = TextAdapter(width, dimension).double()
    adapter.load_state_dict({ours(name): given[f"state.{name}"] for name in numbers["parameters"]})
    return adapter


def assert_near(actual: torch.Tensor, original: torch.Tensor) -> None:
    torch.testing.assert_close(actual.double(), original, rtol=0, atol=RELATIVE * float(original.abs().max()))


def test_adapter_gives_the_originals_vectors(adapter, given):
    projected = []
    adapter.projection.register_forward_hook(lambda module, inputs, output: projected.append(output.detach()))
    rows = adapter(given["texts"])
    assert_near(projected[0], given["output"])
    assert_near(rows.detach(), given["output_normalised"])


def test_loss_through_the_adapter_has_the_originals_gradients(adapter, given, numbers):
    texts = given["texts"].requires_grad_()
    log_scale = torch.tensor(numbers["logit_scale"], dtype=torch.float64, requires_grad=True)
    images = F.normalize(given["images"], dim=-1)
    loss = hardness_weighted_loss(images, adapter(texts), alpha=0.0, temperature=torch.exp(-log_scale)).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(numbers["loss"], rel=RELATIVE)
    assert float(log_scale.grad) == pytest.approx(numbers["logit_scale_gradient"], rel=RELATIVE)
    assert_near(texts.grad, given["texts_gradient"])
    gradients = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    assert gradients.keys() == {ours(name) for name in numbers["parameters"]}
    for name in numbers["parameters"]:
        assert_near(gradients[ours(name)], given[f"gradient.{name}"])
