"""What a step takes of a device's memory."""

import resource
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator


@dataclass(frozen=True)
class Memory:
    """Bytes of a device. total: that torch's allocator can have; base: in use before a step; peak: during it.

    rest: after it. The first step leaves AdamW's moments.
    """

    total: int
    base: int
    peak: int
    rest: int


class Meter:
    """Measures steps, on a GPU; on a CPU the process, whose share of the machine is the device.

    total: bytes of the smallest rank's device. Every rank makes one.
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
        """Since `start`, with the tokens of the largest chunk and the items: of all ranks the most, that all learn."""
        accelerator = get_accelerator()
        if self._cpu:
            peak, others = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, 0
        else:
            peak = accelerator.max_memory_allocated()
            free, total = torch.cuda.mem_get_info()
            # CUDA's context, NCCL's buffers, other processes: the allocator cannot have it.
            others = total - free - torch.cuda.memory_reserved()
        ours = [self._base, peak, accelerator.memory_allocated(), others, largest_chunk, items]
        most = torch.tensor(ours, device=accelerator.current_device_name())
        dist.all_reduce(most, dist.ReduceOp.MAX)
        base, peak, rest, others, largest_chunk, items = most.tolist()
        return Memory(self.total - others, base, peak, rest), largest_chunk, items
