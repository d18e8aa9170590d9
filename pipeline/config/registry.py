"""The implementations of a thing that a recipe names, as its model's family: one package each, imported when needed."""

from importlib import import_module
from types import ModuleType
from typing import Any

from pipeline.config.section import Section


class Registry:
    """Packages by name. The module `config` of each has SECTION, the class of its section of a recipe.

    A section is imported without its package, so that a recipe can be read without torch.
    """

    def __init__(self, packages: dict[str, str]) -> None:
        self._packages = packages

    def __iter__(self) -> Any:
        return iter(self._packages)

    def sections(self) -> dict[str, type[Section]]:
        return {name: import_module(f"{package}.config").SECTION for name, package in self._packages.items()}

    def module(self, name: str, part: str) -> ModuleType:
        """The module `part` of the package of this name."""
        return import_module(f"{self._packages[name]}.{part}")

    def register(self, name: str, package: str) -> None:
        """Add a package. Recipes accept its section from now on."""
        from pipeline.config import Recipe

        self._packages[name] = package
        Recipe.model_rebuild(force=True)
