"""Run conversions that can be interrupted at any point: each shard is a job, recorded when its files are complete.

DEST/.unfinished/plan.json describes the conversion, DEST/.unfinished/NAME.json is the result of job NAME. When the same
conversion is started again, it runs the jobs without a record. Its output is the same as without an interruption.
"""

import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

from tqdm import tqdm

from pipeline.convert.workers import Run, workers
from pipeline.data.index import INDEX_FILE, Count, Index, IndexedFile, Shard, as_json, check_shards
from pipeline.errors import PipelineError, printable
from pipeline.progress import progress_bar
from pipeline.storage import lock, objects
from pipeline.storage.atomic import remove_leftovers
from pipeline.storage.documents import FIXED, DocumentError, parse_json
from pipeline.storage.objects import ObjectError

UNFINISHED = ".unfinished"
REJECTED_FILE = "rejected.jsonl"
_PLAN = "plan"  # no job has this name
_SOURCE_STATE = ("content", "rows", "row_sizes")  # members of a plan that describe the source's content

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobResult:
    """The result of a job.

    shard: its entry in the index; None if all rows were rejected.
    rows: the number of its rows. rejected: {"row", "cause", "detail"} of each rejected row, in order.
    files: name -> bytes of the files that the job wrote for DEST.
    notes: note for the user -> count, such as "members .npy, which nothing reads".
    """

    __pydantic_config__ = FIXED

    shard: Shard | None
    rows: Count
    rejected: list[dict[str, str]]
    files: dict[str, Count]
    notes: dict[str, Count] = field(default_factory=dict)


class TooManyRejected(Exception):
    """A job rejected more rows than all jobs together may reject. The argument is the JobResult so far."""


def allowed(max_rejected: float, rows: int) -> int:
    """Return the most rows that may be rejected. A tolerance corrects rounding errors: 0.29 of 100 is 29, not 28."""
    return math.floor(max_rejected * rows * (1 + 1e-12))


@dataclass(frozen=True)
class Work:
    """The conversion of one dataset, divided into independent jobs.

    plan: everything that determines the output, as JSON values. Only a conversion with the same plan is resumed.
    jobs: job name -> size in the unit of the progress bar, in the order of the shards.
    run: runs a job: (job, folder to write in) -> its result. It is sent to other processes. May raise TooManyRejected.
    index: the index without shards and files.
    rows: the total rows of all jobs; None if it is unknown until the jobs have run.
    files: additional files for DEST, by name.
    """

    plan: dict[str, object]
    jobs: Mapping[str, int]
    run: Callable[[str, Path], JobResult]
    index: Index
    rows: int | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


def refuse_occupied(dest: str) -> None:
    """Raise PipelineError if `dest` contains a finished dataset, and ObjectError if it is unreachable."""
    if objects.exists(objects.join(dest, INDEX_FILE)) and not objects.exists(_record_url(dest, _PLAN)):
        raise PipelineError(
            f"{dest} already contains a dataset: choose another DEST, or delete {INDEX_FILE}, {REJECTED_FILE} and "
            "*.idx.npy there, and the *.tar if they are not SOURCE"
        )


