"""Estimate the memory of a chunk in LLaVE from the model's shapes, with a pooled last layer, in fp32 or bf16."""

import math
from typing import cast

from transformers import LlavaOnevisionConfig
from transformers.image_processing_utils import select_best_resolution

from pipeline.data.tiles import Tiling
from pipeline.models.family import ChunkMemory
from pipeline.models.llave.checks import sides_of, text_of, vision_of

_FP32, _INT64 = 4, 8  # bytes
_PHOTO = (3000, 4000)  # height and width of the images assumed to fill a chunk


def chunk_memory(
    config: LlavaOnevisionConfig,
    tokens: int,
    tiles: int,
    width: int,
    *,
    tower_trained: bool,
    checkpointing: bool = False,
    tiles_at_once: int | None = None,
) -> ChunkMemory:
    """Return the memory of a chunk with `tokens` in the language model and `tiles` in the vision tower.

    It overestimates the graph with adapters or a frozen language model.

    width: bytes per number, 2 in bf16 and 4 in fp32.  checkpointing: the graph holds only each layer's input.
    tiles_at_once: the tower's tiles per forward pass; None is all.
    """
    text, vision, (side, patch) = text_of(config), vision_of(config), sides_of(config)
    head = text.hidden_size // text.num_attention_heads
    # Bytes of one number per token, and per patch.
    token, patches = tokens * width, tiles * (side // patch) ** 2 * width
    keys = token * head * cast(int, text.num_key_value_heads)
    pixels = tiles * 3 * side**2 * width
    features = patches * vision.hidden_size  # the tower's output
    rotary = 2 * token * head  # cosines and sines of the positions, shared by all layers

    # Saved by autograd for each layer.
    norm = 2 * token * text.hidden_size + tokens * _FP32  # the hidden state, its scale, and the normalised state
    language_layer = (
        2 * norm
        + 4 * token * text.hidden_size  # queries and attention output, both packed and padded
        + 4 * keys  # keys and values, packed and padded
        + tokens * text.num_attention_heads * _FP32  # the softmax's denominators
        + 3 * token * text.intermediate_size  # gate, up, and their product
    )
    last_layer = norm + 4 * keys  # pooled: only keys and values have all tokens
    vision_layer = (
        4 * patches * (vision.hidden_size + 1)  # before and after two layer norms, their means and deviations
        + 4 * patches * vision.hidden_size  # queries, keys, values and attention output
        + patches // width * vision.num_attention_heads * _FP32  # the softmax's denominators
        + 2 * patches * vision.intermediate_size  # before and after GELU
    )
    # Backward pass of a recomputed layer: its whole graph, and two gradients of the MLP's width.
    recomputed = language_layer + 2 * token * text.intermediate_size
    if tower_trained:
        recomputed = max(recomputed, vision_layer + 2 * patches * vision.intermediate_size)
    if checkpointing:
        language_layer = last_layer = token * text.hidden_size
        vision_layer = features
    graph = (
        (text.num_hidden_layers - 1) * language_layer
        + last_layer
        + rotary
        + features  # for the projector
        + 3 * patches * text.hidden_size  # before and after the projector's GELU, and as the images' tokens
    )
    if tower_trained:
        graph += vision.num_hidden_layers * vision_layer + pixels

    # A layer's peak is in its MLP, with the layer's input, the residual, the normalised input, and the model's input.
    language = (
        token * (4 * text.hidden_size + 3 * text.intermediate_size)  # SiLU of the gate, up, and their product
        + rotary
        + features
    )
    seen = patches * (4 * vision.hidden_size + 2 * vision.intermediate_size) + pixels  # before and after GELU
    if tiles_at_once:
        seen = seen * min(tiles, tiles_at_once) // tiles + features
    forward = max(language, seen + token * text.hidden_size)
    sent = tokens * 2 * _INT64 + tiles * 3 * side**2  # ids and positions, and bytes of pixels
    return ChunkMemory(forward, graph, recomputed if checkpointing else forward, features, sent)


def tokens_per_tile(tiling: Tiling, videos: bool) -> float:
    """Return the language model's tokens per tile of the vision tower, for a 4:3 image or for a video."""
    if videos:
        return math.ceil(tiling.patches / 2) ** 2
    height, width = select_best_resolution(_PHOTO, [list(size) for size in tiling.pinpoints])
    return tiling.tokens(*_PHOTO, anyres=True) / (1 + height * width // tiling.size**2)
