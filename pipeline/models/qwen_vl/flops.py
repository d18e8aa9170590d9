"""The FLOPs of a step of a Qwen-VL."""

from collections.abc import Sequence
from typing import Any

from pipeline.data.batch import Encoded
from pipeline.models.flops import StepFlops, known, per_pair, per_row, pooled_decoder, trains
from pipeline.models.qwen_vl.checks import tower_width
from pipeline.models.qwen_vl.model import QwenVL
from pipeline.models.qwen_vl.tower import grid_of


def step_flops(model: QwenVL, tower: Any) -> StepFlops | None:
    """Return what counts a step's FLOPs; None if they are unknown.  tower: the model's or the frozen one."""
    text, config = model.language_model, model.config
    mergers = [model.visual.merger, *getattr(model.visual, "deepstack_merger_list", ())]
    blocks = [tower.patch_embed, *tower.blocks]
    if not known(text, tower, *mergers):
        return None
    # Whether the gradient of the tower's states is needed; that of the layers' inputs.
    to_states = trains(*blocks)
    to_inputs = to_states or trains(*mergers) or trains(text)
    merged, side = config.vision_config.spatial_merge_size**2, config.vision_config.patch_size
    patch = per_row(tower.patch_embed, inputs=False) + per_row(*tower.blocks, inputs=to_states)
    image_token = merged * patch + per_row(*mergers, inputs=to_states or trains(*mergers))
    full = getattr(config.vision_config, "fullatt_block_indexes", range(len(tower.blocks)))
    seen = per_pair(tower_width(config), len(full), inputs=to_states)
    windowed = per_pair(tower_width(config), len(tower.blocks) - len(full), inputs=to_states)
    # Patches along a window's side: `get_vision_window_index` rounds twice.
    window = getattr(config.vision_config, "window_size", 0) // config.vision_config.spatial_merge_size // side
    window *= config.vision_config.spatial_merge_size
    decoder = pooled_decoder(text, inputs=to_inputs)

    def flops(items: Sequence[Encoded], _: int) -> float:
        grids = [grid_of(image, side) for each in items for image in each.images]
        cut = sum(frames * rows * columns for frames, rows, columns in grids)
        of_tower = sum(
            frames * (seen * (rows * columns) ** 2 + windowed * _squares(rows, window) * _squares(columns, window))
            for frames, rows, columns in grids
        )
        return decoder(items) + image_token * cut / merged + of_tower

    return flops


def _squares(length: int, window: int) -> int:
    """Return the sum of the squares of the lengths of the windows along a side."""
    return length // window * window**2 + (length % window) ** 2 if window else 0
