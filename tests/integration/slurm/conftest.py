import os
from collections.abc import Iterator

import pytest
from cluster import SlurmCluster, unavailable


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Start a real Slurm of two nodes; skip the test if that is impossible, unless Slurm is required."""
    if reason := unavailable():
        required = os.environ.get("CI") or os.environ.get("PIPELINE_REQUIRE_SLURM") == "1"
        (pytest.fail if required else pytest.skip)(reason)
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def cleared(request: pytest.FixtureRequest) -> Iterator[None]:
    """End all jobs and restore all nodes after each test."""
    yield
    if "slurm" in request.fixturenames:
        request.getfixturevalue("slurm").clear()
