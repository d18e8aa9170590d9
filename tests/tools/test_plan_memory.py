import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from limits import HANG_SECONDS
from memory_shapes import LLAVE, LiveBytes, llave_chunk, llave_config, measured_saved
from PIL import Image as Picture
from transformers import LlavaOnevisionConfig

from pipeline.config import MiningRun, Recipe, load_recipe
from pipeline.data.tiles import Tiling
from pipeline.models.checkpointing import checkpoint_layers
from pipeline.models.family import ChunkMemory
from pipeline.models.llave.memory import chunk_memory, tokens_per_tile
from pipeline.models.llave.model import Llave, TowerlessLlave, normalised, tower_features
from pipeline.models.memory import Execution
from pipeline.models.registry import training_of
from pipeline.objectives.contrastive import loss
from pipeline.objectives.contrastive import memory as loss_memory
from pipeline.objectives.contrastive.config import ContrastiveSection
from pipeline.objectives.contrastive.loss import hardness_weighted_loss
from pipeline.training.engine import freeze
from pipeline.training.memory import Group, Plan, Stored, groups_of, state_bytes

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "pipeline/recipes/demo.yaml"


def plain(dtype: torch.dtype = torch.float32, checkpointing: bool = False) -> Execution:
    """Return how a CPU computes."""
    return Execution(dtype.itemsize, fused=False, padded=True, checkpointing=checkpointing)


def random_model(shape: LlavaOnevisionConfig, dtype: torch.dtype) -> Llave:
    model = Llave(shape).to(dtype)
    model.set_attn_implementation({"text_config": "packed_sdpa", "vision_config": "sdpa"})
    model.vision_tower.post_layernorm.requires_grad_(False)
    return model


def assert_forward(planned: ChunkMemory, live: LiveBytes, model: Llave, tokens: int, dtype: torch.dtype) -> None:
    """Compare the peak of a forward pass. On the CPU, unlike in the plan, SwiGLU's result replaces the gate."""
    replaced = tokens * model.config.text_config.intermediate_size * dtype.itemsize
    assert planned.forward - replaced < 1.05 * live.peak
    assert live.peak < 1.05 * planned.forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LLAVE)
def test_chunk_memory_matches_plan(name, dtype):
    model = random_model(LLAVE[name], dtype)
    packed, tokens, tiles = llave_chunk(LLAVE[name])
    planned = chunk_memory(model.config, tokens, tiles, plain(dtype), tower_trained=True)
    assert planned.graph == pytest.approx(measured_saved(model, packed, None), rel=0.05)
    with torch.no_grad(), LiveBytes() as live:
        model(packed, True)
    assert_forward(planned, live, model, tokens, dtype)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # gradients are counted separately
    with LiveBytes() as live:
        model(packed, True).sum().backward()
    # For a moment, a new gradient exists in addition to the accumulated one; the largest counts.
    assert planned.graph + planned.backward == pytest.approx(live.peak, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LLAVE)
def test_chunk_memory_with_activation_checkpointing_matches_plan(name, dtype):
    model = random_model(LLAVE[name], dtype)
    checkpoint_layers(model)
    packed, tokens, tiles = llave_chunk(LLAVE[name])
    without, planned = (
        chunk_memory(model.config, tokens, tiles, plain(dtype, checkpointing), tower_trained=True)
        for checkpointing in (False, True)
    )
    with torch.no_grad(), LiveBytes() as live:
        model(packed, True)
    assert_forward(planned, live, model, tokens, dtype)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live:
        embeddings = model(packed, True)
        assert planned.graph == pytest.approx(live.now, rel=0.15)
        embeddings.sum().backward()
    assert planned.graph + planned.backward == pytest.approx(live.peak, rel=0.15)
    assert planned.graph < without.graph / 5


@pytest.mark.parametrize("name", LLAVE)
def test_frozen_tower_keeps_only_its_features(name):
    whole, (packed, tokens, tiles) = random_model(LLAVE[name], torch.float32), llave_chunk(LLAVE[name])
    with torch.no_grad():
        features = tower_features(whole.vision_tower, normalised(packed.tiles, whole.device, whole.dtype))
    model = TowerlessLlave(LLAVE[name])
    model.set_attn_implementation({"text_config": "packed_sdpa"})
    planned = chunk_memory(LLAVE[name], tokens, tiles, plain(), tower_trained=False)
    assert planned.graph == pytest.approx(measured_saved(model, packed, features), rel=0.05)
    assert planned.features == features.nbytes


