"""The contrastive objective's section of a recipe."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator

from pipeline.config import Fixed, ObjectiveSection


class ContrastiveSection(ObjectiveSection):
    name: Annotated[Literal["contrastive"], Fixed()] = "contrastive"
    alpha: Annotated[float, Fixed()] = Field(9.0, ge=0, description="hardness weighting of LLaVE; 0 is plain InfoNCE")
    temperature: Annotated[float, Fixed()] = Field(0.02, ge=0.01, le=100, description="softmax temperature")
    learn_temperature: Annotated[bool, Fixed()] = Field(
        False, description="learn the temperature, starting at this value, with optimizer.lr; its bounds are 0.01 and 1"
    )
    directions: Annotated[Literal["both", "query"], Fixed()] = Field(
        "both", description="both: queries against targets and targets against queries; query: the first alone"
    )
    mask_duplicates: Annotated[bool, Fixed()] = Field(
        True, description="whether pairs that share a query or a target are no negatives of each other; false: they are"
    )
    margin: Annotated[float | None, Fixed()] = Field(
        None, description="mask negatives whose similarity exceeds the positive's by more than this"
    )
    dimensions: Annotated[list[PositiveInt], Fixed()] = Field(
        [], description="sizes to which vectors can be cut (Matryoshka); the loss is the mean over them"
    )

    @field_validator("dimensions")
    @classmethod
    def ascending(cls, dimensions: list[int]) -> list[int]:
        if dimensions != sorted(set(dimensions)):
            raise ValueError("the sizes must be ascending and distinct, such as [64, 256, 1024]")
        return dimensions

    @property
    def sizes(self) -> list[int]:
        return self.dimensions


SECTION = ContrastiveSection
