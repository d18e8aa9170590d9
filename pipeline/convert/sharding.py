"""Convert rows to shards: a source has rows in a fixed order, and each becomes a sample or is rejected.

The rows of each shard are fixed before any row is read, so shards are independent jobs.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from pipeline.convert.engine import JobResult, TooManyRejected, Work, allowed, run_conversions
from pipeline.convert.workers import check_stop
from pipeline.data.index import Index
from pipeline.data.sample import BYTE_ORDER_MARK, PICTURE_ENDINGS, VIDEO_SUFFIXES, BadSample, Pair, Single, text_fault
from pipeline.data.shards import write_shard
from pipeline.data.tiles import decode_image
from pipeline.data.video import sample_frames
from pipeline.errors import PipelineError
from pipeline.progress import progress_bar

T = TypeVar("T")
Bytes = TypeVar("Bytes", int, np.ndarray)

MAX_SAMPLE_BYTES = 1 << 30  # a process holds a whole sample in memory


class Rejection(Exception):
    """A row that cannot become a sample. cause: a category, for counting; detail: what is wrong with this row.

    The detail is converted to one line of at most 300 characters. Memory addresses are removed, so it is reproducible.
    """

    def __init__(self, cause: str, detail: str) -> None:
        detail = " ".join(re.sub(" at 0x[0-9a-f]+", "", detail).split())[:300]
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail = cause, detail


@dataclass(frozen=True)
class Rows(ABC):
    """The rows of one dataset. Objects are sent to other processes, so they must not depend on global state."""

    dataset: str

    @abstractmethod
    def sizes(self) -> np.ndarray:
        """Return (rows,) int64: the approximate bytes of each row in a shard, used to divide rows into shards.

        May read the sizes of files, but not their content. A missing file has size 0; its row is rejected later.
        """

    def name(self, number: int) -> str:
        """Return a readable name of the row in the source, such as "line 17"."""
        return f"row {number}"

    @abstractmethod
    def sample(self, number: int) -> Pair | Single:
        """Read row `number`; raises Rejection."""

    def files(self) -> dict[str, bytes]:
        """Return additional files for the dataset's folder, by name."""
        return {}


