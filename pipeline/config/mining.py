"""The options of `python -m pipeline.mine`."""

from typing import Literal

from pydantic import Field

from pipeline.config.encoding import Encoding
from pipeline.config.section import Local, Place


class MiningRun(Encoding):
    """How negatives are mined, and how the model embeds the items."""

    count: int = Field(4, gt=0, le=255, description="negatives of a sample")
    margin: float | None = Field(
        0.95,
        ge=0,
        le=2,
        description="drop candidates that score above margin x the positive's score (positive - (1 - margin) x "
        "|positive|): they are likely right, and clusters separate them; null: keep them (TopK-PercPos, arXiv "
        "2407.15831)",
    )
    absolute_margin: float | None = Field(
        None, ge=-2, le=2, description="likewise, candidates that score above the positive's score minus this"
    )
    skip: int = Field(0, ge=0, description="nearest remaining candidates that are skipped, also for clusters")
    depth: int = Field(100, gt=0, le=10_000, description="nearest candidates that are looked at, also for clusters")
    choose: Literal["hardest", "sampled"] = Field(
        "hardest", description="hardest: the nearest remaining ones; sampled: drawn from all remaining ones"
    )
    seed: int = Field(0, ge=0, lt=1 << 32, description="of choose=sampled")
    among: Literal["own", "all"] = Field(
        "own", description="candidates: targets of the query's own dataset, or of all datasets"
    )
    clusters: int | None = Field(
        None,
        gt=1,
        lt=1 << 16,
        description="also compose clusters of this many neighbours, for data.batches=neighbours; it must divide "
        "batch.global_batch; null: none",
    )
    teacher: Place | None = Field(
        None,
        description="folder of the items' vectors, which are computed if they are missing; default: each dataset's",
    )
    out: Place | None = Field(None, description="folder of the mined negatives and clusters; default: each dataset's")
    scratch: Local | None = Field(
        None, description="folder for a file of all targets' vectors on every node, while it runs; default: TMPDIR"
    )
    overwrite: bool = Field(
        False, description="replace negatives, clusters and vectors of other shards, models or options"
    )
