"""The script for a GPU runs all of its parts on the CPU, with tiny shapes."""

import os
import subprocess

import pytest
from launch import ROOT
from limits import HANG_SECONDS


@pytest.mark.timeout(2 * HANG_SECONDS)
def test_every_part_runs(tmp_path):
    out = tmp_path / "gpu.md"
    command = ["bash", "benchmarks/gpu_all.sh", "--dry-run", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
    log = out.with_name("gpu.md.log").read_text()
    assert done.returncode == 0, out.read_text() + log[-4000:]
    titles = [line for line in out.read_text().splitlines() if line.startswith("#")]
    assert [title.split(":")[0] for title in titles] == [
        "## On the CPU with tiny shapes",
        "### Attention of 0.5B",
        "### A step of 0.5b",
        "### The loss, 64 dimensions, float32",
        "### Embedding in bf16",
        "### The demo's loss",
    ]
    assert "figures are meaningless" in titles[0] and "flash_attn: it is not installed" in out.read_text()
    resumed = [line.split("|")[-2].strip() for line in out.read_text().splitlines() if line.startswith("| 2 |")]
    assert resumed and abs(float(resumed[-1])) < 0.01, "the step after a resumed checkpoint has another loss"


def test_part_that_fails_is_named_and_the_others_follow(tmp_path):
    script = "import sys; from benchmarks import gpu_parts as g; g.PARTS.update(attention=lambda dry: 1 / 0); g.main()"
    command = ["python", "-c", script, "--dry-run", "attention", "heading"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 3
    assert "### attention: failed\n\nZeroDivisionError: division by zero\n" in done.stdout
    assert done.stdout.index("## On the CPU") > done.stdout.index("failed")
