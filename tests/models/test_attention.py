import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close_in_norm

from pipeline.errors import PipelineError
from pipeline.models.attention import KINDS, Segments, choose, implementation
from pipeline.models.llave.model import Llave

LENGTHS = (5, 1, 17, 3)


def test_segments_give_bounds_and_padded_slots():
    segments = Segments(LENGTHS, torch.device("cpu"))
    assert segments.bounds.tolist() == [0, 5, 6, 23, 26]
    expected = [item * 17 + token for item, length in enumerate(LENGTHS) for token in range(length)]
    assert segments.slots.tolist() == expected


@pytest.mark.parametrize("looks", ["causal", "both ways", "by last"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_attention_and_gradients_match_each_item_alone(kind, looks):
    device = "cpu" if kind == "sdpa" else "cuda"
    dtype = torch.float64 if kind == "sdpa" else torch.bfloat16
    try:
        choose(kind, "cuda" if torch.cuda.is_available() else "cpu", dtype)
    except PipelineError as reason:
        pytest.skip(str(reason))
    segments = Segments(LENGTHS, torch.device(device), causal=looks != "both ways")
    segments = segments.asked_by_last() if looks == "by last" else segments
    torch.manual_seed(0)
    heads, groups, width = 4, 2, 16
    sizes = (heads, sum(segments.queries.lengths)), (groups, sum(LENGTHS)), (groups, sum(LENGTHS))
    inputs = [torch.randn(1, *size, width, dtype=dtype, device=device, requires_grad=True) for size in sizes]
    ours, _ = KINDS[kind](None, *inputs, None, segments=segments, scaling=0.3)

    query, key, value = inputs if dtype == torch.float64 else (each.float() for each in inputs)
    key, value = (each.repeat_interleave(heads // groups, dim=1) for each in (key, value))
    items = query.split(segments.queries.lengths, dim=2), key.split(LENGTHS, dim=2), value.split(LENGTHS, dim=2)
    expected = []
    for q, k, v in zip(*items, strict=True):
        logits = q @ k.transpose(2, 3) * 0.3
        if looks == "causal":
            logits = logits.masked_fill(torch.ones(logits.shape[2:], device=device).triu(1) > 0, -torch.inf)
        expected.append((F.softmax(logits, dim=-1) @ v).transpose(1, 2))
    expected = torch.cat(expected, dim=1)
    assert_close_in_norm(ours, expected)
    gradients, others = (torch.autograd.grad(each.square().sum(), inputs) for each in (ours, expected))
    assert_close_in_norm(gradients, others)


@pytest.mark.parametrize("kind", KINDS)
def test_model_is_built_with_each_attention_kernel(tiny_model, kind):
    """transformers treats some names as kernels to download."""
    config = Llave.config_for(tiny_model, None, kind)
    with torch.device("meta"):
        model = Llave(config)
    assert model.language_model.config._attn_implementation == implementation(kind)
    assert model.pads == (kind == "sdpa")
