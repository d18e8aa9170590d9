"""Estimate the memory of a chunk in a Qwen-VL from the model's shapes, with a pooled last layer."""

from typing import Any

from pipeline.models.family import ChunkMemory
from pipeline.models.memory import FP32, INT64, Execution, decoder_memory
from pipeline.models.qwen_vl.checks import tower_width

# Tensors of the MLP's width that a block of the tower saves for the backward pass, and how many are alive at once
# without it: QuickGELU's input, the sigmoid and the product; gate, activated gate, up and their product; or before and
# after GELU, which is part of a frozen layer's kernel.
_WIDE = {"qwen2_vl": (3, 3), "qwen2_5_vl": (4, 3), "qwen3_vl": (2, 2)}


def chunk_memory(
    config: Any,
    tokens: int,
    how: Execution,
    *,
    tower_trained: bool,
    videos: bool = False,
    patches_at_once: int | None = None,
) -> ChunkMemory:
    """Return the memory of a chunk with `tokens` in the language model, all of them of images or `videos`.

    It overestimates the graph with a frozen language model or mergers, and leaves out adapters' small products.

    patches_at_once: the tower's patches per forward pass; None is all.
    """
    text, vision, width = config.text_config, config.vision_config, tower_width(config)
    decoder = decoder_memory(text, tokens, how, head_norms=config.model_type == "qwen3_vl")
    merged = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))  # states of the tower that are merged to tokens
    patches = tokens * vision.spatial_merge_size**2
    numbers = patches * 3 * vision.patch_size**2 * (1 + videos)  # pixels; an image's two frames are the same
    # Bytes of a state of the tower, of a tensor of its MLP, of the embeddings, of the pixels, and of the angles.
    state, embeds = patches * how.width * width, tokens * how.width * text.hidden_size
    wide, (saved, alive) = patches * how.width * _mlp_width(config), _WIDE[config.model_type]
    alive -= config.model_type == "qwen3_vl" and not tower_trained
    pixels, angles = numbers * how.width, 2 * patches * (width // vision.num_heads) * FP32
    features = merged * state

    # Saved by autograd: before and after two norms; queries, keys, values and attention output. The values are part of
    # a tensor with queries and keys before their rotation, unless SDPA attends to copies.
    denominators = patches * vision.num_heads * FP32  # the softmax's
    block = (4 + (5 if how.padded else 6)) * state + saved * wide + denominators
    # A merger saves its input after the norm, and before and after GELU. Tokens are copied or added to their places.
    later = decoder.graph + merged * (3 * state + embeds)  # is freed when the tower's backward pass begins
    graph, backward = features + later, decoder.recomputed if how.checkpointing else decoder.forward
    if tower_trained:
        graph += vision.depth * (state if how.checkpointing else block) + pixels + angles
        backward = max(backward, (block if how.checkpointing else 0) + 2 * wide - later)

    # A block's peak is in its MLP, with the block's input, the residual, the normalised input, and the states to merge;
    # or in its attention, with the first and the normalised input, the three before their rotation, queries, keys and
    # output, and the output's projection or SDPA's copies.
    seen = (merged - 1) * state + max(3 * state + alive * wide, (12 if how.padded else 9) * state) + pixels + angles
    if patches_at_once and patches_at_once < patches:
        seen = max(seen * patches_at_once // patches + features, 2 * features)
    language = decoder.forward + merged * embeds + (0 if tower_trained else features)
    forward = max(language, seen + embeds)
    sent = tokens * 4 * INT64 + numbers  # ids and positions on three axes, and bytes of pixels
    return ChunkMemory(forward, graph, backward, features, sent)


def _mlp_width(config: Any) -> int:
    vision = config.vision_config
    return int(vision.embed_dim * vision.mlp_ratio) if config.model_type == "qwen2_vl" else vision.intermediate_size
