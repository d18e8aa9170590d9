"""Estimate a device's memory in training from the model's shapes alone: no weights are read and nothing is run.

All sizes are in bytes, for AdamW with gradient caching. The family gives the memory of a chunk.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from pipeline.config import MiningRun, Recipe, is_offloaded
from pipeline.data.source import Source
from pipeline.errors import PipelineError
from pipeline.models.family import ChunkMemory
from pipeline.models.memory import FP32
from pipeline.models.pinned import pinned_bytes
from pipeline.models.registry import training_of
from pipeline.models.staging import BUFFERS
from pipeline.objectives.contrastive.config import ContrastiveSection
from pipeline.objectives.contrastive.memory import loss_bytes
from pipeline.training.budget import Budget
from pipeline.training.engine import adapt, freeze

MOST_TOKENS = 1 << 24  # of a chunk; no device can hold more
MOST_CHUNKS = 1 << 12  # with cached graphs


@dataclass(frozen=True)
class Group:
    """A group of the model's parameters.

    trained: they have gradients and optimizer states.
    in_engine: ZeRO shards them; a frozen part outside the engine is replicated on every device.
    largest: parameters in the largest tensor.
    """

    name: str
    parameters: int
    trained: bool
    in_engine: bool = True
    largest: int = 0


@dataclass(frozen=True)
class States:
    """Bytes that a device holds throughout training.

    buckets: DeepSpeed's buffers for gradient reduction.  gathered: maximum size of parameters gathered by ZeRO-3.
    step: additional memory during the optimizer's step, when no chunk is in memory.
    host: CPU memory for offloaded states, per device.
    copied: CPU memory for the copy of the first rank's part of a checkpoint, the largest (see saving.py).
    """

    parameters: int
    gradients: int
    optimizer: int
    buckets: int
    gathered: int
    step: int
    host: int = 0
    copied: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.buckets + self.gathered


def groups_of(model: nn.Module, *, in_engine: bool = True) -> list[Group]:
    """Return the model's parameters grouped by top-level module, trained and frozen ones separately."""
    counts: dict[tuple[str, bool], list[int]] = {}
    for name, parameter in model.named_parameters():
        trained = in_engine and parameter.requires_grad
        counts.setdefault((name.partition(".")[0], trained), []).append(parameter.numel())
    return [Group(name, sum(numbers), trained, in_engine, max(numbers)) for (name, trained), numbers in counts.items()]


def state_bytes(groups: Sequence[Group], *, stage: int, gpus: int, width: int, zero: dict) -> States:
    """Return the memory of all states under ZeRO stage 0 to 3 and AdamW, as DeepSpeed 0.19 allocates it.

    width: bytes per parameter: 2 in bf16, 4 in fp32.  zero: a DeepSpeed config's "zero_optimization".
    """
    outside = sum(group.parameters for group in groups if not group.in_engine)
    inside = sum(group.parameters for group in groups if group.in_engine)
    trained = sum(group.parameters for group in groups if group.trained)
    share = math.ceil(trained / gpus)
    parameters = width * (outside + inside)
    if stage == 0:
        moments = 2 * FP32 * trained
        return States(parameters, FP32 * trained, moments, 0, 0, 0, copied=width * trained + moments)
    # Gradients are accumulated in fp32, for the device's partition; under stage 1 for all parameters, besides the bf16
    # gradients.
    gradients = FP32 * (trained if stage == 1 else share)
    if stage == 1 and width < FP32:
        gradients += width * trained
    optimizer = 3 * FP32 * share  # two moments and the master weights, which ZeRO also keeps in fp32 runs
    copied = optimizer + (0 if stage == 3 else width * trained)
    step = FP32 * share  # the gradients as one tensor
    host = 0
    if is_offloaded(zero):
        # CPU memory holds the accumulated gradients and the optimizer's copy of them. Stage 2 adds the updated
        # parameters, and one gradient in transfer, buffered on both sides.
        host = optimizer + 2 * FP32 * share
        optimizer = step = gradients = 0
        if stage == 2:
            gradients = width * max(group.largest for group in groups if group.trained)
            host += width * share + gradients
    if stage == 3:
        partitions = math.ceil(inside / gpus)
        if (node := zero.get("zero_hpz_partition_size", 1)) > 1:
            partitions += math.ceil(inside / node)  # the second copy
        parameters = width * (outside + partitions)
        if zero.get("offload_param", {}).get("device") == "cpu":
            host += width * partitions
            parameters = width * outside
    return States(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        # Stage 1 reduces in fp32. With overlap_comm stages 1 and 2 fill one bucket while the other is reduced.
        buckets=int(zero.get("reduce_bucket_size", 5e8))
        * (FP32 if stage == 1 else width)
        * (2 if stage < 3 and zero.get("overlap_comm") else 1),
        gathered=width * min(inside, int(zero.get("stage3_max_live_parameters", 1e9))) if stage == 3 else 0,
        step=step,
        host=host,
        copied=copied,
    )


@dataclass(frozen=True)
class Stored:
    """What a recipe reads for each pair besides the sample itself.

    negatives: mined ones.  teacher: the width of its vectors; 0 without a teacher.  remarks: what the estimate assumes.
    """

    negatives: int
    teacher: int
    remarks: tuple[str, ...]

    @classmethod
    def of(cls, recipe: Recipe, source: Source | None, dimension: int) -> "Stored":
        """source: the recipe's data; None if they cannot be read.  dimension: of the model's vectors."""
        negatives, teacher, remarks = 0, 0, ["the samples' own negatives and further positives are not counted"]
        if recipe.data.negatives:
            negatives = MiningRun.model_fields["count"].default
            if source:
                negatives = max(mined.index.metadata.count for mined in source.mined)
            else:
                remarks.append(f"{negatives} mined negatives a pair are assumed")
        if recipe.data.teacher:
            teacher = dimension
            if source and (metadata := source.teacher_metadata):
                teacher = metadata.width
            else:
                remarks.append(f"a teacher's vectors of {teacher} numbers are assumed")
        return cls(negatives, teacher, tuple(remarks))


