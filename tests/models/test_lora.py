"""Adapters compared with peft's own forward and backward pass."""

import copy

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close_in_norm
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.config import Lora
from pipeline.models.lora import AdaptedLinear, AddingLinear, add_adapters

LORA = Lora(rank=4, alpha=12, targets=["first", "second"])


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.gelu(self.first(x)))


def both(dtype: torch.dtype) -> tuple[Layers, Layers]:
    """Return peft's adapters and ours, of the same weights, and none of them zero."""
    torch.manual_seed(0)
    theirs = Layers().to(dtype)
    ours = copy.deepcopy(theirs)
    inject_adapter_in_model(
        LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=LORA.targets, init_lora_weights=False), theirs
    )
    add_adapters(ours, LORA, seed=0)
    assert {type(each) for each in ours.modules()} >= {AdaptedLinear, AddingLinear}
    assert not any(isinstance(each, AdaptedLinear) for each in theirs.modules())
    assert sum(isinstance(each, Linear) for each in theirs.modules()) == 2
    ours.load_state_dict(theirs.state_dict())  # the names are equal
    return theirs, ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("input_trains", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_adapters_match_pefts(dtype, input_trains, checkpointed):
    results = []
    for model in both(dtype):
        torch.manual_seed(1)
        x = torch.randn(1, 11, 16, dtype=dtype, requires_grad=input_trains)
        out = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        with torch.no_grad():
            assert torch.equal(model(x), out)
        wanted = [p for name, p in model.named_parameters() if "lora_" in name] + [x] * input_trains
        results.append([out, *torch.autograd.grad(out, wanted, torch.randn_like(out))])
        assert out.dtype == dtype
    assert_close_in_norm(results[1], results[0])


def test_no_tensor_of_the_output_width_is_saved_or_added():
    _, ours = both(torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape[-1]) or x, lambda x: x):
        out = ours.first(torch.randn(1, 11, 16))
    assert 24 not in saved
    assert out.grad_fn.name() == "_AddProductBackward"
