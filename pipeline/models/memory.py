"""Estimate the memory of a chunk in the language model, which is alike in the families, from the model's shapes."""

from dataclasses import dataclass
from typing import Any

from pipeline.config import Recipe
from pipeline.models.flops import attention_width

FP32, INT64 = 4, 8  # bytes


@dataclass(frozen=True)
class Execution:
    """How a chunk is computed.

    width: bytes per number, 2 in bf16 and 4 in fp32.
    fused: by the kernels of kernels.py, which run in bf16 on a GPU.
    padded: by SDPA, which attends on copies of its inputs; a variable-length kernel needs none.
    checkpointing: the graph holds only each layer's input.
    """

    width: int
    fused: bool
    padded: bool
    checkpointing: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> "Execution":
        """Return how a GPU computes a recipe's chunks."""
        half, padded = recipe.precision == "bf16", recipe.model.attention == "sdpa"
        return cls(2 if half else FP32, half, padded or not half, recipe.batch.activation_checkpointing)


@dataclass(frozen=True)
class PartMemory:
    """Bytes of a part of the model.

    graph: saved by autograd.  recomputed: of a layer's backward pass with activation checkpointing, besides the graph.
    forward: peak of a forward pass without gradient; a backward pass needs less besides the graph, which it frees.
    """

    graph: int
    recomputed: int
    forward: int


def decoder_memory(text: Any, tokens: int, how: Execution, *, head_norms: bool) -> PartMemory:
    """Return the memory of a language model that pools in its last layer, with its input of `tokens` embeddings.

    text: its config.  head_norms: queries and keys have norms.
    """
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = tokens * how.width  # bytes of one number per token
    state, wide = token * text.hidden_size, token * text.intermediate_size
    queries, keys = token * attention_width(text), token * head * text.num_key_value_heads
    rotary = 2 * token * head  # cosines and sines of the positions, shared by all layers
    # Saved by autograd for each layer.
    norm = 2 * state + tokens * FP32  # the state, its scale, and the normalised state
    copies = 2 if how.padded else 1
    of_keys = 2 * copies * keys  # keys and values
    of_queries = 2 * copies * queries + tokens * text.num_attention_heads * FP32  # attention's output; denominators
    if head_norms:  # their inputs and scales
        of_keys += keys + tokens * text.num_key_value_heads * FP32
        of_queries += queries + tokens * text.num_attention_heads * FP32
    layer = 2 * norm + of_queries + of_keys + 3 * wide  # gate, up, and their product
    last = norm + of_keys  # only keys and values have all tokens
    # The whole graph of a layer, and two gradients of the MLP's width.
    recomputed = layer + 2 * wide
    if how.checkpointing:
        layer = last = state
    # A layer's peak is in its MLP, with the layer's input, the residual, the normalised input, and the model's input.
    # Fused layers return two states, whose sum is the next layer's input (see `LeanDecoderLayer`).
    states = 5 if how.fused and not how.checkpointing else 4
    return PartMemory(
        graph=(text.num_hidden_layers - 1) * layer + last + rotary,
        recomputed=recomputed,
        forward=states * state + 3 * wide + rotary,
    )
