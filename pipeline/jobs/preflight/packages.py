"""Check the installed packages against the project's requirements, without importing any of them."""

import platform
import tomllib
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipeline.jobs.preflight.check import Check, check, green, red, yellow

_ROOT = Path(__file__).resolve().parents[3]
_NAMED = ("torch", "deepspeed", "transformers", "webdataset")


@check("packages", if_late="is the file system of the Python environment slow?")
def packages() -> Check:
    """Red where a requirement is not met; yellow where a main package is not of the version that the tests ran with."""
    python, (python_versions, wanted) = platform.python_version(), _requirements()
    if python not in SpecifierSet(python_versions):
        return red(
            f"Python {python}, {python_versions} is needed", "activate .venv, or make it with tools/quickstart.sh"
        )
    missing, installed = [], {}
    for requirement in map(Requirement, wanted):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue  # it belongs to an extra, as dev
        try:
            installed[requirement.name] = version(requirement.name)
        except PackageNotFoundError:
            missing.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed[requirement.name], prereleases=True):
            missing.append(f"{requirement.name} {installed[requirement.name]} is not {requirement.specifier}")
    if missing:
        return red(", ".join(missing), "activate .venv, or pip install -c constraints.txt -r requirements.txt")
    found = f"Python {python}, " + ", ".join(f"{name} {installed[name]}" for name in _NAMED)
    if others := [each for each in _tested() if not each.specifier.contains(installed[each.name])]:
        return yellow(
            found, f"tested with {', '.join(map(str, others))}: pip install -c constraints.txt -r requirements.txt"
        )
    return green(found)


def _requirements() -> tuple[str, list[str]]:
    """Versions of Python, and requirements: of the checkout, or else of the installed package."""
    file = _ROOT / "pyproject.toml"
    if file.exists():
        project = tomllib.loads(file.read_text())["project"]
        return project["requires-python"], project["dependencies"]
    installed = metadata("pipeline")
    return installed["Requires-Python"], installed.get_all("Requires-Dist") or []


def _tested() -> list[Requirement]:
    """The main packages in constraints.txt, which only a checkout has, with the versions that the tests ran with."""
    file = _ROOT / "constraints.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    return [Requirement(line) for line in lines if line.partition("==")[0] in _NAMED]
