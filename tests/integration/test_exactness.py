"""The step equals one process with one big batch: every ZeRO stage, world size, chunking and batch type."""

from pathlib import Path

import pytest
from comparison import assert_equal, zero_config
from launch import Rank, fork, launch, wait

# Language models: hidden size, heads, key-value heads, MLP size.
BACKBONES = {"0.5b": (896, 14, 2, 4864), "2b": (1536, 12, 2, 8960), "7b": (3584, 28, 4, 18_944)}
WORKER = str(Path(__file__).with_name("exactness.py"))


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> Path:
    """Return the folder for the results of one process, which several tests compare with."""
    return tmp_path_factory.mktemp("references")


@pytest.fixture(scope="module")
def tiny_models(tiny_model, tiny_qwens) -> str:
    return ",".join([tiny_model, *tiny_qwens.values()])


def begin(name: str, world: int, model: str, folder: Path, references: Path, *flags: str) -> list[Rank]:
    out = str(folder / f"{name}.out")
    return fork([WORKER, model, zero_config(name, folder), out, str(references), *flags], world)


def assert_exact(name: str, ranks: list[Rank], folder: Path) -> None:
    world, ended = len(ranks), wait(ranks)
    assert ended.status == [0] * world, ended.output[-4000:]
    assert_equal(folder / f"{name}.out", f"{name}, {world} processes")


@pytest.mark.parametrize(("stage", "flags"), [(0, ["few0"]), (1, ["few1"]), (2, ["few2"]), (3, [])])
def test_step_equals_one_process_with_whole_batch(stage, flags, tiny_models, references, tmp_path):
    assert_exact(f"zero{stage}", begin(f"zero{stage}", 2, tiny_models, tmp_path, references, *flags), tmp_path)


def test_chunked_step_of_one_process_equals_whole_batch(tiny_models, references, tmp_path):
    """Run two at a time, one per core."""
    begun = {name: begin(name, 1, tiny_models, tmp_path, references, "alone") for name in ("zero0", "zero3")}
    for name, ranks in begun.items():
        assert_exact(name, ranks, tmp_path)


@pytest.mark.parametrize("stage", [2, 3])
def test_step_with_offloaded_optimizer_equals_whole_batch(stage, tiny_model, references, tmp_path):
    name = f"zero{stage}_offload"
    assert_exact(name, begin(name, 2, tiny_model, tmp_path, references, "offloaded"), tmp_path)


def test_step_of_scaled_down_backbones_equals_whole_batch(make_model, references, tmp_path):
    """Use the recipes' shapes with fewer layers: widths / 16 (tower / 8), three layers, the same number of heads."""
    vision = {"hidden_size": 144, "intermediate_size": 538, "num_attention_heads": 16}
    vision |= {"num_hidden_layers": 3, "image_size": 24, "patch_size": 8}
    models = []
    for hidden, heads, groups, mlp in BACKBONES.values():
        text = {"hidden_size": hidden // 16, "intermediate_size": mlp // 16, "num_hidden_layers": 3}
        text |= {"num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": 320}
        models.append(make_model(vision, text))
    assert_exact("zero3", begin("zero3", 2, ",".join(models), tmp_path, references, "shaped"), tmp_path)


def test_zero3_without_dummy_tile_fails_on_rank_without_images(tiny_model, references, tmp_path):
    """Show that the guard is needed in the mixed batches above, where the second of two ranks has no image."""
    config = zero_config("zero3", tmp_path)
    for mix, works in (("images", True), ("mixed", False)):
        out = tmp_path / f"{mix}.json"
        ended = launch([WORKER, tiny_model, config, str(out), str(references), "no-guard", mix], 2)
        assert (ended.status == [0, 0]) == works, ended.output[-4000:]
        assert out.exists() == works
        assert "TypeError" not in ended.output
        assert "AttributeError" not in ended.output
