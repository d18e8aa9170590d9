"""The size of chunks and the number of kept graphs: as the recipe says, or found by measuring the first steps.

Results depend on them in the last bits at most, so a run measures in its own steps. The first step uses chunks of one
longest item. Each further step at most doubles the chunk, until memory is 90 % full. Then the budget is fixed, and
checkpoints carry it. If a rank runs out of memory all the same, it cannot continue, because the others wait for it in a
collective. It notes a smaller budget for the next start.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter

from pipeline.config import Batch
from pipeline.errors import PipelineError, is_out_of_memory
from pipeline.storage.atomic import write_file
from pipeline.training.conditions import changes
from pipeline.training.meter import Memory

FULL = 0.9  # of the memory that torch's allocator can have
LARGEST_CHUNK = 16384  # tokens: more do not make a GPU faster, and memory serves better to keep graphs
MEMORY = "the device's memory"  # in bytes, a condition by its name
NOTE = "budget.json"  # in the run directory
_ROUND = 128  # tokens


@dataclass
class Budget:
    """The next step's cut.

    auto: which of `chunk_tokens` and `kept_chunks` the recipe leaves to be found.  longest: tokens of an item, at most.
    graph: bytes that a full chunk with its graph takes, once known.
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
        """From the recipe. What is `auto` starts at one longest item, or where an earlier search ended."""
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
            # A chunk size holds for that many kept graphs or fewer; kept graphs only for that chunk size.
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
        """Learn from a step that was cut so. largest: tokens of its largest chunk; items: both the most of any rank."""
        room = FULL * memory.total - memory.rest
        used: float = max(memory.peak - memory.base, 1)
        if not self.chunk_is_fixed:
            # What does not grow with the chunk is counted as if it did: the estimate errs on the safe side.
            fits = int(largest * room / used)
            larger = min(2 * self.chunk_tokens, fits, LARGEST_CHUNK) // _ROUND * _ROUND
            # A batch that does not fill a chunk tells nothing of larger ones.
            if larger > 1.1 * self.chunk_tokens and largest > 0.7 * self.chunk_tokens:
                self.chunk_tokens = larger
                return
            self.chunk_tokens = max(min(self.chunk_tokens, fits) // _ROUND, 1) * _ROUND
            self.chunk_is_fixed = True
        if not self.kept_is_fixed:
            # Another step's chunks may be full. Where these are not even half full, the batch is small, not the cut.
            used *= min(max(self.chunk_tokens / largest, 1), 2)
            self.graph = self.graph or int(used)
            more = int((room - used) // self.graph)
            if more < 0 or (self.kept_chunks and not more) or self.kept_chunks >= items:  # then all are kept
                self.kept_chunks = max(self.kept_chunks + min(more, 0), 0)
                self.kept_is_fixed = True
            else:
                # The first costs nothing: its graph is gone before a chunk is embedded again.
                self.kept_chunks += 1 if not self.kept_chunks else min(more, self.kept_chunks)

    def smaller(self) -> "Budget | None":
        """The budget to try after running out of memory: half the graphs or half the chunk; None if neither helps."""
        if self.kept_chunks > 1 and ("kept_chunks" in self.auto or "chunk_tokens" not in self.auto):
            return replace(self, kept_chunks=self.kept_chunks // 2, chunk_is_fixed=True, kept_is_fixed=True)
        if self.chunk_tokens <= self.longest:  # in a smaller chunk there would be no less than one item
            return None
        half = replace(self, chunk_tokens=max(self.chunk_tokens // 2, self.longest), chunk_is_fixed=True)
        # How many graphs of the smaller chunk fit is found anew.
        return replace(half, kept_chunks=0, kept_is_fixed=False, graph=0) if "kept_chunks" in self.auto else half

    def __str__(self) -> str:
        return f"batch.chunk_tokens={self.chunk_tokens} batch.kept_chunks={self.kept_chunks}"


def found(budget: Budget, conditions: dict) -> dict:
    """A budget as it is kept, in checkpoints and in a run directory's note: plain values."""
    return {"budget": asdict(budget), "conditions": conditions}


def found_before(run: Path, checkpoint: dict | None, conditions: dict) -> Budget | None:
    """The budget to go on with; None where there is none, or none that was found under such conditions.

    That of a start that ran out of memory since the newest checkpoint, or else the checkpoint's.
    checkpoint: as `found` gave it for it.  conditions: by name, what memory depends on, `MEMORY` among it.
    """
    noted = None
    with suppress(OSError, ValueError, RecursionError):
        noted = json.loads((run / NOTE).read_text())
    for kept in cast(tuple[Any, Any], (noted, checkpoint)):
        # What is not as `found` gives it is no budget, be it another version's.
        with suppress(ValueError, TypeError, KeyError, AttributeError, PipelineError):
            if _are_alike(kept["conditions"], conditions):
                budget = TypeAdapter(Budget).validate_json(json.dumps(kept["budget"]), strict=True)
                if min(budget.chunk_tokens, budget.longest) > 0 and min(budget.kept_chunks, budget.graph) >= 0:
                    return budget
    return None


@contextmanager
def out_of_memory_noted(run: Path, step: int, budget: Budget, conditions: dict) -> Iterator[None]:
    """Around step number `step`: turn an error that says that memory is short into PipelineError, with what to do.

    Where it is ours to take less, that is noted in the run directory: the next start takes it.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        advice = _advice(run, budget, conditions)
        raise PipelineError(
            f"out of memory in step {step} with {budget}: {advice}batch.activation_checkpointing=true and more GPUs "
            "each need less memory; so does deepspeed=ds_configs/zero3_offload.json, in a new run directory"
        ) from error


def _advice(run: Path, budget: Budget, conditions: dict) -> str:
    smaller = budget.smaller()
    if smaller is None:
        return "a chunk holds only one item of model.max_tokens; "
    for name in ("chunk_tokens", "kept_chunks"):
        if name not in budget.auto and getattr(smaller, name) != getattr(budget, name):
            return f"start the run again with batch.{name}={getattr(smaller, name)}; if that is still too much, "
    try:
        write_file(run / NOTE, json.dumps(found(smaller, conditions)).encode())
    except OSError:
        return f"start the run again with {smaller}; if that is still too much, "
    return f"the next start uses {smaller}; if that is still too much, "


def _are_alike(before: dict, now: dict) -> bool:
    """But for the last megabytes of memory: equal machines differ in them, and FULL leaves more than that."""
    memory = {MEMORY: before[MEMORY]} if math.isclose(before.get(MEMORY, 0), now.get(MEMORY, 0), rel_tol=0.05) else {}
    return not changes(before, now | memory)
