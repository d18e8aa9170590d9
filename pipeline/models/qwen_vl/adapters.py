"""Merge published adapters of VLM2Vec into the Qwen2-VL that they were trained on.

VLM2Vec/VLM2Vec-V2.0 and TIGER-Lab/VLM2Vec-Qwen2VL-7B on the hub hold adapters, by experiments/examples/qwen2vl and
issue 125 of github.com/TIGER-AI-Lab/VLM2Vec. Its code makes them with peft, as DoRA (arXiv 2402.09353;
`MMEBModel.build` of src/model/model.py, commit 6e1e1d4).
"""

import re
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import PipelineError, disk_errors
from pipeline.models.files import ADAPTERS, Tensors, fetched, read_json, read_tensors
from pipeline.models.qwen_vl import checks
from pipeline.models.qwen_vl.folder import save_folder
from pipeline.models.qwen_vl.model import QwenVL
from pipeline.storage.atomic import replacing

_PART = re.compile(r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)")
# Of peft's fields, those whose other values mean another sum; see https://huggingface.co/docs/peft.
_EXPECTED = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "alpha_pattern": {}, "modules_to_save": None}


def merge_vlm2vec(source: str, out: Path, base: str | None = None) -> None:
    """Write the adapters of VLM2Vec in a folder or at a hub name, merged, as a folder with VLM2Vec's prompt.

    base: folder or hub name of the Qwen2-VL; None is the one that the adapters name.
    Raises PipelineError if `out` exists, and for adapters that are none of a Qwen-VL or of a kind not supported.
    """
    if out.exists():
        raise PipelineError(f"{out} is there already: name another folder, or delete it")
    folder = fetched(source, adapters=True)
    settings = read_json(folder / "adapter_config.json")
    for name, expected in _EXPECTED.items():
        if (value := settings.get(name) or expected) != expected:
            raise PipelineError(f"{source}: {name}={value!r} in its adapter_config.json is not supported")
    if isinstance(start := settings.get("init_lora_weights"), str) and start.lower() != "gaussian":
        # Such as pissa and olora, for which peft takes the initial product from the base model's weights.
        raise PipelineError(f"{source}: init_lora_weights={start!r} in its adapter_config.json is not supported")
    if type(alpha := settings.get("lora_alpha")) not in (int, float):
        raise PipelineError(f"{source}: lora_alpha={alpha!r} in its adapter_config.json is no number: copy it again")
    base = base or settings.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise PipelineError(f"{source}: its adapter_config.json names no base model: name it with --base")
    config = checks.load_config(base)
    setattr(config, checks.SETTINGS, {"prompt": "vlm2vec"})
    model = QwenVL.load(base, "auto", config)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    parts: dict[str, Tensors] = {}
    for name, tensor in read_tensors(folder / ADAPTERS).items():
        if not (found := _PART.fullmatch(name)) or (layer := QwenVL.own_name(f"{found[1]}.weight")) not in weights:
            raise PipelineError(f"{source}: {name} is an adapter of no layer in {base}: name its --base")
        parts.setdefault(layer, {})[found[2].removesuffix(".weight")] = tensor
    for layer, part in parts.items():
        if not part.keys() >= {"lora_A", "lora_B"}:
            raise PipelineError(f"{source}: the adapter of {layer} is not whole: copy or download it again")
        weights[layer] = _merged(weights[layer], part, settings)
    with disk_errors(out), replacing(out) as partial:
        save_folder(model, weights, base, partial, base)


def _merged(weight: torch.Tensor, part: Tensors, settings: dict[str, Any]) -> torch.Tensor:
    """Return W + s B A; with DoRA, each of its rows has the stored length. s is alpha / r, or alpha / sqrt(r)."""
    low, high = part["lora_A"].double(), part["lora_B"].double()
    scale = settings["lora_alpha"] / (len(low) ** 0.5 if settings.get("use_rslora") else len(low))
    total = weight.double() + scale * (high @ low)
    if (lengths := part.get("lora_magnitude_vector")) is not None:
        total *= (lengths.double().flatten() / total.norm(dim=1))[:, None]
    return total.to(weight.dtype)
