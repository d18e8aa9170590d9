"""LLM2CLIP's stages, run by their commands on two processes: killed, resumed, exported, evaluated."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from closeness import assert_close_in_norm
from comparison import assert_results_alike
from launch import launch
from limits import HANG_MINUTES
from safetensors.torch import load_file, save_file

from pipeline import export
from pipeline.config import EvaluationRun, load_recipe
from pipeline.convert.demo import TrainingPairs
from pipeline.convert.sharding import convert
from pipeline.data.source import Source
from pipeline.demo import captioned
from pipeline.embedding.dataset import open_datasets
from pipeline.embedding.embed_shards import embed_datasets
from pipeline.errors import PipelineError
from pipeline.evaluation import sets
from pipeline.evaluation.encode import embed_collection
from pipeline.evaluation.encoders import load_encoder
from pipeline.evaluation.measure import measure
from pipeline.evaluation.report import Report
from pipeline.evaluation.store import MemoryStore
from pipeline.models.registry import training
from pipeline.models.text_encoder import model as decoder
from pipeline.training import checkpoint
from pipeline.training.conditions import check as check_conditions
from pipeline.training.conditions import conditions_of_run

LLAMA3 = Path(__file__).parents[1] / "papers/llm2clip/text_encoder"
CPU = torch.device("cpu")
STEPS, EVERY, KILLED = 6, 2, 6  # the step in which ranks are killed
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 400}
VISION = SIZES | {"image_size": 48, "patch_size": 16, "projection_dim": 16}
TOKENS = 128  # maximum length of a text; long captions are truncated
SIGMAS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Create a few pairs of the demo data, and the evaluation set of short captions."""
    folder = tmp_path_factory.mktemp("data")
    convert({str(folder / name): TrainingPairs(name, 0, 48) for name in ("images", "texts")}, options={}, shards=2)
    for path, content in captioned.evaluation_files(0, 8):
        if path.startswith("short/"):
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)
    return folder


def evaluation_set(data: Path) -> str:
    return f"text-image={data / 'short'}"


def fields(data: Path) -> list[str]:
    return [
        f"data.url={data}",
        "data.lanes=4",
        "data.block_samples=8",
        "data.window_blocks=2",
        "batch.global_batch=16",
        "batch.chunk_tokens=200",
        "batch.kept_chunks=1",
        f"steps={STEPS}",
        f"checkpoint.every={EVERY}",
        f"model.max_tokens={TOKENS}",
        f"timeout_minutes={HANG_MINUTES}",
    ]


@pytest.fixture(scope="module")
def caption_recipe(data, tmp_path_factory) -> list[str]:
    """Return a recipe with adapters in a Llama of random weights, and with an instruction."""
    model = tmp_path_factory.mktemp("models") / "llama"
    pairs = [captioned.training_pair("texts", 0, number) for number in range(50)]
    decoder.build(TEXT, [text for pair in pairs for text in (pair.query.text, *pair.texts)], 0, model)
    return [
        "pipeline/recipes/demo_caption.yaml",
        *fields(data),
        "data.datasets=[images, texts]",
        f"model.path={model}",
        "model.instruction='what a caption shows: '",
        "model.train.lora.rank=2",
        "evaluation=null",
    ]


@pytest.fixture(scope="module")
def caption_run(caption_recipe, tmp_path_factory) -> Path:
    return finished(caption_recipe, tmp_path_factory.mktemp("runs") / "caption")


@pytest.fixture(scope="module")
def vectors(caption_run, data, tmp_path_factory) -> Path:
    return embedded(caption_run / "export", data, tmp_path_factory.mktemp("vectors") / "fp16", "fp16")


@pytest.fixture(scope="module")
def vision_recipe(caption_run, data, vectors) -> list[str]:
    return [
        "pipeline/recipes/demo_llm2clip.yaml",
        *fields(data),
        "data.datasets=[images]",
        f"data.text_embeddings={vectors}",
        f"model.architecture.vision={json.dumps(VISION)}",
        f"model.text_encoder={caption_run / 'export'}",
        f"evaluation.urls=[{evaluation_set(data)}]",
    ]


@pytest.fixture(scope="module")
def vision_run(vision_recipe, tmp_path_factory) -> Path:
    return finished(vision_recipe, tmp_path_factory.mktemp("runs") / "vision")


@pytest.fixture(scope="module")
def vision_paper_recipe(vision_recipe) -> list[str]:
    """Return the published values of stage 2 for the same small data and model."""
    kept = [field for field in vision_recipe[1:] if not field.startswith("evaluation.")]
    return ["pipeline/recipes/llm2clip_vision.yaml", "variant=paper", *kept, "model.path=null", "data.workers=1"]


