"""What training takes of a device's memory, from the model's shapes alone: no weights are read and nothing is run.

All sizes are bytes. Of a LLaVA-OneVision with a pooled last layer, in fp32 or bf16, under AdamW and the gradient cache.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig
from transformers.image_processing_utils import select_best_resolution

from pipeline.config import Recipe, is_offloaded
from pipeline.data.tiles import Tiling
from pipeline.errors import PipelineError
from pipeline.models.llave.checks import sides_of, text_of, vision_of
from pipeline.models.registry import training_of
from pipeline.objectives.contrastive.loss import KEPT_BYTES, TILE
from pipeline.training.budget import Budget
from pipeline.training.engine import adapt, freeze

FP32 = 4
MOST_TOKENS = 1 << 24  # of a chunk: nobody has a device for larger ones
MOST_CHUNKS = 1 << 12  # that keep their graph
_PHOTO = (3000, 4000)  # height and width of the image that chunks are taken to be full of


@dataclass(frozen=True)
class Group:
    """Some of the model's parameters.

    trained: they have a gradient and an optimizer state.
    in_engine: ZeRO shards them; a frozen vision tower is outside, whole on every device.
    largest: how many are in one tensor, at most.
    """

    name: str
    parameters: int
    trained: bool
    in_engine: bool = True
    largest: int = 0


@dataclass(frozen=True)
class States:
    """What a device holds all the time.

    buckets: DeepSpeed's buffer for gradients under way.  gathered: parameters that ZeRO-3 has whole, at most.
    step: more that the optimizer needs while it steps, when no chunk is there.
    host: what is offloaded to the host's memory, of each device.
    """

    parameters: int
    gradients: int
    optimizer: int
    buckets: int
    gathered: int
    step: int
    host: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.buckets + self.gathered


def meta_model(recipe: Recipe) -> nn.Module:
    """The recipe's model, adapters included, with what it trains requiring grad, on the meta device: without weights.

    Raises PipelineError if there is no such model, or its architecture is not one.
    """
    family = training_of(recipe)
    if not family.estimates_memory:
        raise PipelineError(
            f"memory is not estimated for model.family={recipe.model.family}: batch.chunk_tokens=auto finds what fits"
        )
    model = family.memory_model(recipe)
    with torch.device("meta"):
        freeze(model, recipe)
        adapt(model, recipe)
    return model


def groups_of(model: nn.Module, tower_in_engine: bool) -> list[Group]:
    """The model's parameters by its top modules, the trained ones and the frozen ones apart."""
    counts: dict[tuple[str, bool], list[int]] = {}
    for name, parameter in model.named_parameters():
        counts.setdefault((name.partition(".")[0], parameter.requires_grad), []).append(parameter.numel())
    return [
        Group(name, sum(numbers), trained, tower_in_engine or name != "vision_tower", max(numbers))
        for (name, trained), numbers in counts.items()
    ]


def state_bytes(groups: Sequence[Group], *, stage: int, gpus: int, width: int, zero: dict) -> States:
    """Under ZeRO stage 0 to 3 and AdamW, as DeepSpeed 0.19 allocates it.

    width: bytes of a parameter, 2 in bf16 and 4 in fp32.  zero: a DeepSpeed config's "zero_optimization".
    """
    outside = sum(group.parameters for group in groups if not group.in_engine)
    inside = sum(group.parameters for group in groups if group.in_engine)
    trained = sum(group.parameters for group in groups if group.trained)
    share = math.ceil(trained / gpus)
    parameters = width * (outside + (math.ceil(inside / gpus) if stage == 3 else inside))
    if stage == 0:
        return States(parameters, FP32 * trained, 2 * FP32 * trained, 0, 0, 0)  # two moments
    # Gradients are summed in fp32: of a device's share, but with stage 1 of all parameters; there bf16 gradients stay
    # beside that sum.
    gradients = FP32 * (trained if stage == 1 else share)
    if stage == 1 and width < FP32:
        gradients += width * trained
    optimizer = 3 * FP32 * share  # two moments and the master weights, which ZeRO has in fp32 runs, too
    step = FP32 * share  # the gradients as one tensor
    host = 0
    if is_offloaded(zero):
        # There the gradients' sum is beside those that the optimizer takes; with stage 2 also the parameters on their
        # way back, and of a gradient on its way a buffer on both sides.
        host = optimizer + 2 * FP32 * share
        optimizer = step = gradients = 0
        if stage == 2:
            gradients = width * max(group.largest for group in groups if group.trained)
            host += width * share + gradients
    if stage == 3 and zero.get("offload_param", {}).get("device") == "cpu":
        host += width * math.ceil(inside / gpus)
        parameters = width * outside
    return States(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        # Stage 1 in bf16 reduces fp32 sums.  With overlap_comm stages 1 and 2 fill one while the other is under way.
        buckets=int(zero.get("reduce_bucket_size", 5e8))
        * (FP32 if stage == 1 else width)
        * (2 if stage < 3 and zero.get("overlap_comm") else 1),
        gathered=width * min(inside, int(zero.get("stage3_max_live_parameters", 1e9))) if stage == 3 else 0,
        step=step,
        host=host,
    )


