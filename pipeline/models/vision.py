"""Vision encoders that map images to vectors: the vision tower of CLIP or SigLIP, or timm's EVA02-CLIP.

Supported are transformers' CLIP (arXiv 2103.00020), its SigLIP (2303.15343; of SigLIP 2, 2502.14786, the fixed
sizes), and timm's vision transformers whose head is a projection (EVA-CLIP, 2303.15389).
"""

import importlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipImageProcessorPil,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.image_processing_backends import PilBackend

from pipeline.data.sample import BadSample, ContentDraw, Item, hash64
from pipeline.errors import PipelineError
from pipeline.models import loading
from pipeline.models.files import fetched
from pipeline.models.folder import share
from pipeline.models.loading import config_dict, reads_as_stored, refuse_unknown


# From a checkpoint with both towers only the vision tower is read. These classes keep their bases' names, because
# transformers writes the name to config.json and selects the mapping of checkpoint names by it.
class CLIPVisionModelWithProjection(transformers.CLIPVisionModelWithProjection):
    _keys_to_ignore_on_load_unexpected = [r"^(text_model|text_projection|logit_scale)"]  # noqa: RUF012 (as in its base class)


class SiglipVisionModel(transformers.SiglipVisionModel):
    _keys_to_ignore_on_load_unexpected = [r"^(text_model|logit_scale|logit_bias)"]  # noqa: RUF012 (as in its base class)


names = get_checkpoint_conversion_mapping("SiglipVisionModel")
register_checkpoint_conversion_mapping("SiglipVisionModel", names, overwrite=True)  # also for the class here

# The classes by model_type in config.json.
_FAMILIES: dict[str, tuple[type[PreTrainedModel], type[PilBackend]]] = {
    "clip": (CLIPVisionModelWithProjection, CLIPImageProcessorPil),
    "clip_vision_model": (CLIPVisionModelWithProjection, CLIPImageProcessorPil),
    "siglip": (SiglipVisionModel, SiglipImageProcessorPil),
    "siglip_vision_model": (SiglipVisionModel, SiglipImageProcessorPil),
}
TO_EVEN = "crop_rounds_to_even"  # a field of preprocessor_config.json that transformers keeps but does not read
_OUTPUTS = {"clip_vision_model": "image_embeds", "siglip_vision_model": "pooler_output"}


