"""Small models and full chunks for tests of the memory plan, and the memory that tensors take."""

import weakref
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

from pipeline.data.batch import Encoded, Image
from pipeline.models.chunks import Packed, pack
from pipeline.models.qwen_vl import checks
from pipeline.models.qwen_vl.config import QwenVLArchitecture

IMAGE = 3  # token id of the placeholder


def llave_config(vision: tuple[int, ...], text: tuple[int, ...], image_size: int) -> LlavaOnevisionConfig:
    """Return a config from (hidden size, MLP, layers, heads) and, for the language model, key-value heads."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            **dict(zip(names, vision, strict=False)), image_size=image_size, patch_size=8, vision_use_head=False
        ),
        text_config=Qwen2Config(**dict(zip(names, text, strict=True)), vocab_size=64),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[image_size, image_size]],
        vision_feature_select_strategy="full",
    )


LLAVE = {
    "tiny": llave_config((96, 256, 3, 4), (128, 256, 4, 4, 2), 24),
    "small": llave_config((64, 256, 2, 2), (256, 1400, 4, 8, 2), 56),
}


def llave_chunk(shape: LlavaOnevisionConfig, items: int = 4) -> tuple[Packed, int, int]:
    """Return packed items, each with two tiles; and their numbers of tokens and tiles.

    One item is shorter by a token, so attention pads, which takes memory, but hardly more than the plan's.
    """
    size = shape.vision_config.image_size
    side = size // 8
    image = Image(np.zeros((2, 3, size, size), np.uint8), size, size)
    marks = [IMAGE] * (side**2 + side * (side + 1))
    lengths = [50] * (items - 1) + [49]
    packed = pack([Encoded(np.array(marks + [7] * n, np.int32), (image,)) for n in lengths])
    return packed, sum(packed.lengths), 2 * items


def qwen_config(kind: str, layers: int = 3, depth: int = 4) -> Any:
    """Return a config of a Qwen-VL version with the real ones' ratios. Of Qwen3-VL, queries are wider than states."""
    text = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": layers, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 64}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
    vision: dict[str, Any] = {"depth": depth, "num_heads": 2, "patch_size": 14, "hidden_size": 160}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 160, "hidden_size": 256, "mlp_ratio": 4}
    elif kind == "qwen2_5_vl":
        vision |= {"out_hidden_size": 256, "intermediate_size": 432, "window_size": 112}
        vision |= {"fullatt_block_indexes": [1, depth - 1]}
    else:
        vision |= {"out_hidden_size": 256, "intermediate_size": 640, "patch_size": 16, "num_position_embeddings": 2304}
        vision["deepstack_visual_indexes"] = [0, 1]
        text["head_dim"], rope["mrope_section"] = 80, [16, 12, 12]
    architecture = QwenVLArchitecture(model_type=kind, vision=vision, text=text | {"rope_parameters": rope})  # type: ignore[arg-type]
    config = checks.config_of_architecture(architecture)
    config.image_token_id, config.video_token_id = IMAGE, IMAGE + 1
    return config


def qwen_chunk(config: Any, side: int = 12, pairs: int = 1, video: bool = False) -> tuple[Packed, int]:
    """Return packed items of the tokens of an image each, and nothing else, and their number of tokens.

    side: patches of an image's side.  pairs: of a video's frames.  One item is shorter: see `llave_chunk`.
    """
    patch = config.vision_config.patch_size
    items = []
    for rows in (side, side, side - 2):
        tiles = np.zeros(((1 + video) * pairs * rows * side, 3, patch, patch), np.uint8)
        image = Image(tiles, rows * patch, side * patch, video=video)
        count = pairs * rows * side // config.vision_config.spatial_merge_size**2
        ids = np.array([config.video_token_id if video else config.image_token_id] * count, np.int32)
        items.append(Encoded(ids, (image,), positions=np.tile(np.arange(len(ids)), (3, 1))))
    packed = pack(items)
    return packed, sum(packed.lengths)


class LiveBytes(TorchDispatchMode):
    """Track the bytes of live storages that operations allocate on a type of device, and their peak."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.now = self.peak = 0
        self._living: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != self.device:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in given | self._living:
                self._living.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self._living.discard(key)
        self.now -= size


def measured_saved(model: torch.nn.Module, packed: Packed, features: torch.Tensor | None) -> int:
    """Return the bytes of the distinct storages that autograd saves, except parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(packed, True, features)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
