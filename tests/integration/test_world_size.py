"""A run resumes on another number of processes, with the same batches and, in fp32, losses equal to five digits."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from launch import launch
from limits import HANG_MINUTES
from safetensors.torch import load_file

from pipeline import export, train
from pipeline.config.mining import MiningRun
from pipeline.convert.demo import TrainingPairs
from pipeline.convert.sharding import convert
from pipeline.data.stored_vectors import ITEMS
from pipeline.embedding.dataset import open_datasets
from pipeline.embedding.mining import mine_datasets
from pipeline.errors import PipelineError
from pipeline.evaluation.encoders import load_encoder
from pipeline.models.llave.config import LlaveArchitecture
from pipeline.models.llave.model import build
from pipeline.training import checkpoint, manifest

WORKER = str(Path(__file__).with_name("world_size.py"))
CASES = ["zero0", "zero1", "zero2", "zero3", "zero3-adapters", "zero1-bf16", "zero3-qwen"]
LAST = 7
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Saved:
    """WORKER's models and folder, and (loss, gradient norm) for each case and step, starting with step `first`."""

    models: str
    folder: Path
    first: int
    results: dict[str, list[list[float]]]

    def resumed(self, by: int, saved_by: int, first: int, cases: list[str]) -> "Saved":
        """Take steps `first` to LAST on `by` processes, from the checkpoints that `saved_by` processes wrote."""
        arguments = [self.models, str(self.folder), str(saved_by), str(first), str(LAST), *cases]
        ended = launch([WORKER, *arguments], by)
        assert ended.status == [0] * by, ended.output[-4000:]
        lines = [line for line in ended.output.splitlines() if line.startswith("{")]
        assert ("converting" in ended.output) == (first > 0)
        return Saved(self.models, self.folder, first, json.loads(lines[0]))

    def assert_follows(self, undisturbed: "Saved") -> None:
        for case, results in self.results.items():
            expected = undisturbed.results[case][self.first :]
            assert len(results) == LAST - self.first
            for number, ((loss, norm), (expected_loss, expected_norm)) in enumerate(
                zip(results, expected, strict=True), 1
            ):
                if "bf16" in case:
                    assert loss == pytest.approx(expected_loss, rel=5e-3), case
                else:
                    assert loss == pytest.approx(expected_loss, rel=number * 1e-5), case
                    assert norm == pytest.approx(expected_norm, rel=number * 1e-4), case


@pytest.fixture(scope="module")
def undisturbed(tiny_qwen, tmp_path_factory) -> Saved:
    """Run every case on two processes. The LLaVE is so small that one of four ranks has no part of a small group."""
    folder = tmp_path_factory.mktemp("world")
    model = folder / "model"
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 4, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    architecture = LlaveArchitecture(
        vision=vision | {"image_size": 24, "patch_size": 8},
        text=text | {"num_key_value_heads": 1, "vocab_size": 320},
        image_grid_pinpoints=[(24, 24), (24, 48), (48, 24), (48, 48)],
    )
    build(architecture, ["a small red star at the top left", "a large blue ring"], seed=1, folder=model)
    return Saved(f"{model},{tiny_qwen}", folder, 0, {}).resumed(by=2, saved_by=2, first=0, cases=CASES)


@pytest.fixture(scope="module")
def alone(undisturbed) -> Saved:
    """Resume on one process what two processes saved after two steps."""
    return undisturbed.resumed(by=1, saved_by=2, first=2, cases=CASES)


def test_checkpoint_written_during_the_next_step_has_the_bytes_that_deepspeed_writes(undisturbed):
    for case in CASES:
        ours, theirs = (undisturbed.folder / case / name for name in ("by2/step-00000002", "plain/unfinished-00000002"))
        names = {path.name for path in theirs.iterdir()}
        assert names | {checkpoint.CONDITIONS, manifest.FILE} == {path.name for path in ours.iterdir()}
        assert any(name.endswith("model_states.pt") for name in names)
        for name in names:
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), (case, name)


def test_checkpoint_of_two_processes_resumes_on_one(undisturbed, alone):
    alone.assert_follows(undisturbed)
    for case in CASES:
        by_two, by_one = (undisturbed.folder / case / f"by{world}" for world in (2, 1))
        assert not [*by_two.glob("unfinished*"), *by_one.glob("unfinished*")]
        theirs, ours = (checkpoint.trained_weights(folder / "step-00000004") for folder in (by_two, by_one))
        assert theirs.keys() == ours.keys()
        if "bf16" not in case:
            for name, weight in theirs.items():
                torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-5)


