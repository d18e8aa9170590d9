"""The model families. To add one, write its package and add a line here."""

from pipeline.config import Recipe
from pipeline.config.section import Registry
from pipeline.models.family import SavedModelInterface, TrainingInterface

FAMILIES = Registry(
    {
        "llave": "pipeline.models.llave",
        "qwen_vl": "pipeline.models.qwen_vl",
        "text_encoder": "pipeline.models.text_encoder",
        "llm2clip": "pipeline.models.llm2clip",
        "clip": "pipeline.models.clip",
    }
)


def training(family: str, objective: str = "contrastive") -> TrainingInterface:
    """Return a family's training interface for one of the objectives that its section lists."""
    found: TrainingInterface = FAMILIES.module(family, "family").TRAINING[objective]
    return found


def training_of(recipe: Recipe) -> TrainingInterface:
    return training(recipe.model.family, recipe.objective.name)


def saved(family: str) -> SavedModelInterface:
    """Return a family's saved-model interface."""
    found: SavedModelInterface = FAMILIES.module(family, "family").SAVED
    return found


def family_of(path: str) -> SavedModelInterface | None:
    """Return the family of the model in a folder or at a hub name, from its files, or None if no family owns it.

    Raises PipelineError if there is no model.
    """
    from pipeline.models.loading import config_dict  # imports torch, which reading a recipe must not need

    config = config_dict(path)
    return next((each for each in map(saved, FAMILIES) if each.owns(path, config)), None)
