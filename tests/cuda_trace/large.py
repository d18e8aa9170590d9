"""Steps of LLaVE's three sizes, and of Qwen3-VL, in their real shapes, with few layers.

All layers but the last, and those that deepstack adds to, are alike. So a step with one layer more tells what a layer
costs, exactly, and what the whole model would.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch
from steps import traced_step
from torch import nn
from tracer import Record, Tracer, faked

from benchmarks import gpu_step, mmeb_like
from pipeline.config import Recipe, load_recipe
from pipeline.data.batch import Batch, Encoded, Image
from pipeline.models.attention import implementation
from pipeline.models.chunks import CachedFeatures, plan_chunks
from pipeline.models.flops import StepFlops
from pipeline.models.llave.flops import step_flops as llave_flops
from pipeline.models.llave.model import FrozenTower, TowerlessLlave
from pipeline.models.qwen_vl import checks
from pipeline.models.qwen_vl.config import QwenVLArchitecture
from pipeline.models.qwen_vl.flops import step_flops as qwen_flops
from pipeline.models.qwen_vl.model import FrozenQwenTower, QwenVL, TowerlessQwenVL
from pipeline.models.qwen_vl.patches import Grid, positions
from pipeline.training.engine import freeze

LLAVE = ("0.5b", "2b", "7b", "7b full")  # 7b has adapters, "7b full" has none
_VISION = {"num_heads": 16, "patch_size": 16, "num_position_embeddings": 2304}
_TEXT = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151_936}
_TEXT["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
# The fields of vision_config and text_config, all weights of the language model trained.
QWEN = {
    "Qwen3-VL 2b": (
        _VISION | {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096},
        _TEXT | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    ),
    "Qwen3-VL 8b": (
        _VISION | {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304},
        _TEXT | {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32},
    ),
}
MODELS = (*LLAVE, *QWEN)
_DEEP = (0, 1, 2)  # blocks whose states deepstack adds to as many layers
_QWEN_CHUNK_TOKENS = 8192
_META = torch.device("meta")


@dataclass(frozen=True)
class Step:
    """A step of a model.  flops: that the model needs.  tokens, chunks: of the step."""

    record: Record
    flops: float
    tokens: int
    chunks: int


@dataclass(frozen=True)
class Costs:
    """By part of a step (see `Scope`): kernels, bytes, and seconds by the roofline."""

    kernels: Counter[str]
    bytes: Counter[str]
    seconds: Counter[str]

    @classmethod
    def of(cls, record: Record) -> "Costs":
        return cls(*map(_by_part, (record.kernels, record.bytes, record.seconds)))


@dataclass(frozen=True)
class Setting:
    """A model on the meta device, its frozen tower, and what a step of it takes.  flops: counts those of a step."""

    tower: nn.Module
    trained: TowerlessLlave | QwenVL
    recipe: Recipe
    batch: Batch
    chunk_tokens: int
    flops: StepFlops | None


def step(model: str, pairs: int, more_layers: int = 0, more_tower_layers: int | None = None) -> Step:
    """Trace a step of a model with few layers.

    more_layers: of the language model, and of the tower if `more_tower_layers` does not say otherwise.
    """
    more_of_tower = more_layers if more_tower_layers is None else more_tower_layers
    layers, tower_layers = _few(model)
    setting = _setting(model, pairs, layers + more_layers, tower_layers + more_of_tower)
    tracer = Tracer()
    faked(setting.tower, tracer)
    faked(setting.trained, tracer)
    items = list(setting.batch.items.values())
    features = CachedFeatures(setting.tower, setting.recipe.batch.features_mb << 20)  # type: ignore[arg-type]
    cut = setting.chunk_tokens, 0
    record = traced_step(tracer, setting.trained, setting.recipe, setting.batch, features, cut=cut)
    chunks = plan_chunks(items, setting.chunk_tokens, torch.device("cpu"), padded=False)
    return Step(record, 0.0, mmeb_like.tokens_of(items), len(chunks))


def layer(less: Step, more: Step) -> Costs:
    """Return what one layer of each costs. `more` has one layer more than `less`."""
    before, after = Costs.of(less.record), Costs.of(more.record)
    return Costs(
        *(
            Counter({part: x[part] - y[part] for part in x if x[part] > y[part]})
            for x, y in zip(vars(after).values(), vars(before).values(), strict=True)
        )
    )


def whole(model: str, pairs: int) -> tuple[Costs, Step]:
    """Return what a step of the whole model costs, and one of the few layers with the whole model's FLOPs."""
    less, more = step(model, pairs), step(model, pairs, more_layers=1)
    layers, tower_layers = (every - few for every, few in zip(_all(model), _few(model), strict=True))
    base, of_layer = Costs.of(less.record), layer(less, more)
    for total, each in zip(vars(base).values(), vars(of_layer).values(), strict=True):
        for part, x in each.items():
            total[part] += x * (tower_layers if part == "tower" else layers)
    setting = _setting(model, pairs, *_all(model))
    assert setting.flops
    return base, replace(less, flops=setting.flops(list(setting.batch.items.values()), 0))


