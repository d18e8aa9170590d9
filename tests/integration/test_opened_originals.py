"""Original checkpoints on the command line: killed while converting, and opened by several processes at once."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from launch import fork, launch, wait
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline import home
from pipeline.evaluation.report import Report
from pipeline.models.llave.weights import convert_original
from pipeline.storage import lock

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def original(tmp_path) -> Path:
    """Write the golden checkpoint in two files."""
    folder = shutil.copytree(GOLDEN, tmp_path / "original", ignore=shutil.ignore_patterns("model.safetensors"))
    tensors, weight_map = load_file(GOLDEN / "model.safetensors"), {}
    for number in (1, 2):
        name = f"model-{number:05d}-of-00002.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number - 1 :: 2]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def captions(tmp_path) -> Path:
    folder = tmp_path / "captions"
    folder.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "captions.json").write_text(json.dumps({f"{number}.png": f"picture {number}" for number in range(4)}))
    return folder


def test_several_programs_open_an_original_that_a_killed_one_half_converted(original, captions, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv(home.CACHE, str(cache))
    texts = tmp_path / "texts.txt"
    texts.write_text("a red star\n")
    script = str(Path(__file__).with_name("killed_converting.py"))
    embed = [str(original), "--texts", str(texts), "--out"]
    killed = launch([script, *embed, str(tmp_path / "killed")], world=1)
    assert killed.status == [-signal.SIGKILL], killed.output[-4000:]
    (partial,) = cache.glob("*.partial")
    assert [file.name for file in partial.iterdir()] == ["model-00001-of-00002.safetensors"]

    def evaluate(model: Path, name: str) -> list[str]:
        return ["-m", "pipeline.evaluate", str(model), f"text-image={captions}", f"out={tmp_path / name}"]

    running = [fork(evaluate(original, name), world) for name, world in (("one", 1), ("two", 2))]
    running.append(fork(["-m", "pipeline.embed", *embed, str(tmp_path / "embedded")], world=1))
    ended = [wait(ranks) for ranks in running]
    assert not any(status for each in ended for status in each.status), "".join(each.output for each in ended)
    assert "".join(each.output for each in ended).count("converting once, to") == 1
    (copy,) = (folder for folder in cache.iterdir() if folder.name != lock.FOLDER)

    convert_original(original, tmp_path / "converted")
    files = {file.name: file.read_bytes() for file in copy.iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "converted").iterdir()}
    again = launch(evaluate(tmp_path / "converted", "three"), world=1)
    assert again.status == [0], again.output[-4000:]
    results = [Report.read(tmp_path / name).results for name in ("one", "two", "three")]
    assert results[0] == results[1] == results[2]
