"""Triton's kernels on the CPU, by Triton's interpreter, and compiled for GPUs that are not there."""

import copy
import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2Config, Qwen2Model, SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipMLP
from two_ranks import on_two_ranks

from pipeline.models import kernels, lean
from pipeline.models.attention import Segments, implementation
from pipeline.models.checkpointing import checkpoint_layers
from pipeline.models.lean import fuse_gelu
from pipeline.models.packed_attention import pool_in_last_layer

LENGTHS = (5, 1, 17, 3)
BF16_STEP = 2**-7  # relative; the interpreter truncates, where a GPU rounds to nearest
WIDTH = 48
UNUSED = ("embed_tokens.weight",)


def check_swiglu(dtype: torch.dtype) -> None:
    gate, up, gradient = (3 * torch.randn(3, 1, 67, WIDTH)).to(dtype)
    gate[0, 0, :3] = torch.tensor([-200, 0, 200])  # SiLU's limits
    wide = [each.double().requires_grad_() for each in (gate, up)]
    product = F.silu(wide[0]) * wide[1]
    expected = torch.autograd.grad(product, wide, gradient.double())
    assert_rounded_once(kernels.swiglu(gate, up), product)
    for mine, right in zip(kernels.swiglu_backward(gradient, gate, up), expected, strict=True):
        assert_rounded_once(mine, right)


def check_rotation(heads: int, size: int, dtype: torch.dtype, of_angles: torch.dtype) -> None:
    x, gradient = torch.randn(2, 1, 9, heads, size).to(dtype)
    cos, sin = torch.randn(2, 1, 9, size).to(of_angles)
    wide = x.double().requires_grad_()
    expected = lean.rotated(wide.transpose(1, 2), cos.double(), sin.double()).transpose(1, 2)
    (of_x,) = torch.autograd.grad(expected, wide, gradient.double())
    assert_rounded_once(kernels.rotate(x, cos, sin, False), expected)
    assert_rounded_once(kernels.rotate(gradient, cos, sin, True), of_x)


def check_norm(rows: int, width: int, dtype: torch.dtype, added: bool) -> None:
    x, branch, gradient, of_total = torch.randn(4, 1, rows, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    given = branch if added else None
    out, total, scale = kernels.rms_norm(x, given, weight, 1e-6)
    if added:
        assert_rounded_once(total, x.double() + branch.double())
    else:
        assert not len(total)
        total = x
    wide = total.double().requires_grad_(), weight.double().requires_grad_()
    expected = F.rms_norm(wide[0], (width,), wide[1], 1e-6)
    assert_rounded_once(out, expected)
    assert_rounded_once(scale, (total.double().square().mean(-1) + 1e-6).rsqrt())
    of_x, of_weight = torch.autograd.grad(expected, wide, gradient.double())
    found, none = kernels.rms_norm_backward(gradient, None, total, weight, scale, False)
    assert_rounded_once(found, of_x)
    assert not len(none)
    found, parts = kernels.rms_norm_backward(gradient, of_total, total, weight, scale, True)
    assert_rounded_once(found, of_x + of_total.double())
    assert_rounded_once(parts.sum(0), of_weight)


def assert_rounded_once(mine: torch.Tensor, exact: torch.Tensor) -> None:
    """Assert that a result differs from the exact one by the rounding of its few operations in float32 and its own."""
    exact = exact.detach()
    rounded = BF16_STEP * exact.abs() if mine.dtype == torch.bfloat16 else 0
    assert ((mine.double() - exact).abs() <= rounded + 8 * 2**-24 * exact.abs().max()).all()


def check_model(checkpointed: bool) -> None:
    """Compare with transformers in bf16: every layer runs the kernels, in both passes, as on a GPU."""
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attn_implementation=implementation("sdpa"),
    )
    theirs = Qwen2Model(config).bfloat16()
    ours = copy.deepcopy(theirs)
    lean.keep_less(ours)
    pool_in_last_layer(ours)
    if checkpointed:
        checkpoint_layers(ours)
    inputs = {
        "inputs_embeds": torch.randn(1, sum(LENGTHS), 32, dtype=torch.bfloat16, requires_grad=True),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "segments": Segments(LENGTHS, torch.device("cpu")),
        "use_cache": False,
    }
    returned = []
    ours.layers[0].register_forward_hook(lambda layer, given, result: returned.append(type(result)))
    last = torch.tensor(LENGTHS).cumsum(0) - 1
    directions, results = torch.randn(1, len(LENGTHS), 32).bfloat16(), []
    for model, rows in ((theirs, last), (ours, slice(None))):
        state = model(**inputs).last_hidden_state[:, rows]
        with torch.no_grad():  # the first pass of a step
            assert torch.equal(model(**inputs).last_hidden_state[:, rows], state)
        named = {name: each for name, each in model.named_parameters() if name not in UNUSED and "k_proj.b" not in name}
        gradients = torch.autograd.grad(state, [inputs["inputs_embeds"], *named.values()], directions)
        results.append([state.detach(), *gradients])
    for mine, right in zip(*results, strict=True):
        cosine = F.cosine_similarity(mine.flatten().double(), right.flatten().double(), dim=0)
        assert cosine > 0.9997  # without the interpreter's truncation, which the residual stream collects: 0.9999
    assert set(returned) == {torch.Tensor if checkpointed else tuple}


