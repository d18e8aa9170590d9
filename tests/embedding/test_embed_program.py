"""Embedding as a separate program."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]


def test_search_without_folder_needs_no_deepspeed(tiny_model, tmp_path):
    (tmp_path / "broken/deepspeed").mkdir(parents=True)
    (tmp_path / "broken/deepspeed/__init__.py").write_text("raise AssertionError('it is not needed here')")
    (tmp_path / "texts.txt").write_text("a red star\na blue ring\n")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)).save(tmp_path / "a.png")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'broken'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    environment["COLUMNS"] = "200"  # wide enough for paths on one line
    environment.pop("WORLD_SIZE", None)
    command = [sys.executable, "-m", "pipeline.embed", tiny_model, "--texts", str(tmp_path / "texts.txt")]
    command += ["--query", "blue ring", "--query-image", str(tmp_path / "a.png"), "--top", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "a.pngwithbluering" in "".join(ended.stdout.split())  # a title wraps at the table's width
    assert "embedding texts: 100%" in ended.stderr
    assert "text/s" in ended.stderr
