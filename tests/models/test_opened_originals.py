"""Original checkpoints open like converted folders: a copy is converted once, into the cache folder."""

import json
import resource
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from limits import HANG_SECONDS
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline import home
from pipeline.config import EvaluationRun
from pipeline.data.sample import Item
from pipeline.embedding.embedder import Embedder
from pipeline.errors import PipelineError
from pipeline.evaluation.encoders import load_encoder
from pipeline.models import converted
from pipeline.models.converted import converted_once
from pipeline.models.llave import weights
from pipeline.models.llave.weights import convert_original
from pipeline.models.merging import Part, merge
from pipeline.models.registry import family_of
from pipeline.storage import lock

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(home.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def original(tmp_path) -> Path:
    return shutil.copytree(GOLDEN, tmp_path / "LLaVE-tiny")


def copies(cache: Path) -> list[Path]:
    """Return all that is in the cache, also what a failure left there."""
    return sorted(cache.iterdir()) if cache.exists() else []


def written(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def begun(name: str, make) -> Future:
    """Call `converted_once` in a thread."""
    return ThreadPoolExecutor(1).submit(converted_once, name, 0, make)


def items() -> list:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8))
    return ["a red star", {"text": "<image>\nWhat is it?", "images": [picture]}, {"video": [picture] * 3}]


def test_original_embeds_as_its_converted_folder_and_is_converted_once(original, cache, tmp_path):
    convert_original(original, tmp_path / "converted")
    expected = Embedder.load(tmp_path / "converted", CPU).embed(items())
    assert not cache.exists()
    assert torch.equal(Embedder.load(original, CPU).embed(items()), expected)
    (copy,) = copies(cache)
    assert copy.name.startswith("LLaVE-tiny-")
    before = written(copy)
    assert torch.equal(Embedder.load(original, CPU).embed(items()), expected)
    encoder = load_encoder(str(original), EvaluationRun(), CPU)
    rows = encoder.embed([encoder.prepare(Item("a red star"))])
    torch.testing.assert_close(rows, expected[:1], rtol=0, atol=1e-6)  # alone in its batch
    assert copies(cache) == [copy] and written(copy) == before

    file = original / "model.safetensors"
    data = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    place = begin + json.loads(data[8:begin])["model.norm.weight"]["data_offsets"][0]
    data[place : place + 4] = np.float32(1.5).tobytes()
    file.write_bytes(data)  # of the same size
    assert not torch.equal(Embedder.load(original, CPU).embed(items()), expected)
    assert len(copies(cache)) == 2


def test_dimension_and_items_need_no_weights(original, cache, tmp_path):
    convert_original(original, tmp_path / "converted")
    (original / "model.safetensors").unlink()
    family = family_of(str(original))
    assert family.dimension(str(original)) == family.dimension(str(tmp_path / "converted")) == 64
    ours, theirs = (family.reader(str(folder), 512, 4) for folder in (original, tmp_path / "converted"))
    fields = ("tiling", "image_token_id", "video_token_id", "as_stored", "published", "video_frames", "max_tokens")
    assert [getattr(ours, name) for name in fields] == [getattr(theirs, name) for name in fields]
    text = "<image>\n<|im_end|> ça <video> va"
    assert ours.tokenizer(text)["input_ids"] == theirs.tokenizer(text)["input_ids"]
    assert not cache.exists()


def test_hub_name_and_its_snapshot_have_one_copy(original, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, commit = tmp_path / "hub/models--lab--LLaVE-tiny", "0123456789" * 4
    shutil.copytree(original, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    rows = Embedder.load("lab/LLaVE-tiny", CPU).embed(["a red star"])
    assert [copy.name for copy in copies(cache)] == ["LLaVE-tiny-0123456789012345"]
    (repository / "snapshots" / commit / "README.md").write_text("downloaded later")
    encoder = load_encoder("lab/LLaVE-tiny", EvaluationRun(), CPU)
    assert torch.equal(encoder.embed([encoder.prepare(Item("a red star"))]), rows)
    assert len(copies(cache)) == 1


@pytest.mark.parametrize(
    "folders",
    [
        ("a--b/run1/snapshots/checkpoint-000001000", "c/run1/snapshots/checkpoint-000001500"),
        ("models--a--run1/snapshots/checkpoint-000001000", "models--b--run1/snapshots/checkpoint-000001500"),
        (f"a/run1/snapshots/{0:040x}", f"b/run1/snapshots/{1:040x}"),
    ],
)
def test_local_folders_like_those_of_the_hub_have_copies_of_their_own(original, cache, tmp_path, folders):
    paths = [shutil.copytree(original, tmp_path / folder) for folder in folders]
    one, two = (weights.opened(str(path)) for path in paths)
    assert one != two
    (paths[0] / "model.safetensors").touch()  # as if it were written again
    assert weights.opened(str(paths[0])) not in (one, two)


def test_merging_originals_merges_their_copies(original, cache, tmp_path):
    convert_original(original, tmp_path / "converted")
    other = shutil.copytree(original, tmp_path / "other")
    tensors, name = load_file(original / "model.safetensors"), "model.norm.weight"
    save_file(tensors | {name: tensors[name] + 1}, other / "model.safetensors", {"format": "pt"})
    merge([Part(str(original)), Part(str(other))], tmp_path / "merged")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "converted"))
    expected["language_model.norm.weight"] += 0.5
    assert found.keys() == expected.keys() and all(torch.allclose(found[name], expected[name]) for name in found)
    assert len(copies(cache)) == 2