def wrong_extrapolation() -> list[str]:
    """Return how `whole` differs from steps that really have as many layers, in small shapes."""
    pairs, more, more_of_tower = 2, 3, 2
    language = gpu_step.Backbone(64, 2 + more, 4, 2, 96, 320, chunk_tokens=512)
    vision = gpu_step.TINY | {"num_hidden_layers": 1 + more_of_tower}
    tower = _VISION | {"depth": 3 + more_of_tower, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4}
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4 + more, "num_attention_heads": 4}
    problems = []
    with (
        mock.patch.dict(gpu_step.BACKBONES, {"0.5b": language}),
        mock.patch.dict(gpu_step.SO400M, vision),
        mock.patch.dict(QWEN, {"Qwen3-VL 2b": (tower, _TEXT | text | {"num_key_value_heads": 2})}),
        mock.patch.dict(globals(), {"_QWEN_CHUNK_TOKENS": 512}),
    ):
        for model in ("0.5b", "Qwen3-VL 2b"):
            found, few = whole(model, pairs)
            right = Costs.of(step(model, pairs, more, more_of_tower).record)
            assert few.chunks > 1 and {"matmul", "tower", "gradients"} <= right.seconds.keys()
            problems += [
                f"{model}: {name} of {part}: {mine[part]} by extrapolation, {real[part]} in truth"
                for (name, mine), real in zip(vars(found).items(), vars(right).values(), strict=True)
                for part in sorted(mine | real)
                # Seconds are sums in another order.
                if not math.isclose(mine[part], real[part], rel_tol=1e-9 if name == "seconds" else 0)
            ]
    return problems


def _few(model: str) -> tuple[int, int]:
    """Return the layers of the smallest model, and of its tower, that has layers of all sorts."""
    return (len(_DEEP) + 1, len(_DEEP)) if model in QWEN else (2, 1)


def _all(model: str) -> tuple[int, int]:
    """Return the layers of the whole model, and of its tower."""
    if model in QWEN:
        vision, text = QWEN[model]
        return text["num_hidden_layers"], vision["depth"]
    return gpu_step.BACKBONES[model.split()[0]].layers, gpu_step.SO400M["num_hidden_layers"]


def _setting(model: str, pairs: int, layers: int, tower_layers: int) -> Setting:
    make = _qwen if model in QWEN else _llave
    return make(model, pairs, layers, tower_layers)


def _llave(model: str, pairs: int, layers: int, tower_layers: int) -> Setting:
    name, _, full = model.partition(" ")
    shape, attention = gpu_step.BACKBONES[name], implementation("varlen")
    changed = replace(shape, layers=layers, lora=shape.lora and not full)
    with (
        mock.patch.dict(gpu_step.BACKBONES, {name: changed}),
        mock.patch.dict(gpu_step.SO400M, {"num_hidden_layers": tower_layers}),
    ):
        setting = gpu_step.Setting(name, pairs, 1, shape.chunk_tokens, dry=False)
        tower = gpu_step.make(FrozenTower, setting.config(attention), _META).eval().requires_grad_(False)
        trained = gpu_step.make_trained(TowerlessLlave, setting, attention, _META)
        recipe = setting.recipe(pairs, kept_chunks=0)
    flops = llave_flops(trained, tower.vision_tower)
    return Setting(tower, trained, recipe, gpu_step.batch_of(trained.config, pairs), shape.chunk_tokens, flops)


def _qwen(model: str, pairs: int, layers: int, tower_layers: int) -> Setting:
    vision, text = QWEN[model]
    architecture = QwenVLArchitecture(
        model_type="qwen3_vl",
        vision=vision
        | {"depth": tower_layers, "deepstack_visual_indexes": [*_DEEP], "out_hidden_size": text["hidden_size"]},
        text=text | {"num_hidden_layers": layers},
    )
    config = QwenVL.config_for(checks.config_of_architecture(architecture), "varlen", "varlen")
    tower = gpu_step.make(FrozenQwenTower, config, _META).eval().requires_grad_(False)
    trained = gpu_step.make(TowerlessQwenVL, config, _META)
    options = ["deepspeed=ds_configs/zero1.json", "data.lanes=1", f"batch.global_batch={pairs}"]
    recipe = load_recipe(gpu_step.ROOT / "pipeline/recipes/qwen3_vl_2b.yaml", options)
    freeze(trained, recipe)
    batch = _qwen_batch(config, pairs)
    return Setting(tower, trained, recipe, batch, _QWEN_CHUNK_TOKENS, qwen_flops(trained, tower.visual))


def _qwen_batch(config: checks.PreTrainedConfig, pairs: int) -> Batch:
    """Return the pairs of `mmeb_like.draw`, with images as Qwen-VL reads them."""
    rng, its = np.random.default_rng(0), checks.patches(config, "", 4096)

    def item(with_image: bool) -> Encoded:
        length = mmeb_like.PROMPT + rng.integers(mmeb_like.SHORTEST_TEXT, mmeb_like.LONGEST_TEXT + 1)
        text = rng.integers(0, 300, length, np.int32)
        if not with_image:
            return Encoded(text)
        rows, columns = its.grid(*mmeb_like.SHAPES[rng.integers(len(mmeb_like.SHAPES))])
        tiles = rng.integers(0, 256, (rows * columns, 3, its.side, its.side), dtype=np.uint8)
        before, after = np.split(text, [mmeb_like.BEFORE_IMAGE])
        grid = Grid(rows // its.merge, columns // its.merge)
        ids = np.concatenate([before, np.full(grid.rows * grid.columns, config.image_token_id, np.int32), after])
        places = positions([len(before), grid, len(after)])
        return Encoded(ids, (Image(tiles, rows * its.side, columns * its.side),), positions=places)

    return mmeb_like.drawn(pairs, rng, item)


def _by_part(counts: Counter[tuple[str, str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for (part, _), count in counts.items():
        total[part] += count
    return total
