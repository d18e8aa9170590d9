"""The contrastive objective's section of a recipe."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from pipeline.config import Fixed, ObjectiveSection, Recipe, Section

_Temperature = Annotated[float, Field(ge=0.01, le=100)]


class DistillSection(Section):
    """Teacher's scores as labels: see `Distill` in loss.py and `listwise_kl` in listwise.py."""

    scores: Annotated[Literal["teacher", "stored"], Fixed()] = Field(
        description="teacher: similarities of data.teacher's vectors, over the whole batch; stored: each sample's own "
        "scores, of a reranker or judge, over its target, positives and negatives"
    )
    weight: Annotated[float, Fixed()] = Field(1.0, gt=0, description="of the KL divergence, beside the loss's 1")
    temperature: Annotated[float, Fixed()] = Field(
        0.02, ge=1e-3, description="softmax temperature of the scores; larger: softer labels"
    )


class ContrastiveSection(ObjectiveSection):
    name: Annotated[Literal["contrastive"], Fixed()] = "contrastive"
    alpha: Annotated[float, Fixed()] = Field(9.0, ge=0, description="hardness weighting of LLaVE; 0 is plain InfoNCE")
    alpha_ramp: Annotated[int, Fixed()] = Field(
        0, ge=0, description="steps in which alpha rises linearly from 0 to its value; 0: it is constant"
    )
    reward: Annotated[Literal["policy", "teacher"], Fixed()] = Field(
        "policy",
        description="what tells how hard a negative is: policy: the trained model's own similarities (LLaVE's); "
        "teacher: those of data.teacher's vectors",
    )
    temperature: Annotated[_Temperature, Fixed()] = Field(0.02, description="softmax temperature")
    temperatures: Annotated[dict[str, _Temperature], Fixed()] = Field(
        {}, description="temperature of the pairs of a task, by its name, such as {vqa: 0.03}"
    )
    learn_temperature: Annotated[bool, Fixed()] = Field(
        False,
        description="learn each temperature, starting at its value, with optimizer.lr; its bounds are 0.01 and 1",
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
    margins: Annotated[dict[str, float | None], Fixed()] = Field(
        {}, description="margin of the pairs of a task, by its name, such as {classification: 0.1}; null: no mask"
    )
    dimensions: Annotated[list[PositiveInt], Fixed()] = Field(
        [], description="sizes to which vectors can be cut (Matryoshka); the loss is the mean over them"
    )
    dimension_weights: Annotated[list[float], Fixed()] = Field(
        [], description="weight of each of dimensions in that mean; default: equal"
    )
    quantized: Annotated[Literal["int8", "binary"] | None, Fixed()] = Field(
        None,
        description="compute the loss of targets and negatives rounded to this type, as an index stores them, with the "
        "gradient of unrounded ones",
    )
    distill: Annotated[DistillSection | None, Fixed()] = Field(
        None, description="also learn a teacher's distribution over the candidates of each query; its fields:"
    )

    @field_validator("dimensions")
    @classmethod
    def sizes_ascend(cls, sizes: list[int]) -> list[int]:
        if sizes != sorted(set(sizes)):
            raise ValueError("the sizes must be ascending and distinct, such as [64, 256, 1024]")
        return sizes

    @model_validator(mode="after")
    def learned_temperatures_stay_in_bounds(self) -> "ContrastiveSection":
        if self.learn_temperature and max(self.temperature, *self.temperatures.values(), 0) > 1:
            raise ValueError("a learned temperature is at most 1: lower objective.temperature, or do not learn it")
        return self

    @model_validator(mode="after")
    def weights_fit(self) -> "ContrastiveSection":
        weights = self.dimension_weights
        if weights and (len(weights) != len(self.dimensions) or min(weights) <= 0):
            raise ValueError(
                f"objective.dimension_weights={weights} must have a positive number for each of "
                f"objective.dimensions={self.dimensions}"
            )
        return self

    @property
    def uses_teacher(self) -> bool:
        return self.reward == "teacher" or (self.distill is not None and self.distill.scores == "teacher")

    @property
    def sizes(self) -> list[int]:
        return self.dimensions

    @property
    def rounding(self) -> Literal["int8", "binary"] | None:
        return self.quantized

    def alpha_at(self, step: int) -> float:
        """Return alpha in a step, counted from 0."""
        return self.alpha * min(1.0, step / self.alpha_ramp) if self.alpha_ramp else self.alpha

    def check(self, recipe: Recipe) -> None:
        if self.alpha == 0 and (self.alpha_ramp or self.reward == "teacher"):
            raise ValueError(
                "objective.alpha=0 weights no negative by its hardness: remove objective.alpha_ramp and "
                "objective.reward, or raise alpha"
            )
        if self.uses_teacher and not recipe.data.teacher:
            raise ValueError(
                "objective.reward=teacher and objective.distill.scores=teacher need data.teacher: the vectors that "
                "pipeline.embed --shards --items wrote"
            )
        if recipe.data.teacher and not self.uses_teacher:
            raise ValueError(
                "data.teacher is set, but nothing uses it: remove it, or set objective.reward=teacher or "
                "objective.distill.scores=teacher"
            )


SECTION = ContrastiveSection