def test_checkpoint_of_one_process_resumes_on_two(undisturbed, alone):
    cases = ["zero2", "zero3", "zero1-bf16"]
    alone.resumed(by=2, saved_by=1, first=4, cases=cases).assert_follows(undisturbed)


def test_checkpoint_of_two_processes_resumes_on_four(undisturbed):
    undisturbed.resumed(by=4, saved_by=2, first=4, cases=["zero1", "zero3-adapters"]).assert_follows(undisturbed)


@pytest.fixture(scope="module")
def recipe(tiny_model, tmp_path_factory) -> list[str]:
    """Return a recipe with a teacher's vectors, mined negatives and batches of neighbours."""
    data = tmp_path_factory.mktemp("data") / "pairs"
    convert({str(data): TrainingPairs("Scene-T2I", 0, 90)}, options={}, shard_bytes=200_000)
    encoder, options = load_encoder(tiny_model, MiningRun(), CPU), MiningRun(count=1, margin=None, clusters=6)
    mine_datasets(encoder, open_datasets([str(data)], None, ITEMS), str(data), options, CPU)
    fields = ["data.teacher=beside", "data.negatives=beside", "data.batches=neighbours", "objective.reward=teacher"]
    fields += ["objective.distill={scores: teacher, temperature: 0.2}", "objective.dimensions=[16,48]"]
    fields += ["deepspeed=ds_configs/zero2.json", "data.lanes=4", "data.block_samples=8", "data.window_blocks=2"]
    fields += ["batch.global_batch=24", "batch.chunk_tokens=2000", "batch.kept_chunks=1", "steps=5"]
    fields += ["checkpoint.every=2", "checkpoint.keep=9"]
    fields += [f"model.path={tiny_model}", f"data.url={data}", "data.datasets=[]", "evaluation=null", "ledger=true"]
    return ["pipeline/recipes/demo.yaml", *fields, f"timeout_minutes={HANG_MINUTES}"]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_run_stopped_on_two_processes_continues_on_one(recipe, tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stop+ped"  # the folder's name must not act as a pattern
    ended = launch(["-m", "pipeline.train", *recipe, f"run={whole}"], world=2)
    assert ended.status == [0, 0], ended.output[-4000:]
    shutil.copytree(whole, stopped)
    checkpoints = stopped / "checkpoints"
    (checkpoints / "latest").write_text("step-00000002\n")
    for later in ("step-00000004", "step-00000005"):
        shutil.rmtree(checkpoints / later)
    killed = checkpoints / "unfinished-universal" / "step-00000002" / "tmp"  # a killed conversion left it
    killed.mkdir(parents=True)
    assert checkpoint.candidates(checkpoints)[0] == checkpoints / "step-00000002"

    ended = launch(["-m", "pipeline.train", *recipe, f"run={stopped}"], world=1)
    assert ended.status == [0], ended.output[-4000:]
    assert "step-00000002 is of 2 processes: converting it for 1" in ended.output
    ours, theirs = (lines(run / "metrics.jsonl") for run in (stopped, whole))
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5]
    for line, expected in zip(ours, theirs, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=line["step"] * 1e-5)
        assert line == pytest.approx(expected, rel=1e-4)

    def consumed(run: Path) -> list[tuple[int, str]]:
        entries = [entry for path in (run / "ledger").iterdir() for entry in lines(path)]
        return sorted((entry["step"], key) for entry in entries for key in entry["keys"])

    assert consumed(stopped) == consumed(whole)
    assert len(lines(stopped / "ledger/rank1.jsonl")) == 2
    assert sorted(path.name for path in checkpoints.iterdir() if path.is_dir()) == [
        f"step-0000000{step}" for step in (2, 4, 5)
    ]

    monkeypatch.setattr(sys, "argv", ["export", str(stopped), str(tmp_path / "out")])
    export.main()
    capsys.readouterr()
    by_run, by_command = (load_file(folder / "model.safetensors") for folder in (stopped / "export", tmp_path / "out"))
    assert all(torch.equal(weight, by_command[name]) for name, weight in by_run.items())


@pytest.mark.parametrize("world", [3, 5])
def test_invalid_world_size_error_lists_valid_sizes(recipe, world, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ | {"WORLD_SIZE": str(world)})
    monkeypatch.setattr(sys, "argv", ["train", *recipe, f"run={tmp_path}", "batch.sub_batch=12", "data.batches=mixed"])
    with pytest.raises(PipelineError, match="the number of processes could be 1, 2, 4"):
        train.main.__wrapped__()
