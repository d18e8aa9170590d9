"""Whether the packages that training imports are installed; checked without importing any of them."""

import platform
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipeline.jobs.preflight.check import Check, check, green, red, yellow

_ROOT = Path(__file__).resolve().parents[3]
_NAMED = ("torch", "deepspeed", "transformers", "webdataset")


@check("packages", seconds=10, if_late="is the file system of the Python environment slow?")
def packages() -> Check:
    """Compare Python and the packages with pyproject.toml and requirements.txt, and with the tested versions in
    constraints.txt."""
    python = platform.python_version()
    wanted = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    if python not in SpecifierSet(wanted):
        return red(f"Python {python}, {wanted} is needed", "activate .venv, or create it with tools/quickstart.sh")
    missing, installed = [], {}
    for requirement in requirements(_ROOT / "requirements.txt"):
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
    tested = {each.name: each.specifier for each in requirements(_ROOT / "constraints.txt") if each.name in _NAMED}
    if others := [f"{name}{tested[name]}" for name in _NAMED if not tested[name].contains(installed[name])]:
        return yellow(found, f"tested with {', '.join(others)}: pip install -c constraints.txt -r requirements.txt")
    return green(found)


def requirements(file: Path) -> list[Requirement]:
    """The requirements in a file, without comments."""
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return [Requirement(line) for line in lines if line]
