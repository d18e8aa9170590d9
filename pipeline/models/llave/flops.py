"""The FLOPs of a step of LLaVE."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from pipeline.data.batch import Encoded
from pipeline.models.flops import StepFlops, attention_width, image_flops, known, per_pair, per_row, trains
from pipeline.models.llave.checks import sides_of
from pipeline.models.llave.model import Llave


def step_flops(model: Llave, tower: nn.Module) -> StepFlops | None:
    """Return what counts a step's FLOPs; None if they are unknown.  tower: the model's or the frozen one.

    The language model pools in its last layer, which has keys and values for all tokens, and one query for each item.
    """
    text: Any = model.language_model
    projector: Any = model.multi_modal_projector
    if not known(text, projector, tower):
        return None
    # Whether the gradient of the features is needed; that of the images' embeddings; that of the layers' inputs.
    to_features = trains(tower)
    to_images = to_features or trains(projector) or model.image_newline.requires_grad
    to_inputs = to_images or trains(text)
    side, patch = sides_of(model.config)
    projected = per_row(projector.linear_1, inputs=to_features) + per_row(projector.linear_2, inputs=to_images)
    tile = image_flops(tower, side) + (side // patch) ** 2 * projected
    *layers, last = text.layers
    attention, width = last.self_attn, attention_width(text.config)
    token = per_row(*layers, attention.k_proj, attention.v_proj, inputs=to_inputs)
    item = per_row(attention.q_proj, attention.o_proj, last.mlp, inputs=to_inputs)
    pair, last_pair = (per_pair(width, count, inputs=to_inputs) for count in (len(layers), 1))

    def flops(items: Sequence[Encoded], _: int) -> float:
        tokens = [len(item.input_ids) for item in items]
        tiles = sum(len(image.tiles) for each in items for image in each.images)
        pairs = pair * sum(count**2 for count in tokens) / 2 + last_pair * sum(tokens)
        return token * sum(tokens) + pairs + item * len(items) + tile * tiles

    return flops
