"""The project's recipes for the published models: their values and model sizes."""

import json
import re
from pathlib import Path

import pytest
import torch
from qwen_sizes import fields_of
from transformers import LlavaOnevisionConfig, LlavaOnevisionModel, Qwen2Config, SiglipVisionConfig

from pipeline.config import load_ds_config, load_recipe
from pipeline.data.mmeb import MMEB_TASKS
from pipeline.errors import PipelineError
from pipeline.models.llave.model import TowerlessLlave
from pipeline.training.engine import freeze, learning_rate, parameter_groups
from pipeline.training.memory import Plan

SIZES = ("0.5b", "2b", "7b")

# Language models: (hidden size, layers, heads, key-value heads, MLP, vocabulary); published parameters in billions.
# The published 7B count includes an LM head in addition to the embedding; an embedder has none.
BACKBONES = {
    "0.5b": ((896, 24, 14, 2, 4864, 151_936), 0.89, 0),
    "2b": ((1536, 28, 12, 2, 8960, 151_936), 1.95, 0),
    "7b": ((3584, 28, 28, 4, 18944, 152_064), 8.03, 152_064 * 3584),
}
NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
TOWER = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


TRAINED = ("multi_modal_projector.", "image_newline", "language_model.")
MODELS = {
    "0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    "2b": "BAAI/Aquila-VL-2B-llava-qwen",
    "7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
}


# --subset_name of LLaVE's training script, in its order.
SUBSETS = """
ImageNet_1K HatefulMemes SUN397 N24News VOC2007 OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W VisDial CIRR
NIGHTS WebQA VisualNews_i2t VisualNews_t2i MSCOCO_t2i MSCOCO_i2t MSCOCO
"""


def language_model(size: str) -> dict[str, int]:
    return dict(zip((*NAMES, "vocab_size"), BACKBONES[size][0], strict=True))


def recipe(size: str, *overrides: str):
    return load_recipe(f"pipeline/recipes/llave_{size}.yaml", list(overrides))


@pytest.mark.parametrize("size", SIZES)
def test_recipe_values_match_paper(size):
    ours, paper = recipe(size), recipe(size, "variant=paper")
    for each in (ours, paper):
        assert each.model.path == MODELS[size]
        assert (each.objective.alpha, each.objective.temperature, each.epochs, each.precision) == (9.0, 0.02, 1, "bf16")
        optimizer = each.optimizer
        assert (optimizer.lr, optimizer.warmup_ratio, optimizer.weight_decay) == (1e-5, 0.03, 0)
        assert (optimizer.betas, optimizer.eps, optimizer.max_grad_norm) == ((0.9, 0.999), 1e-8, 1.0)  # transformers'
        assert (each.batch.global_batch, each.data.cap, each.model.max_tokens) == (256, 50_000, 4096)
        assert each.model.image_grid_pinpoints == [(384, 384), (384, 768), (768, 384), (768, 768)]
        assert (each.model.train.projector, each.model.train.language_model, each.model.train.vision_tower) == (
            True,
            True,
            False,
        )
    assert (ours.batch.sub_batch, paper.batch.sub_batch) == (None, 32)
    assert (ours.objective.mask_duplicates, paper.objective.mask_duplicates) == (True, False)
    assert (ours.model.mm_newline_position, paper.model.mm_newline_position) == (None, "grid")
    assert (ours.model.images, paper.model.images) == (None, "as_stored")
    stages = [load_ds_config(each, 8)["zero_optimization"]["stage"] for each in (ours, paper)]
    assert stages == [{"0.5b": 1, "2b": 2, "7b": 3}[size], 3]
    assert paper.run == f"{ours.run}_paper"  # it never resumes the other recipe's run
    rows = [(each.data.cap_rows, each.data.hard_negatives, each.data.batches) for each in (ours, paper)]
    assert rows == [("rotating", True, "mixed"), ("first", False, "modality")]
    names = [part.name for part in paper.data.datasets]
    assert names == SUBSETS.split()
    assert all((part.weight, part.cap) == (1, None) for part in paper.data.datasets)
    in_distribution = {name for name, (_, known) in MMEB_TASKS.items() if known} - {"ImageNet-1K"}
    assert {part.name for part in ours.data.datasets} == set(names) == in_distribution
    assert len(ours.data.datasets) == 20


