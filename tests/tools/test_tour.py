"""The tour of a quickstart's run: real processes, with a model of random weights."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from threading import Timer
from urllib.error import HTTPError
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
ELSEWHERE = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER", "SSH_CONNECTION")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ELSEWHERE}


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


@contextmanager
def started(checkout: Path, *command: str, stdin: int, **environment: str) -> Iterator[subprocess.Popen]:
    """Start a command. It is killed at the end of the block, or earlier if it hangs: then nothing more can be read."""
    pipe, variables = subprocess.PIPE, ENVIRONMENT | environment
    with subprocess.Popen(
        command, cwd=checkout, env=variables, stdin=stdin, stdout=pipe, stderr=pipe, text=True
    ) as process:
        limit = Timer(HANG_SECONDS, process.kill)
        limit.start()
        try:
            yield process
        finally:
            limit.cancel()
            process.kill()


def until(process: subprocess.Popen, end: str) -> str:
    """Return what is printed up to the first `end`."""
    printed = ""
    while not printed.endswith(end):
        if not (character := process.stdout.read(1)):
            raise AssertionError(printed + process.stderr.read())
        printed += character
    return printed


def addresses(printed: str) -> dict[str, str]:
    """Return the printed addresses by their page."""
    return dict(re.findall(r"^(.*?): +(http://\S+)$", printed, re.MULTILINE))


def test_sentence_from_a_pipe_finds_pictures(checkout):
    run = checkout / "runs/quickstart"
    (run / "recipe.yaml").touch()
    with started(checkout, "bash", "tools/quickstart.sh", "--tour", stdin=subprocess.PIPE) as process:
        shown = addresses(until(process, "Loading"))
        assert fetched(shown["The report"]) == "the scores"
        site = shown["The report"].removesuffix("/report/report.html")
        for path in ("/", "/recipe.yaml", "/report/../recipe.yaml", "/report/%2e%2e/recipe.yaml", "/report/"):
            with pytest.raises(HTTPError, match="404"):
                fetched(site + path)
        board = shown["TensorBoard"].partition("#")[0]
        assert "learning/loss" in fetched(f"{board}data/plugin/scalars/tags")
        printed, errors = process.communicate("a red circle\n<image>\na <b> ring\n\nnot read", timeout=HANG_SECONDS)
    assert process.returncode == 0, errors
    names = re.findall(r"\d{3}\.png", printed)
    assert len(names) == 10 and all((run / "tour" / name).exists() for name in names)
    similarities = [float(each) for each in re.findall(r"│ +(-?\d\.\d{3}) │", printed)]
    for of_sentence in (similarities[:5], similarities[5:]):
        assert len(of_sentence) == 5 and of_sentence == sorted(of_sentence, reverse=True)
    assert "item 0: " in printed  # <image> without an image does not end the tour
    assert "docs/own-dataset.md" in printed
    html = (run / "tour/search.html").read_text()
    assert re.findall(r'src="(.*?)"', html) == names[5:] + names[:5]  # the last search is the first on the page
    assert "<h2>a &lt;b&gt; ring</h2>" in html
    assert refuses(board.removesuffix("/"))


def test_pages_open_in_the_browser_and_nothing_is_left_after_ctrl_c_at_the_prompt(checkout):
    browser, opened = checkout / "browser.sh", checkout / "opened"
    browser.write_text(f'#!/bin/sh\n[ -t 0 ] && set -- terminal\necho "$1" >>{opened}\n')
    browser.chmod(0o755)
    terminal, inside = pty.openpty()
    try:
        command = (sys.executable, "tools/tour.py", "runs/quickstart")
        variables = {"BROWSER": str(browser), "SSH_CONNECTION": "here 1 there 22"}
        with started(checkout, *command, stdin=inside, **variables) as process:
            printed = until(process, "A sentence (empty: end): ")
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=HANG_SECONDS)
    finally:
        os.close(terminal)
        os.close(inside)
    assert process.returncode == 130 and "interrupted" in errors and "Traceback" not in errors, errors
    pages = addresses(printed)
    assert [*pages] == ["The report", "TensorBoard"]
    assert re.search(r"ssh -L \d+:127.0.0.1:\d+ -L .*\n.* -J ", printed)  # a browser there may not be one here
    end = time.monotonic() + HANG_SECONDS
    while not opened.exists() or len(opened.read_text().split()) < 2:
        assert time.monotonic() < end, "no browser was opened"
        time.sleep(0.05)
    assert sorted(opened.read_text().split()) == sorted(pages.values())
    for address in pages.values():
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


@pytest.mark.parametrize("arguments", [["steps=100", "--tour"], ["steps"], ["run=runs/other"]])
def test_refused_arguments_delete_no_run(arguments, tmp_path):
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    command = ["bash", str(tmp_path / "tools/quickstart.sh"), *arguments]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=HANG_SECONDS)
    assert ended.returncode == 1 and arguments[-1] in ended.stderr
    assert (tmp_path / "runs/quickstart").exists()
