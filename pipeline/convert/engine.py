"""Conversions that may be interrupted anywhere: shards are jobs, each recorded when its files are in their place.

DEST/.unfinished/plan.json says what is being converted, DEST/.unfinished/NAME.json what became of the job NAME. The
same conversion started again does the jobs that have no record, and ends with the same bytes as an undisturbed one.
"""

import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

from tqdm import tqdm

from pipeline.convert.workers import Report, job_threads, run_job, workers
from pipeline.data.index import INDEX_FILE, Count, File, Index, Shard, check_shards
from pipeline.errors import PipelineError, printable
from pipeline.progress import progress_bar
from pipeline.storage import lock, objects
from pipeline.storage.documents import FIXED, DocumentError, parse_json
from pipeline.storage.objects import ObjectError

UNFINISHED = ".unfinished"
REJECTED_FILE = "rejected.jsonl"
_AFRESH = f"delete {UNFINISHED}, {REJECTED_FILE}, *.idx.npy and, unless they are SOURCE, *.tar in DEST and start again"
SOURCE_STATE = ("content", "rows", "row_sizes")  # what a plan says of the source's content


@dataclass(frozen=True)
class Result:
    """What became of a job.

    shard: its entry in the index; None if no row of it could be used.
    rows: how many it had. rejected: of these, {"row", "cause", "detail"} of each that is left out, in order.
    files: name -> bytes of the files that it wrote into its folder and that belong into DEST.
    notes: what else a person should know of it -> how often, as "members .npy, which nothing reads".
    """

    __pydantic_config__ = FIXED

    shard: Shard | None
    rows: Count
    rejected: list[dict[str, str]]
    files: dict[str, Count]
    notes: dict[str, Count] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: bytes, url: str) -> "Result | None":
        """None for a record that is damaged: its job is done again."""
        with suppress(DocumentError, ValueError):
            result = parse_json(data, url, cls, remedy="")
            check_shards([result.shard] if result.shard else [])
            return result
        return None


class Work(Protocol):
    """The conversion of one dataset, cut into jobs that depend on nothing but themselves; sent to other processes.

    dataset: its name.
    plan: all that decides the outcome, as JSON holds it: only the same is gone on with.
    jobs: name -> how much there is to do, in the unit of the progress bar, in the order of their shards.
    rows: in all jobs together; None if only the jobs find out.
    """

    dataset: str
    plan: dict[str, object]
    jobs: Mapping[str, int]
    rows: int | None

    def run(self, job: str, folder: Path, report: Report) -> Result:
        """Do a job in `folder`, and report whenever some of it is done. May raise TooManyRejected."""
        ...

    def index(self, shards: tuple[Shard, ...]) -> Index: ...

    def files(self) -> dict[str, bytes]:
        """Further files for DEST, by name."""
        ...


class TooManyRejected(Exception):
    """A job's rejected rows alone are more than all jobs together may have. Its argument: the Result so far."""


def allowed(max_rejected: float, rows: int) -> int:
    """How many of so many rows may be rejected. 0.29 of 100 are 29, though the product is a little less."""
    return math.floor(max_rejected * rows * (1 + 1e-12))


def refuse_occupied(dest: str) -> None:
    """PipelineError where a finished dataset is, ObjectError where `dest` is out of reach."""
    if objects.exists(objects.join(dest, INDEX_FILE)) and not objects.exists(_plan_url(dest)):
        raise PipelineError(
            f"{dest} holds a dataset already: choose another DEST, or delete {INDEX_FILE}, {REJECTED_FILE} and "
            "*.idx.npy there, and the *.tar if they are not SOURCE"
        )


