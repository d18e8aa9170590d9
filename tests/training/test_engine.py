import math
import os

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from PIL import Image

from pipeline.config import Optimizer, Recipe, load_recipe
from pipeline.distributed import remove_stale_lock, start_distributed
from pipeline.errors import PipelineError
from pipeline.models.attention import head_size
from pipeline.models.llave.model import Llave
from pipeline.models.llm2clip.model import Llm2Clip
from pipeline.models.lora import add_adapters, merge_adapters
from pipeline.models.vision import Pixels, VisionEncoder, layer_factors
from pipeline.training import engine
from pipeline.training.engine import adamw, freeze, learning_rate, parameter_groups


def test_learning_rate_rises_linearly_and_decays_as_cosine():
    optimizer = Optimizer(lr=2.0, warmup_ratio=0.1)
    rates = [learning_rate(step, 100, optimizer) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * n / 90) for n in range(90)])


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 1.0), (3, 1.0), (2, 0.03)])
def test_short_runs_have_positive_learning_rates(steps, warmup):
    optimizer = Optimizer(lr=1.0, warmup_ratio=warmup)
    assert all(0 < learning_rate(step, steps, optimizer) <= 1 for step in range(steps))


@pytest.fixture(scope="module")
def model(tiny_model) -> Llave:
    return Llave.load(tiny_model, torch.float32)


def names(model: Llave, group: dict) -> set[str]:
    """Return the first components of the names of a group's parameters."""
    members = {id(parameter) for parameter in group["params"]}
    return {name.partition(".")[0] for name, parameter in model.named_parameters() if id(parameter) in members}


def recipe(*fields: str) -> Recipe:
    return load_recipe("pipeline/recipes/demo.yaml", ["optimizer.lr=0.1", "optimizer.weight_decay=0.2", *fields])


def test_each_part_has_its_learning_rate_and_vectors_no_decay(model):
    groups = parameter_groups(model, recipe("model.train.projector=0.3", "model.train.vision_tower=0.05"))
    assert [(names(model, group), group["lr_scale"], group["weight_decay"]) for group in groups] == [
        ({"multi_modal_projector"}, pytest.approx(3.0), 0.2),
        ({"multi_modal_projector", "image_newline"}, pytest.approx(3.0), 0.0),
        ({"language_model"}, 1.0, 0.2),
        ({"language_model"}, 1.0, 0.0),
        ({"vision_tower"}, pytest.approx(0.5), 0.2),
        ({"vision_tower"}, pytest.approx(0.5), 0.0),
    ]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trained)


# Parameters of towers with two layers -> steps of decay, by get_num_layer_for_transformer in training/optim.py of
# LLM2CLIP's code. First EVA02-CLIP by timm's names; then CLIP by transformers' names, where the code has OpenAI's.
LAYERS = {
    "vision.tower.timm_model.cls_token": 3,
    "vision.tower.timm_model.pos_embed": 3,
    "vision.tower.timm_model.patch_embed.proj.weight": 3,
    "vision.tower.timm_model.patch_embed.proj.bias": 3,
    "vision.tower.timm_model.blocks.0.norm1.weight": 2,
    "vision.tower.timm_model.blocks.0.attn.q_proj.weight": 2,
    "vision.tower.timm_model.blocks.1.attn.proj.weight": 1,
    "vision.tower.timm_model.blocks.1.mlp.norm.bias": 1,
    "vision.tower.timm_model.norm.weight": 0,
    "vision.tower.timm_model.head.weight": 0,
    "vision.tower.timm_model.head.bias": 0,
}
CLIP_LAYERS = {
    "embeddings.class_embedding": 0,  # its list of names has "cls_token", but not OpenAI's "class_embedding"
    "embeddings.patch_embedding.": 3,
    "embeddings.position_embedding.": 3,
    "pre_layrnorm.": 0,
    "encoder.layers.0.": 2,
    "encoder.layers.1.": 1,
    "post_layernorm.": 0,
    "visual_projection.": 0,
}


def test_layer_decay_factors_follow_published_code():
    expected = {name: pytest.approx(0.85**steps, rel=1e-12) for name, steps in LAYERS.items()}
    assert layer_factors(LAYERS, 0.85) == expected
    names = [f"vision.tower.timm_model.blocks.{n}.mlp.fc1_g.weight" for n in (0, 9, 10, 23)]  # of 24, as published
    assert [layer_factors(names, 0.85)[name] for name in names] == pytest.approx([0.85**n for n in (24, 15, 14, 1)])


@pytest.fixture(scope="module")
def llm2clip() -> Llm2Clip:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = VisionEncoder.build(sizes | {"image_size": 24, "patch_size": 8}, 16, seed=0)
    pixels = Pixels(24, (0.5,) * 3, (0.5,) * 3, 24, True, Image.Resampling.BICUBIC)
    return Llm2Clip(vision, pixels, 8)


