"""Whole runs of `python -m pipeline.train` on two processes that stream from S3: killed, resumed, evaluated."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from closeness import assert_close_in_norm
from comparison import assert_results_alike
from launch import fork, launch, wait
from limits import HANG_MINUTES, HANG_SECONDS
from PIL import Image as Picture
from safetensors.torch import load_file

from pipeline import export
from pipeline.convert.demo import TrainingPairs
from pipeline.convert.sharding import convert
from pipeline.embedding.embedder import Embedder
from pipeline.evaluation.report import Report
from pipeline.training import checkpoint
from pipeline.training.checkpoint import PROCESSES

STEPS = 16
EVERY = 4


@pytest.fixture(scope="module")
def recipe(s3, tiny_model) -> list[str]:
    """Return the demo's recipe with few samples in S3 and an existing model."""
    names = ("Scene-T2I", "Scene-CLS")
    datasets = {f"s3://pipeline-tests/training/{name}": TrainingPairs(name, 0, 90) for name in names}
    convert(datasets, options={}, shard_bytes=200_000)
    return [
        "pipeline/recipes/demo.yaml",
        f"model.path={tiny_model}",
        "data.url=s3://pipeline-tests/training",
        "data.datasets=[Scene-T2I, Scene-CLS]",
        "data.lanes=4",
        "data.block_samples=8",
        "data.window_blocks=2",
        "batch.global_batch=24",
        "batch.chunk_tokens=2000",
        "batch.kept_chunks=1",
        f"steps={STEPS}",
        "data.workers=0",
        f"checkpoint.every={EVERY}",
        "evaluation.urls=[s3://pipeline-tests/training/Scene-T2I]",
        "objective.dimensions=[16,48]",
        "ledger=true",
        f"timeout_minutes={HANG_MINUTES}",
    ]


