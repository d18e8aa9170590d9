"""FLOPs by formula, compared with torch's count of a real forward and backward pass of each family's small models."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Recipe, load_recipe
from pipeline.data.batch import Encoded, Image
from pipeline.models.chunks import Features, plan_chunks, run_chunk
from pipeline.models.flops import StepFlops, known
from pipeline.models.registry import training_of
from pipeline.objectives.masked_tokens.config import MaskedNextTokenSection
from pipeline.objectives.masked_tokens.masks import mask, to_predict
from pipeline.training.engine import adapt, freeze

CPU = torch.device("cpu")
LENGTHS = (5, 12, 9)  # of texts
TOWERLESS = "model.train.vision_tower=false"
LORA = "model.train.lora={rank: 4, alpha: 8}"
WINDOWED = (  # Qwen2.5-VL's tower, with windows of two tokens a side
    "model.architecture.model_type=qwen2_5_vl",
    "model.architecture.vision={hidden_size: 32, out_hidden_size: 128, intermediate_size: 56, num_heads: 2, depth: 3, "
    "patch_size: 8, window_size: 32, fullatt_block_indexes: [1]}",
    "model.architecture.text={hidden_size: 128, intermediate_size: 256, num_hidden_layers: 3, num_attention_heads: 4, "
    "num_key_value_heads: 2, vocab_size: 512, rope_parameters: {rope_type: default, rope_theta: 1.0e+4, "
    "mrope_section: [6, 5, 5]}}",
)


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> str:
    folder, recipe = tmp_path_factory.mktemp("models") / "text_encoder", load_recipe("demo_caption.yaml")
    training_of(recipe).build(recipe.model, ["a red star _ a ring"], 0, folder)
    return str(folder)


def built(recipe: Recipe, folder: Path) -> tuple[nn.Module, Features | None, StepFlops]:
    """Return the recipe's model of random weights as it is trained, the frozen part's features, and the formula."""
    family = training_of(recipe)
    family.build(recipe.model, ["a red star _ a ring"], 0, folder)
    frozen = family.frozen(recipe, str(folder), CPU)
    model = family.load(recipe, str(folder), "sdpa")
    freeze(model, recipe)
    adapt(model, recipe)
    flops = family.flops(model, frozen)
    assert flops
    return model, frozen.features_of if frozen else None, flops


def counted(model: nn.Module, items: Sequence[Encoded], features: Features | None, chunk_tokens: int = 1) -> int:
    """Return torch's count.  chunk_tokens: 1: each item is a chunk, without padding.  Attention is matrix products."""
    # Of shapes; torch counts neither a product that is added in place nor a frozen layer with GELU.
    more = {
        torch.ops.aten.addmm_: lambda _, left, right, **others: 2 * left[0] * left[1] * right[1],
        torch.ops.mkldnn._linear_pointwise: lambda x, weight, *others, **more: 2 * math.prod(x) * weight[0],
    }
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=more) as counter:
        for chunk in plan_chunks(items, chunk_tokens, CPU):
            run_chunk(model, chunk, features).sum().backward()
    return counter.get_total_flops()


def texts(lengths: Sequence[int] = LENGTHS) -> list[Encoded]:
    draws = np.random.default_rng(0)
    return [Encoded(draws.integers(100, 200, n).astype(np.int32)) for n in lengths]


def rotary(model: nn.Module, items: Sequence[Encoded]) -> int:
    """Return what torch counts for positions times frequencies, once per forward pass: it is no matrix of weights."""
    config = model.config
    return config.hidden_size // config.num_attention_heads * sum(len(item.input_ids) for item in items)


def llave_items(model: nn.Module) -> list[Encoded]:
    """Return texts, an image of five tiles, and a video."""
    config = model.config
    side, patches = config.vision_config.image_size, config.vision_config.image_size // config.vision_config.patch_size

    def item(image: Image, token: int) -> Encoded:
        with torch.no_grad():
            width = config.vision_config.hidden_size
            packed = type("Packed", (), {"images": (image,)})
            count = len(model.image_tokens(packed, torch.zeros(len(image.tiles), patches**2, width)))
        return Encoded(np.array([100] * 4 + [token] * count + [101] * 3, np.int32), (image,))

    tiles = np.zeros((5, 3, side, side), np.uint8)
    image, video = Image(tiles, 2 * side, 2 * side), Image(tiles[:2], side, side, video=True)
    return [*texts(), item(image, config.image_token_id), item(video, config.video_token_id)]


@pytest.mark.parametrize(
    "options",
    [
        (),
        (TOWERLESS,),
        (TOWERLESS, "model.train.language_model=false"),
        (TOWERLESS, "model.train.projector=false"),
        (TOWERLESS, LORA),
        (LORA, "model.train.projector=false"),
    ],
    ids=" ".join,
)
def test_llave(options, tmp_path):
    recipe = load_recipe("demo.yaml", list(options))
    model, features, flops = built(recipe, tmp_path)
    text, items = model.language_model.config, llave_items(model)
    if not recipe.model.train.language_model or LORA in options:  # then a text alone has no gradient to its inputs
        items = items[len(LENGTHS) :]
    squares = sum(len(item.input_ids) ** 2 for item in items)
    causal = 12 * squares / 2 * text.hidden_size * (text.num_hidden_layers - 1)  # torch counts whole squares
    expected = flops(items, 0) + causal + rotary(model.language_model, items)
    assert counted(model, items, features) == expected


