"""A family's section of a recipe, for tests that need no more of one."""

from typing import Any

from pipeline.config import ModelSection
from pipeline.models.registry import FAMILIES


def section(family: str, **fields: Any) -> ModelSection:
    """Where a family does not say by itself what it trains: its vision tower."""
    kind = FAMILIES.sections()[family]
    if kind.model_fields["train"].is_required():
        fields = {"train": {"vision_tower": True}} | fields
    return kind(**fields)