def test_tower_wider_than_language_model_is_counted():
    shape = llave_config((256, 1024, 2, 4), (32, 64, 2, 2, 1), 56)
    model, (packed, tokens, tiles) = random_model(shape, torch.float32), llave_chunk(shape)
    planned = chunk_memory(shape, tokens, tiles, plain(), tower_trained=True)
    assert planned.graph == pytest.approx(measured_saved(model, packed, None), rel=0.05)
    with torch.no_grad(), LiveBytes() as live:
        model(packed, True)
    assert planned.forward == pytest.approx(live.peak, rel=0.05)
    assert (
        chunk_memory(shape, tokens, tiles, plain(), tower_trained=False, tiles_at_once=2).forward < planned.forward / 2
    )


def unit(rows: int, width: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width), dim=-1)


LABELS = {"distill": {"scores": "teacher"}}
OWN = {"temperatures": {"vqa": 0.03}, "margins": {"vqa": 0.1}, "learn_temperature": True}


@pytest.mark.parametrize("cached", [1 << 30, 3_000_000])
@pytest.mark.parametrize(
    ("rows", "width", "negatives", "teacher", "fields"),
    [
        (1024, 256, 0, 0, {}),
        (1500, 64, 0, 0, {}),
        (900, 64, 2, 0, {}),
        (64, 512, 8, 0, {"dimensions": [384, 512]}),
        (256, 512, 1, 0, {"dimensions": [128, 256, 512]}),
        (900, 32, 1, 0, {"dimensions": [8, 16, 32]}),
        (1024, 64, 0, 0, OWN),
        (512, 64, 1, 256, {"reward": "teacher"}),
        (768, 64, 1, 32, LABELS),
        (600, 64, 1, 64, OWN | LABELS | {"reward": "teacher", "dimensions": [16, 64], "mask_duplicates": False}),
    ],
)
def test_loss_memory_matches_plan(rows, width, negatives, teacher, fields, cached, monkeypatch):
    torch.manual_seed(0)
    for module in (loss, loss_memory):
        monkeypatch.setattr(module, "CACHED_BYTES", cached)
    section, ids = ContrastiveSection(**fields), torch.arange(rows)
    vectors = [unit(count, width).requires_grad_() for count in (rows, rows, negatives * rows)]
    of_teacher = [unit(count, teacher) for count in (rows, rows, negatives * rows)] if teacher else []
    temperature = torch.full((rows,), 0.03).requires_grad_() if section.temperatures else 0.03
    hashes = {"query_ids": ids, "target_ids": ids + rows, "negative_ids": torch.arange(negatives * rows)}
    with LiveBytes() as live:
        query, target, further = (x.clone() for x in vectors)  # as `contrastive_loss` gathers a pair's items
        output = hardness_weighted_loss(
            query,
            target,
            alpha=9,
            temperature=temperature,
            negatives=further,
            margin=torch.full((rows,), 0.1) if section.margins else None,
            directions=section.directions,
            teacher=loss.Teacher(*(x.clone() for x in of_teacher)) if teacher else None,
            reward=section.reward,
            distill=loss.Distill(1.0, 0.02) if section.distill else None,
            dimensions=section.dimensions,
            **(hashes if section.mask_duplicates else {}),
        )
        torch.autograd.grad(output.loss, [x for x in (*vectors, temperature) if isinstance(x, torch.Tensor)])
    planned = loss_memory.loss_bytes(section, width, rows, gpus=1, negatives=negatives, teacher=teacher)
    assert planned == pytest.approx(live.peak, rel=0.1)


def size_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def test_unsharded_states_match_adamw():
    model = random_model(LLAVE["tiny"], torch.float32)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with LiveBytes() as live:
        optimizer.step()
    assert live.peak < 4 * len(trained) * 8  # the step counters
    states = state_bytes(groups_of(model), stage=0, gpus=2, width=4, zero={})
    assert states.parameters == size_of(model.parameters())
    assert states.gradients == size_of(p.grad for p in trained) < states.parameters
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert states.optimizer == size_of(moments)
    assert states.step == 0


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_states_match_zero_partitions(stage, dtype):
    """Compare with ZeRO's partitions of the flattened parameters; master weights and moments are in fp32."""
    model, gpus = random_model(LLAVE["tiny"], dtype), 3
    flat = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    master = flat.chunk(gpus)[0].float().clone().requires_grad_()
    master.grad = torch.ones_like(master)
    optimizer = torch.optim.AdamW([master])
    optimizer.step()
    moments = [optimizer.state[master][name] for name in ("exp_avg", "exp_avg_sq")]
    zero = {"reduce_bucket_size": 1000, "stage3_max_live_parameters": 5000}
    states = state_bytes(groups_of(model), stage=stage, gpus=gpus, width=dtype.itemsize, zero=zero)
    assert states.optimizer == size_of([master, *moments])
    summed = flat.float().nbytes + (flat.nbytes if dtype == torch.bfloat16 else 0) if stage == 1 else master.nbytes
    assert states.gradients == summed
    every = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert states.parameters == (every.chunk(gpus)[0] if stage == 3 else every).nbytes
    assert states.gathered == (5000 * dtype.itemsize if stage == 3 else 0)
    assert states.buckets == 1000 * (4 if stage == 1 else dtype.itemsize)


