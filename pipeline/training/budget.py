"""How large chunks are and how many keep their graph: as the recipe says, or found by measuring the first steps.

No result depends on it, so the run's own steps are the probe: the first takes a chunk of one longest item, each
further one at most twice as much as memory was seen to hold, until it is nine tenths full. Then it is fixed, and
checkpoints carry it.
"""

import resource
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pipeline.config import Batch

FULL = 0.9  # of the device's memory
LARGEST_CHUNK = 16384  # tokens: more do not make a GPU faster, and memory serves better to keep graphs
_ROUND = 128  # tokens


@dataclass(frozen=True)
class Memory:
    """Bytes of a device. total: that it has; base: in use before a step; peak: during it."""

    total: int
    base: int
    peak: int


class Meter:
    """Measures steps, on a GPU; on a CPU the process, whose share of the machine is the device."""

    def __init__(self, local_world: int) -> None:
        accelerator = get_accelerator()
        self._cpu = accelerator.device_name() == "cpu"
        self._total = accelerator.total_memory() // (local_world if self._cpu else 1)

    def start(self) -> None:
        get_accelerator().reset_peak_memory_stats()
        self._base = get_accelerator().memory_allocated()

    def stop(self, largest_chunk: int) -> tuple[Memory, int]:
        """Since `start`, and the tokens of the largest chunk: the most of all ranks, so that all learn the same."""
        accelerator = get_accelerator()
        peak = accelerator.max_memory_allocated()
        if self._cpu:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        most = torch.tensor([self._base, peak, largest_chunk], device=accelerator.current_device_name())
        dist.all_reduce(most, dist.ReduceOp.MAX)
        base, peak, largest = most.tolist()
        return Memory(self._total, base, peak), largest


@dataclass
class Budget:
    """The next step's cut. graph: bytes that a chunk with its graph takes, once known."""

    chunk_tokens: int
    kept_chunks: int
    chunk_is_fixed: bool
    kept_is_fixed: bool
    graph: int = 0

    @classmethod
    def of(cls, batch: Batch, max_tokens: int, saved: dict | None = None) -> "Budget":
        """The recipe's, or as far as it was found when a checkpoint was written."""
        chunk, kept = batch.chunk_tokens, batch.kept_chunks
        fixed = cls(
            max_tokens if chunk == "auto" else chunk, 0 if kept == "auto" else kept, chunk != "auto", kept != "auto"
        )
        return cls(**saved) if saved and not fixed.is_fixed else fixed

    @property
    def is_fixed(self) -> bool:
        return self.chunk_is_fixed and self.kept_is_fixed

    def state(self) -> dict:
        return asdict(self)

    def measured(self, memory: Memory, largest: int) -> None:
        """Learn from a step that was cut so. largest: tokens of its largest chunk, on any rank."""
        room, used = FULL * memory.total - memory.base, max(memory.peak - memory.base, 1)
        if not self.chunk_is_fixed:
            # What does not grow with the chunk is counted as if it did: the estimate errs on the safe side.
            fits = int(largest * room / used)
            larger = min(2 * self.chunk_tokens, fits, LARGEST_CHUNK) // _ROUND * _ROUND
            # A batch that does not fill a chunk tells nothing of larger ones.
            if larger > 1.1 * self.chunk_tokens and largest > 0.7 * self.chunk_tokens:
                self.chunk_tokens = larger
                return
            self.chunk_tokens = max(min(self.chunk_tokens, fits), _ROUND)
            self.chunk_is_fixed = True
        if not self.kept_is_fixed:
            self.graph = self.graph or used
            more = int((room - used) // self.graph)
            if more < 0 or (self.kept_chunks and not more):
                self.kept_chunks = max(self.kept_chunks + more, 0)
                self.kept_is_fixed = True
            else:
                # The first costs nothing: its graph is gone before a chunk is embedded again.
                self.kept_chunks += 1 if not self.kept_chunks else min(more, self.kept_chunks)
