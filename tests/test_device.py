"""CUDA's settings of a process: what they are, that the CPU's stay, and who makes them."""

from collections.abc import Iterator

import pytest
import torch

from pipeline.config import load_recipe
from pipeline.device import configure_device
from pipeline.embedding import embedder
from pipeline.jobs.preflight import run
from pipeline.jobs.preflight.check import Check
from pipeline.jobs.preflight.nodes import Nodes


def settings() -> tuple:
    cudnn_sdp = torch.backends.cuda.cudnn_sdp_enabled()
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, cudnn_sdp


@pytest.fixture
def loose(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple]:
    """Other settings than ours, as another library may have made."""
    before = settings()
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield settings()
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    torch.backends.cuda.enable_cudnn_sdp(before[2])


def test_cuda_gets_exact_float32_and_no_attention_by_cudnn(loose):
    configure_device(torch.device("cpu"))
    assert settings() == loose == ("high", True, True)
    configure_device("cuda:1")
    assert settings() == ("highest", False, False)


def test_embedder_and_preflight_make_the_settings(tiny_model, monkeypatch, tmp_path):
    """`test_allocator_uses_expandable_segments_by_default` shows the same of programs with a process group."""
    seen = []
    for module in (embedder, run):
        monkeypatch.setattr(module, "configure_device", seen.append)
    embedder.Embedder.load(tiny_model, "cpu")
    assert seen == [torch.device("cpu")]
    monkeypatch.setattr(run, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(run, "meet", lambda nodes: 1 / 0)  # the first check after it
    with pytest.raises(ZeroDivisionError):
        run.preflight(
            load_recipe("demo.yaml", [f"run={tmp_path}"]),
            Nodes(),
            Check("", "green", ""),
            world=1,
            slurm=False,
            began=0,
        )
    assert seen == [torch.device("cpu"), torch.device("cuda")]