@pytest.mark.parametrize(
    "options",
    [
        (),
        (TOWERLESS,),
        (TOWERLESS, "model.train.projector=false"),
        (TOWERLESS, "model.train.language_model=false"),
        WINDOWED,
    ],
    ids=lambda options: " ".join(options)[:60],
)
def test_qwen_vl(options, tmp_path):
    recipe = load_recipe("demo_qwen.yaml", list(options))
    model, features, flops = built(recipe, tmp_path)
    pictures = [Picture.new("RGB", size) for size in ((48, 32), (90, 20))]
    processor = training_of(recipe).processor(recipe, str(tmp_path))
    items = [processor.encode_parts("<image>\nstar", [lambda each=each: each], None) for each in pictures]
    items.append(processor.encode_parts("<video> moves", [], lambda: [Picture.new("RGB", (32, 24))] * 3))
    items += texts() if recipe.model.train.language_model else []
    text, tokens = model.language_model.config, [len(item.input_ids) for item in items]
    head = text.hidden_size // text.num_attention_heads
    width = text.num_attention_heads * head
    causal = 12 * sum(count**2 for count in tokens) / 2 * width * (text.num_hidden_layers - 1)
    rotary = 3 * head * sum(tokens)  # three axes
    assert counted(model, items, features) == flops(items, 0) + causal + rotary


@pytest.mark.parametrize("options", [(), (LORA,)], ids=" ".join)
def test_text_encoder(options, tmp_path):
    model, _, flops = built(load_recipe("demo_caption.yaml", list(options)), tmp_path)
    items, text = texts(), model.language_model
    first = text.layers[0].self_attn
    # Below the first adapters nothing is trained: the first layer's inputs need no gradient, which the formula ignores.
    ignored = sum(2 * p.numel() for name, p in first.named_parameters() if not name.startswith("o_proj") and p.ndim > 1
                  and "lora_B" not in name) if options else 0  # fmt: skip
    expected = flops(items, 0) + rotary(text, items) - ignored * sum(LENGTHS)
    assert counted(model, items, None) == expected


def test_masked_next_token(tmp_path):
    model, _, flops = built(load_recipe("demo_masked.yaml"), tmp_path)
    rate = MaskedNextTokenSection(mask_rate=0.5)
    items = [mask(item, rate, model.mask_token, model.vocabulary, (0, n)) for n, item in enumerate(texts())]
    logits = sum(len(item.places) for item in items)
    expected = flops(items, logits) + rotary(model.language_model, items)
    assert logits and counted(model, items, to_predict) == expected


def two_tower_items(model: nn.Module) -> list[Encoded]:
    """Return texts of one length, since CLIP pads them, and images, also several of one item."""
    side = model.pixels.size
    images = [Image(np.zeros((count, 3, side, side), np.uint8), side, side) for count in (1, 3)]
    return [*texts((9, 9)), *(Encoded(np.zeros(4, np.int32), (image,)) for image in images)]


@pytest.mark.parametrize("part", ["", "vision_tower", "language_model"])
def test_clip(part, tmp_path):
    model, _, flops = built(load_recipe("demo_clip.yaml", [f"model.train.{part}=false"] if part else []), tmp_path)
    items, text = two_tower_items(model), model.clip.config.text_config
    passes = 1 if part == "language_model" else 3
    causal = passes * 4 * 2 * 9**2 / 2 * text.hidden_size * text.num_hidden_layers
    assert counted(model, items, None, 1000) == flops(items, 0) + causal


@pytest.mark.parametrize("part", ["", "vision_tower", "adapter"])
def test_llm2clip(part, text_encoder, tmp_path):
    options = [f"model.text_encoder={text_encoder}", "data.text_embeddings=null"]
    options += [f"model.train.{part}=false"] if part else []
    model, features, flops = built(load_recipe("demo_llm2clip.yaml", options), tmp_path)
    items, heads = two_tower_items(model), 4
    assert features
    extra = model.width // heads * 2 * 9  # see `rotary`
    assert counted(model, items, features, 1000) == flops(items, 0) + extra


def test_stored_vectors_cost_no_text_encoder(text_encoder, tmp_path):
    model, features, flops = built(load_recipe("demo_llm2clip.yaml", [f"model.text_encoder={text_encoder}"]), tmp_path)
    items = [replace(item, vector=np.ones(model.width, np.float32)) for item in two_tower_items(model)]
    assert features is None
    assert counted(model, items, None, 1000) == flops(items, 0)


@pytest.mark.parametrize("demo", ["demo.yaml", "demo_clip.yaml"])
def test_weights_partitioned_by_zero3_count_as_whole(demo, tmp_path):
    recipe = load_recipe(demo)
    model, _, flops = built(recipe, tmp_path)
    items = llave_items(model) if demo == "demo.yaml" else two_tower_items(model)
    for parameter in model.parameters():  # as DeepSpeed leaves them
        parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
        parameter.data = torch.empty(0)
    partitioned = training_of(recipe).flops(model, None)
    assert partitioned and partitioned(items, 0) == flops(items, 0) > 0


def test_experts_are_not_counted():
    experts = nn.Module()
    experts.gate = nn.Parameter(torch.zeros(4, 8, 8))
    assert not known(experts)
    experts.gate.ds_shape, experts.gate.data = experts.gate.shape, torch.empty(0)
    assert not known(experts)
    assert known(nn.Linear(4, 4), nn.Embedding(4, 4), nn.Conv2d(3, 4, 2))
