"""bf16 beside fp32, and checkpoints, at every ZeRO stage."""

import json
from pathlib import Path

import pytest
from launch import start, wait

WORKER = str(Path(__file__).with_name("precision.py"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32_and_both_resume_exactly(stage, tiny_model, tmp_path):
    results = {}
    for precision in ("fp32", "bf16"):
        config = f"ds_configs/zero{stage}.json"
        ended = wait(start([WORKER, tiny_model, config, precision, str(tmp_path / precision)], 1), seconds=60)
        assert ended.status == [0], ended.output[-4000:]
        results[precision] = json.loads(ended.output.splitlines()[-1])
        assert results[precision]["resumed"] == results[precision]["losses"][2]
    fp32, bf16 = (results[precision]["losses"] for precision in ("fp32", "bf16"))
    for (loss, _), (rounded, _) in zip(fp32, bf16, strict=True):
        assert rounded == pytest.approx(loss, rel=0.02)
    assert fp32 != bf16