def run_conversions(
    works: Mapping[str, Work],
    *,
    unit: str,
    processes: int,
    max_rejected: float,
    files: Iterable[tuple[str, bytes]] = (),
) -> dict[str, Index]:
    """Run all jobs of all works. `works` maps a folder or S3 prefix to its work. Returns the indexes.

    unit: unit of the jobs' sizes, for the progress bar. processes: 1 means this process. max_rejected: the fraction of
    a dataset's rows that may be rejected. files: (URL, content) of files outside of the datasets; they are written
    first. Files of at most processes + 2 jobs are in the system's temporary folder (TMPDIR) before their upload to S3.

    Raises PipelineError if a folder contains a dataset or an unfinished conversion with another plan, or if too many
    rows are rejected; ObjectError if a file cannot be written. Finished jobs are kept for the next start.
    """
    files = list(files)  # an error while generating them must occur before anything is written
    with lock.held(works):
        conversions = _open(works, max_rejected, files)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda file: objects.write(*file), files))
        todo = [(conversion, job) for conversion in conversions for job in conversion.todo]
        total = sum(sum(conversion.work.jobs.values()) for conversion in conversions)
        initial = total - sum(conversion.work.jobs[job] for conversion, job in todo)
        with (
            progress_bar(total=total, initial=initial, unit=unit, unit_scale=True, desc="converting") as bar,
            _folders(conversions),
        ):
            try:
                with workers(processes, [each.work.run for each in conversions]) as (threads, run):
                    for conversion in conversions:
                        conversion.finalize()
                    futures = [threads.submit(conversion.run, job, run) for conversion, job in todo]
                    for future in as_completed(futures):
                        conversion, job = future.result()
                        conversion.finalize()  # first: a job that rejected too many rows has not read all of them
                        bar.update(conversion.work.jobs[job])
            except PipelineError:
                # All jobs have ended. Finish the conversions whose jobs are all done.
                for conversion in conversions:
                    with suppress(PipelineError):  # only the first error is reported
                        conversion.finalize()
                raise
    return {dest: Index.load(dest) for dest in works}


