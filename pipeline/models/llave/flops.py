"""The FLOPs of a step of LLaVE."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from pipeline.data.batch import Encoded
from pipeline.models.flops import StepFlops, image_flops, known, per_row, pooled_decoder, trains
from pipeline.models.llave.checks import sides_of
from pipeline.models.llave.model import Llave


def step_flops(model: Llave, tower: nn.Module) -> StepFlops | None:
    """Return what counts a step's FLOPs; None if they are unknown.  tower: the model's or the frozen one."""
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
    decoder = pooled_decoder(text, inputs=to_inputs)

    def flops(items: Sequence[Encoded], _: int) -> float:
        return decoder(items) + tile * sum(len(image.tiles) for each in items for image in each.images)

    return flops
