"""Qwen-VL without an LM head as an embedder.

An item's embedding is the language model's last hidden state at the prompt's last token, normalised to length 1.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from pipeline.data.batch import Image
from pipeline.models import loading
from pipeline.models.attention import PackingModel, Segments, implementation
from pipeline.models.chunks import Chunk, Packed
from pipeline.models.qwen_vl import checks
from pipeline.models.qwen_vl.config import QwenVLArchitecture
from pipeline.models.qwen_vl.decoder import pack_decoder, pooled_states
from pipeline.models.qwen_vl.processor import SPECIAL, image_processor, train_tokenizer
from pipeline.models.qwen_vl.tower import Layout, blank_image, normalised, pack_tower, tower_states

_MERGERS = ("merger", "deepstack_merger_list")
TILE = 729  # patches that count as a tile of batch.tower_tiles: those of SigLIP-so400m's


class _Parts(PreTrainedModel):
    """Parts of a Qwen-VL with transformers' names, for all versions.

    Checkpoints of earlier and current versions of transformers, with and without an LM head, use different prefixes.
    """

    config_class = PreTrainedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_attention_backend = True
    renamings: ClassVar = (
        (r"^model\.(?=(visual|language_model)\.)", ""),
        (r"^(model\.)?(?=(layers|embed_tokens|norm)\.)", "language_model."),
    )

    @classmethod
    def own_name(cls, stored: str) -> str:
        """Return the parameter's name for the name of a tensor in a checkpoint."""
        for pattern, new in cls.renamings:
            stored = re.sub(pattern, new, stored)
        return stored

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.visual: Any = checks.version(config).tower._from_config(config.vision_config)

    def tower_states(self, images: Sequence[Image], patches: Tensor) -> Tensor:
        """Return the states of images with these patches (n, 3, side, side): (1 + deepstack, n, width)."""
        weight, of = self.visual.patch_embed.proj.weight, checks.version(self.config)
        pixels = normalised(patches, images, of.mean, of.std, weight.device, weight.dtype)
        return tower_states(self.visual, pixels, Layout.of(images, self.visual.config, weight.device))


class QwenVL(PackingModel, _Parts):
    """A Qwen-VL without an LM head; maps packed items to unit vectors.

    always_with_images: run the tower in every forward pass (see `forward`), so all trained parameters get gradients.
    """

    always_with_images = False
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012 (as in its base class)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.language_model: Any = AutoModel.from_config(config.text_config)
        self.post_init()
        pack_decoder(self.language_model)
        pack_tower(self.visual)

    @classmethod
    def load(
        cls,
        path: str,
        dtype: torch.dtype | Literal["auto"],
        config: Any = None,
        attention: str = "sdpa",
        tower_attention: str = "sdpa",
    ) -> Any:
        """Load from a folder or hub name; under ZeRO-3 straight into its partitions.

        dtype: of the weights; "auto" is the stored one.  config: with a recipe's settings; None is the folder's.
        attention, tower_attention: see pipeline/models/attention.py.
        """
        config = cls.config_for(config or checks.load_config(path), attention, tower_attention)
        return loading.open_model(cls, path, config, dtype, None)

    @staticmethod
    def config_for(config: Any, attention: str, tower_attention: str) -> Any:
        """Return the config with which `load` builds the model."""
        config._attn_implementation = {
            "text_config": implementation(attention),
            "vision_config": implementation(tower_attention),
        }
        return config

    def forward(self, packed: Packed, with_images: bool, features: Tensor | None = None) -> Tensor:
        """Map N packed items to (N, hidden) float32 unit rows.

        with_images: whether any rank has an image in this forward pass. A rank without one then runs a blank image
        through tower and mergers, multiplied by zero: under ZeRO-3 every rank must run the same modules.
        features: (1 + deepstack, patches, width) of the tower, if it is not part of the model.
        """
        embeds = self.language_model.embed_tokens(packed.input_ids)
        places, deep = None, list[Tensor]()
        if packed.images:
            places = packed.places(self.config.image_token_id, self.config.video_token_id)
            tokens, *deep = self.merged(
                self.tower_states(packed.images, packed.tiles) if features is None else features
            )
            embeds = embeds.index_copy(0, places, tokens)
        elif with_images or self.always_with_images:
            embeds = embeds + 0 * sum(each.sum() for each in self.merged(self._blank_states(embeds)))
        segments = Segments(packed.lengths, embeds.device)
        hidden = pooled_states(self.language_model, embeds, packed.positions, segments, places, deep)
        return F.normalize(hidden.float(), dim=-1)

    def merged(self, states: Tensor) -> list[Tensor]:
        """Map the tower's states to (tokens, hidden): the images' tokens, and what deepstack adds to each layer."""
        mergers = [self.visual.merger, *getattr(self.visual, "deepstack_merger_list", ())]
        return [merger(each) for merger, each in zip(mergers, states, strict=True)]

    def _blank_states(self, like: Tensor) -> Tensor:
        blank = blank_image(self.config.vision_config)
        return self.tower_states((blank,), torch.from_numpy(blank.tiles))


