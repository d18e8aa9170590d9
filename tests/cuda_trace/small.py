"""Steps of the demo's models, from recipe to gradients, with every kind of item."""

import io
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from steps import WORLD, traced_step
from torch import nn
from tracer import CUDA, Record, Tracer, faked

from pipeline.config import Recipe, load_recipe
from pipeline.data.batch import Batch, Origin, RawSample, encode_rows
from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK, Item, Pair
from pipeline.demo import clips
from pipeline.models.attention import implementation
from pipeline.models.checkpointing import checkpoint_layers
from pipeline.models.chunks import CachedFeatures
from pipeline.models.family import Processor
from pipeline.models.qwen_vl.model import FrozenQwenTower, QwenVL
from pipeline.models.registry import training_of
from pipeline.models.text_encoder import model as decoder
from pipeline.training.engine import adapt, freeze

RECIPES = Path(__file__).resolve().parents[2] / "pipeline/recipes"
PAIRS = 8
QWEN_2_5 = {  # with windows of four tokens in the tower's first and last block
    "model.architecture": "{model_type: qwen2_5_vl, "
    "vision: {hidden_size: 96, out_hidden_size: 128, intermediate_size: 192, num_heads: 4, depth: 3, patch_size: 8, "
    "window_size: 32, fullatt_block_indexes: [1]}, "
    "text: {hidden_size: 128, intermediate_size: 256, num_hidden_layers: 3, num_attention_heads: 4, "
    "num_key_value_heads: 2, vocab_size: 512, "
    "rope_parameters: {rope_type: default, rope_theta: 1.0e+4, mrope_section: [6, 5, 5]}}}"
}
# Recipe, options. `attention` is the kernel of the language model, which the recipe's `auto` would choose on a GPU; of
# a Qwen-VL, also that of the tower.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llave, tower trained": ("demo", {"attention": "varlen"}),
    "llave, tower frozen, flash-attn": ("demo", {"attention": "flash_attn", "model.train.vision_tower": "false"}),
    "llave, checkpointing, sdpa": ("demo", {"attention": "sdpa", "batch.activation_checkpointing": "true"}),
    "llave, fp32": (
        "demo",
        {"precision": "fp32", "objective.margin": "0.2", "objective.learn_temperature": "true"},
    ),
    "llave, LoRA": ("demo", {"attention": "varlen", "model.train.lora": "{rank: 4}"}),
    "llave, newline grid, features offloaded": (
        "demo",
        {
            "attention": "varlen",
            "model.mm_newline_position": "grid",
            "model.train.vision_tower": "false",
            "batch.features_mb": "0",
        },
    ),
    "llave, options of the loss": (
        "demo",
        {
            "attention": "varlen",
            "objective.dimensions": "[32, 128]",
            "objective.temperatures": "{vqa: 0.05}",
            "objective.distill": "{scores: stored}",
            "batch.sub_batch": "32",
        },
    ),
    "qwen3-vl, tower trained": ("demo_qwen", {"attention": "varlen"}),
    "qwen3-vl, checkpointing, sdpa": ("demo_qwen", {"attention": "sdpa", "batch.activation_checkpointing": "true"}),
    "qwen3-vl, tower frozen, LoRA": (
        "demo_qwen",
        {"attention": "varlen", "model.train.vision_tower": "false", "model.train.lora": "{rank: 4}"},
    ),
    "qwen2.5-vl, tower trained": ("demo_qwen", {"attention": "varlen"} | QWEN_2_5),
    "qwen2.5-vl, tower frozen, sdpa": (
        "demo_qwen",
        {"attention": "sdpa", "model.train.vision_tower": "false"} | QWEN_2_5,
    ),
    "clip": ("demo_clip", {}),
    "clip, fp32": ("demo_clip", {"precision": "fp32"}),
    "llm2clip": ("demo_llm2clip", {}),
    "llm2clip, texts encoded in the step": ("demo_llm2clip", {"attention": "varlen", "data.text_embeddings": "null"}),
    "text encoder": ("demo_caption", {"attention": "varlen"}),
    "text encoder, sdpa": ("demo_caption", {"attention": "sdpa"}),
    "text encoder, fp32": ("demo_caption", {"precision": "fp32"}),
    "masked tokens": ("demo_masked", {"attention": "varlen"}),
}
_TEXTS = [f"number {i}: a small red star {'beside a large blue ring ' * (i % 5)}at the top left" for i in range(16)]
_DECODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
}