@pytest.fixture(scope="module")
def vision_paper_run(vision_paper_recipe, tmp_path_factory) -> Path:
    return finished(vision_paper_recipe, tmp_path_factory.mktemp("runs") / "vision_paper")


@pytest.fixture(scope="module")
def caption_paper_recipe(caption_recipe) -> list[str]:
    """Return the published values of stage 1 for the same small data, and a tiny Llama with Llama-3's tokenizer."""
    dropped = ("model.path", "model.instruction", "model.train.lora")
    kept = [field for field in caption_recipe[1:] if not field.startswith(dropped)]
    asked = {"images": {"shorter": "Find the long caption; ", "longer": "Find the short caption; "}, "texts": ""}
    own = [f"model.path={LLAMA3}", f"model.query_instructions={json.dumps(asked)}", "precision=fp32"]
    return ["pipeline/recipes/llm2clip_caption.yaml", "variant=paper", *kept, *own]


@pytest.fixture(scope="module")
def caption_paper_run(caption_paper_recipe, tmp_path_factory) -> Path:
    return finished(caption_paper_recipe, tmp_path_factory.mktemp("runs") / "caption_paper")


def finished(recipe: list[str], run: Path) -> Path:
    ended = launch(["-m", "pipeline.train", *recipe, f"run={run}"], world=2)
    assert ended.status == [0, 0], ended.output[-4000:]
    return run


def embedded(encoder: Path, data: Path, out: Path, stored: str) -> Path:
    """Embed the dataset `images`; return the folder of its vectors."""
    (out / "images").mkdir(parents=True)
    datasets = open_datasets([str(data / "images")], str(out / "images"))
    model = load_encoder(str(encoder), EvaluationRun(max_tokens=TOKENS), CPU)
    embed_datasets(model, datasets, stored, CPU, overwrite=False)
    return out


@pytest.mark.parametrize("stage", ["caption", "caption_paper", "vision", "vision_paper"])
def test_killed_stage_matches_uninterrupted_run(stage, request, tmp_path):
    recipe, undisturbed = (request.getfixturevalue(f"{stage}_{what}") for what in ("recipe", "run"))
    recipe = [*recipe, "evaluation=null"]
    run, worker = tmp_path / "killed", str(Path(__file__).with_name("killed.py"))
    ended = launch([worker, str(KILLED), *recipe, f"run={run}"], world=2)
    assert ended.status == [-signal.SIGKILL] * 2, ended.output[-4000:]
    before = KILLED - EVERY
    assert (run / "checkpoints/latest").read_text() == f"step-{before:08d}\n"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == KILLED - 1
    times = (run / "speed.jsonl").read_text().splitlines()[:before]

    finished(recipe, run)
    assert (run / "speed.jsonl").read_text().splitlines()[:before] == times  # it continued instead of restarting
    assert len((run / "metrics.jsonl").read_text().splitlines()) == STEPS
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    ours, theirs = (weights(folder / "export") for folder in (run, undisturbed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.relative_to(folder)} {name}": weight
        for file in folder.rglob("*.safetensors")
        for name, weight in load_file(file).items()
    }


@pytest.mark.parametrize("stored", ["fp16", "bf16"])
def test_stored_embeddings_give_losses_of_live_text_encoder(
    stored, vision_run, vision_recipe, caption_run, data, vectors, tmp_path
):
    """Check that stored vectors change the losses only by their rounding.

    Each number has an independent error of at most 2^-11 (bf16: 2^-8) of its value. The first loss then has a normal
    error, and stored.py bounds its standard deviation; each further step may add as much through the parameters.
    A live encoder whose vectors are rounded in the same way must give the same losses as the stored vectors.
    """
    if stored == "bf16":
        vectors = embedded(caption_run / "export", data, tmp_path / stored, stored)
    out, start = tmp_path / "out.json", f"model.path={vision_run / 'export'}"
    worker = str(Path(__file__).with_name("stored.py"))
    arguments = [str(out), str(vectors), stored, *vision_recipe, start, f"run={tmp_path / 'run'}"]
    ended = launch([worker, *arguments], world=1)
    assert ended.status == [0], ended.output[-4000:]
    result = json.loads(out.read_text())
    cached, live, rounded = (torch.tensor(result[name]) for name in ("cached", "live", "rounded"))
    torch.testing.assert_close(cached, rounded, rtol=1e-5, atol=0)
    steps = torch.arange(1, len(live) + 1)
    assert (abs(cached - live) < SIGMAS * result["deviation"] * steps).all()
    assert SIGMAS * result["deviation"] < 0.01  # the loss is about 2.8
    assert not torch.equal(cached, live)