class VisionEncoder(nn.Module):
    """Maps pixels to vectors.

    tower: transformers' model.  processor: is saved beside it; None for timm, whose config includes it.
    dimension: of the vectors.  tokens: the tower's tokens per image, patches and class token.
    """

    dimension: int
    tokens: int

    def __init__(self, tower: PreTrainedModel, processor: PilBackend | None) -> None:
        super().__init__()
        self.tower, self._processor = tower, processor
        config = tower.config
        if config.model_type == "timm_wrapper":
            timm: Any = tower.timm_model
            if not hasattr(timm, "num_prefix_tokens"):
                raise PipelineError(f"timm's {config.architecture} is not a vision transformer; only those work")
            self.dimension = cast(int, config.num_labels)
            self.tokens = timm.patch_embed.num_patches + timm.num_prefix_tokens
        else:
            clip = config.model_type == "clip_vision_model"
            self.dimension = config.projection_dim if clip else config.hidden_size
            self.tokens = (config.image_size // config.patch_size) ** 2 + clip

    @classmethod
    def load(cls, path: str, dtype: torch.dtype | Literal["auto"]) -> "VisionEncoder":
        """Load from a folder or hub name, which may also hold a text tower.  dtype: "auto" is the stored one.

        Raises PipelineError if there is no model, if its family is not supported, if weights are missing, or if it
        needs timm and timm is not installed.
        """
        kind, config, processor = _parts(path, config_dict(path))
        return cls(loading.open_model(kind, path, config, dtype), processor)

    @staticmethod
    def check(path: str, new_projection: bool = False) -> None:
        """Raise the errors of `load`, and of `renew_projection` if wanted, that the files' headers reveal."""
        kind, config, _ = _parts(path, config_dict(path))
        loading.check_weights(path, kind, config)
        if new_projection:
            _ = shape_of(path)._projection

    @classmethod
    def build(cls, architecture: dict[str, Any], dimension: int, seed: int) -> "VisionEncoder":
        """Build a CLIP vision tower with random weights.

        architecture: fields of transformers' CLIPVisionConfig; PipelineError for an unknown one.
        dimension: of the vectors.
        """
        refuse_unknown("vision", architecture, CLIPVisionConfig())
        config = CLIPVisionConfig(**architecture | {"projection_dim": dimension})
        processor = image_processor(cast(int, config.image_size))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(CLIPVisionModelWithProjection._from_config(config, attn_implementation="sdpa"), processor)

    def renew_projection(self, dimension: int, seed: int) -> None:
        """Replace the projection by a random one to `dimension`, as LLM2CLIP's code does (eva_clip/eva_vit_model.py).

        Its weights have a standard deviation of 2e-5, its bias is zero. The vectors' direction alone matters.
        Raises PipelineError for a SigLIP, which has no projection.
        """
        owner, name = self._projection
        old = getattr(owner, name)
        new = nn.Linear(old.in_features, dimension, old.bias is not None, old.weight.device, old.weight.dtype)
        drawn = torch.randn(new.weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            new.weight.copy_(0.02 * 0.001 * drawn)
            if new.bias is not None:
                new.bias.zero_()
        setattr(owner, name, new)
        self.dimension = dimension
        if name == "head":
            owner.num_classes = self.tower.config.num_labels = dimension
        else:
            self.tower.config.projection_dim = dimension

    @property
    def _projection(self) -> tuple[Any, str]:
        """The module that has the projection, and its name there. Raises PipelineError if there is none."""
        tower: Any = self.tower
        found = (
            (tower.timm_model, "head") if tower.config.model_type == "timm_wrapper" else (tower, "visual_projection")
        )
        if not isinstance(getattr(*found, None), nn.Linear):
            raise PipelineError(
                f"a {tower.config.model_type} has no projection, which model.dimension would replace: remove "
                "model.dimension, or set model.path to a CLIP or timm's EVA02-CLIP"
            )
        return found

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map (n, 3, size, size) to (n, dimension), which are not unit vectors.

        pixels: normalised; after `embed_bytes` also uint8.
        """
        if self.tower.config.model_type == "timm_wrapper":  # the wrapper would convert bytes to the weights' dtype
            return cast(nn.Module, self.tower.timm_model)(pixels)
        return getattr(self.tower(pixel_values=pixels), _OUTPUTS[self.tower.config.model_type])

    def save(self, folder: Path) -> None:
        """Write tower and image processor as a folder that transformers loads by itself."""
        self.tower.save_pretrained(folder)
        if self._processor:
            self._processor.save_pretrained(folder)
        share(folder)


def layer_factors(names: Iterable[str], decay: float) -> dict[str, float]:
    """Return layer-wise factors of the learning rate by name of a tower's parameter (LLM2CLIP's training/optim.py).

    Layer i of n has decay^(n - i), with i from 0. Embeddings of patches and positions and EVA02's class token have
    decay^(n + 1). All others have 1: norms outside the layers, heads, and CLIP's class embedding, which the published
    code does not name either.
    """
    found = {name: _LAYER.search(name) for name in names}
    layers = 1 + max((int(match[1]) for match in found.values() if match), default=-1)

    def factor(name: str, match: re.Match[str] | None) -> float:
        if any(part in name for part in ("patch_embed", *_UNDECAYED)):
            return decay ** (layers + 1)
        return decay ** (layers - int(match[1])) if match else 1.0

    return {name: factor(name, match) for name, match in found.items()}


def undecayed(name: str) -> bool:
    """Whether LLM2CLIP's training/optim.py has no weight decay for a tower's matrix: positions and a class token."""
    return any(part in name for part in _UNDECAYED)


_LAYER = re.compile(r"\b(?:blocks|layers)\.([0-9]+)\.")  # of timm and of transformers
_UNDECAYED = ("pos_embed", "position_embedding", "cls_token")


@dataclass(frozen=True)
class Pixels:
    """Prepares images for a vision encoder: resize and centre crop. The patch embedding normalises them.

    size: pixels of a side.  mean, std: per channel, for values in [0, 1].
    edge: pixels that the shorter side is resized to, or both sides if not `keeps_shape`.  keeps_shape: keep the aspect
    ratio.  to_even: round a crop offset of half a pixel to even, as torchvision and so timm do; transformers rounds
    down, unless the image processor's file has `TO_EVEN`.  as_stored: how images are read, see `rgb`.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    edge: int
    keeps_shape: bool
    resample: Image.Resampling
    to_even: bool = False
    as_stored: bool = False

    @classmethod
    def load(cls, path: str, images: str | None = None) -> "Pixels":
        """Load from a folder or hub name.  images: how they are read, if not as its config says.

        Raises PipelineError if its settings are not supported or do not match the model.
        """
        settings, as_stored = config_dict(path), reads_as_stored(path, images)
        if "pretrained_cfg" in settings:
            with loading.reading(fetched(path, weights=False) / "config.json"):
                return replace(cls._of_timm(path, settings["pretrained_cfg"]), as_stored=as_stored)
        kind, processor_class = _family(path, settings)
        processor = loading.image_processor(path, processor_class)
        with loading.reading(fetched(path, weights=False) / "preprocessor_config.json"):
            pixels = cls._of_processor(path, processor)
        if pixels.size != (side := loading.config(path, kind.config_class).image_size):
            raise PipelineError(
                f"{path}: its image processor makes {pixels.size} pixels a side, its model takes {side}"
            )
        return replace(pixels, as_stored=as_stored)

    @classmethod
    def _of_processor(cls, path: str, its: Any) -> "Pixels":
        edge = its.size.shortest_edge or its.size.height
        height, width = (its.crop_size.height, its.crop_size.width) if its.do_center_crop else (edge, edge)
        keeps_shape = its.size.shortest_edge is not None
        known = its.do_resize and its.do_rescale and its.do_normalize and not its.do_pad
        known = known and math.isclose(its.rescale_factor, 1 / 255)
        if keeps_shape:
            known = known and its.do_center_crop and its.size.longest_edge is None
        else:
            known = known and its.size.height == its.size.width
        if not (known and height == width <= edge):
            raise PipelineError(
                f"{path}: its image processor is not supported; expected are a resize to a square, or of the "
                "shorter edge before a square crop, then a division by 255 and a normalisation"
            )
        resample = Image.Resampling(its.resample)
        to_even = getattr(its, TO_EVEN, False) is True
        return cls(height, tuple(its.image_mean), tuple(its.image_std), edge, keeps_shape, resample, to_even)

    @classmethod
    def _of_timm(cls, path: str, its: dict[str, Any]) -> "Pixels":
        _, height, width = its["input_size"]
        crop, filter_name = its.get("crop_mode", "center"), its["interpolation"].upper()
        if crop != "center" or filter_name not in Image.Resampling.__members__:
            what = f"crop_mode={crop} with interpolation={its['interpolation']}"
            raise PipelineError(f"{path}: {what} is not supported; expected crop_mode=center and a Pillow filter")
        if height != width:
            raise PipelineError(f"{path}: input_size {height}x{width} is not supported; it must be square")
        edge, resample = math.floor(height / its["crop_pct"]), Image.Resampling[filter_name]
        return cls(height, tuple(its["mean"]), tuple(its["std"]), edge, True, resample, to_even=True)

    def prepare(self, picture: Image.Image, box: "Box | None" = None) -> np.ndarray:
        """Return (3, size, size) uint8, byte for byte as the model's own image processor gives.

        box: resize this part of the picture to a square instead.
        Raises BadSample if the aspect ratio is so extreme that the resized image would be too large.
        """
        rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
        if box:  # cut out first: a resize with `box=` also samples pixels around it
            square = rgb.crop(box).resize((self.size, self.size), self.resample)
            return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
        height, width = self.resized(rgb.height, rgb.width)
        if height * width > cast(int, Image.MAX_IMAGE_PIXELS):
            raise BadSample(f"{rgb.width}x{rgb.height} pixels, too long to be resized by the shorter edge")
        planes = np.asarray(rgb.resize((width, height), self.resample)).transpose(2, 0, 1)
        top, left = self._begin(height), self._begin(width)
        return np.ascontiguousarray(planes[:, top : top + self.size, left : left + self.size])

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the size to which a picture of this size is resized, before the crop."""
        if not self.keeps_shape:
            return self.edge, self.edge
        shorter = min(height, width)
        return int(self.edge * height / shorter), int(self.edge * width / shorter)

    def _begin(self, length: int) -> int:
        spare = length - self.size
        return round(spare / 2) if self.to_even else spare // 2


Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; the last two are excluded


@dataclass(frozen=True)
class RandomCrops:
    """Where a step crops its images: the boxes of torchvision's RandomResizedCrop, with its aspect ratios 3:4 to 4:3.

    scale: the least and the greatest part of an image's area.  draws: the step's random numbers.
    """

    scale: tuple[float, float]
    draws: ContentDraw

    def boxes(self, item: Item, pictures: Sequence[Image.Image]) -> list[Box]:
        """Return a box for each picture of an item: its images, then its video's frames, which share their draws."""
        contents = [hash64(image) for image in item.images]
        contents += [hash64(item.video or b"")] * (len(pictures) - len(contents))
        return [self._box(picture, content) for picture, content in zip(pictures, contents, strict=True)]

    def _box(self, picture: Image.Image, content: int) -> Box:
        width, height = picture.size
        *shapes, down, right = self.draws(content, 2 * _CROP_ATTEMPTS + 2).tolist()
        least, greatest = self.scale
        for area_draw, ratio_draw in zip(shapes[::2], shapes[1::2], strict=True):
            area = width * height * (least + (greatest - least) * area_draw)
            ratio = math.exp(math.log(4 / 3) * (2 * ratio_draw - 1))
            wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < high <= height:
                left, top = int(right * (width - wide + 1)), int(down * (height - high + 1))
                return left, top, left + wide, top + high
        wide, high = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - wide) // 2, (height - high) // 2
        return left, top, left + wide, top + high


