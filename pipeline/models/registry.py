"""The families of models. To add one, write its folder and add its line here."""

from pipeline.config import Recipe
from pipeline.config.registry import Registry
from pipeline.models.family import SavedModelInterface, TrainingInterface

FAMILIES = Registry(
    {
        "llave": "pipeline.models.llave",
        "text_encoder": "pipeline.models.text_encoder",
        "llm2clip": "pipeline.models.llm2clip",
        "clip": "pipeline.models.clip",
    }
)


def training(family: str, objective: str = "contrastive") -> TrainingInterface:
    """What training needs of a family, with one of the objectives that its section lists."""
    found: TrainingInterface = FAMILIES.module(family, "family").TRAINING[objective]
    return found


def training_of(recipe: Recipe) -> TrainingInterface:
    return training(recipe.model.family, recipe.objective.name)


def saved(family: str) -> SavedModelInterface:
    """What a program needs of a family's saved folders."""
    found: SavedModelInterface = FAMILIES.module(family, "family").SAVED
    return found


def family_of(path: str) -> SavedModelInterface | None:
    """The family of the model in a folder or of a hub name, by its files; None if it is none of these.

    Raises PipelineError where there is no model.
    """
    from pipeline.models.loading import config_dict  # here: it imports torch, which a recipe is read without

    config = config_dict(path)
    return next((each for each in map(saved, FAMILIES) if each.owns(path, config)), None)
