"""How job scripts use their arguments; stubs that print their arguments replace Slurm's programs."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GIVEN = ["runs/a b", "mmeb=s3://bucket/mmeb", "results", "max_tokens=512", "precision=fp32"]
ASKED = "runs/a b|mmeb=s3://bucket/mmeb|{}max_tokens=512|precision=fp32|"


@pytest.fixture
def evaluate(tmp_path):
    """Return a function that runs slurm/eval_mmeb.sh; it returns one line of arguments per call of a Slurm program."""
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text('#!/bin/sh\n{ printf "%s|" "${0##*/}" "$@"; echo; } >> "${0%/*}/given"\necho 77\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "site.env").touch()

    def run(*arguments: str, **environment: str) -> list[str]:
        here = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SITE_ENV": str(tmp_path / "site.env")}
        command = ["bash", "slurm/eval_mmeb.sh", *arguments]
        subprocess.run(command, cwd=ROOT, env=os.environ | here | environment, check=True, stdout=subprocess.DEVNULL)
        return (tmp_path / "given").read_text().splitlines()

    return run


def test_evaluation_submits_an_array_and_a_dependent_report(evaluate):
    array, report = evaluate("--array=4-7", "--dependency=afterok:5", *GIVEN, SLURM_ARRAY_TASK_ID="3")
    flags = "sbatch|--parsable|--array=4-7|--dependency=afterok:5|"
    assert array == f"{flags}slurm/eval_mmeb.sh|--task|{ASKED.format('results|')}"
    assert report.startswith("sbatch|--parsable|--dependency=afterok:77|--kill-on-invalid-dep=yes|")
    assert report.endswith(f"slurm/gather_report.sh|{ASKED.format('')}out=results|")


def test_array_task_embeds_its_part(evaluate):
    place = {"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "4"}
    (given,) = evaluate("--task", *GIVEN, **place)
    assert given.endswith(f"|python|-u|-m|pipeline.evaluate|{ASKED.format('')}part=2/4|out=results|")
