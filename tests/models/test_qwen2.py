"""Compare with transformers' Qwen2 with the same weights."""

import copy
from collections import Counter

import pytest
import torch
from closeness import assert_close_in_norm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaModel, MistralConfig, MistralModel, Qwen2Config, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from pipeline.config import Lora
from pipeline.models import kernels
from pipeline.models.attention import Segments, implementation
from pipeline.models.checkpointing import checkpoint_layers
from pipeline.models.lean import (
    AddingRMSNorm,
    LeanDecoderLayer,
    LeanMLP,
    LeanRMSNorm,
    SharingLinear,
    keep_less,
    shared,
)
from pipeline.models.lora import add_adapters
from pipeline.models.packed_attention import pool_in_last_layer

LENGTHS = (5, 1, 17, 3)


def theirs() -> Qwen2Model:
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attn_implementation=implementation("sdpa"),
    )
    torch.manual_seed(0)
    model = Qwen2Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def packed(dtype: torch.dtype) -> dict:
    torch.manual_seed(1)
    return {
        "inputs_embeds": torch.randn(1, sum(LENGTHS), 32, dtype=dtype, requires_grad=True),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "segments": Segments(LENGTHS, torch.device("cpu")),
        "use_cache": False,
    }


def gradients(states: torch.Tensor, model: Qwen2Model, inputs: dict) -> list[torch.Tensor]:
    torch.manual_seed(2)
    directions = torch.randn_like(states)
    wanted = [inputs["inputs_embeds"], *model.layers.parameters(), *model.norm.parameters()]
    return list(torch.autograd.grad((states * directions).sum(), wanted))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_last_layer_pooling_matches_whole_model_and_gradients(checkpointed):
    whole = theirs().double()
    keep_less(whole)
    pooling = copy.deepcopy(whole)
    pool_in_last_layer(pooling)
    assert pooling.state_dict().keys() == whole.state_dict().keys()
    if checkpointed:
        checkpoint_layers(pooling)
    inputs = packed(torch.float64)
    expected = whole(**inputs).last_hidden_state[:, torch.tensor(LENGTHS).cumsum(0) - 1]
    ours = pooling(**inputs).last_hidden_state
    assert_close_in_norm(ours, expected)
    assert_close_in_norm(gradients(ours, pooling, inputs), gradients(expected, whole, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lean_modules_match_transformers(dtype):
    whole = theirs().to(dtype)
    lean = copy.deepcopy(whole)
    keep_less(lean)
    kinds = [type(module) for module in lean.modules()]
    assert [kinds.count(kind) for kind in (LeanDecoderLayer, AddingRMSNorm, LeanRMSNorm, LeanMLP)] == [3, 6, 1, 3]
    inputs = packed(dtype)
    expected, ours = whole(**inputs).last_hidden_state, lean(**inputs).last_hidden_state
    assert torch.equal(ours, expected)
    assert_close_in_norm(gradients(ours, lean, inputs), gradients(expected, whole, inputs))


def test_layers_of_models_that_use_their_results_in_other_ways_stay():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64}
    for kind, config, lean in ((LlamaModel, LlamaConfig, True), (MistralModel, MistralConfig, False)):
        model = kind(config(**sizes))
        keep_less(model)
        assert (type(model.layers[0]) is LeanDecoderLayer) == lean
        assert (type(model.layers[0].input_layernorm) is AddingRMSNorm) == lean


def test_lean_norm_and_mlp_gradients_match_autograd():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32, requires_grad=True)
    for module in (theirs().norm, theirs().layers[0].mlp):
        lean = copy.deepcopy(module)
        lean.__class__ = LeanRMSNorm if isinstance(module, Qwen2RMSNorm) else LeanMLP
        directions = torch.randn(2, 5, 32)
        wanted = [torch.autograd.grad((each(x) * directions).sum(), [x, *each.parameters()]) for each in (module, lean)]
        assert_close_in_norm(*reversed(wanted))
        frozen = lean.requires_grad_(False)  # as with adapters
        (of_x,) = torch.autograd.grad((frozen(x) * directions).sum(), x)
        assert_close_in_norm(of_x, wanted[0][0])


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapted", [False, True])
def test_layers_that_share_an_input_add_its_gradients_in_their_matmuls(adapted, monkeypatch):
    monkeypatch.setattr(kernels, "usable", lambda x: True)
    torch.manual_seed(0)
    plain = nn.ModuleDict({name: nn.Linear(16, width) for name, width in (("a", 8), ("b", 4), ("c", 8))}).double()
    if adapted:
        add_adapters(plain, Lora(rank=4, alpha=6, targets=["a", "c"]), seed=0)
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    sharing = copy.deepcopy(plain)
    for each in (sharing["a"], sharing["b"]):
        getattr(each, "base_layer", each).__class__ = SharingLinear
    x, directions = torch.randn(1, 11, 16).double().requires_grad_(), torch.randn(1, 11, 20).double()

    def of_sharing() -> torch.Tensor:
        a, same = shared(sharing["a"], x)
        b, same = shared(sharing["b"], same)
        return torch.cat([a, b, sharing["c"](same)], dim=-1)

    results = []
    expected = torch.cat([plain[name](x) for name in "abc"], dim=-1)
    for out, model in ((of_sharing(), sharing), (expected, plain)):
        wanted = [x, *(each for each in model.parameters() if each.requires_grad)]
        with Operators() as operators:
            results.append([out, *torch.autograd.grad(out, wanted, directions)])
        if model is sharing:
            assert operators.counts["addmm_"] == 2 + 2 * adapted
            assert not operators.counts["add"]
    assert_close_in_norm(*results)
    x = x.detach()
    assert not shared(sharing["a"], x)[1].requires_grad