def test_cache_that_cannot_be_written_is_named_with_its_variable(original, tmp_path, monkeypatch):
    (tmp_path / "file").touch()  # not even root can create a folder in it
    monkeypatch.setenv(home.CACHE, str(tmp_path / "file/cache"))
    with pytest.raises(PipelineError, match="file/cache, which cannot be written: set EMBEDDING_PIPELINE_CACHE to"):
        Embedder.load(original, CPU)
    with pytest.raises(
        PipelineError, match=r"has \d+\.\d GB of free space: set EMBEDDING_PIPELINE_CACHE to .* 10{9}\."
    ):
        monkeypatch.setenv(home.CACHE, str(tmp_path / "cache"))
        converted_once("huge", 10**18, pytest.fail)
    assert copies(tmp_path / "cache") == []


def test_copy_in_a_read_only_cache_is_used(original, cache, monkeypatch):
    expected = Embedder.load(original, CPU).embed(["a red star"])
    monkeypatch.setattr(home, "is_writable", lambda folder: False)
    assert torch.equal(Embedder.load(original, CPU).embed(["a red star"]), expected)


def test_full_disk_leaves_nothing_in_the_cache(original, cache):
    """A file-size limit simulates the full disk: the operating system refuses writes beyond it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(PipelineError, match=f"{cache}/LLaVE-tiny-[0-9a-f]+ cannot be written"):
            Embedder.load(original, CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert copies(cache) == []
    Embedder.load(original, CPU)
    assert len(copies(cache)) == 1


@pytest.mark.parametrize("seen", [True, False])
def test_process_waits_for_another_that_converts(cache, monkeypatch, capsys, seen):
    """seen: whether the other's lock is there when this process looks, or only when it has written its own."""
    monkeypatch.setattr(converted, "_POLL_SECONDS", 0.01)
    if not seen:
        monkeypatch.setattr(lock, "in_use", lambda folder: "")
    with lock.held([str(cache)]):
        waiting = begun("model", pytest.fail)
        with pytest.raises(TimeoutError):
            waiting.result(0.5)
        (cache / "model").mkdir()
        assert waiting.result(HANG_SECONDS) == cache / "model"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"waiting for {cache}/model: {cache} is in use by process") and "end it" not in line
    monkeypatch.setattr(converted, "_MOST_HOURS", 1e-5)
    with lock.held([str(cache)]), pytest.raises(PipelineError, match=r"waited .* for .*other: .* is in use by process"):
        converted_once("other", 0, pytest.fail)


@pytest.mark.parametrize(("rank", "local"), [("1", "1"), ("2", "0")])
def test_other_ranks_leave_the_conversion_to_the_first(rank, local, cache, monkeypatch):
    """They convert only if no other process has begun after some time, as on a node with a disk of its own."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    least = converted._seconds_for_others()
    assert least >= (20 if local == "1" else 5)
    monkeypatch.setattr(converted, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(converted, "_seconds_for_others", lambda: 0.3)
    made = []
    waiting = begun("model", lambda folder: folder.mkdir() or made.append(1))
    with pytest.raises(TimeoutError):
        waiting.result(0.1)
    assert not cache.exists()
    assert waiting.result(HANG_SECONDS).is_dir() and made == [1]


def test_leftovers_of_killed_conversions_are_removed(original, cache):
    (cache / ".LLaVE-7B-0123.elsewhere-7.partial").mkdir(parents=True)
    Embedder.load(original, CPU)
    assert len(copies(cache)) == 1


def test_leftovers_are_removed_before_space_is_required(cache, monkeypatch):
    leftover = cache / ".LLaVE-7B-0123.elsewhere-7.partial"
    leftover.mkdir(parents=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0 if leftover.exists() else 100))
    assert converted_once("model", 100, Path.mkdir).is_dir()
    with pytest.raises(PipelineError, match=r"other must be converted once, .* free space"):
        converted_once("other", 101, Path.mkdir)


def test_copy_that_is_ready_needs_no_space(cache, monkeypatch):
    """Another process has finished it just before this one gets the lock."""
    monkeypatch.setattr(home, "is_writable", lambda folder: not (folder / "model").mkdir(parents=True))
    assert converted_once("model", 10**18, pytest.fail) == cache / "model"


def test_copy_that_nfs_showed_late_stays(cache):
    """Its readers have opened it."""

    def convert(folder: Path) -> None:
        for each in (folder, cache / "model"):
            each.mkdir()
            (each / "config.json").write_text(each.name)

    copy = converted_once("model", 0, convert)
    assert (copy / "config.json").read_text() == "model" and copies(cache) == [copy]


def test_cache_folder_is_in_that_of_hugging_face_unless_named():
    assert home.cache_folder({home.CACHE: "/scratch/copies", "HF_HOME": "/scratch/hf"}) == Path("/scratch/copies")
    assert home.cache_folder({"HF_HOME": "/scratch/hf"}) == Path("/scratch/hf/embedding-pipeline")
    assert home.cache_folder({}) == Path.home() / ".cache/huggingface/embedding-pipeline"


def test_damaged_original_leaves_nothing_in_the_cache(original, cache):
    (original / "config.json").write_text(
        json.dumps(json.loads((original / "config.json").read_text()) | {"intermediate_size": 7})
    )
    with pytest.raises(PipelineError, match=r"has shape .*, but its config needs"):
        Embedder.load(original, CPU)
    assert copies(cache) == []
    assert weights.opened(str(shutil.copytree(GOLDEN, original.parent / "whole"))).parent == cache
