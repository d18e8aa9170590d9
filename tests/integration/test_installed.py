"""The project as an installed package, in its own environment and outside of any checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
# Run the installed scripts, each in a process of its own that has imported what all of them need.
ONE_AFTER_ANOTHER = """
import json, os, runpy, sys
import pipeline.evaluate, pipeline.train

for name, *arguments in json.loads(sys.argv[1]):
    print(f"--- {name}", flush=True)
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"{name} ended with status {status}")
    else:
        sys.argv = [f"{sys.argv[2]}/pipeline-{name}", *arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")
        os._exit(99)  # a script ends by sys.exit
"""


@pytest.mark.timeout(600)
def test_installed_wheel_runs_without_a_checkout(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "elsewhere"
    for name in ("pipeline", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    folder.mkdir()

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            list(map(str, command)), cwd=folder, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    pip, offline = [sys.executable, "-m", "pip", "--disable-pip-version-check"], ["--no-deps", "--no-index"]
    run(*pip, "wheel", "-q", *offline, "--no-build-isolation", "-w", tmp_path, source)
    shutil.rmtree(source)
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    commands = tmp_path / "env/bin"
    (packages,) = (tmp_path / "env/lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(
        sysconfig.get_path("purelib")
    )  # the dependencies come from the current environment
    run(*pip, "--python", commands / "python", "install", "-q", *offline, *tmp_path.glob("*.whl"))

    where = run(commands / "python", "-c", "import pipeline; print(pipeline.__file__)")
    assert Path(where.strip()) == packages / "pipeline/__init__.py"
    (folder / "texts.txt").write_text("a red star\na blue ring\n")
    settings = ["data.url=world/train", "run=run", "evaluation=null", "steps=4", "batch.global_batch=16"]
    scripts = [
        ["make-shards", "demo", "0", "world", "--pairs", "40", "--queries", "2", "--processes", "1"],
        ["preflight", "demo.yaml", *settings, "--world", "1"],
        ["train", "demo.yaml", *settings, "deepspeed=zero1.json"],
        ["embed", "run/export", "--texts", "texts.txt", "--out", "vectors"],
        ["export", "run", "exported"],
        ["merge", "merged", "run", "exported"],
        ["mine", "run/export", "world/train/Scene-CLS", "out=mined"],
        ["evaluate", "merged", "world/train/Scene-CLS", "out=report"],
    ]
    assert "usage: pipeline-make-shards" in run(commands / "pipeline-make-shards", "--help")  # as an executable
    printed = run(commands / "python", "-c", ONE_AFTER_ANOTHER, json.dumps(scripts), commands)
    assert "packages" in printed.partition("--- train")[0].partition("--- preflight")[2]
    assert len((folder / "run/metrics.jsonl").read_text().splitlines()) == 4
    assert np.allclose(np.linalg.norm(np.load(folder / "vectors/texts.npy"), axis=1), [1, 1], atol=1e-5)
    assert (folder / "exported/model.safetensors").exists()
    assert (folder / "merged/model.safetensors").exists() and (folder / "mined/mined.json").exists()
    assert (folder / "report/report.html").exists()
