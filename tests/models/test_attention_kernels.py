"""Optional packages' kernels: which are chosen, why others are refused, and what they are called with.

Small packages with the published signatures stand in for the kernels, which need a GPU.
"""

import sys
from collections.abc import Callable
from importlib import invalidate_caches
from pathlib import Path

import pytest
import torch
from closeness import assert_close_in_norm
from transformers import AutoConfig, PreTrainedConfig

from pipeline.errors import PipelineError
from pipeline.models.attention import KERNELS, KINDS, Segments, choose

# Each item by itself, with the causal mask at the bottom right, as FlashAttention defines it.
LOOPS = """
import torch

def attend(q, k, v, bounds_q, bounds_k, longest_q, longest_k, scale, causal):
    assert all(x.dim() == 3 and x.stride(-1) == 1 for x in (q, k, v))
    assert bounds_q.dtype == bounds_k.dtype == torch.int32 and bounds_q.shape == bounds_k.shape
    assert type(longest_q) is type(longest_k) is int and longest_q > 1
    rows = []
    for start_q, stop_q, start, stop in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:]):
        assert stop_q - start_q <= longest_q and stop - start <= longest_k
        query = q[start_q:stop_q].transpose(0, 1)
        key, value = (x[start:stop].transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (k, v))
        logits = query @ key.transpose(1, 2) * scale
        if causal:
            allowed = torch.ones(logits.shape[1:], dtype=torch.bool).tril(logits.shape[2] - logits.shape[1])
            logits = logits.masked_fill(~allowed, -torch.inf)
        rows.append((logits.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(rows)
"""
_FLASH = "loops.attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)"
FLASH_2 = f"""
import loops
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):
    return {_FLASH}
"""
FLASH_3 = f"""
import loops
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):
    return {_FLASH}
"""
FLASH_3_EARLY = FLASH_3.replace("    return_attn_probs=False,\n", "").replace(_FLASH, f"{_FLASH}, None")
FLASH_4 = f"""
import loops
def flash_attn_varlen_func(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
    return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
):
    assert qv is None
    return {_FLASH}, None
"""
FLASH_4_EARLY = """
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, page_table=None,
    softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, pack_gqa=None,
): ...
"""
VARLEN_BODY = """
    assert window_size in ((-1, 0), (-1, -1))
    causal = window_size == (-1, 0)
    return loops.attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, causal)
"""
VARLEN_13 = f"""
import loops
def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):
    assert enable_gqa or query.shape[1] == key.shape[1]
{VARLEN_BODY}
"""
VARLEN_11 = f"""
import loops
def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    k_cache=None, v_cache=None, cache_seqlens=None, cache_batch_idx=None, page_table=None, seqused_k=None,
):
{VARLEN_BODY}
"""
VARLEN_10 = """
def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None): ...
"""
VARLEN = "torch/nn/attention/varlen.py"
BF16 = torch.bfloat16

Install = Callable[[dict[str, str]], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    """Return a function that makes exactly these files importable, besides torch's own kernel if they have none."""
    monkeypatch.syspath_prepend(tmp_path)
    real = sys.modules.get("torch.nn.attention.varlen")

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "flash_attn_interface")]:
            monkeypatch.delitem(sys.modules, name)

    def installed(files: dict[str, str]) -> None:
        forget()
        for old in sorted(tmp_path.rglob("*"), reverse=True):
            old.rmdir() if old.is_dir() else old.unlink()
        for name, text in (files | {"loops.py": LOOPS}).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        invalidate_caches()
        if VARLEN in files:
            module = type(sys)("varlen")
            exec(files[VARLEN], module.__dict__)
            monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
        elif real:
            monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", real)

    yield installed
    forget()
    sys.modules.pop("loops", None)


