"""Load weights into ZeRO-3 partitions: each rank reads only its own part of every tensor.

With transformers' loader the first rank would read all weights, and send every full tensor to all other ranks.
"""

from pathlib import Path
from typing import Any, Protocol, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups
from safetensors import safe_open
from transformers.initialization import no_init_weights

from pipeline.config import Recipe
from pipeline.errors import PipelineError
from pipeline.models.family import TrainingInterface
from pipeline.models.files import Stored, fetched, refuse_more_layers, refuse_not_finite, survey


def check_nodes(zero: dict[str, Any], ranks: int) -> None:
    """Raise PipelineError if zero_hpz_partition_size does not divide the `ranks` of a node: a group would span nodes.

    zero: a DeepSpeed config's "zero_optimization".
    """
    if ranks % (size := zero.get("zero_hpz_partition_size") or 1):
        raise PipelineError(
            f"zero_optimization.zero_hpz_partition_size={size} does not divide the {ranks} processes of a node: set it "
            f"to {ranks} in a copy of the DeepSpeed config, or use deepspeed=zero3.json"
        )


class _Partitioned(Protocol):
    """The attributes that DeepSpeed adds to a ZeRO-3 parameter.

    ds_tensor: this rank's partition, flat.  ds_secondary_tensor: its partition within a node, if there is one.
    """

    ds_shape: torch.Size
    ds_numel: int
    ds_tensor: torch.Tensor
    ds_secondary_tensor: torch.Tensor | None


def load_partitioned(
    family: TrainingInterface, recipe: Recipe, path: str, attention: str, ds_config: dict[str, Any]
) -> torch.nn.Module:
    """Load a model from a folder or hub name, in transformers' format, partitioned over all ranks.

    Raises PipelineError if tensors are missing, have a wrong shape, or are not in .safetensors files.
    """
    # DeepSpeed creates the groups of nodes once, and refuses to do it again for a process's second engine.
    is_by_node = ds_config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1
    node = groups._get_zero_param_intra_parallel_group() if is_by_node else None
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=ds_config, zero_param_parallel_group=node):
        model = family.empty(recipe, path, attention)
    # Init cast the rotary frequencies to bf16, too coarse for positions beyond a few hundred: compute them again.
    module: Any
    for module in list(model.modules()):
        for name in ("rotary_emb", "rotary_pos_emb"):  # of language models, of vision towers
            if hasattr(module, name):
                made = type(getattr(module, name))(module.config)
                setattr(module, name, made.to(get_accelerator().current_device_name()))
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
    # With zero_hpz_partition_size, Init also partitioned the uninitialized tensor within the node. Without that second
    # partition the first forward pass makes it anew. DeepSpeed itself discards it after each step, and after loading a
    # checkpoint, but only for trained parameters.
    parameter.ds_secondary_tensor = None
    if start < stop:
        row = parameter.ds_numel // shape[0]
        first = start // row
        rows = stored[first : -(-stop // row)].flatten()
        refuse_not_finite(file, name, rows)
        partition.data[: stop - start].copy_(rows[start - first * row : stop - first * row])