def test_values_of_llm2clip_stage_1_match_paper():
    """Those of the published code's run_supervised.py, its MetaLlama3_cc3m.json, and dataset/E5_cc3m.py."""
    ours, paper = (
        load_recipe("pipeline/recipes/llm2clip_caption.yaml", list(overrides)) for overrides in ((), ("variant=paper",))
    )
    for each in (ours, paper):
        loss = each.objective  # its scale of 50 is constant
        assert (loss.alpha, 1 / loss.temperature, loss.learn_temperature, loss.margin) == (0.0, 50.0, False, None)
        assert (each.optimizer.lr, each.optimizer.weight_decay, each.batch.global_batch) == (2e-4, 0.0, 512)
        assert (each.model.train.lora.rank, each.model.train.lora.alpha, each.model.max_tokens) == (16, 32, 512)
        assert each.batch.sub_batch is None  # negatives come from all GPUs
    assert (ours.objective.directions, paper.objective.directions) == ("both", "query")
    assert (ours.objective.mask_duplicates, paper.objective.mask_duplicates) == (True, False)
    assert (ours.data.batches, paper.data.batches) == ("mixed", "homogeneous")
    assert paper.run == f"{ours.run}_paper"


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_match_published_models(size):
    _, published, head = BACKBONES[size]
    vision, text = SiglipVisionConfig(**TOWER, vision_use_head=False), Qwen2Config(**language_model(size))
    config = LlavaOnevisionConfig(vision_config=vision, text_config=text, vision_feature_layer=-1)
    with torch.device("meta"):
        whole, without = LlavaOnevisionModel(config), TowerlessLlave(config)
    count = sum(parameter.numel() for parameter in whole.parameters())
    assert (count + head) / 1e9 == pytest.approx(published, abs=0.005)
    for model in (whole, without):
        freeze(model, recipe(size))
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, _ in model.named_parameters() if name.startswith(TRAINED)}
        grouped = [p for group in parameter_groups(model, recipe(size)) for p in group["params"]]
        assert len(grouped) == len(trained) and all(parameter.requires_grad for parameter in grouped)
    assert count - sum(parameter.numel() for parameter in without.parameters()) == sum(
        parameter.numel() for parameter in whole.vision_tower.parameters()
    )


# Qwen-VL's recipes: the model at model.path, and its size.
QWEN = {
    "qwen2_vl_2b": ("Qwen/Qwen2-VL-2B-Instruct", "Qwen2-VL-2B"),
    "qwen3_vl_2b": ("Qwen/Qwen3-VL-2B-Instruct", "Qwen3-VL-2B"),
    "qwen3_vl_8b": ("Qwen/Qwen3-VL-8B-Instruct", "Qwen3-VL-8B"),
}


@pytest.mark.parametrize("name", QWEN)
def test_qwen_vl_recipes(name):
    """Qwen2-VL's variant has the values of VLM2Vec-V2's published script; the others' are LLaVE's."""
    whole, lora = (load_recipe(f"{name}.yaml", list(overrides)) for overrides in ((), ("variant=lora",)))
    for each in (whole, lora):
        assert each.model.path == QWEN[name][0]
        assert (each.objective.alpha, each.objective.temperature, each.batch.sub_batch) == (9.0, 0.02, None)
        assert each.batch.global_batch == (1024 if name == "qwen2_vl_2b" else 256)
        assert {part.name for part in each.data.datasets} == set(SUBSETS.split())
    adapters, train = lora.model.train.lora, lora.model.train
    assert (train.projector, train.language_model, train.vision_tower) == (False, True, False)
    assert lora.run == f"{whole.run}_lora"
    if name == "qwen2_vl_2b":
        assert (lora.optimizer.lr, adapters.rank, adapters.alpha) == (5e-5, 16, 64)
        assert lora.optimizer.warmup_ratio == 100 / 5000
        assert (lora.model.min_pixels, lora.model.max_pixels) == (4 * 28 * 28, 1280 * 28 * 28)


def jobs() -> list[tuple[str, str, int]]:
    """Return each job's recipe of the two families, with its GPUs by its script; `lora` has one."""
    found = []
    for script in sorted(Path("slurm").glob("train_*.sh")):
        text = script.read_text()
        name = re.search(r"recipes/(.+)\.yaml", text)[1]
        if name.startswith(("llave_", "qwen")):
            nodes, gpus = (int(re.search(rf"--{option}=(\d+)", text)[1]) for option in ("nodes", "gpus-per-node"))
            found += [(name, "", nodes * gpus), *([(name, "lora", 1)] if name in QWEN else [])]
    return found


