"""Compare what optimizer steps would do on a GPU with budgets.yaml, and the memory plan with the tensors alive there.

`python tests/cuda_trace --help` says more.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).parent
CASES = [*yaml.safe_load((HERE / "budgets.yaml").read_text()), "extrapolation to all layers"]
FAMILIES = ("llave", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CASES += [f"memory, {family}, {way}" for way in ("tower trained", "tower frozen, LoRA") for family in FAMILIES]
CASES += [f"memory, {family}, tower trained, checkpointing" for family in ("llave", "qwen3_vl")]


@pytest.fixture(scope="module")
def traced() -> dict[str, str]:
    """Return what is printed of each case. One process traces all; it loads its device before torch."""
    command = [sys.executable, "-W", "ignore", str(HERE)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    of_cases = done.stdout.partition("== ")[2].split("== ")
    assert of_cases and done.returncode in (0, 1), done.stderr[-4000:]
    return dict(each.split(": ", 1) for each in of_cases)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_step_on_a_gpu_stays_within_budget(traced: dict[str, str], case: str) -> None:
    assert traced[case] == "ok\n", traced[case]


@pytest.mark.slow
def test_all_cases_have_budgets(traced: dict[str, str]) -> None:
    assert list(traced) == CASES
