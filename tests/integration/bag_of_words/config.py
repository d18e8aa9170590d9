"""The family's section of a recipe."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from pipeline.config import Fixed, ModelSection, Prefixes, TrainSection
from pipeline.config.section import Section


class BagOfWordsArchitecture(Section):
    words: PositiveInt = Field(description="rows of the table that words are hashed to")
    width: PositiveInt = 16


class BagOfWordsTrain(TrainSection):
    table: Annotated[bool | float, Fixed(bool), Prefixes(["table."])] = True
    projection: Annotated[bool | float, Fixed(bool), Prefixes(["projection."])] = True


class BagOfWordsSection(ModelSection):
    text_part: ClassVar = "table"

    family: Annotated[Literal["bag_of_words"], Fixed()] = "bag_of_words"
    architecture: Annotated[BagOfWordsArchitecture | None, Fixed()] = None
    lower_case: Annotated[bool, Fixed()] = Field(True, description="whether `Red` and `red` are one word")
    train: BagOfWordsTrain = BagOfWordsTrain()


SECTION = BagOfWordsSection
