"""Compare the memory plan of a chunk with the device tensors that are alive while a GPU would run it.

Saved for the backward pass, at the peak of a pass without gradient, and at the peak of both passes.
"""

from dataclasses import dataclass
from typing import Any

import streams
import torch
from memory_shapes import LLAVE, LiveBytes, llave_chunk, qwen_chunk, qwen_config
from stand_ins import attention_kernels
from torch import Tensor, nn
from tracer import CUDA, Tracer, faked

from pipeline.config import Lora
from pipeline.models.attention import implementation
from pipeline.models.checkpointing import checkpoint_layers
from pipeline.models.chunks import Packed
from pipeline.models.family import ChunkMemory
from pipeline.models.llave import memory as llave_memory
from pipeline.models.llave.model import FrozenTower, Llave, TowerlessLlave
from pipeline.models.lora import add_adapters
from pipeline.models.memory import Execution
from pipeline.models.qwen_vl import memory as qwen_memory
from pipeline.models.qwen_vl.model import FrozenQwenTower, QwenVL, TowerlessQwenVL

CASES = (
    *(f"memory, {kind}, tower trained" for kind in ("llave", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")),
    *(f"memory, {kind}, tower frozen, LoRA" for kind in ("llave", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")),
    *(f"memory, {kind}, tower trained, checkpointing" for kind in ("llave", "qwen3_vl")),
)


@dataclass(frozen=True)
class Held:
    """Bytes alive: of the tower's output, at the peaks, and of the graph.  both: with the backward pass."""

    features: int
    forward: int
    graph: int
    both: int


def wrong(case: str) -> list[str]:
    """Return where the plan of one of CASES differs from the truth."""
    _, kind, way = case.split(", ", 2)
    trained, checkpointing = "trained" in way, "checkpointing" in way
    how = Execution(2, fused=True, padded=False, checkpointing=checkpointing)
    model, tower, packed, planned = _llave(how, trained) if kind == "llave" else _qwen(kind, how, trained)
    if "LoRA" in way:
        add_adapters(model.language_model, Lora(rank=4), 0)
    if checkpointing:
        checkpoint_layers(model)
    held = _held(model, tower, packed)
    both = planned.graph + planned.backward
    # LoRA's small products are not in the plan. The backward pass needs less than is assumed.
    pairs = {
        "features": (planned.features, held.features if tower else planned.features, 1.01),
        "a pass without gradient": (planned.forward, held.forward, 1.05),
        "the graph": (planned.graph, held.graph, 1.05),
        "both passes": (both, held.both, 1.2),
    }
    return [
        f"{what}: {plan / held:.3f} of the {held:,} bytes held"
        for what, (plan, held, most) in pairs.items()
        if not 0.97 <= plan / held <= most
    ]


def _llave(how: Execution, trained: bool) -> tuple[nn.Module, nn.Module | None, Packed, ChunkMemory]:
    config = LLAVE["small"]
    config._attn_implementation = {"text_config": implementation("varlen"), "vision_config": "sdpa"}
    packed, tokens, tiles = llave_chunk(config, 40)
    with torch.device("meta"):
        model, tower = (Llave(config), None) if trained else (TowerlessLlave(config), FrozenTower(config))
    return model, tower, packed, llave_memory.chunk_memory(config, tokens, tiles, how, tower_trained=trained)


def _qwen(kind: str, how: Execution, trained: bool) -> tuple[nn.Module, nn.Module | None, Packed, ChunkMemory]:
    config = qwen_config(kind)
    QwenVL.config_for(config, "varlen", "varlen")
    packed, tokens = qwen_chunk(config, 64)
    with torch.device("meta"):
        model, tower = (QwenVL(config), None) if trained else (TowerlessQwenVL(config), FrozenQwenTower(config))
    return model, tower, packed, qwen_memory.chunk_memory(config, tokens, how, tower_trained=trained)


def _held(model: Any, tower: Any, packed: Packed) -> Held:
    tracer, features, of_tower, peak = Tracer(), None, 0, 0
    faked(model.to(torch.bfloat16), tracer)
    if tower is not None:
        faked(tower.to(torch.bfloat16).eval().requires_grad_(False), tracer)
    with tracer, attention_kernels(tracer), streams.stand_ins(lambda: None):
        packed = packed.to(CUDA)
        if tower is not None:
            with LiveBytes("cuda") as live:
                features = tower.features_of(None, packed)
            of_tower, peak = live.now, live.peak
        with torch.no_grad(), LiveBytes("cuda") as live:
            model(packed, True, features)
        forward = max(peak, live.peak + of_tower)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)  # gradients are counted separately
        with LiveBytes("cuda") as live:
            rows: Tensor = model(packed, True, features)
            graph = live.now + of_tower
            rows.sum().backward()
    return Held(of_tower, forward, graph, live.peak + of_tower)
