"""LLaVE's published variant: a training step equals that of its published code, and a run of it can be resumed."""

import json
import signal
from pathlib import Path

import pytest
import torch
from launch import launch
from limits import HANG_MINUTES
from safetensors.torch import load_file

from pipeline.convert.demo import TrainingPairs
from pipeline.convert.sharding import convert
from pipeline.models.llave.weights import convert_original

PAPER = Path(__file__).parents[1] / "papers/llave"
STEP = json.loads((PAPER / "step.json").read_text())
WORKER, KILLED_WORKER = (str(Path(__file__).with_name(name)) for name in ("papers_step.py", "killed.py"))
STEPS, EVERY, KILLED = 5, 2, 4  # the step in which ranks are killed


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("original") / "model"
    convert_original(PAPER / "model", folder)
    return str(folder)


@pytest.mark.parametrize("world", [1, 2])
def test_step_has_loss_and_gradient_norms_of_published_code(converted, tmp_path, world):
    """In the original, one process took the step; two of ours have half of its pairs each."""
    out = tmp_path / "norms.json"
    ended = launch([WORKER, converted, str(PAPER / "images"), str(PAPER / "step.json"), str(out)], world)
    assert ended.status == [0] * world, ended.output[-4000:]
    ours = json.loads(out.read_text())
    assert ours["loss"] == pytest.approx(STEP["loss"], rel=5e-6)
    assert ours["gradient_norm"] == pytest.approx(STEP["gradient_norm"], rel=5e-6)
    theirs = STEP["gradient_norm_by_parameter"]
    assert ours["gradient_norm_by_parameter"].keys() == theirs.keys()
    # Of one parameter, roundings cancel less than of all: on two processes without AVX, one is more than 5e-6 off.
    for name, norm in ours["gradient_norm_by_parameter"].items():
        assert norm == pytest.approx(theirs[name], rel=1e-5), name


def test_killed_run_of_published_variant_matches_uninterrupted_run(tmp_path):
    """Start from the original checkpoint on the demo's shards, on two processes, in batches of one modality."""
    names = ("Scene-T2I", "Scene-CLS")
    convert({str(tmp_path / "data" / name): TrainingPairs(name, 0, 40) for name in names}, options={}, shards=2)
    recipe = [
        *("pipeline/recipes/llave_2b.yaml", "variant=paper", "precision=fp32"),
        *(f"model.path={PAPER / 'model'}", f"data.url={tmp_path / 'data'}", "data.datasets=[Scene-T2I, Scene-CLS]"),
        *("data.cap=30", "data.lanes=4", "data.block_samples=8", "data.window_blocks=2", "data.workers=0"),
        *("batch.global_batch=8", "batch.sub_batch=4", "batch.chunk_tokens=2000", "batch.kept_chunks=1"),
        *(f"steps={STEPS}", f"checkpoint.every={EVERY}", f"timeout_minutes={HANG_MINUTES}"),
    ]

    def train(run: Path) -> None:
        ended = launch(["-m", "pipeline.train", *recipe, f"run={run}"], world=2)
        assert ended.status == [0, 0], ended.output[-4000:]

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    train(undisturbed)
    ended = launch([KILLED_WORKER, str(KILLED), *recipe, f"run={killed}"], world=2)
    assert ended.status == [-signal.SIGKILL] * 2, ended.output[-4000:]
    assert (killed / "checkpoints/latest").read_text() == f"step-{EVERY:08d}\n"
    train(killed)
    assert (killed / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    ours, theirs = (load_file(run / "export/model.safetensors") for run in (killed, undisturbed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    config = json.loads((killed / "export/config.json").read_text())
    assert (config["mark_reading"], config["image_reading"]) == ("published", "as_stored")
