"""Under ZeRO-3 every rank reads only its own part of the weights, for all naming schemes."""

import json
import shutil
from pathlib import Path

import pytest
from launch import launch
from safetensors.torch import load_file, save_file

WORKER = str(Path(__file__).with_name("partitions.py"))
CONFIG = "ds_configs/zero3.json"


def stored_as(model: str, folder: Path, rename) -> Path:
    """Save the model in two files with renamed weights; omit weights that are renamed to None."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    renamed = {rename(name): weight for name, weight in weights.items() if rename(name)}
    names = sorted(renamed)
    for number, some in enumerate((names[::2], names[1::2])):
        save_file({name: renamed[name] for name in some}, folder / f"model-{number}.safetensors")
    return folder


def of_the_hub(name: str) -> str:
    """Return the name as in checkpoints of llava-hf."""
    return name.replace("language_model.", "language_model.model.").replace(
        "vision_tower.", "vision_tower.vision_model."
    )


@pytest.mark.parametrize("rename", [str, of_the_hub, lambda name: f"model.{of_the_hub(name)}"])
def test_each_rank_reads_only_its_part_of_the_weights(tiny_model, tmp_path, rename):
    folder = stored_as(tiny_model, tmp_path / "model", rename)
    ended = launch([WORKER, str(folder), CONFIG, tiny_model], 3)
    assert ended.status == [0] * 3, ended.output[-4000:]
    results = [json.loads(line) for line in ended.output.splitlines() if line.startswith("{")]
    assert [result["differing"] for result in results] == [[], [], []]
    # Each rank reads the first and the last row of its part completely.
    assert 1 <= sum(result["read"] for result in results) < 1.1
    assert max(result["read"] for result in results) < 0.4


def test_rotary_frequencies_of_a_trained_tower_stay_in_float32(tiny_qwen, tmp_path):
    """Also a checkpoint of the hub is read: its names begin with `model.`, and it may have an LM head."""
    folder = stored_as(tiny_qwen, tmp_path / "model", lambda name: f"model.{name}")
    head = {"lm_head.weight": load_file(Path(tiny_qwen, "model.safetensors"))["language_model.embed_tokens.weight"]}
    save_file(head, folder / "model-2.safetensors")
    ended = launch([WORKER, str(folder), CONFIG, tiny_qwen, "model.train.vision_tower=true"], 1)
    assert ended.status == [0], ended.output[-4000:]
    (result,) = [json.loads(line) for line in ended.output.splitlines() if line.startswith("{")]
    assert result == {"differing": [], "read": 1}


def without_a_layer(name: str) -> str | None:
    return None if "layers.1.mlp" in name else name


def test_unusable_weights_are_refused(tiny_model, tmp_path):
    lacking = stored_as(tiny_model, tmp_path / "lacking", without_a_layer)
    misshapen = stored_as(tiny_model, tmp_path / "misshapen", str)
    weights = load_file(misshapen / "model-0.safetensors")
    save_file({name: weight[:-1] for name, weight in weights.items()}, misshapen / "model-0.safetensors")
    damaged = stored_as(tiny_model, tmp_path / "damaged", str)
    weights = load_file(damaged / "model-1.safetensors")
    next(iter(weights.values())).view(-1)[-1] = float("nan")
    save_file(weights, damaged / "model-1.safetensors")
    empty = stored_as(tiny_model, tmp_path / "empty", str)
    for file in empty.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    for folder, reason in (
        (lacking, "lacks 3 of the model's weights, language_model.layers.1.mlp.down_proj.weight the first"),
        (misshapen, "image_newline has shape [47], but its config needs [48]"),
        (damaged, "has NaN or infinite weights"),
        (empty, "has no .safetensors files"),
    ):
        ended = launch([WORKER, str(folder), CONFIG, tiny_model], 1)
        assert reason in ended.output
