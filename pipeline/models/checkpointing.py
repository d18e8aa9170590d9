"""Activation checkpointing (arXiv 1604.06174): memory for time."""

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Keep of each layer its input alone, from which backward works out the rest once more."""
    # Nothing is random here.
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    model.disable_input_require_grads()  # with which frozen embeddings would be given a gradient
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # it checkpoints so alone; what is in it stays as it is, without dropout