@dataclass(frozen=True)
class Work:
    """What a forward pass of a chunk does.

    tokens: of the language model.  slots: the same with attention's padding.  tiles: of the vision tower.
    width: bytes of a parameter, 2 in bf16 and 4 in fp32.
    """

    tokens: int
    slots: int
    tiles: int
    width: int


def saved_bytes(config: LlavaOnevisionConfig, work: Work, tower_trained: bool, checkpointing: bool = False) -> int:
    """What autograd keeps of a forward pass with gradient, parameters not counted.

    checkpointing: of each layer its input alone.
    With adapters, or with a language model that is frozen, it is less than that.
    """
    text, vision, width = text_of(config), vision_of(config), work.width
    patches = work.tiles * _patches(config)
    inputs = work.tokens * text.hidden_size * width, patches * vision.hidden_size * width
    language_layer, vision_layer = inputs if checkpointing else _layers(config, work)
    kept = (
        (text.num_hidden_layers - 1) * language_layer
        + (inputs[0] if checkpointing else _last_language_layer(text, work))
        + 2 * work.tokens * _head(text) * width  # cosines and sines of the positions, which all layers share
        + patches * vision.hidden_size * width  # the tower's output, for the projector
        + 3 * patches * text.hidden_size * width  # before and after the projector's GELU, and as the images' tokens
    )
    if tower_trained:
        kept += vision.num_hidden_layers * vision_layer
        kept += work.tiles * 3 * sides_of(config)[0] ** 2 * width  # pixels, for the patch embedding
    return kept


def recomputed_bytes(config: LlavaOnevisionConfig, work: Work, tower_trained: bool) -> int:
    """What a backward pass has of the layer that activation checkpointing works out again, with its gradients."""
    language, vision = _layers(config, work)
    patches = work.tiles * _patches(config)
    # At the MLP's activation everything is there, and twice a gradient of that width.
    language += 2 * work.tokens * text_of(config).intermediate_size * work.width
    vision += 2 * patches * vision_of(config).intermediate_size * work.width
    return max(language, vision if tower_trained else 0)


def working_bytes(config: LlavaOnevisionConfig, work: Work, tiles_at_once: int | None = None) -> int:
    """The most that a forward pass without gradient holds, parameters not counted.

    It is at the widest place of a layer, its MLP; a backward pass needs about as much besides what autograd kept.
    tiles_at_once: that the tower sees, if not all.
    """
    text, vision, width = text_of(config), vision_of(config), work.width
    features = work.tiles * _patches(config) * vision.hidden_size * width
    seen = min(work.tiles, tiles_at_once or work.tiles)
    # Of each layer its input, the residual and the normalised input of the MLP.
    language = (
        4 * work.tokens * text.hidden_size * width  # these three, and the embedded tokens
        + 3 * work.tokens * text.intermediate_size * width  # SiLU of the gate, up, and the product
        + 2 * work.tokens * _head(text) * width  # cosines and sines of the positions
        + features
    )
    tower = (
        4 * seen * _patches(config) * vision.hidden_size * width  # the same three, and the embedded patches
        + 2 * seen * _patches(config) * vision.intermediate_size * width  # before and after GELU
        + seen * 3 * sides_of(config)[0] ** 2 * width  # pixels
        + work.tokens * text.hidden_size * width  # the embedded tokens
        + (features if tiles_at_once else 0)  # of the tiles seen before
    )
    return max(language, tower)