def convert(
    datasets: Mapping[str, Rows],
    *,
    options: Mapping[str, object],
    shard_bytes: int = 256 << 20,
    shards: int | None = None,
    processes: int = 1,
    max_rejected: float = 0.01,
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
    works = {dest: _planned(rows, plan, shard_bytes, shards, max_rejected) for dest, rows in planned}
    return run_conversions(works, unit=" rows", processes=processes, max_rejected=max_rejected, files=files)


def _planned(rows: Rows, options: dict[str, object], shard_bytes: int, shards: int | None, max_rejected: float) -> Work:
    """Return the conversion of a dataset's rows: every job writes a shard of consecutive rows."""
    sizes = rows.sizes()
    if not len(sizes):
        raise PipelineError(f"{rows.dataset}: the source has no rows")
    cuts = _cuts(sizes, shard_bytes, shards)
    too_large = set(np.flatnonzero(sizes > MAX_SAMPLE_BYTES).tolist())
    hashed = sha256(sizes.astype("<i8").tobytes()).hexdigest()
    return Work(
        plan={**options, "dataset": rows.dataset, "rows": len(sizes), "row_sizes": hashed},
        jobs={f"{shard:06d}": int(count) for shard, count in enumerate(np.diff(cuts))},
        run=partial(_write, rows, cuts, too_large, allowed(max_rejected, len(sizes))),
        index=Index(rows.dataset, ()),
        rows=len(sizes),
        files=rows.files(),
    )


def _write(rows: Rows, cuts: np.ndarray, too_large: set[int], most: int, job: str, folder: Path) -> JobResult:
    """Write shard `job`. Rows whose numbers are in `too_large` are rejected unread.

    Raises TooManyRejected as soon as more than `most` rows are rejected.
    """
    numbers = range(*cuts[int(job) : int(job) + 2].tolist())
    rejected: list[dict[str, str]] = []

    def samples() -> Iterator[Pair | Single]:
        for number in numbers:
            check_stop()
            try:
                if number in too_large:
                    raise Rejection("too large", f"more than {MAX_SAMPLE_BYTES >> 20} MiB")
                yield rows.sample(number)
            except Rejection as reason:
                rejected.append({"row": rows.name(number), "cause": reason.cause, "detail": reason.detail})
                if len(rejected) > most:
                    raise TooManyRejected(JobResult(None, number - numbers.start + 1, rejected, {})) from None

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


@dataclass(frozen=True)
class ImageFolder:
    """Reads the images and videos of a source.

    max_side: larger images are scaled down to this many pixels on their longer side, and encoded as JPEG of `quality`;
    other images keep their bytes.
    """

    folder: Path
    max_side: int | None = None
    quality: int = 90

    def path(self, name: str) -> Path:
        """Return the path of the file. Raises Rejection if the name leads out of the folder, even by a link."""
        try:
            found = (self.folder / name).resolve()
        except (OSError, ValueError, RuntimeError):  # the name contains a NUL, or links form a cycle
            raise Rejection("missing file", repr(name)) from None
        if not found.is_relative_to(self.folder.resolve()):
            raise Rejection("path leaves the source", name)
        return found

    def size(self, name: str) -> int:
        """Return the file's size in bytes; 0 if it cannot be read."""
        try:
            return self.path(name).stat().st_size
        except (Rejection, OSError, ValueError):
            return 0

    def read(self, name: str) -> bytes:
        """Return the image's bytes. Raises Rejection if it is missing, broken or too large to decode."""
        data, image = self._decoded(name, "image", decode_image)
        if self.max_side is None or max(image.size) <= self.max_side:
            return data
        image.thumbnail((self.max_side, self.max_side), Image.Resampling.LANCZOS)
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue()

    def read_video(self, name: str) -> bytes:
        """Return the video's bytes. Raises Rejection if it is missing, or if no frame of it can be decoded."""
        data, _ = self._decoded(name, "video", lambda data: sample_frames(data, 1))
        return data

    def _decoded(self, name: str, kind: str, decode: Callable[[bytes], T]) -> tuple[bytes, T]:
        path = self.path(name)
        try:
            if not path.is_file():
                raise Rejection("missing file", self._absent(name, path))
            data = path.read_bytes()
            return data, decode(data)
        except OSError as error:
            raise Rejection("unreadable file", f"{name}: {error.strerror}") from None
        except BadSample as reason:
            raise Rejection(f"broken {kind}", f"{name}: {reason}") from None

    def _absent(self, name: str, path: Path) -> str:
        """Say where the file is missing, and whether one is there with another ending."""
        if path.exists():
            return f"{name} in {self.folder} is not a file"
        endings = [each for ending in sorted({*PICTURE_ENDINGS, *VIDEO_SUFFIXES}) for each in (ending, ending.upper())]
        others = (path.with_suffix(f".{ending}") for ending in endings)
        near = next((f"; {other.name} is there" for other in others if other.is_file()), "")
        return f"{name} is not in {self.folder}{near}"


def checked_text(text: str, images: int = 0, videos: int = 0) -> str:
    """Return the text without a leading byte-order mark. Raises Rejection if it has a `text_fault`."""
    if fault := text_fault(text, images, videos):
        raise Rejection(*fault)
    return text.lstrip(BYTE_ORDER_MARK)


def member_bytes(content: Bytes) -> Bytes:
    """Return the size in a tar of a file with `content` bytes: a header, and blocks of 512 bytes."""
    return 512 + -(-content // 512) * 512


def folder(path: Path) -> Path:
    """Return `path` if it is a folder; otherwise raise PipelineError."""
    if not path.is_dir():
        raise PipelineError(f"{path} is not a folder: name the folder of the dataset")
    return path