@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_states_are_in_cpu_memory(stage):
    groups = [
        Group("tower", 1000, False, in_engine=False),
        Group("frozen", 600, False),
        Group("trained", 60, True, largest=40),
    ]
    zero = json.loads((ROOT / f"ds_configs/zero{stage}_offload.json").read_text())["zero_optimization"]
    width = 2 if stage == 3 else 4
    states = state_bytes(groups, stage=stage, gpus=2, width=width, zero=zero)
    assert (states.optimizer, states.step) == (0, 0)
    own = 30
    if stage == 3:
        assert (states.parameters, states.gradients) == (2 * 1000, 0)
        # Master weights, two moments, accumulated gradients and their fp32 copy; trained and frozen parameters.
        assert states.host == 5 * 4 * own + 2 * 330
    else:
        assert (states.parameters, states.gradients) == (4 * 1660, 4 * 40)
        assert states.host == 5 * 4 * own + 4 * own + 4 * 40
    without = state_bytes(
        groups, stage=stage, gpus=2, width=width, zero={"reduce_bucket_size": zero["reduce_bucket_size"]}
    )
    assert (states.buckets, states.gathered) == (without.buckets, without.gathered)
    assert without.host == 0


@pytest.mark.parametrize("name", ["zero3", "zero3_offload"])
def test_second_partition_within_node_is_counted_with_parameters(name):
    groups = [
        Group("tower", 1000, False, in_engine=False),
        Group("frozen", 600, False),
        Group("trained", 60, True, largest=40),
    ]
    zero = json.loads((ROOT / f"ds_configs/{name}.json").read_text())["zero_optimization"]
    plain, by_node = (
        state_bytes(groups, stage=3, gpus=4, width=2, zero=zero | changes)
        for changes in ({}, {"zero_hpz_partition_size": 2})
    )
    where = "host" if "offload" in name else "parameters"
    assert vars(by_node) == vars(plain) | {where: getattr(plain, where) + 2 * 660 // 2}


@pytest.mark.parametrize("name", LLAVE)
def test_bytes_sent_of_a_chunk_are_those_of_its_tensors(name):
    packed, tokens, tiles = llave_chunk(LLAVE[name])
    sent = packed.input_ids.nbytes + packed.position_ids.nbytes + packed.tiles.nbytes
    assert chunk_memory(LLAVE[name], tokens, tiles, plain(), tower_trained=False).sent == sent


@pytest.mark.parametrize(
    ("in_engine", "chunk_tokens", "pinned"),
    [
        # Two chunks of 20,480 bytes. Of 16 chunks with 2,048,000 bytes of features 5 fit into 10 MiB.
        (False, 2048, 2 * 32768 + 11 * 2**21),
        # An item is a chunk by itself; of 64 with 512,000 bytes 20 fit.
        (False, 100, 2 * 8192 + 44 * 2**19),
        (True, 2048, 2 * 32768),
    ],
)
def test_pinned_memory_is_that_of_chunks_and_of_features_beyond_the_device(in_engine, chunk_tokens, pinned):
    recipe = load_recipe(DEMO, ["batch.global_batch=64", "model.max_tokens=512", "batch.features_mb=10"])

    def chunk(tokens: int) -> ChunkMemory:
        return ChunkMemory(forward=0, graph=0, backward=0, features=1000 * tokens, sent=10 * tokens)

    plan = Plan(recipe, 2, [Group("tower", 1, False, in_engine)], 8, Stored(0, 0, ()), chunk)
    assert plan.pinned(chunk_tokens) == pinned


def test_frozen_parameters_have_no_gradient_or_optimizer_state():
    groups = [Group("tower", 1000, False, in_engine=False), Group("frozen", 600, False), Group("trained", 60, True)]
    states = state_bytes(groups, stage=3, gpus=2, width=2, zero={})
    assert states.parameters == 2 * (1000 + 330)
    assert (states.gradients, states.optimizer) == (4 * 30, 12 * 30)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_copy_of_a_checkpoint_has_the_files_of_the_first_rank(stage):
    groups = [Group("frozen", 600, False), Group("trained", 60, True)]
    # Master weights and moments of the rank's share, and the trained parameters; ZeRO 0 has no master weights.
    expected = {0: 60 * (4 + 8), 1: 30 * 12 + 60 * 4, 2: 30 * 12 + 60 * 4, 3: 30 * 12}
    assert state_bytes(groups, stage=stage, gpus=2, width=4, zero={}).copied == expected[stage]


def recipe(*overrides: str) -> Recipe:
    return load_recipe(DEMO, ["precision=fp32", *overrides])


def test_meta_device_model_matches_trained_model(tiny_model):
    trains = recipe(f"model.path={tiny_model}", "model.train.vision_tower=true")
    loaded, memory = Llave.load(tiny_model, torch.float32), training_of(trains).memory(trains, videos=False)
    assert {p.device.type for p in memory.model.parameters()} == {"meta"}
    freeze(loaded, trains)
    assert Plan.of(trains, 2, videos=False).groups == groups_of(loaded)
    frozen = {name for name, p in loaded.named_parameters() if not p.requires_grad}
    assert frozen == {"vision_tower.post_layernorm.weight", "vision_tower.post_layernorm.bias"}


def test_adapters_replace_language_model_parameters():
    groups = Plan.of(recipe("model.train.lora={rank: 4}", "model.train.vision_tower=false"), 2, videos=False).groups
    trained = {group.name: group.parameters for group in groups if group.trained}
    assert set(trained) == {"image_newline", "multi_modal_projector", "language_model"}
    # Demo: two layers, hidden 128, MLP 256, keys and values 64; inputs and outputs of q, k, v, o and three of the MLP.
    assert trained["language_model"] == 2 * 4 * (2 * 256 + 2 * 192 + 3 * 384)
    assert all(not group.in_engine for group in groups if group.name == "vision_tower")


def test_largest_chunk_fits_and_a_larger_one_does_not():
    plan = Plan.of(
        recipe("model.train.vision_tower=false", "batch.kept_chunks=2", "batch.features_mb=1"), 2, videos=False
    )
    states = plan.states(3, {"reduce_bucket_size": 1000})
    for memory in (1e8, 1e9):
        largest = plan.largest_chunk(memory, states)
        assert plan.total(largest, states) <= memory < plan.total(largest + 64, states)
    # A chunk cannot be smaller than one item of max_tokens.
    assert plan.total(1, states) == plan.total(plan.recipe.model.max_tokens, states)
    assert plan.largest_chunk(plan.total(1, states) - 1, states) == 0


def test_most_cached_graphs_fit_and_one_more_does_not():
    def plan(count: int) -> Plan:
        return Plan.of(recipe(f"batch.kept_chunks={count}"), 2, videos=False)

    states = plan(0).states(3, {"reduce_bucket_size": 1000})
    longest = plan(0).recipe.model.max_tokens
    for memory in (1e8, 1e9):
        most = plan(0).most_cached(memory, states)
        assert plan(most).total(longest, states) <= memory < plan(most + 1).total(longest, states)
    assert plan(0).most_cached(plan(1).total(longest, states) - 1, states) == 0


def test_cached_features_are_bounded_by_the_items_of_a_rank():
    fields = ("model.train.vision_tower=false", "batch.global_batch=64")
    two, eight = (Plan.of(recipe(*fields), gpus, videos=False) for gpus in (2, 8))
    architecture, longest = two.recipe.model.architecture, two.recipe.model.max_tokens
    side, patch, width = (architecture.vision[name] for name in ("image_size", "patch_size", "hidden_size"))
    tiling = training_of(two.recipe).lengths(two.recipe).tiling
    # 32 queries and 32 targets, each with as many tiles as its tokens allow.
    expected = 64 * math.ceil(longest / tokens_per_tile(tiling, videos=False)) * (side // patch) ** 2 * width * 4
    assert 0 < two.kept()["kept features, at most"] == expected < two.recipe.batch.features_mb << 20
    assert eight.kept()["kept features, at most"] == expected // 4
    few = Plan.of(recipe(*fields, "batch.features_mb=1"), 2, videos=False)
    assert few.kept()["kept features, at most"] == 1 << 20 < expected


def test_mined_negatives_and_teachers_vectors_are_counted():
    fields = ("data.negatives=beside", "data.teacher=beside", "objective.reward=teacher", "batch.global_batch=64")
    plain, assumed = (Plan.of(recipe(*each), 2, videos=False) for each in (fields[-1:], fields))
    mined = [SimpleNamespace(index=SimpleNamespace(metadata=SimpleNamespace(count=count))) for count in (2, 7)]
    source = SimpleNamespace(mined=mined, teacher_metadata=SimpleNamespace(width=96))
    known = Plan.of(recipe(*fields), 2, False, source)
    assert [(plan.stored.negatives, plan.stored.teacher) for plan in (plain, assumed, known)] == [
        (0, 0),
        (MiningRun().count, plain.dimension),
        (7, 96),
    ]
    assert [len(plan.stored.remarks) for plan in (plain, assumed, known)] == [1, 3, 1]
    for plan in (assumed, known):
        pairs, negatives = 64 // 2, plan.stored.negatives
        kept = plan.kept()["kept embeddings, their gradient"]
        assert kept == 2 * (2 + negatives) * pairs * plan.dimension * 4
        planned = plan.phases(4096, plan.states(3, {}))["the loss"]
        objective, teacher = plan.recipe.objective, plan.stored.teacher
        assert planned == loss_memory.loss_bytes(objective, plan.dimension, 64, 2, negatives=negatives, teacher=teacher)


def test_cached_chunks_hold_their_graphs_simultaneously():
    plans = [Plan.of(recipe(f"batch.kept_chunks={count}"), 2, videos=False) for count in (0, 1, 3)]
    none, one, three = (plan.phases(4096, plan.states(3, {}))["a chunk with gradient"] for plan in plans)
    assert none == one
    assert three - one == 2 * plans[0].chunk(4096).graph


def test_activation_checkpointing_allows_larger_chunks():
    plans = [Plan.of(recipe(f"batch.activation_checkpointing={on}"), 2, videos=False) for on in ("false", "true")]
    without, checkpointing = (plan.largest_chunk(1e9, plan.states(3, {"reduce_bucket_size": 1000})) for plan in plans)
    assert checkpointing > 1.3 * without


def test_program_reports_cpu_memory_of_offloading(plan_memory):
    assert "CPU memory for each GPU" in plan_memory("--gpus", "2", "deepspeed=ds_configs/zero3_offload.json")


def test_tokens_per_tile_match_tiling():
    tiling = Tiling(size=24, patches=3, pinpoints=((24, 24), (24, 48), (48, 24), (48, 48)))
    tiles = tiling.cut(Picture.new("RGB", (4000, 3000)), anyres=True)
    assert tokens_per_tile(tiling, videos=False) * len(tiles) == tiling.tokens(3000, 4000, anyres=True)
    assert tokens_per_tile(tiling, videos=True) * 8 == tiling.video_tokens(8) - 1


@pytest.fixture
def plan_memory(monkeypatch, capsys) -> Callable[..., str]:
    """Return a function that runs the program in this process and returns what it prints."""
    monkeypatch.setenv("DS_ACCELERATOR", os.environ.get("DS_ACCELERATOR", "cpu"))  # which the program sets if it is not
    from tools.plan_memory import main

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan_memory.py", str(DEMO), *arguments])
        main()
        return capsys.readouterr().out

    return run


def test_program_reports_which_zero_stages_fit(plan_memory):
    printed = plan_memory("--gpus", "2", "--memory", "1", "batch.chunk_tokens=1024")
    cells = [line.strip("│┃ ").split("│") for line in printed.splitlines()]
    rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}
    # DeepSpeed's bucket of 500 million numbers alone does not fit.
    assert rows["fits"] == ["yes", "no", "no", "yes"]
    assert rows["largest batch.chunk_tokens"][1:3] == ["none", "none"]


def test_program_says_what_it_assumes(plan_memory, tmp_path):
    fields = [f"data.url={tmp_path}", "data.datasets=[]", "data.negatives=beside"]
    notes = [line for line in plan_memory("--gpus", "2", *fields).splitlines() if line.startswith("note: ")]
    assert notes[1] == f"note: {MiningRun().count} mined negatives a pair are assumed"
    assert notes[2].startswith("note: the data cannot be read: ") and str(tmp_path)[:20] in notes[2]
    assert plan_memory("--gpus", "2").count("note: ") == 1


def test_program_reports_invalid_arguments():
    command = [sys.executable, str(ROOT / "tools/plan_memory.py"), str(DEMO), "--gpus", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: 3 processes do not divide batch.global_batch=64"
