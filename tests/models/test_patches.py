"""Patch embeddings of bytes, compared with their definition in float64: a convolution of normalised pixels."""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close_in_norm
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from pipeline.errors import PipelineError
from pipeline.models import patches
from pipeline.models.patches import embed_bytes

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def images(count: int, side: int, seed: int = 0) -> Tensor:
    """Return images of which some are nearly black and some nearly white."""
    drawn = torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    drawn[::3] //= 16
    drawn[1::3] = 255 - drawn[1::3] // 16
    return drawn


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    return (pixels.double() / 255 - mean) / std


def defined(layer: nn.Conv2d, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the convolution in float64, and its parameters there."""
    parameters = [parameter.detach().double().requires_grad_() for parameter in layer.parameters()]
    return F.conv2d(normalised(pixels), *parameters, stride=layer.stride), parameters


@pytest.mark.parametrize("has_bias", [False, True])
def test_bytes_equal_normalised_pixels_forward_and_backward(has_bias, monkeypatch):
    torch.manual_seed(0)
    layer, pixels = nn.Conv2d(3, 16, 7, 7, bias=has_bias), images(10, 31)  # three columns and rows are in no patch
    embed_bytes(nn.Sequential(layer), MEAN, STD)
    right, parameters = defined(layer, pixels)
    weights = torch.randn(right.shape, generator=torch.Generator().manual_seed(1))
    exact = right, torch.autograd.grad(right, parameters, weights.double())
    for images_at_once in (100, 3, 0):  # in one slice, in slices of which the last is smaller, and each by itself
        monkeypatch.setattr(patches, "_AT_ONCE_ON_CPU", images_at_once * pixels[0].numel())
        embedded = layer(pixels)
        of_parameters = torch.autograd.grad(embedded, list(layer.parameters()), weights)
        # A sum of 147 products, and a gradient's sum of 160.
        assert_close_in_norm((embedded, *of_parameters), (exact[0], *exact[1]), torch.float32, operations=400)
    assert_close_in_norm(layer(normalised(pixels).float()), right, operations=400)  # still accepts normalised pixels


def test_bytes_in_bf16_round_weights_once(monkeypatch):
    """Errors stay below what three roundings allow: of the scaled weights, of the bias, and of the result."""
    torch.manual_seed(0)
    layer, pixels = nn.Conv2d(3, 16, 8, 8).bfloat16(), images(9, 32)
    embed_bytes(nn.Sequential(layer), MEAN, STD)
    right, (weight, bias) = defined(layer, pixels)
    centre = (255 * torch.tensor(MEAN, dtype=torch.float64) - 128) / (255 * torch.tensor(STD, dtype=torch.float64))
    products = F.conv2d(normalised(pixels).abs(), weight.abs(), stride=8)
    constant = (bias.abs() + weight.abs().sum((2, 3)) @ centre.abs())[:, None, None]
    allowed = 2.0**-9 * 1.01 * (products + constant + right.abs())  # and 1 % for float32
    monkeypatch.setattr(patches, "_AT_ONCE_ON_CPU", 4 * pixels[0].numel())
    embedded = layer(pixels)
    assert embedded.dtype == torch.bfloat16
    assert ((embedded.double() - right).abs() <= allowed).all()
    gradient = torch.randn(right.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    mine = torch.autograd.grad(embedded, list(layer.parameters()), gradient)
    assert_close_in_norm(mine, torch.autograd.grad(right, [weight, bias], gradient.double()))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_towers_accept_bytes_and_normalised_pixels(kind):
    config = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[kind](**SIZES, image_size=28, patch_size=8)
    torch.manual_seed(0)
    tower = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}[kind](config).eval()
    pixels, before = images(3, 28), {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    right = tower(pixel_values=normalised(pixels).float()).pooler_output
    embed_bytes(tower, MEAN, STD)
    assert torch.equal(tower(pixel_values=normalised(pixels).float()).pooler_output, right)
    assert_close_in_norm(tower(pixel_values=pixels).pooler_output, right)
    after = tower.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_backward_pass_keeps_bytes():
    layer, pixels = nn.Conv2d(3, 4, 8, 8), images(5, 32)
    embed_bytes(nn.Sequential(layer), MEAN, STD)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(pixels)
    assert sum(kept.values()) <= pixels.nbytes + 4 * (2 * layer.weight.numel() + 16)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 8, 4),
        nn.Conv2d(3, 4, 8, 8, padding=1),
        nn.Conv2d(1, 4, 8, 8),
        nn.Conv2d(3, 4, (8, 4), (8, 4)),
        nn.Linear(3, 4),
        nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Conv2d(3, 4, 8, 8)),
    ],
)
def test_other_embeddings_are_refused(layer):
    with pytest.raises(PipelineError, match="does not embed patches by one convolution"):
        embed_bytes(nn.Sequential(layer), MEAN, STD)
