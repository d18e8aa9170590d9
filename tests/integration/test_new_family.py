"""A family that a test registers from its own folder works with all programs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bag_of_words.family import BagOfWords
from closeness import assert_close_in_norm
from launch import launch
from safetensors.torch import load_file

from pipeline.convert.demo import TrainingPairs
from pipeline.convert.sharding import convert
from pipeline.embedding.embedder import Embedder
from pipeline.models.registry import FAMILIES

PROGRAM = str(Path(__file__).with_name("with_bag_of_words.py"))
RECIPE = """\
run: runs/bag_of_words
steps: 8
precision: fp32
deepspeed: ds_configs/zero0.json
model:
  family: bag_of_words
  architecture: {words: 300, width: 12}
  lower_case: true
  train: {projection: 0.02}
data: {url: here, lanes: 2, workers: 0}
batch: {global_batch: 16, chunk_tokens: 100}
objective: {name: contrastive, alpha: 0, temperature: 0.1}
optimizer: {lr: 5.0e-2}
checkpoint: {every: 4}
"""


@pytest.fixture(scope="module")
def world_of_words(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    convert({f"{folder}/pairs": TrainingPairs("Scene-CLS", 0, 64)}, options={}, shard_bytes=200_000)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "texts.txt").write_text("a red star\na blue moon\n")
    return folder


def run(world: int, *arguments: object) -> str:
    ended = launch([PROGRAM, *map(str, arguments)], world)
    assert ended.status == [0] * world, ended.output[-6000:]
    return ended.output


@pytest.mark.parametrize("stage", [0, 3])
def test_registered_family_trains_exports_evaluates_and_embeds(stage, world_of_words, tmp_path, monkeypatch):
    pairs, trained = world_of_words / "pairs", tmp_path / "trained"
    fields = [f"data.url={pairs}", f"deepspeed=ds_configs/zero{stage}.json", f"evaluation.urls=[{pairs}]"]
    train = ["pipeline.train", world_of_words / "recipe.yaml", *fields]
    run(2, *train, f"run={trained}")
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and lines[-1]["loss"] < lines[0]["loss"]

    # A run that stops after half of its steps and resumes ends with the same metrics.
    resumed = tmp_path / "resumed"
    shutil.copytree(trained, resumed)
    shutil.rmtree(resumed / "checkpoints/step-00000008")
    shutil.rmtree(resumed / "export")
    run(2, *train, f"run={resumed}")
    assert (resumed / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()
    weights = load_file(trained / "export/model.safetensors")
    for name, weight in load_file(resumed / "export/model.safetensors").items():
        assert torch.equal(weight, weights[name])

    exported = tmp_path / "exported"
    assert "cosine 1.0000" in run(1, "pipeline.export", trained, exported)
    assert (exported / "config.json").read_text() == (trained / "export/config.json").read_text()
    run(2, "pipeline.evaluate", exported, pairs, f"out={tmp_path / 'evaluation'}")
    during, after = (
        json.loads(file.read_text())
        for file in (trained / "evaluation/step-00000008.json", tmp_path / "evaluation/report.json")
    )
    assert during["results"]["Scene-CLS"]["metrics"] == pytest.approx(after["results"]["Scene-CLS"]["metrics"])
    run(1, "pipeline.embed", exported, "--texts", world_of_words / "texts.txt", "--out", tmp_path / "vectors")
    monkeypatch.setitem(FAMILIES, "bag_of_words", "")  # and removed after the test
    FAMILIES.register("bag_of_words", "bag_of_words")
    rows = Embedder.load(exported, "cpu").embed(["a red star", "a blue moon"])
    assert_close_in_norm(rows, torch.from_numpy(np.load(tmp_path / "vectors/texts.npy")))
    assert BagOfWords.load(str(exported), "auto").dimension == rows.shape[1] == 12
