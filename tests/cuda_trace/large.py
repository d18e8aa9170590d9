"""Steps of LLaVE's three sizes in their real shapes, with few layers.

All layers but the last are alike. So a step with one layer more tells what a layer costs, exactly, and what the whole
model would.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
from steps import traced_step
from tracer import Record, Tracer, faked

from benchmarks import gpu_step
from pipeline.models.attention import implementation
from pipeline.models.chunks import CachedFeatures, plan_chunks
from pipeline.models.llave.flops import step_flops
from pipeline.models.llave.model import FrozenTower, TowerlessLlave

MODELS = ("0.5b", "2b", "7b", "7b full")  # 7b has adapters, "7b full" has none
_LAYERS, _TOWER_LAYERS = 2, 1
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


def step(model: str, pairs: int, more_layers: int = 0, more_tower_layers: int | None = None) -> Step:
    """Trace a step of a model with few layers.

    more_layers: of the language model, and of the tower if `more_tower_layers` does not say otherwise.
    """
    more_of_tower = more_layers if more_tower_layers is None else more_tower_layers
    with _setting(model, pairs, _LAYERS + more_layers, _TOWER_LAYERS + more_of_tower) as setting:
        tower, trained = _models(setting)
        recipe = setting.recipe(pairs, kept_chunks=0)
    tracer = Tracer()
    faked(tower, tracer)
    faked(trained, tracer)
    batch = gpu_step.batch_of(trained.config, pairs)
    items = list(batch.items.values())
    features = CachedFeatures(tower, recipe.batch.features_mb << 20)
    record = traced_step(tracer, trained, recipe, batch, features, cut=(setting.chunk_tokens, 0))
    chunks = plan_chunks(items, setting.chunk_tokens, torch.device("cpu"), padded=False)
    return Step(record, 0.0, gpu_step.tokens_of(items), len(chunks))


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
    layers = gpu_step.BACKBONES[model.split()[0]].layers - _LAYERS
    tower_layers = gpu_step.SO400M["num_hidden_layers"] - _TOWER_LAYERS
    base, of_layer = Costs.of(less.record), layer(less, more)
    for total, each in zip(vars(base).values(), vars(of_layer).values(), strict=True):
        for part, x in each.items():
            total[part] += x * (tower_layers if part == "tower" else layers)
    with _setting(model, pairs) as setting:
        tower, trained = _models(setting)
    items = list(gpu_step.batch_of(trained.config, pairs).items.values())
    return base, replace(less, flops=step_flops(trained, tower.vision_tower)(items, 0))


def wrong_extrapolation() -> list[str]:
    """Return how `whole` differs from a step that really has as many layers, in small shapes."""
    model, pairs, more, more_of_tower = "0.5b", 2, 3, 2
    language = gpu_step.Backbone(64, _LAYERS + more, 4, 2, 96, 320, chunk_tokens=512)
    vision = gpu_step.TINY | {"num_hidden_layers": _TOWER_LAYERS + more_of_tower}
    with mock.patch.dict(gpu_step.BACKBONES, {model: language}), mock.patch.dict(gpu_step.SO400M, vision):
        found, few = whole(model, pairs)
        right = Costs.of(step(model, pairs, more, more_of_tower).record)
    assert few.chunks > 1 and {"matmul", "tower", "gradients"} <= right.seconds.keys()
    return [
        f"{name} of {part}: {mine[part]} by extrapolation, {real[part]} in truth"
        for (name, mine), real in zip(vars(found).items(), vars(right).values(), strict=True)
        for part in sorted(mine | real)
        # Seconds are sums in another order.
        if not math.isclose(mine[part], real[part], rel_tol=1e-9 if name == "seconds" else 0)
    ]


@contextmanager
def _setting(model: str, pairs: int, layers: int = 0, tower_layers: int = 0) -> Iterator[gpu_step.Setting]:
    """Set the benchmark's shapes to those of a model, with so many layers if given, and return its setting."""
    name, _, full = model.partition(" ")
    shape, vision = gpu_step.BACKBONES[name], dict(gpu_step.SO400M)
    gpu_step.BACKBONES[name] = replace(shape, layers=layers or shape.layers, lora=shape.lora and not full)
    gpu_step.SO400M["num_hidden_layers"] = tower_layers or vision["num_hidden_layers"]
    try:
        yield gpu_step.Setting(name, pairs, 1, shape.chunk_tokens, dry=False)
    finally:
        gpu_step.BACKBONES[name] = shape
        gpu_step.SO400M.update(vision)


def _models(setting: gpu_step.Setting) -> tuple[FrozenTower, TowerlessLlave]:
    """Return both parts on the meta device."""
    attention = implementation("varlen")
    tower = gpu_step.make(FrozenTower, setting.config(attention), _META).eval().requires_grad_(False)
    return tower, gpu_step.make_trained(TowerlessLlave, setting, attention, _META)


def _by_part(counts: Counter[tuple[str, str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for (part, _), count in counts.items():
        total[part] += count
    return total
