import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from pipeline.errors import PipelineError
from pipeline.models.attention import KINDS, Segments, choose, implementation
from pipeline.models.llave import Llave

LENGTHS = (5, 1, 17, 3)


def test_where_items_are():
    segments = Segments(LENGTHS, torch.device("cpu"))
    assert segments.bounds.tolist() == [0, 5, 6, 23, 26]
    expected = [item * 17 + token for item, length in enumerate(LENGTHS) for token in range(length)]
    assert segments.slots.tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_each_item_attends_to_itself_alone_and_backwards(kind):
    device = "cpu" if kind == "sdpa" else "cuda"
    dtype = torch.float64 if kind == "sdpa" else torch.bfloat16
    try:
        choose(kind, "cuda" if torch.cuda.is_available() else "cpu", dtype)
    except PipelineError as reason:
        pytest.skip(str(reason))
    torch.manual_seed(0)
    heads, groups, width = 4, 2, 16
    query = torch.randn(1, heads, sum(LENGTHS), width, dtype=dtype, device=device, requires_grad=True)
    key, value = torch.randn(2, 1, groups, sum(LENGTHS), width, dtype=dtype, device=device).unbind(0)
    segments = Segments(LENGTHS, query.device)
    ours, _ = KINDS[kind](None, query, key, value, None, segments=segments, scaling=0.3)

    expected, place = [], 0
    for length in LENGTHS:
        part = slice(place, place + length)
        q, k, v = (x[:, :, part].float() if dtype != torch.float64 else x[:, :, part] for x in (query, key, value))
        k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
        logits = (q @ k.transpose(2, 3) * 0.3).masked_fill(torch.ones(length, length, device=device).triu(1) > 0, -1e9)
        expected.append((F.softmax(logits, dim=-1) @ v).transpose(1, 2))
        place += length
    expected = torch.cat(expected, dim=1)
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours, expected.to(dtype), **tolerance)
    (gradient,) = torch.autograd.grad(ours.square().sum(), query)
    (other,) = torch.autograd.grad(expected.square().sum(), query)
    torch.testing.assert_close(gradient, other.to(dtype), **tolerance)


def test_the_best_that_runs_is_chosen_and_what_does_not_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # as if it were not there
    assert choose("auto", "cpu", torch.bfloat16) == "sdpa"
    assert choose("auto", "cuda", torch.float32) == "sdpa"
    assert choose("auto", "cuda", torch.bfloat16) == "varlen"
    with pytest.raises(PipelineError, match="it is not installed"):
        choose("flash_attn", "cuda", torch.bfloat16)
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    assert choose("auto", "cuda", torch.bfloat16) == "varlen"
    with pytest.raises(PipelineError, match=r"it cannot be imported \(undefined symbol"):
        choose("flash_attn", "cuda", torch.bfloat16)
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    assert choose("auto", "cuda", torch.bfloat16) == "flash_attn"
    for kind in ("flash_attn", "varlen"):
        with pytest.raises(PipelineError, match=rf"model\.attention={kind} cannot run here: it needs a CUDA"):
            choose(kind, "cpu", torch.bfloat16)
        with pytest.raises(PipelineError, match="it is for bf16 only, and the precision is fp32"):
            choose(kind, "cuda", torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "V100")
    for capability, kind in (((7, 0), "sdpa"), ((9, 0), "flash_attn")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert choose("auto", "cuda", torch.bfloat16) == kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_made_with_each_kind(tiny_model, kind):
    """transformers takes some names for kernels that it would fetch."""
    config = Llave.config_for(tiny_model, None, kind)
    with torch.device("meta"):
        model = Llave(config)
    assert model.language_model.config._attn_implementation == implementation(kind)
    assert model.pads == (kind == "sdpa")