class TowerlessQwenVL(QwenVL):
    """The model without its vision tower, but with the mergers; it gets the tower's states as input."""

    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012 (as in its base class)
        r"^lm_head\.",
        rf"^(model\.)?visual\.(?!({'|'.join(_MERGERS)})\.)",
    ]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for name in [name for name, _ in self.visual.named_children() if name not in _MERGERS]:
            delattr(self.visual, name)
        self.visual.supports_gradient_checkpointing = False  # it has no layers left

    def _blank_states(self, like: Tensor) -> Tensor:
        vision = self.config.vision_config
        deep = len(getattr(vision, "deepstack_visual_indexes", ()))
        return like.new_zeros(1 + deep, vision.spatial_merge_size**2, checks.tower_width(self.config))


class FrozenQwenTower(_Parts):
    """The frozen tower of a Qwen-VL folder or hub name, outside the engine; no other weights are read.

    patches_at_once: patches per forward pass; an image is never divided.
    """

    patches_at_once = 64 * TILE
    reads_tiles: ClassVar[bool] = True

    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012 (as in its base class)
        r"^(?!(model\.)?visual\.)",
        rf"^(model\.)?visual\.({'|'.join(_MERGERS)})\.",
    ]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for name in _MERGERS:
            if hasattr(self.visual, name):
                delattr(self.visual, name)
        self.post_init()
        pack_tower(self.visual)

    @classmethod
    def load(
        cls,
        path: str,
        dtype: torch.dtype | Literal["auto"],
        device: torch.device,
        attention: str = "sdpa",
        tiles_at_once: int = 64,
    ) -> "FrozenQwenTower":
        config = QwenVL.config_for(checks.load_config(path), "sdpa", attention)
        tower = loading.open_model(cls, path, config, dtype, None)
        tower.patches_at_once = tiles_at_once * TILE
        return tower.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]  # its decorator hides self

    @torch.no_grad()
    def features_of(self, chunk: Chunk, packed: Packed) -> Tensor | None:
        """Return the states of the chunk's images, (1 + deepstack, patches, width); None if it has no image."""
        if not packed.images:
            return None
        parts, first, tiles = [], 0, packed.tiles
        for images in self._passes(packed.images):
            count = sum(len(image.tiles) for image in images)
            parts.append(self.tower_states(images, tiles[first : first + count]))
            first += count
        return torch.cat(parts, dim=1)

    def _passes(self, images: Iterable[Image]) -> list[list[Image]]:
        passes, size = list[list[Image]](), 0
        for image in images:
            size += len(image.tiles)
            if not passes or size > self.patches_at_once:
                passes.append([])
                size = len(image.tiles)
            passes[-1].append(image)
        return passes


for kind in (QwenVL, TowerlessQwenVL, FrozenQwenTower):
    # transformers looks up the mapping of checkpoint names by class name.
    register_checkpoint_conversion_mapping(kind.__name__, [WeightRenaming(*pair) for pair in kind.renamings])


def build(architecture: QwenVLArchitecture, texts: Iterable[str], seed: int, folder: Path) -> None:
    """Write a folder, readable by `load`, with a model of random weights and a tokenizer trained on `texts`.

    It is written once and loaded by every rank, because loading is the only way into ZeRO-3's partitions.
    """
    config = checks.config_of_architecture(architecture)
    tokenizer = train_tokenizer(texts, int(config.text_config.vocab_size))
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.pad_token_id, config.text_config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    for name, token in zip(("vision_start", "vision_end", "image", "video"), SPECIAL[2:], strict=True):
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        checks.version(config).whole(config).save_pretrained(folder, save_original_format=False)
    tokenizer.save_pretrained(folder)
    image_processor(config, "model.architecture").save_pretrained(folder)