@pytest.mark.parametrize(("name", "variant", "gpus"), jobs())
def test_recipes_fit_into_80_gb(name, variant, gpus):
    """By the memory plan, a chunk of one item of maximum length fits into 90 % of each GPU; `auto` fills no more."""
    if name in QWEN:
        architecture = fields_of(QWEN[name][1])
    else:
        size = name.removeprefix("llave_")
        pinpoints = recipe(size).model.image_grid_pinpoints
        architecture = {"vision": TOWER, "text": language_model(size), "image_grid_pinpoints": pinpoints}
    changes = ["model.path=null", f"model.architecture={json.dumps(architecture)}"]
    changes += [] if name in QWEN else ["model.image_grid_pinpoints=null"]
    planned = load_recipe(f"{name}.yaml", changes + ([f"variant={variant}"] if variant else []))
    zero, plan = load_ds_config(planned, gpus)["zero_optimization"], Plan.of(planned, gpus, videos=False)
    states = plan.states(zero["stage"], zero)
    assert plan.largest_chunk(0.9 * 80e9, states) >= planned.model.max_tokens
    trained = sum(group.parameters for group in plan.groups if group.trained)
    assert trained < 0.02 * sum(group.parameters for group in plan.groups) if variant else trained > 4e8


def test_stage_two_values_match_published_code():
    """Compare with run.sh, training/params.py and eva_clip/transform.py of LLM2CLIP's code."""
    ours, paper = (load_recipe("pipeline/recipes/llm2clip_vision.yaml", fields) for fields in ([], ["variant=paper"]))
    for each in (ours, paper):
        adam = each.optimizer
        assert (adam.lr, adam.weight_decay, adam.betas, adam.eps) == (1e-5, 0.05, (0.9, 0.999), 1e-8)
        assert (each.batch.global_batch, each.batch.sub_batch) == (512 * 8, None)
        assert (each.objective.alpha, each.objective.temperature, each.objective.learn_temperature) == (0, 0.07, True)
        assert load_ds_config(each, 8)["zero_optimization"]["stage"] == 1
        assert (each.model.train.vision_tower, each.model.train.adapter) == (True, True)
    assert load_ds_config(paper, 8)["gradient_clipping"] == 5.0
    assert learning_rate(0, 1000, paper.optimizer) == 1e-5  # no warm-up
    assert learning_rate(500, 1000, paper.optimizer) == pytest.approx(0.5e-5)
    assert paper.epochs == 20
    assert paper.model.path.startswith("timm/eva02_large_patch14_clip_336.")
    assert (paper.model.images, ours.model.images) == ("as_stored", None)
    assert (paper.model.dimension, ours.model.dimension) == (1280, None)
    assert (paper.model.crop_scale, ours.model.crop_scale) == ((0.9, 1.0), None)
    assert (paper.model.train.layer_decay, ours.model.train.layer_decay) == (0.85, 1.0)
    assert (paper.objective.mask_duplicates, ours.objective.mask_duplicates) == (False, True)
    assert [(part.name, part.weight, part.cap) for part in paper.data.datasets] == [
        ("cc3m", 1, None),
        ("cc12m", 1, None),
    ]
    assert (ours.data.parts, paper.data.parts) == (None, 1)
    assert paper.run == f"{ours.run}_paper"


def test_variants_override_recipe_values(tmp_path):
    text = Path("pipeline/recipes/demo.yaml").read_text()
    (tmp_path / "a.yaml").write_text(text + "variants: {short: {steps: 3, data.url: here}}\n")
    short = load_recipe(tmp_path / "a.yaml", ["variant=short"])
    assert (short.steps, short.epochs, short.data.url) == (3, None, "here")
    (tmp_path / "b.yaml").write_text(text + "variants:\n")
    assert load_recipe(tmp_path / "b.yaml", []).steps is None
    with pytest.raises(PipelineError, match=r"demo.yaml has no variant 'paper'; it has none"):
        load_recipe("pipeline/recipes/demo.yaml", ["variant=paper"])
    assert recipe("2b", "batch.sub_batch=64", "variant=paper").batch.sub_batch == 64
    with pytest.raises(PipelineError, match=r"batch.sub_batch=48 must be a multiple of data.lanes=32"):
        recipe("2b", "batch.sub_batch=48")
    with pytest.raises(PipelineError, match=r"batch.sub_batch=96 does not divide batch.global_batch=256"):
        recipe("2b", "batch.sub_batch=96")
