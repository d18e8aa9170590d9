"""Activation checkpointing (arXiv 1604.06174): less memory, more computation."""

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Save only each layer's input; the backward pass recomputes the rest."""
    # Without dropout there is no RNG state to restore.
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    model.disable_input_require_grads()  # or frozen embeddings would get a gradient
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # it checkpoints only then; its children stay in eval mode, without dropout
