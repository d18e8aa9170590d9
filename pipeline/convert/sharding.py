"""Convert rows to shards. The rows of each shard are fixed before any row is read, so shards are independent jobs."""

from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from itertools import chain
from pathlib import Path

import numpy as np

from pipeline.convert.engine import JobResult, TooManyRejected, allowed, run_conversions
from pipeline.convert.rows import Rejection, Rows
from pipeline.convert.workers import Report
from pipeline.data.index import Index, Shard
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
    works = {dest: RowsWork(rows, plan, shard_bytes, shards, max_rejected) for dest, rows in planned}
    return run_conversions(works, unit=" rows", processes=processes, max_rejected=max_rejected, tmp=tmp, files=files)


class RowsWork:
    """The conversion of a dataset's rows: every job writes a shard of consecutive rows."""

    def __init__(
        self, rows: Rows, options: dict[str, object], shard_bytes: int, shards: int | None, max_rejected: float
    ) -> None:
        sizes = rows.sizes()
        if not len(sizes):
            raise PipelineError(f"{rows.dataset}: the source has no rows")
        self._rows = rows
        self.rows = len(sizes)
        self._allowed = allowed(max_rejected, self.rows)
        self._cuts = _cuts(sizes, shard_bytes, shards)
        self.jobs = {f"{shard:06d}": int(rows) for shard, rows in enumerate(np.diff(self._cuts))}
        self._too_large = set(np.flatnonzero(sizes > MAX_SAMPLE_BYTES).tolist())
        source = {"rows": self.rows, "row_sizes": sha256(sizes.astype("<i8").tobytes()).hexdigest()}
        self.plan: dict[str, object] = {**options, "dataset": rows.dataset, **source}

    def run(self, job: str, folder: Path, report: Report) -> JobResult:
        rows = range(*self._cuts[int(job) : int(job) + 2].tolist())
        rejected: list[dict[str, str]] = []
        samples = self._samples(rows, rejected, report)
        first = next(samples, None)
        if first is None:
            return JobResult(None, len(rows), rejected, {})
        shard = write_shard(chain([first], samples), folder / f"{job}.tar")
        files = {shard.file: shard.size, shard.sidecar: shard.sidecar_bytes}
        return JobResult(shard, len(rows), rejected, files)

    def _samples(self, rows: range, rejected: list[dict[str, str]], report: Report) -> Iterator[Pair | Single]:
        for row in rows:
            try:
                if row in self._too_large:
                    raise Rejection("too large", f"more than {MAX_SAMPLE_BYTES >> 20} MiB")
                sample = self._rows.sample(row)
            except Rejection as reason:
                rejected.append({"row": self._rows.name(row), "cause": reason.cause, "detail": reason.detail})
                if len(rejected) > self._allowed:
                    raise TooManyRejected(JobResult(None, row - rows.start + 1, rejected, {})) from None
            else:
                yield sample
            report(1)

    def index(self, shards: tuple[Shard, ...]) -> Index:
        return Index(self._rows.dataset, shards)

    def files(self) -> dict[str, bytes]:
        return self._rows.files()


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
