"""Weights -> ZeRO-3's partitions: of every tensor a rank reads its own part, and no other.

transformers would have the first rank read all of it, and send every tensor whole to all others.
"""

from pathlib import Path
from typing import Any, Protocol, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors import safe_open
from transformers.initialization import no_init_weights

from pipeline.config import Recipe
from pipeline.errors import PipelineError
from pipeline.models.family import TrainingInterface
from pipeline.models.files import Stored, fetched, refuse_more_layers, refuse_not_finite, survey


class _Partitioned(Protocol):
    """What DeepSpeed adds to a parameter of ZeRO-3. ds_tensor: this rank's part, flat."""

    ds_shape: torch.Size
    ds_numel: int
    ds_tensor: torch.Tensor


def load_partitioned(
    family: TrainingInterface, recipe: Recipe, path: str, attention: str, ds_config: dict[str, Any]
) -> torch.nn.Module:
    """The model of a folder or hub name in transformers' format, partitioned over all ranks.

    Raises PipelineError where tensors are missing, misshapen, or not in .safetensors files, and for partitions
    of a kind that is not filled here.
    """
    zero = ds_config["zero_optimization"]
    if zero.get("zero_hpz_partition_size", 1) > 1 or zero.get("zero_quantized_weights"):
        raise PipelineError("zero_hpz_partition_size and zero_quantized_weights are not supported: remove them")
    if zero.get("offload_param", {}).get("device") == "nvme":
        raise PipelineError("offload_param to nvme is not supported: use cpu, or none")
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=ds_config):
        model = family.empty(recipe, path, attention)
    # Init made the frequencies of rotary embeddings bf16, with which positions beyond some hundred are others.
    module: Any
    for module in list(model.modules()):
        if hasattr(module, "rotary_emb"):
            module.rotary_emb = type(module.rotary_emb)(module.config).to(get_accelerator().current_device_name())
    wanted, stored = dict(model.named_parameters()), _stored(path)
    refuse_more_layers(path, stored, {name for name in stored if family.own_name(name) not in wanted})
    for file in sorted({tensor.file for tensor in stored.values()}):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                if (own := family.own_name(name)) in wanted:
                    _fill(cast(_Partitioned, wanted.pop(own)), tensors.get_slice(name), file, name)
    if wanted:
        raise PipelineError(f"{path} lacks {len(wanted)} of the model's weights, {min(wanted)} the first")
    return model


def _stored(path: str) -> dict[str, Stored]:
    folder = fetched(path)
    if not (files := sorted(folder.glob("*.safetensors"))):
        raise PipelineError(f"{path} has no .safetensors files, of which ranks read parts under ZeRO-3")
    known = any((folder / f"model.safetensors{suffix}").is_file() for suffix in ("", ".index.json"))
    return survey(folder, None if known else files)


def _fill(parameter: _Partitioned, stored: Any, file: Path, name: str) -> None:
    """Copy this rank's part of a tensor, flat from rank * size on, out of the rows that hold it."""
    shape = stored.get_shape()
    if shape != list(parameter.ds_shape):
        raise PipelineError(f"{file}: {name} is {shape}, but by its config {list(parameter.ds_shape)}")
    partition = parameter.ds_tensor
    start = partition.numel() * dist.get_rank()
    stop = min(start + partition.numel(), parameter.ds_numel)
    partition.data.zero_()  # what is past the tensor's end
    if start < stop:
        row = parameter.ds_numel // shape[0]
        first = start // row
        rows = stored[first : -(-stop // row)].flatten()
        refuse_not_finite(file, name, rows)
        partition.data[: stop - start].copy_(rows[start - first * row : stop - first * row])
