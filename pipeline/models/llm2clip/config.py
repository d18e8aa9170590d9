"""LLM2CLIP's section of a recipe."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from pipeline.config import Fixed, ModelSection, Prefixes, TrainSection
from pipeline.config.section import Place, Section

_Part = Annotated[float, Field(gt=0, le=1)]


class Llm2ClipArchitecture(Section):
    vision: dict[str, Any] = Field(min_length=1, description="transformers' CLIPVisionConfig")


class Llm2ClipTrain(TrainSection):
    """The trainable parts of an LLM2CLIP; its text encoder is frozen."""

    vision_tower: Annotated[bool | float, Fixed(bool), Prefixes(["vision."])]
    adapter: Annotated[bool | float, Fixed(bool), Prefixes(["adapter."])] = Field(
        True, description="over the frozen text encoder's vectors"
    )
    layer_decay: Annotated[float, Fixed()] = Field(
        1.0,
        gt=0,
        le=1,
        description="factor of the vision tower's learning rate from each layer to the one before; below 1, its "
        "position embeddings and class token have no weight decay",
    )


class Llm2ClipSection(ModelSection):
    """LLM2CLIP's second stage: a vision encoder trained against a frozen text encoder."""

    text_part: ClassVar = "adapter"

    family: Annotated[Literal["llm2clip"], Fixed()] = "llm2clip"
    path: Annotated[Place | None, Fixed()] = Field(
        None, description="folder or hub name of a CLIP, SigLIP or timm vision tower"
    )
    architecture: Annotated[Llm2ClipArchitecture | None, Fixed()] = Field(
        None, description="train from random weights with this architecture, instead of model.path"
    )
    images: Literal["upright", "as_stored"] | None = Field(None, description="how images are read; see llave's")
    dimension: Annotated[int | None, Fixed()] = Field(
        None,
        gt=0,
        description="of the shared space, by a new projection in place of the vision tower's; null: the tower's own",
    )
    crop_scale: Annotated[tuple[_Part, _Part] | None, Fixed()] = Field(
        None,
        description="in training, crop each image at random to between these parts of its area, such as [0.9, 1.0]",
    )
    text_encoder: Annotated[Place, Fixed()] = Field(
        description="folder or hub name of the frozen text encoder: the export of a run of family text_encoder, or a "
        "sentence embedder in sentence-transformers' format"
    )
    train: Llm2ClipTrain

    @field_validator("crop_scale")
    @classmethod
    def scale_rises(cls, scale: tuple[float, float] | None) -> tuple[float, float] | None:
        if scale and scale[0] > scale[1]:
            raise ValueError(f"{list(scale)} falls: give the smaller part first")
        return scale

    @property
    def other_folders(self) -> dict[str, str]:
        return {"model.text_encoder": self.text_encoder}


SECTION = Llm2ClipSection