_CROP_ATTEMPTS = 10  # as in torchvision; then the largest box in the middle whose aspect ratio is allowed


def _family(path: str, settings: dict[str, Any]) -> tuple[type[PreTrainedModel], type[PilBackend]]:
    kind = settings.get("model_type")
    if kind not in _FAMILIES:
        raise PipelineError(
            f"{path} is a {kind} model; expected a vision encoder: clip, siglip (or a SigLIP 2 of fixed size) or timm's"
        )
    return _FAMILIES[kind]


def _parts(path: str, settings: dict[str, Any]) -> tuple[type[PreTrainedModel], PreTrainedConfig, PilBackend | None]:
    if "pretrained_cfg" in settings:
        return *_timm_parts(path), None
    kind, processor_class = _family(path, settings)
    config = loading.config(path, kind.config_class)
    if settings["model_type"] == "clip":  # the top-level projection_dim is valid; the vision part's is often a default
        config.projection_dim = loading.config(path, CLIPConfig).projection_dim
    if not getattr(config, "vision_use_head", True):
        raise PipelineError(f"{path} has no pooling head (vision_use_head=false), which gives an image's vector")
    return kind, config, loading.image_processor(path, processor_class)


def _timm_parts(path: str) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    try:
        importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not match torch
        raise PipelineError(f"{path} needs timm ({str(error).splitlines()[0]}): pip install timm") from None
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification  # these import timm

    config = loading.config(path, TimmWrapperConfig)
    if not config.num_labels:
        raise PipelineError(f"{path} has no head (num_classes=0), which is the projection of timm's CLIP towers")
    if config.model_args:
        config.model_args.pop("num_classes", None)  # transformers passes it too
    return TimmWrapperForImageClassification, config


def image_processor(side: int, to_even: bool = False) -> CLIPImageProcessorPil:
    """Return CLIP's image processor for images of `side` pixels a side.  to_even: see `Pixels`."""
    more: dict[str, Any] = {TO_EVEN: True} if to_even else {}
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **more)


@cache
def shape_of(path: str) -> VisionEncoder:
    """Return the vision encoder of a folder or hub name on the meta device. It raises the errors of `load`."""
    kind, config, processor = _parts(path, config_dict(path))
    with loading.reading(fetched(path, weights=False) / "config.json"), torch.device("meta"):
        return VisionEncoder(kind._from_config(config, attn_implementation="sdpa"), processor)


def tokens_of(path: str | None, architecture: Any) -> int:
    """Return how many tokens an image counts as, from the model at `path` or from the recipe's architecture."""
    if path:
        return shape_of(path).tokens
    with torch.device("meta"):
        return VisionEncoder.build(architecture.vision, 1, seed=0).tokens