def loss_bytes(config: LlavaOnevisionConfig, global_batch: int, gpus: int) -> int:
    """The most that the loss takes, in float32, while nothing but embeddings is there."""
    width, rows = text_of(config).hidden_size, global_batch // gpus
    work = FP32 * (
        4 * global_batch * width  # targets of all devices, as columns, as a factor of the logits, and their gradient
        + 3 * rows * width  # own queries, as a factor, and their gradient
        + 2 * min(TILE, rows) * global_batch  # a tile's gradient, in both directions
    )
    return work + min(KEPT_BYTES, FP32 * rows * global_batch)  # tiles of logits


def embedding_bytes(config: LlavaOnevisionConfig, global_batch: int, gpus: int) -> int:
    """A device's embeddings and their gradient, float32, which a step keeps from its first pass to its end."""
    return 2 * 2 * (global_batch // gpus) * text_of(config).hidden_size * FP32


def tokens_per_tile(tiling: Tiling, videos: bool) -> float:
    """Tokens that an image of 4:3 gives the language model for each tile it gives the vision tower; or a video."""
    if videos:
        return math.ceil(tiling.patches / 2) ** 2
    height, width = select_best_resolution(_PHOTO, [list(size) for size in tiling.pinpoints])
    return tiling.tokens(*_PHOTO, anyres=True) / (1 + height * width // tiling.size**2)


def _layers(config: LlavaOnevisionConfig, work: Work) -> tuple[int, int]:
    """What autograd keeps of a layer of the language model, and of the vision tower."""
    patches = work.tiles * _patches(config)
    return _language_layer(text_of(config), work), _vision_layer(vision_of(config), patches, work.width)


def _language_layer(text: Qwen2Config, work: Work) -> int:
    hidden, width, keys = text.hidden_size, work.width, _head(text) * cast(int, text.num_key_value_heads)
    return (
        2 * _rms_norm(text, work)
        + work.tokens * (hidden + 2 * keys) * width  # q, k and v, packed
        + work.slots * (2 * hidden + 2 * keys) * width  # q, k, v and what attention makes of them, padded
        + work.slots * text.num_attention_heads * FP32  # the softmax's denominators
        + work.tokens * hidden * width  # attention's result, packed, for the output projection
        + 3 * work.tokens * text.intermediate_size * width  # gate, up, and the product of the two
    )


def _last_language_layer(text: Qwen2Config, work: Work) -> int:
    """It is pooled: of all tokens there are keys and values."""
    keys = _head(text) * cast(int, text.num_key_value_heads)
    return _rms_norm(text, work) + 2 * (work.tokens + work.slots) * keys * work.width  # packed, and padded


def _rms_norm(text: Qwen2Config, work: Work) -> int:
    # The hidden state and its scale; and normalised, times the weight, which the next projections take.
    return work.tokens * (2 * text.hidden_size * work.width + FP32)


def _vision_layer(vision: SiglipVisionConfig, patches: int, width: int) -> int:
    return (
        4 * patches * vision.hidden_size * width  # before and after each of the two layer norms
        + 4 * patches * width  # their means and deviations
        + 4 * patches * vision.hidden_size * width  # q, k, v and what attention makes of them
        + patches * vision.num_attention_heads * FP32  # the softmax's denominators
        + 2 * patches * vision.intermediate_size * width  # before and after GELU
    )


def _patches(config: LlavaOnevisionConfig) -> int:
    """Of a tile."""
    side, patch = sides_of(config)
    return (side // patch) ** 2


def _head(text: Qwen2Config) -> int:
    """Dimensions of an attention head."""
    return text.hidden_size // text.num_attention_heads


def _tower_trained(recipe: Recipe) -> bool:
    return bool(getattr(recipe.model.train, "vision_tower", False))


@dataclass(frozen=True)
class Plan:
    """What a recipe takes of one of `gpus` devices.

    tile_tokens: the tokens that a tile is taken to stand for.
    """

    recipe: Recipe
    gpus: int
    config: LlavaOnevisionConfig
    groups: list[Group]
    tile_tokens: float

    @classmethod
    def of(cls, recipe: Recipe, gpus: int, videos: bool) -> "Plan":
        """For chunks full of images, or of videos. Raises PipelineError if the recipe's model cannot be had."""
        model = meta_model(recipe)
        groups = groups_of(model, tower_in_engine=_tower_trained(recipe))
        tiling: Any = training_of(recipe).lengths(recipe).tiling
        return cls(recipe, gpus, cast(LlavaOnevisionConfig, model.config), groups, tokens_per_tile(tiling, videos))

    @property
    def budget(self) -> Budget:
        """How the first step is cut: where the recipe says auto, into longest items, of which no graph is kept."""
        return Budget.of(self.recipe.batch, self.recipe.model.max_tokens)

    def states(self, stage: int, zero: dict) -> States:
        return state_bytes(self.groups, stage=stage, gpus=self.gpus, width=self._width, zero=zero)

    def kept(self) -> dict[str, int]:
        """What a step keeps besides, by name."""
        batch, vision = self.recipe.batch, vision_of(self.config)
        kept = {"kept embeddings, their gradient": embedding_bytes(self.config, batch.global_batch, self.gpus)}
        if not _tower_trained(self.recipe):
            # Of the longest items, each full of tiles.
            tiles = 2 * (batch.global_batch // self.gpus) * max(int(self.recipe.model.max_tokens / self.tile_tokens), 1)
            features = tiles * _patches(self.config) * vision.hidden_size * self._width
            kept["kept features, at most"] = min(batch.features_mb << 20, features)
        return kept

    def phases(self, chunk_tokens: int, states: States) -> dict[str, int]:
        """What the parts of a step take that follow each other, by name."""
        batch, tower_trained = self.recipe.batch, _tower_trained(self.recipe)
        # An item that is longer than a chunk may be is a chunk by itself.
        tokens = max(chunk_tokens, self.recipe.model.max_tokens)
        work = Work(tokens, tokens, math.ceil(tokens / self.tile_tokens), self._width)
        working = working_bytes(self.config, work, None if tower_trained else batch.tower_tiles)
        saved = saved_bytes(self.config, work, tower_trained, batch.activation_checkpointing)
        backward = recomputed_bytes(self.config, work, tower_trained) if batch.activation_checkpointing else working
        return {
            "a chunk without gradient": working,
            "a chunk with gradient": max(self.budget.kept_chunks, 1) * saved + backward,
            "the loss": loss_bytes(self.config, batch.global_batch, self.gpus),
            "the optimizer's step": states.step,
        }

    def total(self, chunk_tokens: int, states: States) -> int:
        return states.total + sum(self.kept().values()) + max(self.phases(chunk_tokens, states).values())

    def largest_chunk(self, memory: float, states: States) -> int:
        """The most tokens, of chunks that hold a longest item, with which it fits in `memory` bytes; 0 if none does.

        In steps of 64, up to `MOST_TOKENS`.
        """
        tokens = range(self.recipe.model.max_tokens, MOST_TOKENS + 1, 64)
        fitting = bisect_right(tokens, memory, key=lambda count: self.total(count, states))
        return tokens[fitting - 1] if fitting else 0

    def most_kept(self, memory: float, states: States) -> int:
        """Of how many chunks of a longest item the graphs can be kept in `memory` bytes; 0 if one does not fit."""

        def total(count: int) -> int:
            batch = self.recipe.batch.model_copy(update={"kept_chunks": count})
            plan = replace(self, recipe=self.recipe.model_copy(update={"batch": batch}))
            return plan.total(self.recipe.model.max_tokens, states)

        return bisect_right(range(1, MOST_CHUNKS + 1), memory, key=total)

    @property
    def _width(self) -> int:
        return 2 if self.recipe.precision == "bf16" else FP32