def carry_out(
    works: Mapping[str, Work],
    *,
    unit: str,
    processes: int,
    max_rejected: float,
    tmp: Path | None = None,
    files: Iterable[tuple[str, bytes]] = (),
) -> dict[str, Index]:
    """Do all jobs of all works, each work's into the folder (or S3 prefix) it is keyed by. Returns their indexes.

    unit: of the jobs' sizes, for the progress bar. processes: 1 is this one. tmp: where files wait for their upload
    to S3, at most those of processes + 2 jobs. max_rejected: the fraction of a dataset's rows that may be left out.
    files: (URL, content) of what belongs to no dataset; written first.

    Raises PipelineError if a folder holds a dataset, or an unfinished conversion of another plan, and when more rows
    than allowed are rejected; ObjectError if anything cannot be written. What was finished stays, to be gone on with.
    """
    files = list(files)  # where they cannot be made, nothing is begun
    with lock.held(works):
        conversions = _open(works, max_rejected, files)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda file: objects.write(*file), files))
        todo = [(conversion, job) for conversion in conversions for job in conversion.todo]
        total = sum(sum(conversion.work.jobs.values()) for conversion in conversions)
        initial = total - sum(conversion.work.jobs[job] for conversion, job in todo)
        outcomes: SimpleQueue[Future] = SimpleQueue()
        with (
            progress_bar(total=total, initial=initial, unit=unit, unit_scale=True, desc="converting") as bar,
            _folders(conversions, tmp),
        ):
            try:
                with (
                    job_threads(processes + 2) as threads,
                    workers(processes, [each.work.run for each in conversions], len(todo)) as (pool, progress),
                ):
                    for conversion in conversions:
                        conversion.settle(bar)
                    for number, (conversion, job) in enumerate(todo):
                        threads.submit(conversion.do, job, number, pool).add_done_callback(outcomes.put)
                    waiting = len(todo)
                    while waiting:
                        bar.update(initial + int(progress.sum()) - bar.n)
                        try:
                            outcome = outcomes.get(timeout=0.3)
                        except Empty:
                            continue
                        waiting -= 1
                        conversion, job, result = outcome.result()
                        conversion.results[job] = result
                        conversion.settle(bar)
                bar.update(total - bar.n)
            except PipelineError:
                _save_others(conversions, outcomes, bar)
                raise
    return {dest: Index.load(dest) for dest in works}


def _save_others(conversions: list["_Conversion"], outcomes: SimpleQueue[Future], bar: tqdm) -> None:
    """After an error, when all jobs have ended: finish the conversions that have all of theirs."""
    while not outcomes.empty():
        outcome = outcomes.get()
        if not outcome.cancelled() and outcome.exception() is None:
            conversion, job, result = outcome.result()
            conversion.results[job] = result
    for conversion in conversions:
        with suppress(PipelineError):  # the first error is the one to report
            conversion.settle(bar)


