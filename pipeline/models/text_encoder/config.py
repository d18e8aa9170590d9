"""The text encoder's section of a recipe."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config import Fixed, LanguageModelTrain, ModelSection, Prefixes
from pipeline.config.section import Place, Section


class TextEncoderArchitecture(Section):
    text: dict[str, Any] = Field(
        min_length=1,
        description="transformers' Qwen2Config, or another's, such as {model_type: llama}; vocab_size is the size of "
        "the tokenizer to train",
    )


class ByLength(Section):
    """The instruction of a query that is longer than its target, by characters, and that of any other query."""

    longer: str
    shorter: str


QueryInstruction = str | Annotated[list[str], Field(min_length=1)] | ByLength


class TextEncoderTrain(LanguageModelTrain):
    # For masked next-token prediction the model includes the LM head, and its parameters begin with `causal.`.
    language_model: Annotated[bool | float, Fixed(bool), Prefixes(["language_model.", "causal."])] = Field(
        True, description="its weights, or adapters"
    )


class TextEncoderSection(ModelSection):
    """A decoder as a text encoder: LLM2CLIP's first stage, or masked next-token prediction before it."""

    objectives: ClassVar = ("contrastive", "masked_next_token")
    text_part: ClassVar = "language_model"

    family: Annotated[Literal["text_encoder"], Fixed()] = "text_encoder"
    path: Annotated[Place | None, Fixed()] = Field(None, description="folder or hub name of a decoder")
    architecture: Annotated[TextEncoderArchitecture | None, Fixed()] = Field(
        None, description="train from random weights with this architecture, instead of model.path"
    )
    instruction: Annotated[str, Fixed()] = Field(
        "", description="prefix of each text; its tokens are excluded from mean pooling"
    )
    template: Annotated[Literal["none", "llama3"], Fixed()] = Field(
        "none",
        description="llama3: each text, with its instruction, is a user's turn of Llama-3-Instruct, as in LLM2CLIP",
    )
    query_instructions: Annotated[dict[str, QueryInstruction], Fixed()] = Field(
        {},
        description="by dataset, prefix of the queries alone, in place of model.instruction: a text, a list of which a "
        "step draws one, or {longer: , shorter: } by whether the query is the longer text of its pair",
    )
    train: TextEncoderTrain = TextEncoderTrain()

    @model_validator(mode="after")
    def template_has_a_tokenizer(self) -> "TextEncoderSection":
        if self.template != "none" and self.path is None:
            raise ValueError(
                f"the template {self.template} needs model.path, of a model whose tokenizer has its tokens: with "
                "model.architecture, set model.template=none"
            )
        return self


SECTION = TextEncoderSection
