"""Estimate the memory of a chunk in LLaVE from the model's shapes, with a pooled last layer."""

import math

from transformers import LlavaOnevisionConfig
from transformers.image_processing_utils import select_best_resolution

from pipeline.data.tiles import Tiling
from pipeline.models.family import ChunkMemory
from pipeline.models.llave.checks import sides_of, text_of, vision_of
from pipeline.models.memory import FP32, INT64, Execution, decoder_memory

_PHOTO = (3000, 4000)  # height and width of the images assumed to fill a chunk


def chunk_memory(
    config: LlavaOnevisionConfig,
    tokens: int,
    tiles: int,
    how: Execution,
    *,
    tower_trained: bool,
    tiles_at_once: int | None = None,
) -> ChunkMemory:
    """Return the memory of a chunk with `tokens` in the language model and `tiles` in the vision tower.

    It overestimates the graph with a frozen language model or projector, and leaves out adapters' small products.

    tiles_at_once: the tower's tiles per forward pass; None is all.
    """
    text, vision, (side, patch) = text_of(config), vision_of(config), sides_of(config)
    decoder = decoder_memory(text, tokens, how, head_norms=False)
    patches = tiles * (side // patch) ** 2 * how.width  # bytes of one number per patch
    pixels = tiles * 3 * side**2 * how.width
    features = patches * vision.hidden_size  # the tower's output

    # Saved by autograd for each layer.
    vision_layer = (
        4 * patches * (vision.hidden_size + 1)  # before and after two layer norms, their means and deviations
        + 4 * patches * vision.hidden_size  # queries, keys, values and attention output
        + patches // how.width * vision.num_attention_heads * FP32  # the softmax's denominators
        + 2 * patches * vision.intermediate_size  # before and after GELU
    )
    # Before and after the projector's GELU; the images' tokens. The tower's backward pass begins when they are freed.
    later = decoder.graph + 3 * patches * text.hidden_size
    graph, backward = features + later, decoder.recomputed if how.checkpointing else decoder.forward
    if tower_trained:  # a layer's whole graph, if it is recomputed, and two gradients of the MLP's width
        graph += vision.num_hidden_layers * (features if how.checkpointing else vision_layer) + pixels
        again = vision_layer if how.checkpointing else 0
        backward = max(backward, again + 2 * patches * vision.intermediate_size - later)

    seen = patches * (4 * vision.hidden_size + 2 * vision.intermediate_size) + pixels  # before and after GELU
    if tiles_at_once:
        seen = seen * min(tiles, tiles_at_once) // tiles + features
    forward = max(decoder.forward + features, seen + tokens * how.width * text.hidden_size)
    sent = tokens * 2 * INT64 + tiles * 3 * side**2  # ids and positions, and bytes of pixels
    return ChunkMemory(forward, graph, backward, features, sent)


def tokens_per_tile(tiling: Tiling, videos: bool) -> float:
    """Return the language model's tokens per tile of the vision tower, for a 4:3 image or for a video."""
    if videos:
        return math.ceil(tiling.patches / 2) ** 2
    height, width = select_best_resolution(_PHOTO, [list(size) for size in tiling.pinpoints])
    return tiling.tokens(*_PHOTO, anyres=True) / (1 + height * width // tiling.size**2)
