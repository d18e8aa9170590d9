"""Measure a step's device memory."""

import resource
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator


@dataclass(frozen=True)
class Memory:
    """Bytes of a device's memory.

    total: available to torch's allocator.  base: in use before a step.  peak: maximum during the step.
    rest: in use after it; the first step allocates AdamW's moments.
    """

    total: int
    base: int
    peak: int
    rest: int


class Meter:
    """Measures the memory of steps on a GPU. On a CPU the device is the process's share of the machine's memory.

    total: bytes of the smallest rank's device.  The constructor is collective.
    """

    def __init__(self, local_world: int) -> None:
        accelerator = get_accelerator()
        self._cpu = accelerator.device_name() == "cpu"
        total = accelerator.total_memory() // (local_world if self._cpu else 1)
        least = torch.tensor(total, device=accelerator.current_device_name())
        dist.all_reduce(least, dist.ReduceOp.MIN)
        self.total = int(least)

    def start(self) -> None:
        get_accelerator().reset_peak_memory_stats()
        self._base = get_accelerator().memory_allocated()

    def stop(self, largest_chunk: int, items: int) -> tuple[Memory, int, int]:
        """Return the memory since `start`, largest_chunk (tokens) and items, all as maxima over ranks. Collective."""
        accelerator = get_accelerator()
        if self._cpu:
            peak, others = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, 0
        else:
            peak = accelerator.max_memory_allocated()
            free, total = torch.cuda.mem_get_info()
            # CUDA's context, NCCL's buffers and other processes: not available to the allocator.
            others = total - free - torch.cuda.memory_reserved()
        ours = [self._base, peak, accelerator.memory_allocated(), others, largest_chunk, items]
        most = torch.tensor(ours, device=accelerator.current_device_name())
        dist.all_reduce(most, dist.ReduceOp.MAX)
        base, peak, rest, others, largest_chunk, items = most.tolist()
        return Memory(self.total - others, base, peak, rest), largest_chunk, items