class _Conversion:
    """A work and what has been done of it. results: of the jobs that have ended. folder: where jobs write."""

    folder: Path
    finished = False

    def __init__(self, number: int, dest: str, work: Work, max_rejected: float) -> None:
        self.number, self.dest, self.work = number, dest, work
        self._max_rejected = max_rejected
        self._began = math.inf
        recorded = {url.rpartition("/")[2] for url in objects.list_under(objects.join(dest, UNFINISHED))}
        jobs = [job for job in work.jobs if f"{job}.json" in recorded]
        with ThreadPoolExecutor(16) as threads:
            results = zip(jobs, threads.map(self._recorded, jobs), strict=True)
            self.results = {job: result for job, result in results if result}
        self._samples_before = sum(result.shard.samples for result in self.results.values() if result.shard)

    @property
    def todo(self) -> list[str]:
        return [job for job in self.work.jobs if job not in self.results]

    @property
    def complete(self) -> bool:
        return len(self.results) == len(self.work.jobs)

    @property
    def remote(self) -> bool:
        return "://" in self.dest

    def _recorded(self, job: str) -> Result | None:
        """What the job's record says, if the files are there too."""
        result = Result.from_json(objects.read(url := self._record_url(job)), url)
        if result is None:
            return None
        urls = {objects.join(self.dest, name): size for name, size in result.files.items()}
        return result if all(objects.exists(url) and objects.size(url) == size for url, size in urls.items()) else None

    def _record_url(self, job: str) -> str:
        return objects.join(self.dest, UNFINISHED, f"{job}.json")

    def do(self, job: str, number: int, pool: Executor) -> tuple["_Conversion", str, Result]:
        """Have the job done in `pool` (it is of this number among all), bring its files to DEST, record it."""
        self._began = min(self._began, time.monotonic())
        try:
            result = pool.submit(run_job, self.number, job, number, self.folder).result()
        except TooManyRejected as error:
            return self, job, error.args[0]  # not recorded; `settle` refuses it
        except BrokenProcessPool:
            raise PipelineError("a process was killed; if memory ran out, choose fewer --processes") from None
        if self.remote:
            for name, size in result.files.items():
                url, path = objects.join(self.dest, name), self.folder / name
                objects.write(url, path)
                if (stored := objects.size(url)) != size:
                    raise ObjectError(f"{url} has {stored} bytes where {size} were written: start again")
                path.unlink()
        objects.write(self._record_url(job), _json(asdict(result)))
        return self, job, result

    def settle(self, bar: tqdm) -> None:
        """Finish it if all jobs are done. PipelineError as soon as it is certain that too many rows are rejected."""
        read = sum(result.rows for result in self.results.values())
        rejected = self._rejected()
        if self.work.rows is None and not self.complete:
            return
        if len(rejected) > allowed(self._max_rejected, self.work.rows or read):
            self._write_rejected(rejected)
            first = "; ".join(f"{each['row']}: {each['cause']}: {each['detail']}" for each in rejected[:3])
            raise PipelineError(
                f"{self.dest}: {len(rejected)} rows are rejected so far, of {read} rows read, more than --max-rejected "
                f"{self._max_rejected} allows: {_causes(rejected)}; the first: {first}. They are in {REJECTED_FILE} "
                "there: raise --max-rejected to go on without them, or mend them, {_AFRESH}"
            )
        if self.complete and not self.finished:
            bar.write(printable(self._finish()))
            notes = sum((Counter(result.notes) for result in self.results.values()), Counter())
            for what, count in notes.most_common():
                bar.write(printable(f"note: {self.dest}: {count} {what}"), file=sys.stderr)
            self.finished = True

    def _write_rejected(self, rejected: list[dict[str, str]]) -> None:
        objects.write(objects.join(self.dest, REJECTED_FILE), b"".join(_json(each) + b"\n" for each in rejected))

    def _rejected(self) -> list[dict[str, str]]:
        """The rejected rows known so far, in order."""
        results = (self.results.get(job) for job in self.work.jobs)
        return [each for result in results if result for each in result.rejected]

    def _finish(self) -> str:
        """Write what belongs to the dataset as a whole, its index last. Returns a summary of one line."""
        results = [self.results[job] for job in self.work.jobs]
        shards = tuple(result.shard for result in results if result.shard)
        rejected = self._rejected()
        self._write_rejected(rejected)
        if not shards:
            why = f"see {REJECTED_FILE} there" if rejected else "SOURCE has none"
            raise PipelineError(f"{self.dest}: no row can be used, {why}")
        files = self.work.files()
        for name, content in files.items():
            objects.write(objects.join(self.dest, name), content)
        index = replace(self.work.index(shards), files={name: File.of(content) for name, content in files.items()})
        objects.write(objects.join(self.dest, INDEX_FILE), index.to_json().encode())
        _remove_unfinished(self.dest)
        seconds = max(time.monotonic() - self._began, 1e-3)  # all may have been done before
        return (
            f"{self.dest}: {index.samples} samples in {len(shards)} shards, {index.total_bytes / 1e6:.1f} MB, "
            f"{seconds:.1f} s, {(index.samples - self._samples_before) / seconds:.0f} samples/s, "
            f"{len(rejected)} rejected" + (f" ({_causes(rejected)})" if rejected else "")
        )


