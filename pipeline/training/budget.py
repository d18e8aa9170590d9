"""The chunk size and the number of cached graphs: set by the recipe, or found by measuring the first steps.

They change results in the last bits at most, so a run measures during its own steps. The first step uses chunks of one
longest item. Each further step at most doubles the chunk size, until memory is 90 % full. Then the budget is fixed, and
checkpoints store it. A rank that still runs out of memory cannot continue, because the others wait for it in a
collective. It records a smaller budget for the next start.
"""

import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from pydantic import TypeAdapter

from pipeline.config import Batch
from pipeline.errors import PipelineError, is_out_of_memory
from pipeline.storage.atomic import write_file
from pipeline.training.conditions import changes

FULL = 0.9  # of the memory available to torch's allocator
LARGEST_CHUNK = 16384  # tokens; a larger chunk is no faster, and cached graphs make better use of the memory
MEMORY = "the device's memory"  # a condition's name; the value is in bytes
NOTE = "budget.json"  # in the run directory
_ROUND = 128  # tokens


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

    def peak(self) -> int:
        """Return this rank's peak in bytes: allocated since `start` on a GPU; on a CPU resident, since its begin."""
        if self._cpu:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return int(get_accelerator().max_memory_allocated())

    def stop(self, largest_chunk: int, items: int) -> tuple[Memory, int, int]:
        """Return the memory since `start`, largest_chunk (tokens) and items, all as maxima over ranks. Collective."""
        accelerator, peak, others = get_accelerator(), self.peak(), 0
        if not self._cpu:
            free, total = torch.cuda.mem_get_info()
            # CUDA's context, NCCL's buffers and other processes: not available to the allocator.
            others = total - free - torch.cuda.memory_reserved()
        ours = [self._base, peak, accelerator.memory_allocated(), others, largest_chunk, items]
        most = torch.tensor(ours, device=accelerator.current_device_name())
        dist.all_reduce(most, dist.ReduceOp.MAX)
        base, peak, rest, others, largest_chunk, items = most.tolist()
        return Memory(self.total - others, base, peak, rest), largest_chunk, items