class _Conversion:
    """The state of one dataset's conversion. results: of each job, in order; None until it is done.

    folder: where jobs write.
    """

    folder: Path
    finished = False

    def __init__(self, number: int, dest: str, work: Work, max_rejected: float) -> None:
        self.number, self.dest, self.work = number, dest, work
        self.remote = "://" in dest
        self._max_rejected = max_rejected
        self._began = math.inf
        recorded = {url.rpartition("/")[2] for url in objects.list_under(objects.join(dest, UNFINISHED))}
        jobs = [job for job in work.jobs if f"{job}.json" in recorded]
        self.results: dict[str, JobResult | None] = dict.fromkeys(work.jobs)
        with ThreadPoolExecutor(16) as threads:
            self.results.update(zip(jobs, threads.map(self._recorded, jobs), strict=True))
        self._samples_before = sum(result.shard.samples for result in self._done if result.shard)

    @property
    def todo(self) -> list[str]:
        return [job for job, result in self.results.items() if result is None]

    @property
    def _done(self) -> list[JobResult]:
        return [result for result in self.results.values() if result]

    def _recorded(self, job: str) -> JobResult | None:
        """Return the result in the job's record; None if the record is damaged, or a file is missing or truncated."""
        with suppress(DocumentError, ValueError):
            record = _record_url(self.dest, job)
            result: JobResult = parse_json(objects.read(record), record, JobResult, remedy="")
            check_shards([result.shard] if result.shard else [])
            urls = {objects.join(self.dest, name): size for name, size in result.files.items()}
            if all(objects.exists(url) and objects.size(url) == size for url, size in urls.items()):
                return result
        return None

    def run(self, job: str, run: Run) -> tuple["_Conversion", str]:
        """Run the job with `run`, upload its files to DEST, and record its result."""
        self._began = min(self._began, time.monotonic())
        try:
            result: JobResult = run(self.number, job, self.folder)
        except TooManyRejected as error:
            self.results[job] = error.args[0]  # not recorded; `finalize` raises the error
            return self, job
        if self.remote:
            for name, size in result.files.items():
                url, path = objects.join(self.dest, name), self.folder / name
                objects.write(url, path)
                if (stored := objects.size(url)) != size:
                    raise ObjectError(f"{url} has {stored} bytes, but {size} were written: start again")
                path.unlink()
        record = vars(result) | {"shard": result.shard and as_json(result.shard)}
        objects.write(_record_url(self.dest, job), _json(record))
        self.results[job] = result
        return self, job

    def finalize(self) -> None:
        """Finish the dataset if all jobs are done. Raises PipelineError as soon as too many rows are rejected."""
        complete, done = not self.todo, self._done
        if self.finished or (self.work.rows is None and not complete):
            return
        read = sum(result.rows for result in done)
        rejected = [row for result in done for row in result.rejected]
        rows = self.work.rows or read
        too_many = len(rejected) > allowed(self._max_rejected, rows)
        if complete or too_many:
            lines = b"".join(_json(row) + b"\n" for row in rejected)
            objects.write(objects.join(self.dest, REJECTED_FILE), lines)
        if too_many:
            first = "; ".join(f"{each['row']}: {each['cause']}: {each['detail']}" for each in rejected[:3])
            raise PipelineError(
                f"{self.dest}: {len(rejected)} rows are rejected so far, of {read} rows read, more than --max-rejected "
                f"{self._max_rejected} allows: {_causes(rejected)}; the first: {first}. They are in {REJECTED_FILE} "
                f"there. To continue without them, raise --max-rejected; or correct them, "
                f"{_restart(self.dest, self.work)}"
            )
        if complete:
            self._finish(done, rejected)
            self.finished = True

    def _finish(self, results: list[JobResult], rejected: list[dict[str, str]]) -> None:
        """Write the dataset's files, the index last. Prints a summary in one line, and logs the notes of the jobs."""
        shards = tuple(result.shard for result in results if result.shard)
        if not shards:
            why = f"see {REJECTED_FILE} there" if rejected else "SOURCE has none"
            raise PipelineError(f"{self.dest}: no row is usable, {why}")
        files = self.work.files
        for name, content in files.items():
            objects.write(objects.join(self.dest, name), content)
        indexed = {name: IndexedFile.of(content) for name, content in files.items()}
        index = replace(self.work.index, shards=shards, files=indexed)
        objects.write(objects.join(self.dest, INDEX_FILE), index.to_json().encode())
        _remove_unfinished(self.dest)
        seconds = max(time.monotonic() - self._began, 1e-3)  # all jobs may have been finished earlier
        summary = (
            f"{self.dest}: {index.samples} samples in {len(shards)} shards, {index.total_bytes / 1e6:.1f} MB, "
            f"{seconds:.1f} s, {(index.samples - self._samples_before) / seconds:.0f} samples/s, "
            f"{len(rejected)} rejected" + (f" ({_causes(rejected)})" if rejected else "")
        )
        tqdm.write(printable(summary))
        notes: Counter[str] = Counter()
        for result in results:
            notes.update(result.notes)
        for what, count in notes.most_common():
            logger.warning("%s: %d %s", self.dest, count, what)


def _open(works: Mapping[str, Work], max_rejected: float, files: list[tuple[str, bytes]]) -> list[_Conversion]:
    """Write the plans of the unfinished conversions, and read their records.

    If any plan of the command exists, its finished datasets come from an earlier start of the same command: plans are
    written before everything else, and a plan is removed when its dataset is finished. If no plan exists, none of the
    command's output files may exist. Temporary files of an earlier start that was killed are removed.
    """
    begun = set()
    for dest, work in works.items():
        if objects.exists(url := _record_url(dest, _PLAN)):
            begun.add(dest)
            restart = _restart(dest, work)
            wanted, plan = json.loads(_json(work.plan)), parse_json(objects.read(url), url, dict, remedy=restart)
            for name in wanted | plan:
                if plan.get(name) != wanted.get(name):
                    was, now = plan.get(name), wanted.get(name)
                    raise PipelineError(
                        f"{dest} contains an unfinished conversion, but SOURCE has changed since the conversion began: "
                        f"restore it, or {restart}"
                        if name in _SOURCE_STATE
                        else f"{dest} contains an unfinished conversion whose {name} was {was!r} and is now {now!r}: "
                        f"give the same command with the same source, or {restart}"
                    )
    finished = [dest for dest in works if objects.exists(objects.join(dest, INDEX_FILE))]
    if not begun:
        for dest in finished:
            refuse_occupied(dest)
        _refuse_overwriting([url for url, _ in files])
    for dest, work in works.items():
        if dest not in begun and dest not in finished:
            names = (REJECTED_FILE, *work.files, *(job + end for job in work.jobs for end in (".tar", ".idx.npy")))
            _refuse_overwriting([objects.join(dest, name) for name in names])
    for dest in works:
        if "://" not in dest:
            remove_leftovers(Path(dest))
    unfinished = {dest: work for dest, work in works.items() if dest not in finished}
    for dest, work in unfinished.items():
        objects.write(_record_url(dest, _PLAN), _json(work.plan))
    for dest in finished:
        _remove_unfinished(dest)
    return [_Conversion(number, dest, work, max_rejected) for number, (dest, work) in enumerate(unfinished.items())]


