"""LLaVE's section of a recipe."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from pipeline.config import Fixed, LanguageModelTrain, ModelSection, Prefixes
from pipeline.config.section import Place, Section

Sizes = list[tuple[PositiveInt, PositiveInt]]


class LlaveArchitecture(Section):
    vision: dict[str, Any] = Field(min_length=1, description="transformers' SiglipVisionConfig")
    text: dict[str, Any] = Field(
        min_length=1, description="transformers' Qwen2Config; vocab_size is the size of the tokenizer to train"
    )
    image_grid_pinpoints: Sizes = Field(min_length=1, description="sizes (height, width) an image is tiled to")


class LlaveTrain(LanguageModelTrain):
    projector: Annotated[bool | float, Fixed(bool), Prefixes(["multi_modal_projector.", "image_newline"])] = Field(
        True, description="with the newline's embedding"
    )
    language_model: Annotated[bool | float, Fixed(bool), Prefixes(["language_model."])] = Field(
        True, description="its weights, or adapters"
    )
    vision_tower: Annotated[bool | float, Fixed(bool), Prefixes(["vision_tower."])] = Field(
        False, description="if frozen, it runs outside the DeepSpeed engine, once per step"
    )


class LlaveSection(ModelSection):
    text_part: ClassVar = "language_model"

    family: Annotated[Literal["llave"], Fixed()] = "llave"
    path: Annotated[Place | None, Fixed()] = Field(
        None, description="folder or hub name of a LLaVA-OneVision in transformers' format, or of an original LLaVE"
    )
    architecture: Annotated[LlaveArchitecture | None, Fixed()] = Field(
        None, description="train from random weights with this architecture, instead of model.path"
    )
    image_grid_pinpoints: Annotated[Sizes | None, Fixed()] = Field(
        None,
        min_length=1,
        description="sizes (height, width) an image is tiled to; default: the model config's value",
    )
    mm_newline_position: Annotated[Literal["one_token", "grid"] | None, Fixed()] = Field(
        None,
        description="where a video has newlines: at its end, or after each row of each frame; default: the model "
        "config's value",
    )
    images: Literal["upright", "as_stored"] | None = Field(
        None,
        description='upright: turned by their EXIF orientation, 16 bits scaled to 8; as_stored: only convert("RGB"), '
        "like the papers' code; default: the model config's value, or else upright",
    )
    marks: Literal["mended", "published"] | None = Field(
        None,
        description="rows of MMEB with a mark and no image, or an image and no mark. mended: such a mark is removed, "
        "such an image gets a mark at the front; published: such a mark is a tile of zeros, such an image is ignored, "
        "like in the paper's code; default: the model config's value, or else mended",
    )
    train: LlaveTrain = LlaveTrain()

    @model_validator(mode="after")
    def pinpoints_are_given_once(self) -> "LlaveSection":
        if self.architecture and self.image_grid_pinpoints:
            raise ValueError("model.image_grid_pinpoints is for model.path; the architecture has its own")
        return self


SECTION = LlaveSection
