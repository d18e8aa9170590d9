"""LLaVA-OneVision without an LM head as an embedder.

An item's embedding is the language model's last hidden state at the prompt's last token, normalised to length 1.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from transformers import (
    AutoModel,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionModel,
    LlavaOnevisionPreTrainedModel,
    PreTrainedConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from pipeline.data.batch import Image
from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK
from pipeline.data.tiles import Tiling
from pipeline.models import loading
from pipeline.models.attention import PackingModel, Segments, implementation
from pipeline.models.chunks import Chunk, Packed, sent
from pipeline.models.lean import fuse_gelu, keep_less
from pipeline.models.llave import checks
from pipeline.models.llave.checks import MEAN, STD, Pinpoints, sides_of, text_of
from pipeline.models.llave.config import LlaveArchitecture
from pipeline.models.llave.processor import train_tokenizer
from pipeline.models.packed_attention import pool_in_last_layer
from pipeline.models.packing import check_packing


def normalised(
    tiles: torch.Tensor, device: torch.device, dtype: torch.dtype, blank: Iterable[int] = ()
) -> torch.Tensor:
    """Normalise (n, 3, size, size) uint8 for the tower. It computes in float32: bf16 has only eight bits.

    blank: the tiles that become zeros.
    """
    pixels = sent(tiles, device).float().div_(255).sub_(MEAN).div_(STD).to(dtype)
    for place in blank:
        pixels[place].zero_()
    return pixels


def tower_features(tower: SiglipVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    """Map (n, 3, size, size) normalised pixels to (n, patches², width) of the last layer, before the final norm."""
    return tower.encoder(tower.embeddings(pixels)).last_hidden_state


class Llave(PackingModel, LlavaOnevisionModel):
    """LLaVA-OneVision without an LM head; maps packed items to unit vectors.

    always_with_images: run the tower in every forward pass (see `forward`), so all trained parameters get gradients.
    """

    always_with_images = False

    def __init__(self, config: LlavaOnevisionConfig) -> None:
        super().__init__(config)
        fuse_gelu(self.vision_tower)
        keep_less(self.language_model)
        pool_in_last_layer(self.language_model)

    @classmethod
    def load(
        cls,
        path: str,
        dtype: torch.dtype | Literal["auto"],
        pinpoints: Pinpoints | None = None,
        attention: str = "sdpa",
        newline: str | None = None,
    ) -> "Llave":
        """Load from a folder or hub name in transformers' format; under ZeRO-3 straight into its partitions.

        dtype: of the weights; "auto" is the stored one.  attention: see pipeline/models/attention.py.
        pinpoints, newline: override the config's tile sizes and newline position.
        """
        config = cls.config_for(path, pinpoints, attention, newline)
        return loading.open_model(cls, path, config, dtype, None, check_language_model)

    @staticmethod
    def config_for(
        path: str, pinpoints: Pinpoints | None, attention: str, newline: str | None = None
    ) -> LlavaOnevisionConfig:
        """Return the config with which `load` builds the model."""
        config = checks.load_config(path, pinpoints, newline)
        config.mm_newline_position = checks.newline_position(config)
        config._attn_implementation = {"text_config": implementation(attention), "vision_config": "sdpa"}
        return config

    def forward(self, packed: Packed, with_images: bool, features: torch.Tensor | None = None) -> torch.Tensor:
        """Map N packed items to (N, hidden) float32 unit rows.

        with_images: whether any rank has an image or video in this forward pass. A rank without one then runs a dummy
        tile through tower and projector, multiplied by zero: under ZeRO-3 every rank must run the same modules.
        features: (tiles, patches², width) of the tower, if it is not part of the model.
        """
        embeds = self.language_model.embed_tokens(packed.input_ids)
        if packed.images:
            placeholders = packed.places(self.config.image_token_id, self.config.video_token_id)
            if features is None:
                pixels = normalised(packed.tiles, embeds.device, embeds.dtype, packed.blank_tiles)
                features = tower_features(self.vision_tower, pixels)
            embeds = embeds.index_copy(0, placeholders, self.image_tokens(packed, features))
        elif with_images or self.always_with_images:
            dummy = self.multi_modal_projector(self._dummy_features(embeds))
            embeds = embeds + 0 * (dummy.sum() + self.image_newline.sum())
        hidden = self.language_model(
            inputs_embeds=embeds[None],
            position_ids=packed.positions,
            segments=Segments(packed.lengths, embeds.device),
            use_cache=False,
        ).last_hidden_state[0]
        return F.normalize(hidden.float(), dim=-1)

    def image_tokens(self, packed: Packed, features: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of all images and videos in the order of their placeholders, (placeholders, hidden)."""
        features = self.multi_modal_projector(features).split([len(image.tiles) for image in packed.images])
        rows, tiling = [], checks.tiling(self.config)
        for tiles, image in zip(features, packed.images, strict=True):
            if image.video and self.config.mm_newline_position == "grid":
                frames = self.apply_pooling(tiles)
                side = math.isqrt(frames.shape[1])
                newlines = self.image_newline.expand(len(frames), side, 1, -1)
                rows.append(torch.cat([frames.unflatten(1, (side, side)), newlines], dim=2).flatten(0, 2))
            elif image.video:
                rows += [self.apply_pooling(tiles).flatten(0, 1), self.image_newline[None]]
            elif len(tiles) == 1:
                rows += [tiles[0], self.image_newline[None]]
            else:
                rows += [tiles[0], self._grid(tiles[1:], image, tiling)]
        return torch.cat(rows)

    def _grid(self, tiles: torch.Tensor, image: Image, tiling: Tiling) -> torch.Tensor:
        """Return the tokens of an image's grid, with a newline per row. tiles: (n, patches², hidden).

        transformers' `pack_image_features` computes the same, but copies a tensor to the device, for which it waits.
        """
        down, across = (side // tiling.size for side in tiling.grid(image.height, image.width))
        grid = tiles.unflatten(0, (down, across)).unflatten(2, (tiling.patches, tiling.patches))
        grid = grid.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)  # (hidden, rows, columns)
        rows, columns = tiling.unpadded(image.height, image.width, rounded=not image.unrounded)
        top, left = (grid.shape[1] - rows) // 2, (grid.shape[2] - columns) // 2
        grid = grid[:, top : top + rows, left : left + columns]
        if (size := tiling.reduced(rows, columns)) != (rows, columns):
            grid = F.interpolate(grid[None], size, mode="bilinear")[0]
        newlines = self.image_newline[:, None, None].expand(-1, grid.shape[1], 1)
        return torch.cat([grid, newlines], dim=2).flatten(1, 2).T

    def _dummy_features(self, like: torch.Tensor) -> torch.Tensor:
        """Return the tower's features of a dummy tile, or zeros if the tower is not part of the model."""
        if self.vision_tower is None:
            return like.new_zeros(1, 1, checks.vision_of(self.config).hidden_size)
        side, _ = sides_of(self.config)
        return tower_features(self.vision_tower, like.new_zeros(1, 3, side, side))


