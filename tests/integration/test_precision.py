"""bf16 compared with fp32, and checkpoints, at every ZeRO stage."""

import json
import sys
from pathlib import Path

import pytest
import torch
from launch import launch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

from pipeline.export import main

WORKER = str(Path(__file__).with_name("precision.py"))


def assert_exported_alike(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that `pipeline.export` writes the same model from the checkpoint as the engine's own export."""
    monkeypatch.setattr(sys, "argv", ["export", str(run), str(run / "again")])
    main()
    files = [run / folder / "model.safetensors" for folder in ("export", "again")]
    by_engine, by_command = map(load_file, files)
    assert by_engine.keys() == by_command.keys()
    assert all(torch.equal(weight, by_command[name]) for name, weight in by_engine.items())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_losses_are_close_to_fp32_and_both_resume_exactly(stage, tiny_model, tmp_path, monkeypatch):
    results = {}
    for precision in ("fp32", "bf16"):
        config = f"ds_configs/zero{stage}.json"
        ended = launch([WORKER, tiny_model, config, precision, str(tmp_path / precision)], 1)
        assert ended.status == [0], ended.output[-4000:]
        results[precision] = json.loads(ended.output.splitlines()[-1])
        assert results[precision]["resumed"] == results[precision]["losses"][2]
        assert results[precision]["cosine"] > (0.999 if precision == "bf16" else 1 - 1e-6)
        assert_exported_alike(tmp_path / precision, monkeypatch)
    fp32, bf16 = (results[precision]["losses"] for precision in ("fp32", "bf16"))
    for (loss, _), (rounded, _) in zip(fp32, bf16, strict=True):
        assert rounded == pytest.approx(loss, rel=0.02)
    assert fp32 != bf16


@pytest.mark.parametrize(("stage", "world"), [(1, 1), (3, 2)])
def test_adapters_with_frozen_parts_resume_exactly_and_merge_on_export(stage, world, tiny_model, tmp_path, monkeypatch):
    fields = [
        "model.train.vision_tower=false",
        "model.train.projector=false",
        "model.train.lora.rank=2",
        "batch.kept_chunks=1",
    ]
    config = f"ds_configs/zero{stage}.json"
    ended = launch([WORKER, tiny_model, config, "fp32", str(tmp_path), *fields], world)
    assert ended.status == [0] * world, ended.output[-4000:]
    result = json.loads(next(line for line in ended.output.splitlines() if line.startswith("{")))
    assert result["resumed"] == result["losses"][2]
    assert result["cosine"] > 1 - 1e-6
    assert_exported_alike(tmp_path, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["export", str(tmp_path), str(tmp_path / "alone"), "--adapters"])
    main()
    merged, before = load_file(tmp_path / "again/model.safetensors"), load_file(f"{tiny_model}/model.safetensors")
    both = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model), str(tmp_path / "alone")).merge_and_unload()
    assert both.state_dict().keys() == merged.keys()
    assert not all(torch.equal(merged[name], weight) for name, weight in before.items())
    for name, weight in both.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=1e-5, atol=1e-6)
    # Frozen parameters are not in the checkpoint: 70,000 parameters, against 7,000 in the adapters.
    assert max(path.stat().st_size for path in (tmp_path / "checkpoints/step-00000002").rglob("*.pt")) < 60_000
