"""Look at what the quickstart made: its report and TensorBoard in a browser, and a search by the sentences you type.

    bash tools/quickstart.sh --tour
    echo "a small red star at the top left" | bash tools/quickstart.sh --tour

The pages' addresses are printed, too. They are served on this machine's loopback, for all who use the machine, until
the tour ends: at an empty line, Ctrl-D or Ctrl-C. The found pictures are also shown by RUN/tour/search.html.
"""

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from html import escape
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import BinaryIO, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tensorboard.program import TensorBoard
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pipeline  # its Embedder is imported when it is first used: the pages are shown before
from pipeline.demo.tasks import FIND_IMAGE, REPRESENT_IMAGE, captioned_pictures
from pipeline.errors import PipelineError, disk_errors, printable
from pipeline.jobs.program import command_line
from pipeline.jobs.status import Status

SEED = 0  # of the quickstart's data
TOP = 5
NEXT = """
Next
  Your own pictures with captions   docs/own-dataset.md
  A real model, on a GPU            docs/recipes.md: LLaVE, LLM2CLIP, Qwen-VL
  A Slurm cluster                   docs/clusters.md: sbatch slurm/train_demo.sh
  The model that you have           python -m pipeline.embed {run}/export --images 'photos/*.jpg' --query "a red star"
"""
_STYLE = """
body { font: 16px sans-serif; margin: 2em; color-scheme: light dark }
div { display: flex; flex-wrap: wrap; gap: 1em }
figure { margin: 0; width: 11em }
img { width: 100%; image-rendering: pixelated }
"""


class Match(NamedTuple):
    """A picture that was found.  file: its name in the tour's folder."""

    similarity: float
    caption: str
    file: str


class Search:
    """A search among the pictures of the demo's evaluation set Scene-T2I, which are written to RUN/tour."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "tour"
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            self.captions = {}
            for number, (caption, png) in enumerate(captioned_pictures(SEED)):
                (self.folder / f"{number:03d}.png").write_bytes(png)
                self.captions[f"{number:03d}.png"] = caption
        self._embedder = pipeline.Embedder.load(run / "export")
        items = [{"text": REPRESENT_IMAGE, "images": [self.folder / file]} for file in self.captions]
        self._vectors = self._embedder.embed(items)

    def nearest(self, sentence: str) -> list[Match]:
        """Return the most similar pictures, the most similar first. Raises PipelineError for a text with marks."""
        query = self._embedder.embed([FIND_IMAGE.format(sentence)])[0]
        values, rows = (self._vectors @ query).topk(TOP)
        files = list(self.captions)
        found = zip(values.tolist(), rows.tolist(), strict=True)
        return [Match(similarity, self.captions[files[row]], files[row]) for similarity, row in found]


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory of a finished quickstart")
    run = parser.parse_args().run
    require_finished(run)
    site, board = served(run), tensorboard(run)
    # VS Code on another machine sets BROWSER: it opens pages where you sit.
    has_browser = sys.stdin.isatty() and any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")))
    pages = {"The report": f"{site}/report/report.html", "TensorBoard": f"{board}#custom_scalars"}
    for name, address in pages.items():
        print(f"{name + ':':13}{address}")
        if has_browser:
            open_in_browser(address)
    if not has_browser or "SSH_CONNECTION" in os.environ:  # `ssh -X` sets DISPLAY, also where no browser is installed
        forwards = " ".join(f"-L {port}:127.0.0.1:{port}" for port in map(_port, pages.values()))
        print(f"If these do not open where you sit, run there: ssh {forwards} you@{socket.gethostname()}")
        print("To a cluster's compute node, add -J you@LOGIN, with the name of its login node")
    print("\nLoading the model ...", flush=True)
    disable_progress_bar()
    search = Search(run)
    found: list[tuple[str, list[Match]]] = []
    print(f"Describe one of {len(search.captions)} pictures that it was not trained on, for example:")
    print(f"  {next(iter(search.captions.values()))}\n")
    for sentence in sentences():
        try:
            found.insert(0, (sentence, search.nearest(sentence)))
        except PipelineError as error:
            print(printable(str(error)))
            continue
        show(*found[0])
        with disk_errors(search.folder):
            (search.folder / "search.html").write_text(page(found), encoding="utf-8", errors="replace")
        print(f"The pictures, which are in {search.folder}: {site}/tour/search.html\n")
        if has_browser and len(found) == 1:
            open_in_browser(f"{site}/tour/search.html")
    print(NEXT.format(run=run))


def require_finished(run: Path) -> None:
    """Raise PipelineError unless the quickstart has trained and evaluated the run."""
    remedy = "`bash tools/quickstart.sh` makes it"
    if not run.exists():
        raise PipelineError(f"there is no {run} to look at: {remedy}")
    if not (run / "report/report.html").exists():  # it is written last
        status = Status.read(run)
        steps = f", step {status.step} of {status.steps}" if status.steps else ""
        raise PipelineError(
            f"{run} is not finished: its training is {status.state}{steps}, and it has no report. If it does not run "
            f"any more, {remedy} anew"
        )


def open_in_browser(address: str) -> None:
    """Open a page in a process without this terminal, which a browser of the console (lynx, w3m) would take."""
    nothing = subprocess.DEVNULL
    command = [sys.executable, "-m", "webbrowser", address]
    subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)


def served(run: Path) -> str:
    """Serve the files in RUN/report and RUN/tour on a free port of the loopback while this process lives.

    Returns the address.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(run)))
    Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


