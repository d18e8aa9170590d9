"""The section of a recipe for masked next-token prediction."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config import Fixed, ObjectiveSection


class MaskedNextTokenSection(ObjectiveSection):
    """Masked next-token prediction, which needs no negatives and only one pass per step."""

    without: ClassVar = (
        "batch.sub_batch",
        "batch.kept_chunks",
        "data.negatives",
        "data.teacher",
        "model.instruction",
        "model.template",
        "model.query_instructions",
    )

    name: Annotated[Literal["masked_next_token"], Fixed()] = "masked_next_token"
    mask_rate: Annotated[float, Fixed()] = Field(
        0.2, ge=1e-3, le=1, description="fraction of the tokens that are masked, to be predicted"
    )
    mask_random: Annotated[float, Fixed()] = Field(
        0.1, ge=0, le=1, description="fraction of masked tokens replaced by a random token"
    )
    mask_kept: Annotated[float, Fixed()] = Field(
        0.1, ge=0, le=1, description="fraction of masked tokens left unchanged; the rest become the mask token"
    )

    @model_validator(mode="after")
    def shares_are_parts_of_one(self) -> "MaskedNextTokenSection":
        if self.mask_random + self.mask_kept > 1:
            raise ValueError(
                f"objective.mask_random={self.mask_random} and objective.mask_kept={self.mask_kept} are more than 1 "
                "together"
            )
        return self


SECTION = MaskedNextTokenSection
