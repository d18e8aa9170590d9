"""Activation checkpointing (arXiv 1604.06174): less memory, more computation."""

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.errors import PipelineError


def checkpoint_layers(model: nn.Module) -> None:
    """Make transformers' layers in a model save only their input; the backward pass recomputes the rest.

    Raises PipelineError if the model has no such layers.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
            # Without dropout there is no RNG state to restore.
            module.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
            module.disable_input_require_grads()  # or frozen embeddings would get a gradient
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # it checkpoints only then; its children stay in eval mode, without dropout
    names = ("gradient_checkpointing", "grad_checkpointing")  # transformers', timm's
    if not any(getattr(module, name, False) for module in model.modules() for name in names):
        raise PipelineError("batch.activation_checkpointing is not supported by this model: set it to false")