def command(recipe: list[str], run: Path, *overrides: str) -> list[str]:
    return ["-m", "pipeline.train", *recipe, f"run={run}", *overrides]


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    ended = launch(command(recipe, run), world=2)
    assert ended.status == [0, 0], ended.output[-4000:]
    return run


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_finished_run_has_all_outputs_and_no_secrets(finished, recipe):
    metrics = lines(finished / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert [line["samples"] for line in metrics] == [24 * step for step in range(1, STEPS + 1)]
    assert {line["epoch"] for line in metrics} == {0, 1, 2}  # an epoch has 180 samples, 7 steps
    assert all(np.isfinite(line[name]) for line in metrics for name in ("loss", "grad_norm", "lr"))
    assert [line["step"] for line in lines(finished / "speed.jsonl")] == list(range(1, STEPS + 1))
    assert any((finished / "tensorboard").iterdir())
    assert sorted(path.name for path in (finished / "checkpoints").glob("step-*")) == ["step-00000012", "step-00000016"]
    assert sorted(path.name for path in (finished / "evaluation").iterdir()) == [
        "step-00000000.json",
        "step-00000016.json",
    ]
    kept = (finished / "recipe.yaml").read_text()
    assert "torch" in kept.splitlines()[0]
    for secret in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        for file in finished.rglob("*"):
            assert not file.is_file() or os.environ[secret].encode() not in file.read_bytes()
    seen = [key for rank in range(2) for line in lines(finished / f"ledger/rank{rank}.jsonl") for key in line["keys"]]
    assert len(seen) == 24 * STEPS
    first_epoch = [
        key
        for rank in range(2)
        for line in lines(finished / f"ledger/rank{rank}.jsonl")
        if line["step"] <= 7
        for key in line["keys"]
    ]
    assert len(first_epoch) == len(set(first_epoch)) == 24 * 7


def test_killed_run_matches_uninterrupted_run(finished, recipe, tmp_path):
    run = tmp_path / "killed"
    metrics = run / "metrics.jsonl"
    # A different number of workers must not change anything, either.
    ranks = fork(command(recipe, run, "data.workers=2"), world=2)
    deadline = time.monotonic() + HANG_SECONDS
    while not metrics.exists() or len(metrics.read_text().splitlines()) < EVERY + 2:
        assert time.monotonic() < deadline, wait(ranks, seconds=1).output[-8000:]
        assert [rank.poll() for rank in ranks] == [None, None]
        time.sleep(0.01)
    workers = [worker for rank in ranks for worker in psutil.Process(rank.pid).children(recursive=True)]
    assert len(workers) >= 4
    os.kill(ranks[1].pid, signal.SIGKILL)
    ended = wait(ranks)
    assert ended.status[1] == -signal.SIGKILL
    assert not psutil.wait_procs(workers, timeout=HANG_SECONDS)[1], "data workers outlived their ranks"
    assert (run / "checkpoints/latest").read_text() in ("step-00000004\n", "step-00000008\n")
    assert len(metrics.read_text().splitlines()) < STEPS
    first_evaluation = (run / "evaluation/step-00000000.json").stat().st_mtime_ns

    again = [str(Path(__file__).with_name("one_thread.py")), *command(recipe, run, "data.workers=2")[2:]]
    ended = launch(again, world=2)
    assert ended.status == [0, 0], ended.output[-4000:]
    # The run resumed instead of restarting, which would give the same bits.
    assert (run / "evaluation/step-00000000.json").stat().st_mtime_ns == first_evaluation
    for name in ("metrics.jsonl", "ledger/rank0.jsonl", "ledger/rank1.jsonl"):
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name
    ours, theirs = (load_file(folder / "export/model.safetensors") for folder in (run, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_run_killed_while_checkpoints_are_written_matches_uninterrupted_run(finished, recipe, tmp_path):
    run, script = tmp_path / "run", "tests/integration/killed_saving.py"
    # The rank and the moment of the kill, and the checkpoints and the pointer that it leaves.
    for rank, moment, steps, latest in (
        (1, "sums", [], ""),
        (0, "latest", [4], ""),
        (0, "removal", [4, 8], "step-00000008"),
    ):
        ended = wait(fork([script, str(rank), moment, *command(recipe, run)[2:]], world=2), after_failure=0)
        assert ended.status[rank] == -signal.SIGKILL, ended.output[-4000:]
        checkpoints = run / "checkpoints"
        assert sorted(checkpoint.step_of(path) for path in checkpoints.glob("step-*")) == steps
        assert ((checkpoints / "latest").read_text().strip() if (checkpoints / "latest").exists() else "") == latest
    ended = launch(command(recipe, run), world=2)
    assert ended.status == [0, 0], ended.output[-4000:]
    for name in ("metrics.jsonl", "ledger/rank0.jsonl", "ledger/rank1.jsonl"):
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name
    ours, theirs = (load_file(folder / "export/model.safetensors") for folder in (run, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_exported_model_matches_evaluation_during_training(finished, tmp_path):
    arguments = [
        str(finished / "export"),
        "s3://pipeline-tests/training/Scene-T2I",
        f"out={tmp_path}",
        "dimensions=[16]",
    ]
    ended = launch(["-m", "pipeline.evaluate", *arguments], world=2)
    assert ended.status == [0, 0], ended.output[-4000:]
    assert "Precision@1" in ended.output
    ours, theirs = (Report.read(path) for path in (tmp_path, finished / "evaluation/step-00000016.json"))
    assert_results_alike(ours.results, theirs.results)
    for variant, other in zip(ours.variants, theirs.variants, strict=True):
        assert variant.form == other.form
        assert_results_alike(ours.at(variant).results, theirs.at(other).results)
    assert [str(variant.form) for variant in theirs.variants] == ["48 float32", "16 float32"]
    assert json.loads((finished / "export/config.json").read_text())["matryoshka_dimensions"] == [16, 48]
    best = json.loads((finished / "checkpoints/best").read_text())
    assert (best["checkpoint"], best["score"]) == ("step-00000016", theirs.score)


def budget_of(run: Path, step: int) -> dict:
    """Return the budget in the checkpoint after `step` steps."""
    with checkpoint.weights_only():
        path = run / f"checkpoints/step-{step:08d}/zero_pp_rank_0_mp_rank_00_model_states.pt"
        return torch.load(path, map_location="cpu", weights_only=True)["budget"]


def test_original_checkpoint_trains_adapters_with_automatic_budget(recipe, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    fields = [
        "model.path=tests/golden",
        "objective.dimensions=[]",
        "model.max_tokens=4096",
        "model.image_grid_pinpoints=[[384, 384]]",
    ]
    fields += ["batch.global_batch=4", "data.lanes=2", "batch.chunk_tokens=auto", "batch.kept_chunks=auto"]
    fields += ["model.train.vision_tower=false", "model.train.lora.rank=2", "checkpoint.every=2", "evaluation=null"]
    ended = launch(command(recipe, run, *fields, "steps=8"), world=2)
    assert ended.status == [0, 0], ended.output[-4000:]
    assert ended.output.count("next batch.chunk_tokens=8192 batch.kept_chunks=0\n") == 1
    found = budget_of(run, 8)
    (converted,) = (run / "init").iterdir()
    written = (converted / "model.safetensors").stat().st_mtime_ns
    # The file of a start on four GPUs that ran out of memory. It does not apply to two; the next checkpoint removes it.
    left = {"budget": found["budget"] | {"chunk_tokens": 128}, "conditions": found["conditions"] | {PROCESSES: 4}}
    (run / "budget.json").write_text(json.dumps(left))
    ended = launch(command(recipe, run, *fields, "steps=10"), world=2)
    assert ended.status == [0, 0], ended.output[-4000:]
    assert (converted / "model.safetensors").stat().st_mtime_ns == written
    metrics = lines(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 11))
    assert found["budget"]["chunk_is_fixed"] and found["budget"]["kept_is_fixed"]
    assert budget_of(run, 10) == found
    assert "a step took" not in ended.output  # the budget was restored, not measured
    assert not (run / "budget.json").exists()

    monkeypatch.setattr(sys, "argv", ["export", str(run), str(tmp_path / "out")])
    export.main()
    assert "step-00000010 of" in capsys.readouterr().out
    before, by_run, by_command = (
        load_file(folder / "model.safetensors") for folder in (converted, run / "export", tmp_path / "out")
    )
    assert before.keys() == by_run.keys() == by_command.keys()
    changed = {name for name, weight in by_run.items() if not torch.equal(weight, before[name])}
    assert {name for name in changed if "_proj.weight" not in name} == {
        "image_newline",
        *(f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
    }
    assert not [name for name in changed if name.startswith("vision_tower")]
    for name, weight in by_run.items():
        assert_close_in_norm(by_command[name], weight, operations=64)


def test_family_of_native_resolution_resumes_on_one_process_and_its_export_embeds(recipe, tiny_qwen, tmp_path):
    run, steps = tmp_path / "run", ["steps=5", "checkpoint.every=2", "evaluation=null"]
    steps.append("deepspeed=ds_configs/zero2.json")
    given = ["pipeline/recipes/demo_qwen.yaml", f"model.path={tiny_qwen}", *recipe[2:], *steps]
    given = command(given, run, "model.train.vision_tower=false", "model.max_pixels=2048")
    ended = launch([str(Path(__file__).with_name("killed.py")), "5", *given[2:]], world=2)
    assert ended.status == [-signal.SIGKILL] * 2, ended.output[-4000:]
    saved = checkpoint.candidates(run / "checkpoints")[0]
    assert checkpoint.step_of(saved) in (2, 4)  # the last one is written while the next steps are taken
    ended = launch(given, world=1)
    assert ended.status == [0], ended.output[-4000:]
    assert f"{saved.name} is of 2 processes: converting it for 1" in ended.output
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    weights, initial = load_file(run / "export/model.safetensors"), load_file(f"{tiny_qwen}/model.safetensors")
    assert weights.keys() == initial.keys()
    moved = {name.split(".")[1] for name in weights if not torch.equal(weights[name], initial[name])}
    assert moved == {"merger", "deepstack_merger_list", "embed_tokens", "layers", "norm"}
    embedder = Embedder.load(run / "export", device="cpu", precision="fp32")
    assert embedder.processor.patches.max_pixels == 2048
    assert embedder.embed(["a star", Picture.new("RGB", (90, 20))]).shape == (2, 48)


def test_resume_with_another_seed_is_refused(finished, recipe):
    ended = launch(command(recipe, finished, "seed=7"), world=1)
    assert ended.status == [2]
    assert "seed was 0 and is now 7" in ended.output


def test_unfinished_checkpoint_is_ignored(tmp_path):
    """A kill during a save leaves files under another name, and `latest` unchanged."""
    folder = tmp_path / "checkpoints"
    (folder / "unfinished-00000008").mkdir(parents=True)
    assert checkpoint.candidates(folder) == []
    (folder / "step-00000004").mkdir()
    (folder / "latest").write_text("step-00000004\n")
    assert checkpoint.candidates(folder)[0] == folder / "step-00000004"
