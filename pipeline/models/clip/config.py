"""CLIP's section of a recipe."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipeline.config import Fixed, ModelSection, Prefixes, TrainSection
from pipeline.config.section import Place, Section


class ClipArchitecture(Section):
    vision: dict[str, Any] = Field(min_length=1, description="transformers' CLIPVisionConfig")
    text: dict[str, Any] = Field(
        min_length=1, description="transformers' CLIPTextConfig; vocab_size is the size of the tokenizer to train"
    )


class ClipTrain(TrainSection):
    vision_tower: Annotated[bool | float, Fixed(bool), Prefixes(["clip.vision_model.", "clip.visual_projection."])] = (
        Field(description="with its projection")
    )
    language_model: Annotated[bool | float, Fixed(bool), Prefixes(["clip.text_model.", "clip.text_projection."])] = (
        Field(True, description="with its projection")
    )


class ClipSection(ModelSection):
    text_part: ClassVar = "language_model"

    family: Annotated[Literal["clip"], Fixed()] = "clip"
    path: Annotated[Place | None, Fixed()] = Field(None, description="folder or hub name of a CLIP")
    architecture: Annotated[ClipArchitecture | None, Fixed()] = Field(
        None, description="train from random weights with this architecture, instead of model.path"
    )
    images: Literal["upright", "as_stored"] | None = Field(None, description="how images are read; see llave's")
    train: ClipTrain


SECTION = ClipSection
