"""`python collectives.py MODEL FOLDER`: take the same steps with different DeepSpeed settings.

Prints as JSON, for each case: the backward passes and collectives of the second step; the largest differences from the
case that its name begins with; and those of the third step in a new engine that loads that case's
checkpoint.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import eager_kernels
import torch
import torch.distributed as dist
from exactness import CHECKPOINTING, PAIRS, WHOLE, batch_of, largest_difference, make_pairs, recipe_of
from limits import HANG_MINUTES

from pipeline.config import load_ds_config
from pipeline.data.batch import Batch
from pipeline.distributed import end_distributed, start_distributed
from pipeline.models.chunks import CachedFeatures, embed_chunks, plan_chunks
from pipeline.models.llave.processor import LlaveProcessor
from pipeline.objectives.contrastive.step import Contrastive
from pipeline.training import checkpoint
from pipeline.training.budget import Budget
from pipeline.training.engine import build_engine, load_frozen
from pipeline.training.saving import Saver

LR = 0.1
CUT = ("data.lanes=4", "batch.chunk_tokens=200", "batch.kept_chunks=0")
ADAPTERS = ("model.train.lora.rank=4", "precision=bf16", CHECKPOINTING)
# Some parameters stay whole on every rank, as they do with the project's configs.
BY_NODE = {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 100}
GPU = " as on a GPU"
# Name: (stage, changes of its config, further fields).
CASES = {
    "zero1": (1, {}, WHOLE),
    "zero2": (2, {}, WHOLE),
    "zero3": (3, {}, WHOLE),
    "zero3 by node": (3, BY_NODE, WHOLE),
    "adapters": (3, {}, ADAPTERS),
    "adapters by node": (3, BY_NODE, ADAPTERS),
    f"zero3{GPU}": (3, {}, (*WHOLE, "batch.kept_chunks=2")),
    f"adapters{GPU}": (3, {}, ADAPTERS),
}


@dataclass
class Results:
    """A case's losses and gradient norms of three steps, embeddings before the third, and parameters after it."""

    name: str
    steps: list[tuple[float, float]] = field(default_factory=list)
    embeddings: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)


class Run:
    """A case's engine."""

    def __init__(self, model: str, name: str, folder: Path) -> None:
        stage, changes, fields = CASES[name]
        config = json.loads(Path(f"ds_configs/zero{stage}.json").read_text())
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
        config["zero_optimization"] |= changes
        path = folder / f"{name}-{dist.get_rank()}.json"
        path.write_text(json.dumps(config))
        self.recipe = recipe_of((f"deepspeed={path}", *CUT, *fields))
        self.tower = load_frozen(self.recipe, model, torch.device("cpu"))
        self.engine = build_engine(self.recipe, load_ds_config(self.recipe, dist.get_world_size()), model)
        self.processor = LlaveProcessor.load(model, 512)

    def features(self) -> CachedFeatures | None:
        return CachedFeatures(self.tower, 0) if self.tower else None

    def batch(self, step: int) -> Batch:
        rank, world = dist.get_rank(), dist.get_world_size()
        return batch_of(make_pairs("mixed", step)[rank * PAIRS // world : (rank + 1) * PAIRS // world], self.processor)

    def step(self, number: int) -> tuple[float, float]:
        objective, budget = Contrastive(self.recipe, self.engine.device), Budget.of(self.recipe.batch, 512)
        result = objective.step(self.engine, self.batch(number), budget, number, lr=LR, features=self.features())
        return float(result.loss.loss.detach()), result.grad_norm

    def embeddings(self) -> torch.Tensor:
        items = list(self.batch(0).items.values())
        chunks = plan_chunks(items, 200, self.engine.device)
        with torch.no_grad():
            return embed_chunks(self.engine, chunks, len(items), self.features())

    def parameters(self) -> dict[str, torch.Tensor]:
        parameters = {}
        for name, parameter in self.engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                parameters[name] = parameter.detach().clone()
        return parameters


def compared(model: str, name: str, folder: Path, references: dict[str, Results]) -> dict[str, Any]:
    run, ours, counts = Run(model, name, folder), Results(name), Counter()
    ours.steps.append(run.step(0))
    with counted(counts), mock.patch.object(run.engine, "backward", wraps=run.engine.backward) as backward:
        ours.steps.append(run.step(1))
    ours.embeddings = run.embeddings()
    saver = Saver(run.engine, folder / name, {}, keep=1)
    saver.begin(2, {})
    saver.finish()
    ours.steps.append(run.step(2))
    ours.parameters = run.parameters()
    theirs = references.setdefault(name.split()[0], ours)
    trained = [p for p in run.engine.module.parameters() if p.requires_grad]
    result = counts | {
        "trained": sum(getattr(p, "ds_numel", p.numel()) for p in trained),
        "backward passes": backward.call_count,
        "steps": relative(ours.steps, theirs.steps),
        "embeddings": float((ours.embeddings - theirs.embeddings).abs().max() / theirs.embeddings.abs().max()),
        "parameters": largest_difference(run.engine, theirs.parameters),
    }
    run.engine.destroy()
    if name.endswith("by node"):
        run = Run(model, name, folder)
        checkpoint.load(run.engine, folder / theirs.name / "step-00000002")
        result["resumed step"] = relative([run.step(2)], theirs.steps[2:])
        result["resumed parameters"] = largest_difference(run.engine, theirs.parameters)
        run.engine.destroy()
    return result


def relative(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> float:
    return float((torch.tensor(ours, dtype=torch.float64) / torch.tensor(theirs, dtype=torch.float64) - 1).abs().max())


@contextmanager
def counted(counts: Counter[str]) -> Iterator[None]:
    """Count the collectives that gather or reduce, and the elements in them, by the number of ranks."""

    def counting(name: str):
        original, kind = getattr(dist.ProcessGroup, name), "gather" if "gather" in name else "reduce"

        def count(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
            counts[f"{kind} of {group.size()}"] += 1
            counts[f"elements, {kind} of {group.size()}"] += max(sizes(arguments))
            return original(group, *arguments, **options)

        return count

    names = [name for name in dir(dist.ProcessGroup) if "gather" in name or "reduce" in name]
    with mock.patch.multiple(dist.ProcessGroup, **{name: counting(name) for name in names}):
        yield


def sizes(values: Sequence[Any]) -> Iterator[int]:
    """Yield the sizes of all tensors in nested lists."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value.numel()
        elif isinstance(value, list | tuple):
            yield from sizes(value)


def main() -> None:
    model, folder = sys.argv[1:]
    start_distributed(timeout_minutes=HANG_MINUTES)
    references: dict[str, Results] = {}
    results = {}
    for name in CASES:
        with eager_kernels.installed() if name.endswith(GPU) else nullcontext():
            results[name] = compared(model, name, Path(folder), references)
    if dist.get_rank() == 0:
        print(json.dumps(results))
    end_distributed()


if __name__ == "__main__":
    main()
