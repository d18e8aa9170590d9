import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from two_ranks import on_two_ranks

from pipeline import distributed
from pipeline.config import load_recipe
from pipeline.errors import PipelineError
from pipeline.training import export


def _slow_export(rank: int) -> list[str]:
    """With a collective timeout of 8 s, run an export that takes longer, then one that fails on the first rank."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=8))  # not of the start, which may take long
    distributed._POLL_SECONDS = 0.2
    chosen = load_recipe("pipeline/recipes/demo.yaml", [])
    engine, said = SimpleNamespace(module=torch.nn.Linear(2, 2)), []

    def slow(*_: object) -> None:
        if said:
            raise PipelineError("the disk is full")
        time.sleep(9)

    export.write_folder = slow
    for _ in range(2):
        try:
            export.export(engine, None, chosen, "", Path("nowhere"))
            said.append("done")
        except Exception as error:
            said.append(str(error) if rank == 0 else "left")
    return said


@pytest.mark.slow
def test_export_may_exceed_the_collective_timeout():
    assert on_two_ranks(_slow_export) == [["done", "the disk is full"], ["done", "left"]]