def test_resume_with_changed_text_encoder_or_embeddings_is_refused(
    vision_run, vision_recipe, caption_run, data, vectors, tmp_path
):
    recipe, source = None, None

    def check(*overrides: str) -> None:
        nonlocal recipe, source
        recipe = load_recipe(vision_recipe[0], [*vision_recipe[1:], f"run={vision_run}", *overrides])
        source = Source.open(recipe.data)
        conditions = conditions_of_run(recipe, source, {"stage": 1})
        check_conditions(checkpoint.candidates(vision_run / "checkpoints")[0], conditions)

    check()
    others = embedded(caption_run / "export", data, tmp_path / "vectors", "bf16")
    with pytest.raises(PipelineError, match=r"cannot resume from .*: the data's fingerprint was"):
        check(f"data.text_embeddings={others}")
    with pytest.raises(PipelineError, match=r"cannot resume from .*: the data's fingerprint was"):
        check("data.text_embeddings=null")
    weights = caption_run / "export/model.safetensors"
    kept = weights.rename(weights.with_name("kept"))
    changed = load_file(kept)
    changed["norm.weight"] = changed["norm.weight"] + 1
    save_file(changed, weights, metadata={"format": "pt"})
    try:
        with pytest.raises(PipelineError, match=r"cannot resume from .*: the text encoder's fingerprint was"):
            check()
        with pytest.raises(PipelineError, match=r"data\.text_embeddings were made by .* with weights="):
            training("llm2clip").check_data(recipe, source)  # a new run does not start with them, either
    finally:
        kept.rename(weights)


def test_zero_stage_3_is_refused(vision_recipe, tmp_path):
    zero3 = "deepspeed=ds_configs/zero3.json"
    ended = launch(["-m", "pipeline.train", *vision_recipe, f"run={tmp_path}", zero3], world=1)
    assert ended.status == [2]
    assert "error: this family trains under ZeRO 0, 1, 2, not 3: set deepspeed=" in ended.output


def test_embeddings_with_another_max_tokens_are_refused(vision_recipe):
    recipe = load_recipe(vision_recipe[0], [*vision_recipe[1:], f"model.max_tokens={TOKENS + 1}"])
    with pytest.raises(PipelineError, match=f"with max_tokens={TOKENS}, which is {TOKENS + 1} for"):
        training("llm2clip").check_data(recipe, Source.open(recipe.data))


@pytest.mark.parametrize("stage", ["caption", "vision"])
def test_bf16_losses_are_close_to_fp32(stage, request, tmp_path):
    """Use ZeRO-1, which keeps fp32 gradients in addition to bf16 ones. A step's last chunk contains only texts."""
    recipe, expected = request.getfixturevalue(f"{stage}_recipe"), request.getfixturevalue(f"{stage}_run")
    fields = ["precision=bf16", "deepspeed=ds_configs/zero1.json", "evaluation=null"]
    run = finished([*recipe, *fields], tmp_path / "bf16")
    ours, theirs = (
        torch.tensor([json.loads(line)["loss"] for line in (each / "metrics.jsonl").read_text().splitlines()])
        for each in (run, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0)
    assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("stage", ["caption", "vision"])
def test_exported_checkpoint_matches_export_of_the_run(stage, request, tmp_path, monkeypatch, capsys):
    run = request.getfixturevalue(f"{stage}_run")
    monkeypatch.setattr(sys, "argv", ["export", str(run), str(tmp_path / "out")])
    export.main()
    assert f"step-{STEPS:08d} of" in capsys.readouterr().out
    ours, theirs = weights(tmp_path / "out"), weights(run / "export")
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if "lora" in name]
    for name, weight in theirs.items():  # one process merges the adapters here
        assert_close_in_norm(ours[name], weight, operations=64)
    files = {path.relative_to(folder) for folder in (run / "export",) for path in folder.rglob("*")}
    assert files == {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")}


def test_exported_model_matches_evaluation_during_training(vision_run, data):
    """Training uses the recipe's text encoder, evaluation that of the export, with other chunks."""
    encoder = load_encoder(str(vision_run / "export"), EvaluationRun(max_tokens=TOKENS), CPU)
    collection = sets.load([evaluation_set(data)], instructed=encoder.instructed)
    store = MemoryStore(len(collection.items), encoder.dimension)
    assert embed_collection(encoder, collection, store)
    report = measure("", collection, store.take)
    assert_results_alike(report.results, Report.read(vision_run / f"evaluation/step-{STEPS:08d}.json").results)
    assert len(collection.items) == 24
