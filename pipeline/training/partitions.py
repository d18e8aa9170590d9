"""Load weights into ZeRO-3 partitions: each rank reads only its own part of every tensor.

With transformers' loader the first rank would read all weights, and send every full tensor to all other ranks.
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
    """The attributes that DeepSpeed adds to a ZeRO-3 parameter.  ds_tensor: this rank's partition, flat."""

    ds_shape: torch.Size
    ds_numel: int
    ds_tensor: torch.Tensor


def load_partitioned(
    family: TrainingInterface, recipe: Recipe, path: str, attention: str, ds_config: dict[str, Any]
) -> torch.nn.Module:
    """Load a model from a folder or hub name, in transformers' format, partitioned over all ranks.

    Raises PipelineError if tensors are missing, have a wrong shape, or are not in .safetensors files, and for
    unsupported ZeRO-3 options.
    """
    zero = ds_config["zero_optimization"]
    if zero.get("zero_hpz_partition_size", 1) > 1 or zero.get("zero_quantized_weights"):
        raise PipelineError("zero_hpz_partition_size and zero_quantized_weights are not supported: remove them")
    if zero.get("offload_param", {}).get("device") == "nvme":
        raise PipelineError("offload_param to nvme is not supported: use cpu, or none")
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=ds_config):
        model = family.empty(recipe, path, attention)
    # Init cast the rotary frequencies to bf16, too coarse for positions beyond a few hundred: compute them again.
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
    """Copy this rank's part of a tensor, from flat index rank * size on, reading only the rows that contain it."""
    shape = stored.get_shape()
    if shape != list(parameter.ds_shape):
        raise PipelineError(f"{file}: {name} has shape {shape}, but its config needs {list(parameter.ds_shape)}")
    partition = parameter.ds_tensor
    start = partition.numel() * dist.get_rank()
    stop = min(start + partition.numel(), parameter.ds_numel)
    partition.data.zero_()  # padding past the tensor's end
    if start < stop:
        row = parameter.ds_numel // shape[0]
        first = start // row
        rows = stored[first : -(-stop // row)].flatten()
        refuse_not_finite(file, name, rows)
        partition.data[: stop - start].copy_(rows[start - first * row : stop - first * row])