class TowerlessLlave(Llave):
    """The model without its vision tower; it gets the tower's features as input."""

    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?vision_tower"]  # noqa: RUF012 (as in its base class)

    def __init__(self, config: LlavaOnevisionConfig) -> None:
        super().__init__(config)
        self.vision_tower = None


class FrozenTower(LlavaOnevisionPreTrainedModel):
    """The frozen tower of a LLaVA-OneVision folder or hub name, outside the engine; no other weights are read.

    tiles_at_once: tiles per forward pass.
    """

    tiles_at_once = 64
    reads_tiles: ClassVar[bool] = True

    _keys_to_ignore_on_load_unexpected = [r"^(?!(model\.)?vision_tower)"]  # noqa: RUF012 (as in its base class)

    def __init__(self, config: LlavaOnevisionConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        fuse_gelu(self.vision_tower)
        self.post_init()

    @classmethod
    def load(
        cls, path: str, dtype: torch.dtype | Literal["auto"], device: torch.device, tiles_at_once: int = 64
    ) -> "FrozenTower":
        tower = loading.open_model(cls, path, loading.config(path, LlavaOnevisionConfig), dtype)
        tower.tiles_at_once = tiles_at_once
        return tower.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]  # its decorator hides self

    @torch.no_grad()
    def features(self, tiles: torch.Tensor, blank: Sequence[int] = ()) -> torch.Tensor:
        """Map (n, 3, size, size) uint8 to (n, patches², width) in the tower's dtype.  blank: see `normalised`."""
        parts = []
        for start in range(0, len(tiles), self.tiles_at_once):
            part = tiles[start : start + self.tiles_at_once]
            places = [place - start for place in blank if 0 <= place - start < len(part)]
            parts.append(tower_features(self.vision_tower, normalised(part, self.device, self.dtype, places)))
        return torch.cat(parts)

    def features_of(self, chunk: Chunk, packed: Packed) -> torch.Tensor | None:
        """Return the features of all the chunk's tiles; None if it has no image."""
        return self.features(packed.tiles, packed.blank_tiles) if packed.images else None


# transformers looks up the mapping of checkpoint names by class name.
for name in ("Llave", "TowerlessLlave", "FrozenTower"):
    register_checkpoint_conversion_mapping(name, get_checkpoint_conversion_mapping("LlavaOnevisionModel"))


def build(architecture: LlaveArchitecture, texts: Iterable[str], seed: int, folder: Path) -> None:
    """Write a folder, readable by `load`, with a model of random weights and a tokenizer trained on `texts`.

    It is written once and loaded by every rank, because loading is the only way into ZeRO-3's partitions.
    """
    tokenizer = train_tokenizer(texts, int(architecture.text["vocab_size"]))
    config = checks.config_of_architecture(architecture)
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
    config.video_token_id = tokenizer.convert_tokens_to_ids(VIDEO_MARK)
    text = text_of(config)
    text.vocab_size, text.bos_token_id = len(tokenizer), None
    text.pad_token_id, text.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlavaOnevisionModel(config).save_pretrained(folder, save_original_format=False)
    tokenizer.save_pretrained(folder)
    save_image_processor(config, folder)


def save_image_processor(config: LlavaOnevisionConfig, folder: Path) -> None:
    """Write the image processor that fits a config."""
    side, _ = sides_of(config)
    LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side},
        image_grid_pinpoints=config.image_grid_pinpoints,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    ).save_pretrained(folder)


def check_language_model(path: str, config: LlavaOnevisionConfig) -> None:
    """Raise PipelineError if the model does not keep packed items independent."""
    check_packing(path, text_of(config), _of_text)


def _of_text(text: PreTrainedConfig) -> Llave:
    """Build a model with this language model and a minimal rest."""
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8
    )
    config = LlavaOnevisionConfig(vision_config=vision, text_config=text)
    config._attn_implementation = {"text_config": implementation("sdpa"), "vision_config": "sdpa"}
    return TowerlessLlave(config)
