"""Which part of a step an operator belongs to, by the frames of Python that call it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType

from transformers.modeling_layers import GradientCheckpointingLayer

PIPELINE = str(Path(__file__).resolve().parents[2] / "pipeline")
# The first that matches the name of a function and its class, from the innermost frame outwards.
_PARTS = {
    "RMSNorm": r"rms_?norm|layer_?norm",
    "RoPE": r"rotary|rotate|rope",
    "LoRA": r"lora|\bpeft\b|AdaptedLinear|AddingLinear|_AddProduct",
    "SwiGLU": r"mlp|silu|swiglu",
}
_TOWERS, _LOSS = ("FrozenTower", "FrozenQwenTower"), f"{PIPELINE}/objectives/contrastive/"


@dataclass(frozen=True)
class Scope:
    """part: a key of _PARTS, tower (frozen), loss, or other.  layer: whether it is inside a layer of a model.

    where: the innermost function of this project, with its module.
    """

    part: str
    layer: bool
    where: str


def scope_of(frames: Iterable[FrameType]) -> Scope:
    """frames: from the innermost outwards."""
    part, layer, where = "", False, ""
    tower = False
    for frame in frames:
        of_code, place = _of_code(frame.f_code)
        part, where = part or of_code, where or place
        tower = tower or frame.f_code.co_qualname.startswith(_TOWERS)
        if not layer and frame.f_code.co_name == "forward":
            layer = isinstance(frame.f_locals.get("self"), GradientCheckpointingLayer)
        if frame.f_code.co_name == "traced_step":
            break
    return Scope("tower" if tower else part or "other", layer, where or "torch")


@cache
def _of_code(code: CodeType) -> tuple[str, str]:
    """Return the part that a function's name tells, or "", and its place if it is the project's, or ""."""
    name = code.co_qualname
    part = next((part for part, pattern in _PARTS.items() if re.search(pattern, name, re.IGNORECASE)), "")
    inside = code.co_filename.startswith(PIPELINE)
    if not part and "/peft/" in code.co_filename:
        part = "LoRA"
    if not part and code.co_filename.startswith(_LOSS) and Path(code.co_filename).stem != "step":
        part = "loss"
    return part, f"{Path(code.co_filename).stem}.{name}" if inside else ""