def _restart(dest: str, work: Work) -> str:
    """Say what to delete before a conversion can begin again: DEST, unless something else, such as SOURCE, is in it."""
    ours = {REJECTED_FILE, *work.files, *(job + end for job in work.jobs for end in (".tar", ".idx.npy"))}
    place = dest if "://" in dest else str(Path(dest))
    found = [url.removeprefix(objects.join(place, "")) for url in objects.list_under(dest)]
    if all(name in ours or name.startswith((f"{UNFINISHED}/", f"{lock.FOLDER}/")) for name in found):
        return f"delete {dest} and start again"
    return f"delete {UNFINISHED}, {REJECTED_FILE}, *.idx.npy and, unless they are SOURCE, *.tar in DEST and start again"


def _refuse_overwriting(urls: list[str]) -> None:
    with ThreadPoolExecutor(16) as threads:
        for url, there in zip(urls, threads.map(objects.exists, urls), strict=True):
            if there:
                raise PipelineError(f"{url} exists and would be overwritten: move it or choose another DEST")


def _record_url(dest: str, name: str) -> str:
    """Return the URL of a job's record, or of the plan."""
    return objects.join(dest, UNFINISHED, f"{name}.json")


def _remove_unfinished(dest: str) -> None:
    """Remove the files of an unfinished conversion, the plan last."""
    for _ in range(3):  # a listing has no checksum, so it may arrive with damaged names
        listed = objects.list_under(objects.join(dest, UNFINISHED))
        if not (records := [url for url in listed if not url.endswith("/plan.json")]):
            break
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(objects.delete, records))
    objects.delete(_record_url(dest, _PLAN))
    if "://" not in dest:
        with suppress(FileNotFoundError):
            Path(dest, UNFINISHED).rmdir()


@contextmanager
def _folders(conversions: list[_Conversion]) -> Iterator[None]:
    """Set the folder in which each conversion's jobs write: DEST itself, or a new temporary folder if it is on S3."""
    with ExitStack() as stack:
        for conversion in conversions:
            conversion.folder = Path(conversion.dest)
            if conversion.remote:
                place = f"{objects.server()} {conversion.dest}"  # the same DEST on another server may be in use
                name = f"make-shards-{os.getuid()}-{sha256(place.encode()).hexdigest()[:16]}"
                conversion.folder = Path(tempfile.gettempdir(), name)
                shutil.rmtree(conversion.folder, ignore_errors=True)
                conversion.folder.mkdir(mode=0o700)
                # After an error a process may still be writing there.
                stack.callback(shutil.rmtree, conversion.folder, ignore_errors=True)
        yield


def _causes(rejected: list[dict[str, str]]) -> str:
    return ", ".join(f"{count} {cause}" for cause, count in Counter(each["cause"] for each in rejected).most_common())


def _json(content: object) -> bytes:
    # A name may contain half a surrogate pair, which becomes an escape sequence of JSON.
    return json.dumps(content, ensure_ascii=False).encode(errors="backslashreplace")