@dataclass(frozen=True)
class Plan:
    """The memory that a recipe needs on each of `gpus` devices.

    dimension: of an embedding.  stored: what each pair has besides its sample.
    chunk: number of tokens -> memory of a chunk with them.
    """

    recipe: Recipe
    gpus: int
    groups: list[Group]
    dimension: int
    stored: Stored
    chunk: Callable[[int], ChunkMemory]

    @classmethod
    def of(cls, recipe: Recipe, gpus: int, videos: bool, source: Source | None = None) -> "Plan":
        """Return the plan for chunks full of images or `videos`. Raises PipelineError if memory cannot be estimated.

        source: the recipe's data; None if they cannot be read.
        """
        family = training_of(recipe)
        if not family.estimates_memory:
            raise PipelineError(
                f"memory is not estimated for model.family={recipe.model.family}: batch.chunk_tokens=auto finds what "
                "fits"
            )
        memory = family.memory(recipe, videos)
        with torch.device("meta"):
            freeze(memory.model, recipe)
            adapt(memory.model, recipe)
        groups = groups_of(memory.model)
        if memory.frozen:
            groups = groups_of(memory.frozen, in_engine=False) + groups
        dimension = cast(int, memory.model.dimension)
        return cls(recipe, gpus, groups, dimension, Stored.of(recipe, source, dimension), memory.chunk)

    @property
    def budget(self) -> Budget:
        """The first step's budget: for `auto`, chunks of one longest item, and no cached graphs."""
        return Budget.of(self.recipe.batch, self.recipe.model.max_tokens)

    def states(self, stage: int, zero: dict) -> States:
        width = 2 if self.recipe.precision == "bf16" else FP32
        return state_bytes(self.groups, stage=stage, gpus=self.gpus, width=width, zero=zero)

    def kept(self) -> dict[str, int]:
        """Return, by name, what else a step keeps in memory throughout."""
        batch = self.recipe.batch
        items = (2 + self.stored.negatives) * (batch.global_batch // self.gpus)
        kept = {"kept embeddings, their gradient": 2 * items * self.dimension * FP32}
        if any(not group.in_engine for group in self.groups):  # for items of maximum length
            features = items * self.chunk(self.recipe.model.max_tokens).features
            kept["kept features, at most"] = min(batch.features_mb << 20, features)
        return kept

    def pinned(self, chunk_tokens: int) -> int:
        """Return the CPU memory that is pinned for a device besides copies of checkpoints, as torch allocates it.

        It holds chunks on their way to the device, and features that batch.features_mb does not keep there, of items of
        maximum length.
        """
        batch, longest = self.recipe.batch, self.recipe.model.max_tokens
        chunk = self.chunk(max(chunk_tokens, longest))
        pinned = BUFFERS * pinned_bytes(chunk.sent)
        if any(not group.in_engine for group in self.groups):
            items = (2 + self.stored.negatives) * (batch.global_batch // self.gpus)
            chunks = math.ceil(items / max(chunk_tokens // longest, 1))
            on_device = (batch.features_mb << 20) // chunk.features
            pinned += max(chunks - on_device, 0) * pinned_bytes(chunk.features)
        return pinned

    def phases(self, chunk_tokens: int, states: States, kept_chunks: int | None = None) -> dict[str, int]:
        """Return the memory of a step's successive phases, by name.  kept_chunks: None: the budget's."""
        # An item longer than the chunk size is a chunk by itself.
        chunk = self.chunk(max(chunk_tokens, self.recipe.model.max_tokens))
        graphs = self.budget.kept_chunks if kept_chunks is None else kept_chunks
        objective, stored = cast(ContrastiveSection, self.recipe.objective), self.stored
        pairs = self.recipe.batch.global_batch
        return {
            "a chunk without gradient": chunk.forward,
            "a chunk with gradient": max(graphs, 1) * chunk.graph + chunk.backward,
            "the loss": loss_bytes(
                objective, self.dimension, pairs, self.gpus, negatives=stored.negatives, teacher=stored.teacher
            ),
            "the optimizer's step": states.step,
        }

    def total(self, chunk_tokens: int, states: States, kept_chunks: int | None = None) -> int:
        phases = self.phases(chunk_tokens, states, kept_chunks)
        return states.total + sum(self.kept().values()) + max(phases.values())

    def largest_chunk(self, memory: float, states: States) -> int:
        """Return the largest chunk size, in tokens, with which training fits in `memory` bytes; 0 if none does.

        Sizes from one longest item to `MOST_TOKENS` are considered, in steps of 64.
        """
        tokens = range(self.recipe.model.max_tokens, MOST_TOKENS + 1, 64)
        fitting = bisect_right(tokens, memory, key=lambda count: self.total(count, states))
        return tokens[fitting - 1] if fitting else 0

    def most_cached(self, memory: float, states: States) -> int:
        """Return how many graphs of chunks of one longest item can be cached in `memory` bytes; 0 if none fits."""
        longest = self.recipe.model.max_tokens
        return bisect_right(range(1, MOST_CHUNKS + 1), memory, key=lambda count: self.total(longest, states, count))
