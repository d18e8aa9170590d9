"""Preflight's check of attention passes what is right, and finds what kernels have had wrong."""

import re
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config import load_recipe
from pipeline.jobs.preflight import attention as checked
from pipeline.jobs.preflight.attention import LENGTHS, LOOKS, attention, error
from pipeline.models.attention import KINDS, Segments

DEMO = Path(__file__).resolve().parents[2] / "pipeline/recipes/demo.yaml"
CPU = torch.device("cpu")
SDPA = KINDS["sdpa"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def found(precision: str = "fp32", recipe: str = DEMO) -> tuple[str, str]:
    result = attention(load_recipe(recipe, [f"precision={precision}"]), CPU, slurm=True)
    return result.state, result.found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_passes_for_all_shapes(dtype):
    for lengths, looks, size in product(LENGTHS, LOOKS, (64, 72)):
        assert error("sdpa", (lengths, (4, 2), size), looks, dtype, CPU) == ""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_check_on_a_cpu_is_of_sdpa(precision):
    assert found(precision) == ("green", "sdpa, heads of 32; sdpa, heads of 24: 6 of 6 comparisons with float64")


class NanBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[0, 0, 7, 0] = torch.nan
        return gradient


def cudnn_of_9_20(module, query, key, value, mask, *, segments: Segments, scaling: float):
    """NaN gradients with a mask if the longest item has 64 tokens more than a multiple of 128."""
    if not segments.causal and segments.longest % 128 == 64:
        key = NanBackward.apply(key)
    return SDPA(module, query, key, value, mask, segments=segments, scaling=scaling)


def with_nan(module, query, *others, **options):
    result, _ = SDPA(module, query, *others, **options)
    return result.index_fill(2, torch.tensor([1]), torch.nan), None


def with_default_scale(module, query, *others, segments: Segments, scaling: float):
    return SDPA(module, query, *others, segments=segments, scaling=query.shape[-1] ** -0.5)


def with_tf32(module, query, *others, **options):
    """The query rounded to the 11 bits of TF32."""
    far = query.detach() * (2**13 + 1)
    return SDPA(module, query + (far - (far - query.detach()) - query.detach()), *others, **options)


def with_all_as_one(module, *inputs, segments: Segments, scaling: float):
    if not segments.by_last:
        segments = Segments((sum(segments.lengths),), CPU, segments.causal)
    return SDPA(module, *inputs, segments=segments, scaling=scaling)


def with_other(causal: bool, module, *inputs, segments: Segments, scaling: float):
    if not segments.by_last:
        segments = Segments(segments.lengths, CPU, causal)
    return SDPA(module, *inputs, segments=segments, scaling=scaling)


def with_wrong_groups(module, query, key, *others, **options):
    return SDPA(module, query, key.flip(1), *others, **options)


def with_halved_gradient(which: int, module, *inputs, **options):
    changed = [x / 2 + x.detach() / 2 if number == which else x for number, x in enumerate(inputs)]
    return SDPA(module, *changed, **options)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (cudnn_of_9_20, r"gradient of keys is off by nan% \(both ways, lengths \(192, 1, 65\)"),
        (with_nan, "result is off by nan%"),
        (with_default_scale, "result"),
        (with_tf32, "result"),
        (with_all_as_one, "result"),
        (partial(with_other, True), r"result is off by .*% \(both ways"),
        (partial(with_other, False), r"result is off by .*% \(causal"),
        (with_wrong_groups, "result"),
        (partial(with_halved_gradient, 0), "gradient of queries"),
        (partial(with_halved_gradient, 1), "gradient of keys"),
        (partial(with_halved_gradient, 2), "gradient of values"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_wrong_attention_is_found(monkeypatch, wrong: Callable, name: str, precision: str):
    if wrong is with_tf32 and precision == "bf16":
        pytest.skip("bf16 has fewer bits than TF32")
    monkeypatch.setitem(KINDS, "sdpa", wrong)
    state, text = found(precision)
    assert state == "red"
    assert re.match(f"sdpa: the {name}", text), text


def test_wrong_sdpa_is_a_warning_where_texts_use_another_kernel(monkeypatch):
    monkeypatch.setattr(checked, "choose", lambda *_: "varlen")
    monkeypatch.setitem(KINDS, "varlen", SDPA)
    assert found() == ("green", "varlen, heads of 32; sdpa, heads of 24: 6 of 6 comparisons with float64")
    monkeypatch.setitem(KINDS, "sdpa", with_nan)
    assert found()[0] == "yellow"
    monkeypatch.setitem(KINDS, "varlen", with_nan)
    assert found()[0] == "red"


def test_wrong_sdpa_is_red_for_a_model_of_towers_alone(monkeypatch):
    monkeypatch.setattr(checked, "choose", lambda *_: "varlen")  # for texts, of which this model has no kernel
    monkeypatch.setitem(KINDS, "sdpa", with_nan)
    assert found(recipe="demo_clip.yaml")[0] == "red"


@pytest.mark.parametrize(
    ("recipe", "changes", "heads"),
    [  # (kind, heads of queries and of keys, size) of the model's own: of the language model, then of the towers
        (
            "demo.yaml",
            [
                "model.attention=varlen",
                "model.architecture.text.num_attention_heads=14",
                "model.architecture.text.hidden_size=896",
            ],
            [("varlen", (14, 2), 64), ("sdpa", (2, 2), 24)],
        ),
        ("demo.yaml", ["model.architecture.text.hidden_size=2048"], [("sdpa", (4, 2), 512), ("sdpa", (2, 2), 24)]),
        ("demo_caption.yaml", ["model.attention=varlen"], [("varlen", (4, 2), 32)]),
        (
            "demo_clip.yaml",
            ["model.architecture.text.num_attention_heads=8"],
            [("sdpa", (2, 2), 24), ("sdpa", (2, 2), 16)],
        ),
        ("demo_llm2clip.yaml", ["data.text_embeddings=true", "model.text_encoder=/none"], [("sdpa", (2, 2), 24)]),
    ],
)
def test_heads_are_the_models_own(monkeypatch, recipe: str, changes: list[str], heads: list):
    tried = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "A100")
    monkeypatch.setattr(checked, "error", lambda kind, shape, *_: tried.append((kind, *shape[1:])) or "")
    result = attention(
        load_recipe(recipe, ["precision=bf16", "deepspeed=ds_configs/zero1.json", *changes]),
        torch.device("cuda"),
        slurm=True,
    )
    assert result.state == "green"
    assert list(dict.fromkeys(tried)) == heads
    assert len(tried) == len(heads) * len(LENGTHS) * len(LOOKS)


def test_unreadable_model_is_left_to_its_own_check():
    result = attention(load_recipe(DEMO, ["model.architecture=null", "model.path=/nowhere"]), CPU, slurm=True)
    assert result.state == "skipped"
