"""Convert rows to shards. The rows of each shard are fixed before any row is read, so shards are independent jobs."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path

import numpy as np

from pipeline.convert.engine import JobResult, Work, run_conversions
from pipeline.convert.rows import Rejection, Rows
from pipeline.data.index import Index
from pipeline.data.sample import Pair, Single
from pipeline.data.shards import write_shard
from pipeline.errors import PipelineError
from pipeline.progress import progress_bar

MAX_SAMPLE_BYTES = 1 << 30  # a process holds a whole sample in memory


def convert(
    datasets: Mapping[str, Rows],
    *,
    options: Mapping[str, object],
    shard_bytes: int = 256 << 20,
    shards: int | None = None,
    processes: int = 1,
    max_rejected: float = 0.01,
    tmp: Path | None = None,
    files: Iterable[tuple[str, bytes]] = (),
) -> dict[str, Index]:
    """Write each dataset's rows in order as shards with an index. `datasets` maps a folder or S3 prefix to rows.

    options: everything else that affects the output, as JSON values; only the same conversion is resumed.
    shard_bytes: approximate size of a shard, estimated from `Rows.sizes`.
    shards: if given, write this many shards with equal numbers of rows instead.
    For the other arguments and the errors see `run_conversions`.
    """
    plan = dict(options) | {"shard_bytes": shard_bytes, "shards": shards}
    planned = progress_bar(iterable=datasets.items(), unit=" datasets", desc="planning")
    works = {dest: _planned(rows, plan, shard_bytes, shards) for dest, rows in planned}
    return run_conversions(works, unit=" rows", processes=processes, max_rejected=max_rejected, tmp=tmp, files=files)


def _planned(rows: Rows, options: dict[str, object], shard_bytes: int, shards: int | None) -> Work:
    """Return the conversion of a dataset's rows: every job writes a shard of consecutive rows."""
    sizes = rows.sizes()
    if not len(sizes):
        raise PipelineError(f"{rows.dataset}: the source has no rows")
    cuts = _cuts(sizes, shard_bytes, shards)
    hashed = sha256(sizes.astype("<i8").tobytes()).hexdigest()
    return Work(
        plan={**options, "dataset": rows.dataset, "rows": len(sizes), "row_sizes": hashed},
        jobs={f"{shard:06d}": int(count) for shard, count in enumerate(np.diff(cuts))},
        run=partial(_write, rows, cuts, set(np.flatnonzero(sizes > MAX_SAMPLE_BYTES).tolist())),
        index=Index(rows.dataset, ()),
        rows=len(sizes),
        files=rows.files(),
    )


def _write(rows: Rows, cuts: np.ndarray, too_large: set[int], job: str, folder: Path) -> JobResult:
    """Write shard `job`. Rows whose numbers are in `too_large` are rejected unread."""
    numbers = range(*cuts[int(job) : int(job) + 2].tolist())
    rejected: list[dict[str, str]] = []

    def samples() -> Iterator[Pair | Single]:
        for number in numbers:
            try:
                if number in too_large:
                    raise Rejection("too large", f"more than {MAX_SAMPLE_BYTES >> 20} MiB")
                yield rows.sample(number)
            except Rejection as reason:
                rejected.append({"row": rows.name(number), "cause": reason.cause, "detail": reason.detail})

    usable = samples()
    first = next(usable, None)
    if first is None:
        return JobResult(None, len(numbers), rejected, {})
    shard = write_shard(chain([first], usable), folder / f"{job}.tar")
    return JobResult(shard, len(numbers), rejected, {shard.file: shard.size, shard.sidecar: shard.sidecar_bytes})


def _cuts(sizes: np.ndarray, shard_bytes: int, shards: int | None) -> np.ndarray:
    """Return (shards + 1,): the first row of each shard, then the number of rows. No shard is empty.

    Without `shards`, a shard ends with the row in which the total bytes pass a multiple of `shard_bytes`.
    """
    if shards:
        shards = min(shards, len(sizes))
        return np.arange(shards + 1) * len(sizes) // shards
    starts = np.cumsum(sizes) - sizes
    first = np.flatnonzero(np.diff(starts // shard_bytes, prepend=-1))
    return np.append(first, len(sizes))
