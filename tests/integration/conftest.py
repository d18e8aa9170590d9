import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    """DeepSpeed compiles its CPU communication and its CPU Adam once a machine: before any test has a time limit."""
    build = "; ".join(
        [
            "from deepspeed.accelerator import get_accelerator",
            "[get_accelerator().create_op_builder(f'{name}Builder').load() for name in ('ShareMemComm', 'CPUAdam')]",
        ]
    )
    subprocess.run(
        [sys.executable, "-c", build], env=os.environ | {"DS_ACCELERATOR": "cpu"}, check=True, capture_output=True
    )