@dataclass
class Budget:
    """How the next step is split into chunks.

    auto: which of `chunk_tokens` and `kept_chunks` are "auto" in the recipe.  longest: maximum tokens of an item.
    graph: bytes of a full chunk with its graph; 0 until measured.
    """

    chunk_tokens: int
    kept_chunks: int
    chunk_is_fixed: bool
    kept_is_fixed: bool
    auto: list[str]
    longest: int
    graph: int = 0

    @classmethod
    def of(cls, batch: Batch, max_tokens: int, before: "Budget | None" = None) -> "Budget":
        """Return the recipe's budget. An `auto` value starts at its minimum, or where the search in `before` ended."""
        auto = [name for name in ("chunk_tokens", "kept_chunks") if getattr(batch, name) == "auto"]
        budget = cls(
            max_tokens if batch.chunk_tokens == "auto" else batch.chunk_tokens,
            0 if batch.kept_chunks == "auto" else batch.kept_chunks,
            "chunk_tokens" not in auto,
            "kept_chunks" not in auto,
            auto,
            max_tokens,
        )
        if before:
            # A chunk size stays valid with as many cached graphs or fewer; a graph count only with the same chunk size.
            if "chunk_tokens" in auto and "chunk_tokens" in before.auto and budget.kept_chunks <= before.kept_chunks:
                budget.chunk_tokens, budget.chunk_is_fixed = before.chunk_tokens, before.chunk_is_fixed
            if "kept_chunks" in auto and "kept_chunks" in before.auto and budget.chunk_tokens == before.chunk_tokens:
                budget.kept_chunks, budget.kept_is_fixed = before.kept_chunks, before.kept_is_fixed
                budget.graph = before.graph
        return budget

    @property
    def is_fixed(self) -> bool:
        return self.chunk_is_fixed and self.kept_is_fixed

    def measured(self, memory: Memory, largest: int, items: int) -> None:
        """Update the budget from a step that used it.

        largest: tokens of the step's largest chunk.  items: items in the step.  Both are maxima over ranks.
        """
        room = FULL * memory.total - memory.rest
        used: float = max(memory.peak - memory.base, 1)
        if not self.chunk_is_fixed:
            # Memory that does not grow with the chunk is counted as if it did, so the estimate is conservative.
            fits = int(largest * room / used)
            larger = min(2 * self.chunk_tokens, fits, LARGEST_CHUNK) // _ROUND * _ROUND
            # A batch that does not fill a chunk says nothing about larger chunks.
            if larger > 1.1 * self.chunk_tokens and largest > 0.7 * self.chunk_tokens:
                self.chunk_tokens = larger
                return
            self.chunk_tokens = max(min(self.chunk_tokens, fits) // _ROUND, 1) * _ROUND
            self.chunk_is_fixed = True
        if not self.kept_is_fixed:
            # Later chunks may be full, so scale to a full chunk, by 2 at most: emptier chunks mean a small batch.
            used *= min(max(self.chunk_tokens / largest, 1), 2)
            self.graph = self.graph or int(used)
            more = int((room - used) // self.graph)
            if more < 0 or (self.kept_chunks and not more) or self.kept_chunks >= items:  # at `items` all are cached
                self.kept_chunks = max(self.kept_chunks + min(more, 0), 0)
                self.kept_is_fixed = True
            else:
                # The first cached graph costs nothing: it is freed before any chunk is recomputed.
                self.kept_chunks += 1 if not self.kept_chunks else min(more, self.kept_chunks)

    def smaller(self) -> "Budget | None":
        """Return the budget to try after running out of memory: half the graphs or tokens; None if neither helps."""
        if self.kept_chunks > 1 and ("kept_chunks" in self.auto or "chunk_tokens" not in self.auto):
            return replace(self, kept_chunks=self.kept_chunks // 2, chunk_is_fixed=True, kept_is_fixed=True)
        if self.chunk_tokens <= self.longest:  # a chunk holds at least one item
            return None
        half = replace(self, chunk_tokens=max(self.chunk_tokens // 2, self.longest), chunk_is_fixed=True)
        # Search again for the number of graphs that fit with the smaller chunk.
        return replace(half, kept_chunks=0, kept_is_fixed=False, graph=0) if "kept_chunks" in self.auto else half

    def __str__(self) -> str:
        return f"batch.chunk_tokens={self.chunk_tokens} batch.kept_chunks={self.kept_chunks}"


def record_of(budget: Budget, conditions: dict) -> dict:
    """Return a budget as plain values, for checkpoints and the run directory's note."""
    return {"budget": asdict(budget), "conditions": conditions}


def restored_budget(run: Path, checkpoint: dict | None, conditions: dict) -> Budget | None:
    """Return the budget to restore; None if there is none for these conditions.

    The note of a start that ran out of memory after the newest checkpoint takes precedence over the checkpoint.
    checkpoint: the result of `record_of` in the checkpoint.
    conditions: by name, what memory depends on, including `MEMORY`.
    """
    noted = None
    with suppress(OSError, ValueError, RecursionError):
        noted = json.loads((run / NOTE).read_text())
    for kept in cast(tuple[Any, Any], (noted, checkpoint)):
        # Ignore content in another form, for example from another version.
        with suppress(ValueError, TypeError, KeyError, AttributeError, PipelineError):
            if _are_alike(kept["conditions"], conditions):
                budget = TypeAdapter(Budget).validate_json(json.dumps(kept["budget"]), strict=True)
                if min(budget.chunk_tokens, budget.longest) > 0 and min(budget.kept_chunks, budget.graph) >= 0:
                    return budget
    return None


@contextmanager
def out_of_memory_noted(run: Path, step: int, budget: Budget, conditions: dict) -> Iterator[None]:
    """Turn an out-of-memory error in step number `step` into a PipelineError that says what to do.

    If the recipe's `auto` allows a smaller budget, it is written to the run directory, and the next start uses it.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        advice = _advice(run, budget, conditions)
        raise PipelineError(
            f"out of memory in step {step} with {budget}: {advice}batch.activation_checkpointing=true and more GPUs "
            "each need less memory; so does deepspeed=ds_configs/zero3_offload.json, if the model supports ZeRO 3, in "
            "a new run directory"
        ) from error


def _advice(run: Path, budget: Budget, conditions: dict) -> str:
    smaller = budget.smaller()
    if smaller is None:
        return "a chunk holds only one item of model.max_tokens; "
    for name in ("chunk_tokens", "kept_chunks"):
        if name not in budget.auto and getattr(smaller, name) != getattr(budget, name):
            return f"start the run again with batch.{name}={getattr(smaller, name)}; if that is still too much, "
    try:
        write_file(run / NOTE, json.dumps(record_of(smaller, conditions)).encode())
    except OSError:
        return f"start the run again with {smaller}; if that is still too much, "
    return f"the next start uses {smaller}; if that is still too much, "


def _are_alike(before: dict, now: dict) -> bool:
    """Whether the conditions are equal, up to 5 % of memory: equal machines differ a little, and FULL leaves more."""
    memory = {MEMORY: before[MEMORY]} if math.isclose(before.get(MEMORY, 0), now.get(MEMORY, 0), rel_tol=0.05) else {}
    return not changes(before, now | memory)