def check_first_use_in_a_checkpointed_layer() -> None:
    """The first layer may be the one that asks whether the kernels run; they are tried by a backward pass."""
    model = Qwen2Model(
        Qwen2Config(
            hidden_size=32,
            intermediate_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=64,
        )
    ).bfloat16()
    lean.keep_less(model)
    checkpoint_layers(model)
    x = torch.randn(1, 5, 32, dtype=torch.bfloat16, requires_grad=True)
    with mock.patch.object(kernels, "usable", lambda x: not kernels._why_not()):
        model(inputs_embeds=x, use_cache=False).last_hidden_state.sum().backward()
    assert not kernels._why_not() and x.grad is not None


def check_frozen_tower() -> None:
    mlp = SiglipMLP(SiglipVisionConfig(hidden_size=32, intermediate_size=WIDTH)).bfloat16()
    for parameter in mlp.parameters():
        nn.init.normal_(parameter)
    frozen = copy.deepcopy(mlp)
    fuse_gelu(frozen.requires_grad_(False))
    x = torch.randn(2, 5, 32).bfloat16()
    with torch.no_grad():
        mine, right, exact = frozen(x).double(), mlp(x).double(), copy.deepcopy(mlp).double()(x.double())
    assert (mine - exact).norm() <= 1.1 * (right - exact).norm()  # one rounding less


@pytest.mark.slow
def test_kernels_match_formulas_and_transformers():
    pytest.importorskip("triton")
    # Triton reads the variable when it is imported.
    run = [sys.executable, "-W", "ignore", __file__]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(run, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus_with_wide_loads_and_rounding(capability, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.models import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    of_heads = {"HEADS": 14, "HALF": 32, "ROWS": 32, "WIDTH": 32}
    of_rows = {"COUNT": 896, "ROWS": 1, "WIDTH": 1024, "ADD": True}
    others = {"count": "i32", "rows": "i32", "tiles": "i32", "epsilon": "fp32", "scale": "*fp32", "of_weight": "*fp32"}
    for kernel, constants in (
        (triton_kernels._swiglu, {"BLOCK": 1024}),
        (triton_kernels._swiglu_backward, {"BLOCK": 1024}),
        (triton_kernels._rotate, of_heads | {"BACKWARD": False}),
        (triton_kernels._rotate, of_heads | {"BACKWARD": True}),
        (triton_kernels._rms_norm, of_rows),
        (triton_kernels._rms_norm_backward, of_rows | {"WEIGHT": True}),
    ):
        kinds = dict.fromkeys(kernel.arg_names, "*bf16") | dict.fromkeys(constants, "constexpr")
        kinds |= {name: kind for name, kind in others.items() if name in kinds}
        aligned = [place for place, kind in enumerate(kinds.values()) if kind[0] in "*i"]
        divisible = {(place,): [["tt.divisibility", 16]] for place in aligned}
        source = ASTSource(kernel, kinds, constants, divisible)
        code = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        moves = set(re.findall(r"\b(?:ld|st)\.global[.\w]*", code))
        if "scale" in kinds:
            moves -= {"ld.global.b32", "st.global.b32"}  # a row's scale
        assert moves == {"ld.global.v4.b32", "st.global.v4.b32"}, moves  # 16 bytes at a time
        assert "cvt.rn.bf16x2.f32" in code


@pytest.mark.parametrize(
    ("largest", "reason"),
    [
        (RuntimeError("Failed to find C compiler.\nSet CC"), "RuntimeError: Failed to find C compiler."),
        (0.5, "0.5"),
        (float("nan"), "nan"),
    ],
)
def test_callers_run_without_kernels_that_fail_or_are_wrong(largest, reason, monkeypatch, caplog):
    def difference(device: torch.device) -> float:
        if isinstance(largest, Exception):
            raise largest
        return largest

    monkeypatch.setattr(kernels, "_largest_difference", difference)
    with caplog.at_level(logging.WARNING):
        assert reason in kernels._why_not.__wrapped__()
    assert reason in caplog.text
    assert "TRITON_CACHE_DIR" in caplog.text
    monkeypatch.setattr(kernels, "_largest_difference", lambda device: 2**-8)
    assert kernels._why_not.__wrapped__() == ""


def _agreeing(rank: int) -> list[list[bool]]:
    """Return which of two ranks can run the kernels, and what they then do, on a tensor that seems to be on a GPU."""
    x, found = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16), []
    for able in ((True, False), (False, True), (True, True)):
        kernels._why_not.cache_clear()
        with mock.patch.object(kernels, "_largest_difference", lambda device, able=able: 0.0 if able[rank] else 1.0):
            kernels.agree()
            found.append([not kernels._why_not(), kernels.usable(x)])
    return found


def test_all_ranks_use_kernels_or_none():
    first, second = on_two_ranks(_agreeing)
    assert first == [[True, False], [False, False], [True, True]]
    assert second == [[False, False], [True, False], [True, True]]


if __name__ == "__main__":
    torch.manual_seed(0)
    kernels._PARTS = 7  # the interpreter runs programs one by one
    assert kernels._largest_difference(torch.device("cpu")) <= 4 * 2**-8
    for dtype in (torch.float32, torch.bfloat16):
        check_swiglu(dtype)
        for heads, size in ((14, 64), (2, 64), (3, 128), (5, 24)):
            check_rotation(heads, size, dtype, dtype)
            check_rotation(heads, size, dtype, torch.float32)  # as a vision tower's
        for added in (True, False):
            check_norm(229, 48, dtype, added)  # 15 tiles: three of a program, and programs without any
            check_norm(3, 2000, dtype, added)
    check_first_use_in_a_checkpointed_layer()
    kernels.usable = lambda x: x.dtype == torch.bfloat16
    check_frozen_tower()
    for checkpointed in (False, True):
        check_model(checkpointed)
