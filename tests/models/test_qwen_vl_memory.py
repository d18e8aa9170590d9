"""The memory plan of Qwen-VL, compared with what tensors take on the CPU. tests/cuda_trace/memory.py has GPUs."""

from typing import Any

import pytest
import torch
from memory_shapes import LiveBytes, measured_saved, qwen_chunk, qwen_config
from qwen_sizes import SIZES, fields_of

from pipeline.config import load_recipe
from pipeline.models.checkpointing import checkpoint_layers
from pipeline.models.memory import Execution
from pipeline.models.qwen_vl.checks import VERSIONS
from pipeline.models.qwen_vl.memory import chunk_memory
from pipeline.models.qwen_vl.model import FrozenQwenTower, QwenVL, TowerlessQwenVL
from pipeline.models.registry import training_of
from pipeline.training.engine import freeze
from pipeline.training.memory import Plan, groups_of

PLAIN = Execution(4, fused=False, padded=True)
CHECKPOINTING = Execution(4, fused=False, padded=True, checkpointing=True)


def config(kind: str) -> Any:
    return QwenVL.config_for(qwen_config(kind), "sdpa", "sdpa")


@pytest.mark.parametrize("how", [PLAIN, CHECKPOINTING], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", VERSIONS)
def test_chunk_memory_matches_plan(kind, how):
    model = QwenVL(config(kind))
    packed, tokens = qwen_chunk(model.config)
    planned = chunk_memory(model.config, tokens, how, tower_trained=True)
    if how.checkpointing:
        checkpoint_layers(model)
    else:
        assert planned.graph == pytest.approx(measured_saved(model, packed, None), rel=0.02)
    with torch.no_grad(), LiveBytes() as live:
        model(packed, True)
    assert planned.forward == pytest.approx(live.peak, rel=0.03)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # gradients are counted separately
    with LiveBytes() as live:
        rows = model(packed, True)
        if how.checkpointing:
            assert planned.graph == pytest.approx(live.now, rel=0.15)
        rows.sum().backward()
    assert planned.graph + planned.backward == pytest.approx(live.peak, rel=0.2)


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize("kind", VERSIONS)
def test_frozen_tower_keeps_only_its_states(kind, video):
    tower, model = FrozenQwenTower(config(kind)).requires_grad_(False), TowerlessQwenVL(config(kind))
    packed, tokens = qwen_chunk(model.config, video=video)
    planned = chunk_memory(model.config, tokens, PLAIN, tower_trained=False, videos=video)
    with LiveBytes() as live:
        features = tower.features_of(None, packed)
    assert planned.features == features.nbytes
    assert planned.forward == pytest.approx(live.peak, rel=0.03)
    assert planned.graph == pytest.approx(measured_saved(model, packed, features), rel=0.03)
    sent = packed.input_ids.nbytes + packed.position_ids.nbytes + packed.tiles.nbytes
    assert planned.sent == sent


def test_tower_in_passes_needs_less():
    shape = config("qwen3_vl")
    packed, tokens = qwen_chunk(shape)
    tower = FrozenQwenTower(shape).requires_grad_(False)
    whole, part = (
        chunk_memory(shape, tokens, PLAIN, tower_trained=False, patches_at_once=count) for count in (None, 256)
    )
    tower.patches_at_once = 256
    with LiveBytes() as live:
        tower.features_of(None, packed)
    assert live.peak < 1.02 * part.forward < 0.8 * whole.forward


def test_meta_device_model_matches_trained_model(tmp_path):
    recipe = load_recipe("demo_qwen.yaml", [])
    family = training_of(recipe)
    family.build(recipe.model, ["a red star"], 0, tmp_path)
    trains = load_recipe("demo_qwen.yaml", ["model.architecture=null", f"model.path={tmp_path}"])
    loaded, memory = family.load(trains, str(tmp_path), "sdpa"), family.memory(trains, videos=False)
    assert {p.device.type for p in memory.model.parameters()} == {"meta"}
    freeze(loaded, trains)
    assert Plan.of(trains, 2, videos=False).groups == groups_of(loaded)
    assert memory.frozen is None


def test_plan_of_a_published_size_has_its_parameters():
    """Adapters in the language model alone: their number follows from the sizes, the tower is outside the engine."""
    size = "Qwen2.5-VL-3B"
    fields = ["model.path=null", f"model.architecture={fields_of(size)}", "variant=lora"]
    plan = Plan.of(load_recipe("qwen3_vl_8b.yaml", fields), 1, videos=False)
    (hidden, layers, heads, key_value_heads, mlp, _), published = SIZES[size][2:4]
    keys = key_value_heads * (hidden // heads)
    sides = 2 * (hidden + hidden) + 2 * (hidden + keys) + 3 * (hidden + mlp)  # of q, o; k, v; gate, up, down
    trained = sum(group.parameters for group in plan.groups if group.trained)
    assert trained == 32 * layers * sides
    assert sum(group.parameters for group in plan.groups) - trained == published
    outside = [group for group in plan.groups if not group.in_engine]
    assert [group.name for group in outside] == ["visual"]
