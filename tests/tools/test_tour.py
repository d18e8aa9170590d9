"""The tour of a quickstart's run: real processes, with a model of random weights."""

import os
import pty
import re
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import pytest
from limits import HANG_SECONDS
from test_s3_server import refuses
from torch.utils.tensorboard import SummaryWriter

from pipeline.errors import PipelineError
from pipeline.jobs import status
from tools.tour import require_finished

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ("requirements.txt", "requirements-dev.txt", "constraints.txt")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")}


@pytest.fixture
def checkout(tmp_path, tiny_model) -> Path:
    """Return a checkout that has finished a quickstart."""
    for name in ("pipeline", "tools", *REQUIREMENTS):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != ".installed":
            (tmp_path / ".venv" / path.name).symlink_to(path)
    lists = b"".join(
        (ROOT / f"{name}.txt").read_bytes() for name in ("requirements", "requirements-dev", "constraints")
    )
    (tmp_path / ".venv/.installed").write_text(f"{sha256(lists).hexdigest()}  -\n")
    run = tmp_path / "runs/quickstart"
    (run / "report").mkdir(parents=True)
    (run / "report/report.html").write_text("the scores")
    (run / "export").symlink_to(tiny_model)
    with SummaryWriter(str(run / "tensorboard")) as writer:
        writer.add_scalar("learning/loss", 1.0, 1)
    status.note(run, "finished", step=4, steps=4)
    return tmp_path


def fetched(address: str) -> str:
    return build_opener(ProxyHandler({})).open(address, timeout=HANG_SECONDS).read().decode()


def addresses(process: subprocess.Popen) -> dict[str, str]:
    """Return the printed addresses by their page, once the servers run."""
    found = {}
    for line in iter(process.stdout.readline, ""):
        if line.startswith("Loading"):
            return found
        if match := re.match(r"(.*?): +(http://\S+)$", line):
            found[match[1]] = match[2]
    raise AssertionError(process.communicate()[1])


def test_sentence_from_a_pipe_finds_pictures(checkout):
    process = subprocess.Popen(
        ["bash", "tools/quickstart.sh", "--tour"],
        cwd=checkout,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    shown = addresses(process)
    assert fetched(shown["The report"]) == "the scores"
    board = shown["TensorBoard"].partition("#")[0]
    assert "learning/loss" in fetched(f"{board}data/plugin/scalars/tags")
    printed, errors = process.communicate("a red circle\n<image>\na <b> ring", timeout=HANG_SECONDS)
    assert process.returncode == 0, errors
    names = re.findall(r"\d{3}\.png", printed)
    assert len(names) == 10 and all((checkout / "runs/quickstart/tour" / name).exists() for name in names)
    similarities = [float(each) for each in re.findall(r"│ +(-?\d\.\d{3}) │", printed)]
    for of_sentence in (similarities[:5], similarities[5:]):
        assert len(of_sentence) == 5 and of_sentence == sorted(of_sentence, reverse=True)
    assert "item 0: " in printed  # <image> without an image does not end the tour
    assert "docs/own-dataset.md" in printed
    html = (checkout / "runs/quickstart/tour/search.html").read_text()
    assert re.findall(r'src="(.*?)"', html) == names[5:] + names[:5]  # the last search is the first on the page
    assert "<h2>a &lt;b&gt; ring</h2>" in html
    assert refuses(board.removesuffix("/"))


def test_pages_open_in_the_browser_and_nothing_is_left_after_ctrl_c(checkout):
    browser, opened = checkout / "browser.sh", checkout / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" >>{opened}\n')
    browser.chmod(0o755)
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "tools/tour.py", "runs/quickstart"],
        cwd=checkout,
        env=ENVIRONMENT | {"BROWSER": str(browser)},
        stdin=inside,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    shown = addresses(process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=HANG_SECONDS)
    os.close(terminal)
    os.close(inside)
    assert process.returncode == 130 and "interrupted" in errors and "Traceback" not in errors, errors
    assert opened.read_text().split() == [*shown.values()]
    for address in shown.values():
        assert refuses("/".join(address.split("/")[:3]))


def test_run_that_is_missing_or_unfinished_is_named_with_what_to_do(tmp_path):
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    ended = subprocess.run(["bash", str(tmp_path / "tools/quickstart.sh"), "--tour"], stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ended.stderr == "error: there is no runs/quickstart to look at: bash tools/quickstart.sh makes it\n"
    with pytest.raises(PipelineError, match=r"there is no .*/run to look at: `bash tools/quickstart.sh` makes it"):
        require_finished(tmp_path / "run")
    (tmp_path / "run").mkdir()
    status.note(tmp_path / "run", "stopped", step=12, steps=75)
    with pytest.raises(PipelineError, match="its training is stopped, step 12 of 75, and it has no report"):
        require_finished(tmp_path / "run")