def on_gpu(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GB900")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))


TWO, THREE, FOUR = (
    {"flash_attn/__init__.py": FLASH_2},
    {"flash_attn_interface.py": FLASH_3},
    {"flash_attn/cute/__init__.py": FLASH_4},
)


@pytest.mark.parametrize(
    ("files", "kinds"),
    [  # by the GPU's major compute capability: Volta, Ampere, Hopper, Blackwell (data center, then workstation), later
        ({}, "sdpa varlen varlen varlen varlen varlen"),
        (TWO, "sdpa flash_attn flash_attn flash_attn flash_attn flash_attn"),
        (THREE, "sdpa varlen flash_attn_3 varlen varlen varlen"),
        (FOUR, "sdpa varlen flash_attn_4 flash_attn_4 flash_attn_4 varlen"),
        (TWO | THREE | FOUR, "sdpa flash_attn flash_attn_3 flash_attn_4 flash_attn_4 flash_attn"),
        ({VARLEN: VARLEN_10}, "sdpa sdpa sdpa sdpa sdpa sdpa"),
        ({VARLEN: VARLEN_11}, "sdpa varlen varlen varlen varlen varlen"),
        (TWO | {"flash_attn/cute/__init__.py": FLASH_4_EARLY}, "sdpa" + 5 * " flash_attn"),
        (TWO | {"flash_attn/cute/__init__.py": "import cutlass"}, "sdpa" + 5 * " flash_attn"),
        ({"flash_attn_interface.py": "import flash_attn_3._C"}, "sdpa" + 5 * " varlen"),
    ],
)
def test_auto_chooses_fastest_kernel_that_can_be_called(install, monkeypatch, files, kinds):
    install(files)
    for major, kind in zip((7, 8, 9, 10, 12, 13), kinds.split(), strict=True):
        on_gpu(monkeypatch, major)
        assert choose("auto", "cuda", BF16) == kind, major
        assert choose("auto", "cuda", torch.float32) == choose("auto", "cpu", BF16) == "sdpa"


@pytest.mark.parametrize(
    ("kind", "major", "files", "reason"),
    [
        ("flash_attn", 9, {}, "it is not installed"),
        ("flash_attn", 9, FOUR, r"it is not installed \(flash_attn has no flash_attn_varlen_func\)"),
        ("flash_attn_4", 9, {}, "it is not installed"),
        ("flash_attn_4", 9, TWO, "it is not installed"),
        ("flash_attn_3", 9, FOUR, "it is not installed"),
        (
            "flash_attn",
            9,
            {"flash_attn.py": "raise RuntimeError('undefined symbol: x')"},
            r"it cannot be imported \(undefined symbol: x\)",
        ),
        (
            "flash_attn_3",
            9,
            {"flash_attn_interface.py": "import flash_attn_3._C"},
            r"it cannot be imported \(No module named 'flash_attn_3'\)",
        ),
        (
            "flash_attn_4",
            9,
            {"flash_attn/cute/__init__.py": FLASH_4_EARLY},
            "the installed version's .* has no parameter max_seqlen_q, max_seqlen_k",
        ),
        ("varlen", 9, {VARLEN: VARLEN_10}, "the installed version's varlen_attn has no parameter scale, window_size"),
        ("varlen", 7, {}, "it is for Ampere GPUs and newer, and this is a GB900"),
        ("flash_attn_3", 10, THREE, "it is for Hopper GPUs, and this is a GB900"),
        ("flash_attn_4", 8, FOUR, "it is for Hopper and Blackwell GPUs, and this is a GB900"),
    ],
)
def test_kernel_that_cannot_be_called_is_refused(install, monkeypatch, kind, major, files, reason):
    install(files)
    on_gpu(monkeypatch, major)
    with pytest.raises(
        PipelineError, match=rf"^model\.attention={kind} cannot run here: {reason}; choose another, or auto$"
    ):
        choose(kind, "cuda", BF16)


def test_every_kernel_needs_a_gpu_and_half_precision(install):
    install(TWO | THREE | FOUR)
    for kind in KERNELS:
        assert choose(kind, "cuda", BF16) == kind  # a machine without a GPU cannot know better
        with pytest.raises(PipelineError, match="it needs a CUDA device, and this is a cpu"):
            choose(kind, "cpu", BF16)
        with pytest.raises(PipelineError, match="it is for bf16 only, and the precision is fp32"):
            choose(kind, "cuda", torch.float32)


def config_of(**values: object) -> PreTrainedConfig:
    return AutoConfig.for_model("qwen3", hidden_size=1024, num_attention_heads=16, dtype=BF16, **values)


def test_heads_that_a_kernel_lacks_rule_it_out(install, monkeypatch):
    install(THREE | FOUR)
    gemma4 = AutoConfig.for_model("gemma4_text", num_hidden_layers=6, dtype=BF16)  # 256, in some layers 512
    qwen2 = AutoConfig.for_model("qwen2", hidden_size=1024, num_attention_heads=8, dtype=BF16)  # it has no head_dim
    for major, kinds in ((9, ["flash_attn_3"] * 3), (10, ["flash_attn_4", "varlen", "flash_attn_4"])):
        on_gpu(monkeypatch, major)
        assert [choose("auto", "cuda", BF16, config_of(head_dim=size)) for size in (128, 192, 256)] == kinds
        assert choose("auto", "cuda", BF16, config_of(head_dim=512)) == choose("auto", "cuda", BF16, gemma4) == "sdpa"
        assert choose("auto", "cuda", "auto", qwen2) == kinds[0]
        with pytest.raises(PipelineError, match="it has no heads of size 36 on this GB900"):
            choose("varlen", "cuda", BF16, config_of(head_dim=36))


@pytest.mark.parametrize("looks", ["causal", "both ways", "by last"])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("flash_attn", TWO),
        ("flash_attn_3", THREE),
        ("flash_attn_3", {"flash_attn_interface.py": FLASH_3_EARLY}),
        ("flash_attn_4", FOUR),
        ("varlen", {VARLEN: VARLEN_11}),
        ("varlen", {VARLEN: VARLEN_13}),
    ],
)
def test_kernel_is_called_for_what_sdpa_computes(install, kind, files, groups, looks):
    install(files)
    lengths, heads, width = (5, 1, 17, 3), 4, 8
    segments = Segments(lengths, torch.device("cpu"), causal=looks != "both ways")
    segments = segments.asked_by_last() if looks == "by last" else segments
    rng = torch.Generator().manual_seed(0)
    shapes = (heads, sum(segments.queries.lengths)), (groups, sum(lengths)), (groups, sum(lengths))
    inputs = [torch.randn(1, *shape, width, dtype=torch.float64, generator=rng, requires_grad=True) for shape in shapes]
    results = []
    for each in (kind, "sdpa"):
        result, _ = KINDS[each](None, *inputs, None, segments=segments, scaling=0.7)
        results.append((result, *torch.autograd.grad(result.square().sum(), inputs)))
    assert_close_in_norm(*results)
