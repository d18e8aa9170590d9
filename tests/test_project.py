"""Tests of the whole project: its requirements, its public API, its documents."""

import ast
import re
import tomllib
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType

import pytest
from PIL import Image

import pipeline
from pipeline.config import load_ds_config, load_recipe
from pipeline.errors import PipelineError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LISTS = {
    "requirements.txt": PROJECT["dependencies"],
    "requirements-dev.txt": PROJECT["optional-dependencies"]["dev"],
    "requirements-gpu.txt": ["-r requirements.txt", *PROJECT["optional-dependencies"]["gpu"]],
}
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))


@pytest.mark.parametrize("file", LISTS)
def test_requirements_match_pyproject(file):
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    assert lines == LISTS[file], f"{file} and pyproject.toml must list the same packages"


def test_functions_of_commands_exist():
    for place in PROJECT["scripts"].values():
        module, _, function = place.partition(":")
        assert f"def {function}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()


def test_public_api_matches_exported_names():
    assert {name: getattr(pipeline, name).__name__ for name in pipeline.__all__} == {n: n for n in pipeline.__all__}
    with pytest.raises(AttributeError, match="no attribute 'embedder'"):
        pipeline.embedder  # noqa: B018


def test_page_on_papers_names_tests_that_exist():
    """A row's test is `tests/FILE::NAME` or `tests/FILE`; a name alone is of the file that its table names."""
    rows = [line for line in (ROOT / "docs/papers.md").read_text().splitlines() if line.startswith("|")]
    named = [name for row in rows for name in re.findall(r"`((?:tests/|test_)[\w/.:]+)`", row)]
    assert len(named) > 50
    for name in named:
        file, _, test = name.rpartition("::") if "::" in name else (name, "", "")
        file, test = (file, test) if file.startswith("tests/") else ("tests/models/test_papers_llave.py", file)
        assert f"def {test}" in (ROOT / file).read_text(), name


def test_recipes_and_deepspeed_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "demo.yaml").write_text(
        (ROOT / "pipeline/recipes/demo.yaml").read_text().replace("epochs: 1", "steps: 7")
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("demo.yaml", "recipes/demo.yaml", "pipeline/recipes/demo.yaml"):
        recipe = load_recipe(name)
        assert recipe.steps is None
        assert load_ds_config(recipe, 2)["zero_optimization"]["stage"] == 3
    assert load_ds_config(load_recipe(name, ["deepspeed=zero1.json"]), 2)["zero_optimization"]["stage"] == 1
    assert load_recipe("../demo.yaml").steps == 7
    with pytest.raises(PipelineError, match=r"no recipe at ../x.yaml; the project's own are demo.yaml, "):
        load_recipe("../x.yaml")
    with pytest.raises(PipelineError, match=r"no DeepSpeed config at zero9.json; the project's own are zero0.json, "):
        load_ds_config(load_recipe("demo.yaml", ["deepspeed=zero9.json"]), 2)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("demo.yaml").steps == 7  # an existing file takes precedence


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_in_documents_resolve(document):
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    for link in re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', text):
        target, _, heading = "".join(link).partition("#")
        if "://" in target:
            continue
        path = ROOT / document if not target else (ROOT / document).parent / target
        assert path.exists(), f"{document} links to {target}"
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if heading else []
        slugs = [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings]
        assert not heading or heading in slugs, f"{document} links to {target}#{heading}"


def test_paths_in_documents_exist():
    """Check paths inside the repository, in inline code and in commands."""
    place = re.compile(r"(?<![\w/.:-])(?:pipeline|tools|slurm|tests|benchmarks|ds_configs|docs)/[\w./-]*\w")
    made = {"slurm/site.env"}
    for document in {*DOCUMENTS} - {"docs/comparison.md"}:  # it names files of other projects
        for name in {*place.findall((ROOT / document).read_text())} - made:
            assert (ROOT / name).exists(), f"{document} names {name}"


def test_api_examples_run(tiny_model, tmp_path, monkeypatch):
    """Run the Python blocks of docs/api.md one after another in one process."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (24, 24), "red").save("star.png")
    Path("model").symlink_to(tiny_model)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.DOTALL)
    assert len(blocks) == 7
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), names)
    assert names["vectors"].shape == (3, 48)
    assert {"write_shards", "open_dataset", "Order", "hardness_weighted_loss", "load_recipe", "Embedder"} <= {*names}
    assert all(name in names for name in pipeline.__all__)


@pytest.mark.parametrize("folder", ["benchmarks", "tools", "tests/chaos"])
def test_programs_that_tests_do_not_run_name_only_what_there_is(folder):
    """Such as benchmarks, which take minutes: a name that was changed elsewhere would end them."""
    for file in (ROOT / folder).glob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        imported = {
            each.asname or each.name: resolve_name(f"{node.module}.{each.name}")  # raises an error if there is none
            for node in nodes
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pipeline")
            for each in node.names
        }
        modules = {name: value for name, value in imported.items() if isinstance(value, ModuleType)}
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                module = modules[node.value.id]
                assert hasattr(module, node.attr), f"{file}:{node.lineno}: {module.__name__} has no {node.attr}"