def settings_of(model: Llm2Clip, *fields: str) -> dict[str, tuple[float, float]]:
    """Return the (lr_scale, weight_decay) of each parameter."""
    common = ["model.text_encoder=/tmp/none", "optimizer.lr=0.1", "optimizer.weight_decay=0.2"]
    groups = parameter_groups(model, load_recipe("pipeline/recipes/demo_llm2clip.yaml", [*common, *fields]))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], (group["lr_scale"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert len(found) == len(dict(found)) == len(names)  # each once
    return dict(found)


def test_layer_decay_sets_each_parameter_of_the_tower(llm2clip):
    settings = settings_of(llm2clip, "model.train.layer_decay=0.85", "model.train.vision_tower=0.05")
    seen = set()
    for name, parameter in llm2clip.named_parameters():
        part = next((part for part in CLIP_LAYERS if part in name), None)
        assert (part is None) == name.startswith("adapter.")
        scale = 0.5 * 0.85 ** CLIP_LAYERS[part] if part else 1.0
        decay = 0.2 if parameter.ndim > 1 and "position_embedding" not in name else 0.0
        assert settings[name] == (pytest.approx(scale), decay), name
        seen.add(part)
    assert seen == {None, *CLIP_LAYERS}


def test_layer_decay_of_one_leaves_groups_as_they_are(llm2clip):
    settings = settings_of(llm2clip)
    for name, parameter in llm2clip.named_parameters():
        assert settings[name] == (1.0, 0.2 if parameter.ndim > 1 else 0.0)
    groups = parameter_groups(
        llm2clip, load_recipe("pipeline/recipes/demo_llm2clip.yaml", ["model.text_encoder=/tmp/none"])
    )
    assert len(groups) == 4  # DeepSpeed stores its state by group: those of a resumed run must not change


@pytest.mark.parametrize(
    ("fields", "trained"),
    [
        ((), {"multi_modal_projector", "image_newline", "language_model", "vision_tower"}),
        (("model.train.vision_tower=false",), {"multi_modal_projector", "image_newline", "language_model"}),
        (("model.train.language_model=false", "model.train.projector=false"), {"vision_tower"}),
    ],
)
def test_frozen_parameters_are_in_no_parameter_group(tiny_model, fields, trained):
    model = Llave.load(tiny_model, torch.float32)
    chosen = recipe(*fields)
    freeze(model, chosen)
    assert set().union(*(names(model, group) for group in parameter_groups(model, chosen))) == trained


def test_new_adapters_are_trained_and_merge_to_original_weights(tiny_model):
    model, chosen = (
        Llave.load(tiny_model, torch.float32),
        recipe("model.train.projector=false", "model.train.lora.rank=3"),
    )
    freeze(model, chosen)
    before = dict(model.named_parameters())
    add_adapters(model.language_model, chosen.model.train.adapters, seed=1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "tower" not in name}
    assert len(trained) == 2 * 7 * 2  # A and B for seven linear layers in each of two blocks
    assert all("lora_" in name and 3 in parameter.shape for name, parameter in trained.items())
    given = dict(model.named_parameters())
    merged = merge_adapters(given, chosen.model.train.adapters)
    assert not given  # a large model and its merged copy would not fit together
    assert merged.keys() == before.keys()
    assert all(torch.equal(merged[name], weight) for name, weight in before.items())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            ["model.train.projector=false", "model.train.language_model=false", "model.train.vision_tower=false"],
            "nothing is trained",
        ),
        (
            ["model.train.projector=-1e-5"],
            "model.train.projector is -1e-05: give true, false or a positive learning rate",
        ),
        (
            ["model.train.language_model=false", "model.train.lora.rank=4"],
            "model.train.lora needs model.train.language_model",
        ),
        (
            ["model.train.lora.targets=[q_proj, nothing]"],
            "targets has nothing; its linear layers are down_proj, gate",
        ),
        (["model.train.lora.targets=[embed_tokens]"], "model.train.lora.targets has embed_tokens"),
    ],
)
def test_untrainable_settings_are_refused(tiny_model, fields, reason):
    with pytest.raises(PipelineError, match=reason):
        chosen = recipe(*fields)
        add_adapters(Llave.load(tiny_model, torch.float32).language_model, chosen.model.train.adapters, seed=0)


@pytest.mark.parametrize(("device", "fused"), [("cuda", True), ("cpu", None)])
def test_adamw_is_fused_only_on_cuda(model, monkeypatch, device, fused):
    monkeypatch.setattr(get_accelerator(), "device_name", lambda: device)
    chosen = recipe("model.train.projector=0.3")
    optimizer = adamw(parameter_groups(model, chosen), chosen.optimizer.lr, {"stage": 2})
    assert type(optimizer) is torch.optim.AdamW
    assert {group["fused"] for group in optimizer.param_groups} == {fused}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.2, 0.0}


@pytest.mark.parametrize("name, value", [("LOCAL_WORLD_SIZE", "0"), ("MASTER_PORT", "http"), ("LOCAL_RANK", "")])
def test_invalid_launcher_variable_is_named(monkeypatch, name, value):
    for variable, here in {"RANK": "0", "WORLD_SIZE": "1", name: value}.items():
        monkeypatch.setenv(variable, here)
    with pytest.raises(PipelineError, match=f"^{name}={value} in the environment was not set by a launcher: unset it"):
        start_distributed(1)


def test_stale_build_lock_is_deleted_and_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam/lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    remove_stale_lock()
    assert not lock.exists()
    assert caplog.messages == [f"deleted {lock}, which a killed build left"]


def test_running_build_is_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam/lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setattr("time.sleep", lambda _: lock.unlink())  # the build ends during the wait
    remove_stale_lock()
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("name", "changes", "head"),
    [
        ("demo.yaml", ["model.architecture.text.hidden_size=2048"], 512),
        ("demo_caption.yaml", ["model.architecture.text.num_attention_heads=2"], 64),
        ("demo_clip.yaml", [], None),
    ],
)
def test_attention_is_chosen_by_the_size_of_the_models_heads(monkeypatch, name, changes, head):
    def chosen(wanted, device, dtype, config):
        assert (wanted, device, dtype) == ("auto", "cpu", torch.float32)
        raise PipelineError(f"heads of {config and head_size(config)}")

    monkeypatch.setattr(engine, "choose", chosen)
    with pytest.raises(PipelineError, match=f"^heads of {head}$"):
        engine.build_engine(load_recipe(name, changes), {}, "/nowhere")
