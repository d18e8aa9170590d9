"""The documents as a site: it builds strictly, its links lead somewhere, its commands are valid, and its blocks run.

A block in ```python or ```bash runs, in the order of its page. Other commands, which need a GPU, a cluster or
downloads, are indented; their recipes and fields (`key=value`) are checked, their flags (`--gpus`) are not.
"""

import json
import os
import re
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from pipeline.config import EvaluationRun, MiningRun, load_recipe, parse_options
from tools.recipe_fields import PAGE, page
from tools.site_hooks import on_page_markdown

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/*.md"))
LOSSES = ROOT / "pipeline/objectives/contrastive"
BLOCKS = re.compile(r"^```(python|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)
RUN = {"docs/own-dataset.md"}  # docs/api.md: tests/test_project.py


class Links(HTMLParser):
    """The ids of a page, its links, and what it loads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = {""}
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {values[name] or "" for name in ("id", "name") if name in values}
        links = [values[name] or "" for name in ("href", "src") if name in values]
        is_page = tag == "a" or values.get("rel") in ("canonical", "next", "prev")
        (self.links if is_page else self.loaded).extend(links)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[str, Links]:
    """Build the site strictly, and return its pages by path."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    pages = {name: Links(path.read_text()) for name, path in files.items() if name.endswith(".html")}
    return pages | {name: Links("") for name in files.keys() - pages.keys()}


@pytest.mark.slow
def test_links_and_anchors_of_the_site_lead_somewhere(site):
    dead = []
    for name, found in site.items():
        for link in [] if name == "404.html" else found.links + found.loaded:  # that page's links begin at the root
            parts = urlsplit(link)
            if parts.scheme or link.startswith("data:"):
                continue
            place = os.path.normpath(Path(name).parent / unquote(parts.path)) if parts.path else name
            place = "index.html" if place == "." else place
            if place not in site or (place.endswith(".html") and unquote(parts.fragment) not in site[place].ids):
                dead.append(f"{name}: {link}")
    assert not dead


@pytest.mark.slow
def test_site_loads_nothing_from_the_network(site):
    assert {
        link for found in site.values() for link in found.loaded if urlsplit(link).scheme not in ("", "data")
    } == set()
    assert "recipe-fields.html" in site and "source/pipeline/models/registry.py.html" in site


def test_bars_in_code_in_tables_have_no_backslash_in_the_site():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    shown = on_page_markdown("| `<\\|end\\|>` | a \\| b |\n\nbelow `a \\| b`", page, None, None)
    assert shown == "| `<|end|>` | a \\| b |\n\nbelow `a \\| b`"


def test_page_of_recipe_fields_is_current():
    assert PAGE.read_text() == page(), "run `python tools/recipe_fields.py`"


@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.name)
def test_names_of_functions_exist(document):
    """`FILE.py::NAME` is a function or class; FILE is in the repository, or a file of the contrastive loss."""
    for file, name in re.findall(r"`([\w/]+\.py)::([\w.]+)`", document.read_text()):
        path = ROOT / file if "/" in file else LOSSES / file
        if "/" in file and not path.exists() and document.name == "comparison.md":
            continue  # a file of another project
        text = path.read_text()
        for part in name.split("."):
            assert re.search(rf"(def|class) {part}\b|^{part}\b", text, re.MULTILINE), f"{document.name}: {file}::{name}"


def test_recipes_and_fields_of_commands_are_valid():
    """Their fields exist and have values of the right type. No file but the recipe is read."""
    text = "\n".join(path.read_text() for path in (*PAGES, ROOT / "README.md")).replace("\\\n", " ")
    programs = r"pipeline\.\w+|tools/\w+\.py|slurm/train_\w+\.sh"
    checked = jobs = 0
    for program, rest in re.findall(rf"^(?:    |)\S.*?({programs})(?: (.*))?$", text, re.MULTILINE):
        words = [] if "`" in rest or "|" in rest else shlex.split(rest, comments=True)
        if program.startswith("slurm/") and (recipe := _recipe_of(ROOT / program)):
            words, jobs = [recipe, *words], jobs + 1
        if words and program in ("pipeline.evaluate", "pipeline.mine"):
            parse_options(EvaluationRun if program == "pipeline.evaluate" else MiningRun, words[2:])
        elif words and words[0].endswith(".yaml"):
            load_recipe(Path(words[0]).name, [word for word in words[1:] if re.match(r"[a-z_.]+=", word)])
        else:
            continue
        checked += 1
    assert checked > 20 and jobs > 2


def _recipe_of(job: Path) -> str:
    """Return the recipe that a job script trains, or "" if it submits several."""
    return "".join(re.findall(r"^RECIPE=(?:\$\{RECIPE:-)?([\w./]+\.yaml)\}?$", job.read_text(), re.MULTILINE))


def blocks(document: str) -> list[tuple[str, str]]:
    """The blocks of a page that run: (language, text).  Excerpts of files, which begin with the file's name, do not."""
    found = BLOCKS.findall((ROOT / document).read_text())
    return [(language, text) for language, text in found if not re.match(r"# [\w/]+\.py\n", text)]


def test_excerpts_are_as_in_their_files():
    excerpts = re.findall(
        r"^```python\n# ([\w/]+\.py)\n(.*?)^```", (ROOT / "docs/models.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert len(excerpts) > 5
    for file, text in excerpts:
        assert text in (ROOT / file).read_text(), f"docs/models.md has lines that {file} has not:\n{text}"


def test_pages_with_blocks_are_tested():
    assert {f"docs/{path.name}" for path in PAGES if blocks(f"docs/{path.name}")} == RUN | {"docs/api.md"}


# One process imports torch once; each command of the page is a fork of it, since programs end their process.
RUNNER = """
import json, os, runpy, shlex, subprocess, sys
import deepspeed, torch, transformers
import pipeline.embedding.embedder, pipeline.evaluation.measure, pipeline.training.trainer

names = {}
for language, text in json.load(sys.stdin):
    if language == "python":
        exec(compile(text, "page", "exec"), names)
        continue
    for line in text.replace("\\\\\\n", " ").splitlines():
        words = shlex.split(line)
        assert words[0] == "python", line
        sys.stdout.flush()
        if not (child := os.fork()):
            sys.argv = words[2:] if words[1] == "-m" else words[1:]
            run = runpy.run_module if words[1] == "-m" else runpy.run_path
            run(sys.argv[0], run_name="__main__")
            sys.stdout.flush()
            os._exit(0)
        assert not os.waitpid(child, 0)[1], line
"""


@pytest.mark.slow
@pytest.mark.parametrize("document", sorted(RUN))
def test_blocks_of_page_run(document, tmp_path):
    """From a checkout's root, without a GPU; training takes a few steps."""
    import subprocess  # --fast leaves out files that import it

    (tmp_path / "tools").symlink_to(ROOT / "tools")
    shortened = [(language, re.sub(r"\bsteps=\d+", "steps=4", text)) for language, text in blocks(document)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    ended = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(shortened),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-6000:]
    assert (tmp_path / "runs/own/report/report.html").exists()
    assert "000.jpg" in (tmp_path / "vectors/images.txt").read_text()
