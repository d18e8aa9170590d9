"""Masked next-token prediction: steps equal one process with the whole batch; a run learns, is killed and resumes."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from comparison import zero_config
from launch import launch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline import export
from pipeline.data.shards import write_shards
from pipeline.demo.captioned import training_pair
from pipeline.models.text_encoder import masked
from pipeline.models.text_encoder.model import TextEncoder, build

WORKER = str(Path(__file__).with_name("masked_steps.py"))
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
STEPS = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Create two models, and DeepSpeed's configs in the same folder."""
    folder = tmp_path_factory.mktemp("models")
    for name, tied in (("tied", True), ("untied", False)):
        shape = SIZES | {"vocab_size": 300, "tie_word_embeddings": tied}
        build(shape, ["query target negative 0 1 2 3 4 5 6 7 8 9"], 1, folder / name, AutoModelForCausalLM)
        # Biases are initialized to zero, where a relative difference is meaningless. Those of trained models are not.
        model = masked.MaskedLanguageModel.load(str(folder / name), torch.float32)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in (p for given, p in model.named_parameters() if given.endswith("bias")):
                parameter.normal_(std=0.05)
        masked.save(model, dict(model.named_parameters()), str(folder / name), folder / name, None)
    for stage in range(4):
        zero_config(f"zero{stage}", folder)
    return folder


@pytest.mark.parametrize("world", [1, 2])
def test_step_equals_one_process_with_whole_batch(world, models, tmp_path):
    out = tmp_path / "out.json"
    ended = launch([WORKER, str(models), str(out)], world)
    assert ended.status == [0] * world, ended.output[-4000:]
    for result in json.loads(out.read_text()):
        print(f"{world} processes: {result}")
        assert all(result[name] < 1e-5 for name in ("loss", "grad_norm", "parameters", "export")), result


def test_run_learns_resumes_after_a_kill_and_exports_a_decoder(tmp_path, monkeypatch):
    for name in ("images", "texts"):
        pairs = (training_pair(name, 0, number) for number in range(100))
        write_shards(pairs, tmp_path / "data" / name, dataset=name, shard_bytes=100_000)
    run, again = tmp_path / "run", tmp_path / "again"
    shape = json.dumps(SIZES | {"vocab_size": 500})
    fields = [f"data.url={tmp_path}/data", "data.datasets=[images, texts]", "data.lanes=2", "batch.global_batch=24"]
    fields += [f"model.architecture.text={shape}", "optimizer.lr=0.01", f"steps={STEPS}", "checkpoint.every=9"]

    def train(run: Path) -> None:
        command = ["-m", "pipeline.train", "pipeline/recipes/demo_masked.yaml", *fields, f"run={run}"]
        ended = launch(command, world=2)
        assert ended.status == [0, 0], ended.output[-4000:]

    train(run)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert all(line["valid"] == 24 and 0 <= line["accuracy"] <= 1 for line in metrics)
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"]
    assert metrics[-1]["accuracy"] > 0.1 > metrics[0]["accuracy"]

    # The state after a kill that follows the checkpoint of step 9.
    shutil.copytree(run, again)
    shutil.rmtree(again / f"checkpoints/step-{STEPS:08d}")
    shutil.rmtree(again / "export")
    (again / "checkpoints/latest").write_text("step-00000009\n")
    train(again)
    assert (again / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    ours, theirs = (load_file(folder / "export/model.safetensors") for folder in (again, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    monkeypatch.setattr(sys, "argv", ["export", str(run), str(tmp_path / "out")])
    export.main()
    causal = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not causal.config.is_causal
    assert torch.equal(causal.lm_head.weight, theirs["lm_head.weight"])
    TextEncoder.load(str(tmp_path / "out"), torch.float32)