def trace(name: str) -> Record:
    """Trace a step of a case."""
    recipe_name, options = CASES[name]
    options = {"precision": "bf16"} | options
    attention = options.pop("attention", "sdpa")
    tracer = Tracer()
    with tempfile.TemporaryDirectory() as root:
        if recipe_name == "demo_llm2clip":
            options["model.text_encoder"] = f"{root}/encoder"
            decoder.build(_DECODER, _TEXTS, 0, Path(root, "encoder"))
        batch_options = {"data.lanes": WORLD, "batch.global_batch": PAIRS * WORLD, "evaluation": "null"}
        given = [f"{field}={value}" for field, value in (batch_options | options).items()]
        recipe = load_recipe(RECIPES / f"{recipe_name}.yaml", given)
        family, folder = training_of(recipe), str(Path(root, "model"))
        family.build(recipe.model, _TEXTS, 0, Path(folder))
        processor, model = family.processor(recipe, folder), family.load(recipe, folder, attention)
        frozen = family.frozen(recipe, folder, torch.device("cpu"))
    for part in (model, frozen):
        if isinstance(part, QwenVL | FrozenQwenTower):
            part.visual.config._attn_implementation = implementation(attention)
    freeze(model, recipe)
    adapt(model, recipe)
    if recipe.batch.activation_checkpointing:
        checkpoint_layers(model)
    faked(model, tracer)
    features = None
    if isinstance(frozen, decoder.FrozenTextEncoder):
        assert isinstance(frozen.model, decoder.TextEncoder)
        frozen.model.language_model.config._attn_implementation = implementation(attention)
        frozen.device = CUDA
        faked(frozen.model, tracer)
    elif frozen is not None:
        assert isinstance(frozen, nn.Module)
        faked(frozen, tracer)
    if frozen is not None:
        features = CachedFeatures(frozen, recipe.batch.features_mb << 20)
    batch = _batch(recipe, processor)
    return traced_step(tracer, model, recipe, batch, features, cut=(300, 1))


def _batch(recipe: Recipe, processor: Processor) -> Batch:
    makers = {"llave": _llave_pairs, "qwen_vl": _llave_pairs, "text_encoder": _text_pairs}
    pairs = makers.get(recipe.model.family, _two_tower_pairs)(recipe)
    raw = [RawSample(i, Origin("shard", i), b"", lambda pair=pair: pair) for i, pair in enumerate(pairs)]
    batch = Batch.of([encode_rows(raw, processor.encode)])
    assert all(batch.valid) and len(batch.query) == PAIRS, batch.bad
    return batch


def _llave_pairs(recipe: Recipe) -> Iterable[Pair]:
    """Images with hard negatives and further positives, an image as target, two images, a video, and two texts."""
    video = next(data for name, data in clips.evaluation_files(0, 1).items() if name.endswith(".mp4"))
    shown = [Item(f"{IMAGE_MARK}\nwhat is it?", (_picture(i),)) for i in range(8)]
    for i in range(3):
        yield Pair("", "", "vqa", shown[i], Item(_TEXTS[i]), (Item(_TEXTS[i + 8]),), scores=(0.9, 0.1))
    yield Pair(
        *("", "", "vqa", shown[3], Item(_TEXTS[3]), (Item(_TEXTS[11]),)),
        positives=(Item(_TEXTS[12]),),
        weights=(1.0, 0.5),
        scores=(0.9, 0.8, 0.1),
    )
    yield Pair("", "", "", Item(_TEXTS[5]), shown[7])
    yield Pair("", "", "", Item(f"{IMAGE_MARK} and {IMAGE_MARK}", (_picture(8), _picture(9))), Item(_TEXTS[6]))
    yield Pair("", "", "", Item(f"{VIDEO_MARK}\nwhat moves?", (), video), Item(_TEXTS[7]))
    yield Pair("", "", "", Item(_TEXTS[0]), Item(_TEXTS[1]))


def _text_pairs(recipe: Recipe) -> Iterable[Pair]:
    return (Pair("", "", "", Item(_TEXTS[i]), Item(_TEXTS[i + PAIRS])) for i in range(PAIRS))


def _two_tower_pairs(recipe: Recipe) -> Iterable[Pair]:
    for i in range(PAIRS):
        vector = np.linspace(-1, 1, 64, dtype=np.float32) * (1 + i) if recipe.data.text_embeddings else None
        yield Pair("", "", "", Item("", (_picture(i),)), Item(_TEXTS[i], vector=vector))


def _picture(i: int) -> bytes:
    rng, out = np.random.default_rng(i), io.BytesIO()
    pixels = rng.integers(0, 256, (40 + 13 * (i % 4), 60 - 7 * (i % 3), 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
