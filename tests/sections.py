"""A minimal model section of a recipe for each family."""

from typing import Any

from pipeline.config import ModelSection
from pipeline.models.registry import FAMILIES


def section(family: str, **fields: Any) -> ModelSection:
    """Return the family's section. If the family requires `train`, its default here is the vision tower."""
    kind = FAMILIES.sections()[family]
    if kind.model_fields["train"].is_required():
        fields = {"train": {"vision_tower": True}} | fields
    return kind(**fields)
