import os
from collections.abc import Iterator

import pytest
from cluster import SlurmCluster, unavailable


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A real Slurm of two nodes; skipped where there can be none, unless it is required."""
    if reason := unavailable():
        required = os.environ.get("CI") or os.environ.get("PIPELINE_REQUIRE_SLURM") == "1"
        (pytest.fail if required else pytest.skip)(reason)
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def cleared(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test finds another's jobs or nodes out of service."""
    yield
    if "slurm" in request.fixturenames:
        request.getfixturevalue("slurm").clear()
