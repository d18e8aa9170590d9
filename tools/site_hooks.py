"""Let the site's pages link to files outside of docs/: MkDocs calls these functions (see mkdocs.yml).

Every file that a page links to becomes a part of the site, so that it has no dead links and needs no repository server:
Markdown files are pages, pictures are copied, and any other file is a page below source/ that shows its text. A folder
is a page that lists its files.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs"
PICTURES = (".png", ".svg")
_FENCES = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_ROWS, _CODE = re.compile(r"^\|.*", re.MULTILINE), re.compile(r"`[^`]+`")
_LINKS = re.compile(r"""(\]\()([^)\s]+)(\))|((?:src|href)=")([^"]+)(")""")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages link to, and those that these link to."""
    pages = [f"{DOCS}/{file.src_uri}" for file in files.documentation_pages()]
    while pages:
        source = pages.pop()
        found: list[str] = []
        _with_links((ROOT / source).read_text(encoding="utf-8"), source, found.append)
        for path in found:
            uri = _uri(path)
            if (ROOT / path).exists() and not files.get_file_from_path(uri):
                files.append(_generated(path, uri, config))
                pages += [path] if path.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the page's links to the places that files have in the site."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    # In code in a table, GitHub needs a backslash before a bar, which Python-Markdown would show.
    markdown = _ROWS.sub(lambda row: _CODE.sub(lambda code: code[0].replace("\\|", "|"), row[0]), markdown)
    source = f"{DOCS}/{uri}" if (ROOT / DOCS / uri).exists() else uri
    here = posixpath.dirname(uri)
    return _with_links(markdown, source, lambda path: posixpath.relpath(_uri(path), here))


def _with_links(markdown: str, source: str, target: Callable[[str], str | None]) -> str:
    """Replace the links of a page by what `target` returns for the paths that they lead to, in the repository.

    source: the page's path.  Links to other hosts and inside the page stay, as do links in code.
    """
    folder = posixpath.dirname(source)

    def replaced(match: re.Match) -> str:
        before, link, after = (each for each in match.groups() if each is not None)
        place, sign, anchor = link.partition("#")
        if "://" in link or not place:
            return match[0]
        return f"{before}{target(posixpath.normpath(posixpath.join(folder, place))) or place}{sign}{anchor}{after}"

    pieces, end = [], 0
    for fence in _FENCES.finditer(markdown):
        pieces += [_LINKS.sub(replaced, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, _LINKS.sub(replaced, markdown[end:])])


def _uri(path: str) -> str:
    """Return the place in the site of a file or folder of the repository."""
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    return path if path.endswith((".md", *PICTURES)) else f"source/{path}.md"


def _generated(path: str, uri: str, config: MkDocsConfig) -> File:
    full = ROOT / path
    if path.endswith((".md", *PICTURES)):
        return File.generated(config, uri, abs_src_path=str(full))
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
    if full.is_dir():
        names = [f"- `{each.name}`" for each in sorted(full.iterdir()) if not each.name.startswith(("_", "."))]
        return File.generated(config, uri, content=head + "\n".join(names) + "\n")
    language = PurePosixPath(path).suffix.removeprefix(".").replace("example", "text")
    return File.generated(config, uri, content=f"{head}````{language}\n{full.read_text(encoding='utf-8')}\n````\n")
