"""Helpers for the tests of several formats: run the command line in this or another process, and read its output."""

import signal
import subprocess
import sys
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from pipeline import make_shards as tool
from pipeline.data.index import Index, load_sidecar, read_samples
from pipeline.data.sample import Pair, Single
from pipeline.data.shards import parse_sample
from pipeline.errors import PipelineError
from pipeline.storage import objects

COMMAND = [sys.executable, str(Path(__file__).resolve().parents[2] / "tools/make_shards.py")]


def make_shards(*arguments: object) -> None:
    """Run the command line in this process, which does all the work unless the arguments set --processes."""
    with pytest.MonkeyPatch.context() as patch:
        more = () if "--processes" in arguments else ("--processes", "1")
        patch.setattr(sys, "argv", ["make_shards.py", *map(str, arguments), *more])
        tool.main.__wrapped__()


def error_of(*arguments: object) -> str:
    with pytest.raises(PipelineError) as caught:
        make_shards(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def start(*arguments: object) -> subprocess.Popen:
    """Start the command line in a new process, outside of the repository."""
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs ignore SIGINT
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*COMMAND, *map(str, arguments)], **pipes, text=True, cwd="/", preexec_fn=heed)


def read_all(url: str) -> list[Pair | Single]:
    samples = []
    for shard in Index.load(url).shards:
        samples += map(parse_sample, read_samples(url, shard, load_sidecar(url, shard)))
    return samples


def content(url: str) -> dict[str, bytes]:
    """Return {name: bytes} for every object below `url`."""
    return {name.removeprefix(url): objects.read(name) for name in objects.list_under(url)}


def picture(width: int, height: int, seed: int = 0, format: str = "PNG") -> bytes:
    """Return an encoded image of noise, which does not compress."""
    import numpy as np

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()