class _Files(SimpleHTTPRequestHandler):
    def send_head(self) -> BinaryIO | None:
        """Send no other file of the run, and no list of a folder: other users of this machine reach its loopback."""
        path = Path(self.translate_path(self.path))  # without `..`
        if path.relative_to(self.directory).parts[:1] not in (("report",), ("tour",)) or not path.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return super().send_head()

    def log_message(self, *message: object) -> None:
        """The terminal belongs to the search."""


def tensorboard(run: Path) -> str:
    """Start TensorBoard in a thread of this process, with which it ends. Returns its address."""
    board = TensorBoard()
    where = [f"--logdir={run / 'tensorboard'}", "--host=127.0.0.1", "--port=0"]
    board.configure(["tensorboard", *where, "--load_fast=false"])  # the fast loader would be another process
    return board.launch()


def sentences() -> Iterator[str]:
    """Yield what is typed, until an empty line or the end of the input."""
    with suppress(ImportError):
        import readline  # noqa: F401 (arrow keys)
    with suppress(EOFError):
        while sentence := input("A sentence (empty: end): ").strip():
            yield sentence


def show(sentence: str, matches: list[Match]) -> None:
    """Print the found pictures as a table."""
    table = Table(title=Text(printable(sentence)), title_justify="left", title_style="bold")
    table.add_column("similarity", justify="right")
    table.add_column("what the picture shows")
    table.add_column("file", no_wrap=True)
    for match in matches:
        table.add_row(f"{match.similarity:.3f}", match.caption, match.file)
    console = Console() if sys.stdout.isatty() else Console(width=120)  # a log file has no width
    console.print()
    console.print(table)


def page(found: list[tuple[str, list[Match]]]) -> str:
    """Return the HTML of the searches, as they are given."""
    parts = []
    for sentence, matches in found:
        parts.append(f"<h2>{escape(sentence)}</h2>\n<div>")
        for similarity, caption, file in matches:
            text = f"<b>{similarity:.3f}</b> {escape(caption)}"
            parts.append(f'<figure><img src="{file}" alt=""><figcaption>{text}</figcaption></figure>')
        parts.append("</div>")
    head = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Search</title><style>{_STYLE}</style>'
    return "\n".join([head, *parts, "</html>\n"])


def _port(address: str) -> str:
    return address.split(":")[2].partition("/")[0]


if __name__ == "__main__":
    main()
