"""The Qwen-VL family's section of a recipe."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config import Fixed, LanguageModelTrain, ModelSection, Prefixes
from pipeline.config.section import Place, Section


class QwenVLArchitecture(Section):
    model_type: Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
    vision: dict[str, Any] = Field(min_length=1, description="fields of its vision_config")
    text: dict[str, Any] = Field(
        min_length=1, description="fields of its text_config; vocab_size is the size of the tokenizer to train"
    )


class QwenVLTrain(LanguageModelTrain):
    projector: Annotated[bool | float, Fixed(bool), Prefixes(["visual.merger.", "visual.deepstack_merger_list."])] = (
        Field(True, description="the merger of patches, and those of deepstack")
    )
    language_model: Annotated[bool | float, Fixed(bool), Prefixes(["language_model."])] = Field(
        True, description="its weights, or adapters"
    )
    vision_tower: Annotated[
        bool | float, Fixed(bool), Prefixes(["visual.patch_embed.", "visual.pos_embed.", "visual.blocks."])
    ] = Field(False, description="if frozen, it runs outside the DeepSpeed engine, once per step")


class QwenVLSection(ModelSection):
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL, without experts."""

    text_part: ClassVar = "language_model"

    family: Annotated[Literal["qwen_vl"], Fixed()] = "qwen_vl"
    path: Annotated[Place | None, Fixed()] = Field(
        None, description="folder or hub name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, or of an embedder made from one"
    )
    architecture: Annotated[QwenVLArchitecture | None, Fixed()] = Field(
        None, description="train from random weights with this architecture, instead of model.path"
    )
    prompt: Annotated[Literal["chat", "gme", "vlm2vec"] | None, Fixed()] = Field(
        None,
        description="what stands around an item, and how images are resized, as of Qwen3-VL-Embedding (chat), GME or "
        "VLM2Vec; default: that of the model, or else chat",
    )
    instruction: Annotated[str | None, Fixed()] = Field(
        None,
        min_length=1,
        description="the system's turn of the prompt, which vlm2vec lacks; default: the model config's value, or else "
        "the prompt's",
    )
    min_pixels: Annotated[int | None, Fixed()] = Field(
        None,
        gt=0,
        description="images are enlarged to this many pixels; default: what an export's config records, or GME's, or "
        "else the prompt's (chat: 4 tokens); the sizes in preprocessor_config.json are not used",
    )
    max_pixels: Annotated[int | None, Fixed()] = Field(
        None,
        gt=0,
        description="images are reduced to this many; default: what an export's config records, or GME's, or else the "
        "prompt's (chat: 1,800 tokens); the sizes in preprocessor_config.json are not used",
    )
    images: Literal["upright", "as_stored"] | None = Field(
        None,
        description='upright: turned by their EXIF orientation, 16 bits scaled to 8; as_stored: only convert("RGB"); '
        "default: the model config's value, or else upright",
    )
    train: QwenVLTrain = QwenVLTrain()

    @model_validator(mode="after")
    def sizes_are_ordered(self) -> "QwenVLSection":
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"model.min_pixels={self.min_pixels} is more than model.max_pixels={self.max_pixels}")
        return self


SECTION = QwenVLSection
