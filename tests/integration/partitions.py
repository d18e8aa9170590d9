"""`python partitions.py MODEL DS_CONFIG WHOLE [key=value ...]`: load MODEL partitioned by ZeRO-3; compare with WHOLE.

Each rank prints as JSON the parameters and buffers that differ, and the fraction of the weights that it read.
"""

import json
import sys

import deepspeed
import torch
import torch.distributed as dist
from exactness import recipe_of
from limits import HANG_MINUTES
from safetensors import safe_open

from pipeline.config import load_ds_config
from pipeline.distributed import end_distributed, start_distributed
from pipeline.models.registry import training_of
from pipeline.training import partitions

read = []


class Counting:
    """A tensor in a file that counts how much of it is read."""

    def __init__(self, stored) -> None:
        self.stored, self.get_shape = stored, stored.get_shape

    def __getitem__(self, rows: slice) -> torch.Tensor:
        part = self.stored[rows]
        read.append(part.numel())
        return part


class CountingFile:
    def __init__(self, *arguments: str) -> None:
        self.file = safe_open(*arguments)

    def __enter__(self) -> "CountingFile":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def keys(self) -> list[str]:
        return self.file.keys()

    def get_slice(self, name: str) -> Counting:
        return Counting(self.file.get_slice(name))


def main() -> None:
    model, config, whole, *given = sys.argv[1:]
    start_distributed(timeout_minutes=HANG_MINUTES)
    fields = (f"deepspeed={config}", "batch.global_batch=12", "data.lanes=12", "precision=bf16")
    recipe = recipe_of((*fields, *given), model)
    family = training_of(recipe)
    ds_config = load_ds_config(recipe, dist.get_world_size())
    partitions.safe_open = CountingFile
    loaded = partitions.load_partitioned(family, recipe, model, "sdpa", ds_config)
    expected = family.load(recipe, whole, "sdpa")
    parameters, count = dict(expected.named_parameters()), 0
    same = {}
    for name, parameter in loaded.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            same[name] = torch.equal(parameter.detach(), parameters.pop(name).detach())
            count += parameter.numel()
    buffers = dict(expected.named_buffers())
    for name, buffer in loaded.named_buffers():
        other = buffers.pop(name)
        same[name] = buffer.dtype == other.dtype and torch.equal(buffer, other)
    differing = [name for name, equal in same.items() if not equal] + [*parameters, *buffers]
    print(json.dumps({"differing": differing, "read": sum(read) / count}))
    end_distributed()


if __name__ == "__main__":
    main()