def _open(works: Mapping[str, Work], max_rejected: float, files: list[tuple[str, bytes]]) -> list[_Conversion]:
    """The conversions that are not finished, each with its plan written and its records read.

    A dataset that is finished is one of an earlier start of the same command if any of the command's plans is still
    there: plans are written before all else, and one goes only when its dataset is finished. Where none of them is,
    nothing that the command would write may be there.
    """
    plans = {}
    for dest, work in works.items():
        plans[dest] = _plan(dest)
        wanted = json.loads(_json(work.plan))
        for name in wanted | plans[dest] if plans[dest] is not None else ():
            if (was := plans[dest].get(name)) == wanted.get(name):
                continue
            if name in SOURCE_STATE:
                raise PipelineError(
                    f"{dest} holds an unfinished conversion, and SOURCE has changed since: restore it, or {_AFRESH}"
                )
            raise PipelineError(
                f"{dest} holds an unfinished conversion whose {name} was {was!r} and is {wanted.get(name)!r} now: "
                f"give the same command with the same source, or {_AFRESH}"
            )
    finished = [dest for dest in works if objects.exists(objects.join(dest, INDEX_FILE))]
    if not any(plans.values()):
        for dest in finished:
            refuse_occupied(dest)
        _refuse_overwriting([url for url, _ in files])
    for dest, work in works.items():
        if plans[dest] is None and dest not in finished:
            names = (REJECTED_FILE, *work.files(), *(job + end for job in work.jobs for end in (".tar", ".idx.npy")))
            _refuse_overwriting([objects.join(dest, name) for name in names])
    unfinished = {dest: work for dest, work in works.items() if dest not in finished}
    for dest, work in unfinished.items():
        objects.write(_plan_url(dest), _json(work.plan))
    for dest in finished:
        _remove_unfinished(dest)
    return [_Conversion(number, dest, work, max_rejected) for number, (dest, work) in enumerate(unfinished.items())]


def _refuse_overwriting(urls: list[str]) -> None:
    with ThreadPoolExecutor(16) as threads:
        for url, there in zip(urls, threads.map(objects.exists, urls), strict=True):
            if there:
                raise PipelineError(f"{url} is there already and would be overwritten: move it or choose another DEST")


def _plan(dest: str) -> dict[str, object] | None:
    """What an earlier start noted that it converts; None if there was none, or it has finished."""
    if not objects.exists(url := _plan_url(dest)):
        return None
    return parse_json(objects.read(url), url, dict, remedy=_AFRESH)


def _plan_url(dest: str) -> str:
    return objects.join(dest, UNFINISHED, "plan.json")


def _remove_unfinished(dest: str) -> None:
    """Remove what only an unfinished conversion needs, the plan last."""
    plan = _plan_url(dest)
    for _ in range(3):  # a listing has no checksum: what was damaged on the way names another
        listed = objects.list_under(objects.join(dest, UNFINISHED))
        if not (records := [url for url in listed if not url.endswith("/plan.json")]):
            break
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(objects.delete, records))
    objects.delete(plan)
    if "://" not in dest:
        _remove_partial(Path(dest))
        with suppress(FileNotFoundError):
            Path(dest, UNFINISHED).rmdir()


def _remove_partial(folder: Path) -> None:
    """Remove what processes that were killed had begun to write."""
    for pattern in (".*.partial", "*.tar.partial"):
        for partial in folder.glob(pattern):
            partial.unlink()


@contextmanager
def _folders(conversions: list[_Conversion], tmp: Path | None) -> Iterator[None]:
    """Give each conversion the folder in which its jobs write: DEST itself, or one from which they are uploaded.

    What an earlier start left there when it was killed is removed.
    """
    with ExitStack() as stack:
        for conversion in conversions:
            conversion.folder = Path(conversion.dest)
            if conversion.remote:
                place = f"{objects.server()} {conversion.dest}"  # of another server it may be in use just now
                name = f"make-shards-{os.getuid()}-{sha256(place.encode()).hexdigest()[:16]}"
                conversion.folder = Path(tmp or tempfile.gettempdir(), name)
                shutil.rmtree(conversion.folder, ignore_errors=True)
                conversion.folder.mkdir(mode=0o700)
                # A process may still be writing when all is over early.
                stack.callback(shutil.rmtree, conversion.folder, ignore_errors=True)
            else:
                _remove_partial(conversion.folder)
        yield


def _causes(rejected: list[dict[str, str]]) -> str:
    return ", ".join(f"{count} {cause}" for cause, count in Counter(each["cause"] for each in rejected).most_common())


def _json(content: object) -> bytes:
    # Half a surrogate pair, which a name may hold, is written as JSON writes it.
    return json.dumps(content, ensure_ascii=False).encode(errors="backslashreplace")
