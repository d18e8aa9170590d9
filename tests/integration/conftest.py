import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    """DeepSpeed compiles its CPU communication once a machine: before any test has a time limit."""
    build = "import deepspeed.accelerator as a; a.get_accelerator().create_op_builder('ShareMemCommBuilder').load()"
    subprocess.run(
        [sys.executable, "-c", build], env=os.environ | {"DS_ACCELERATOR": "cpu"}, check=True, capture_output=True
    )
