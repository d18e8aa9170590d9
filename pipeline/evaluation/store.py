"""Embeddings of a collection's items: in memory, or on disk, where a killed evaluation finds what it had.

    FOLDER/<dataset>.npy    (N, D) float32, in the order in which items were embedded
    FOLDER/<dataset>.keys   N times the 16 bytes of an item's key (see Collection)

Vectors are appended and brought to the disk before their keys, which say how many there are; what a process that was
killed wrote beyond is overwritten. An item is in the file of the dataset that it was first needed
for; or in several files, if several jobs embedded it at the same time.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO, FileIO
from pathlib import Path

import numpy as np

from pipeline.embedding.folder import mapped
from pipeline.errors import PipelineError
from pipeline.storage import lock

_KEY_BYTES = 16


@contextmanager
def held(folder: Path, datasets: Iterable[str]) -> Iterator[None]:
    """Let no other process embed these datasets into `folder` meanwhile (others it may); see `lock.held`."""
    places = [folder / _name(dataset) for dataset in datasets]
    try:
        with lock.held(map(str, places)):
            yield
    finally:
        for place in places:
            with suppress(OSError):  # another waits there
                place.rmdir()


def _name(dataset: str) -> str:
    return re.sub(r"[^\w.-]+", "_", dataset)


class Memory:
    """Embeddings of `count` items, by their rows in the collection."""

    def __init__(self, count: int, dimension: int) -> None:
        self.vectors = np.zeros((count, dimension), np.float32)

    def missing(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def append(self, dataset: str, rows: np.ndarray, vectors: np.ndarray) -> None:
        self.vectors[rows] = vectors

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self.vectors[rows]


class Disk:
    """Those that `folder` has, all of one encoder, and those that are appended."""

    def __init__(self, folder: Path, keys: Sequence[bytes], dimension: int) -> None:
        """keys: of the collection's items.  Raises PipelineError for a file that is not of this dimension."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.keys, self.dimension = folder, keys, dimension
        self.files = [_File(path, dimension) for path in sorted(folder.glob("*.npy"))]
        # Where the vector of each row of the collection is: in which file, -1 for none, and at which of its rows.
        self._file = np.full(len(keys), -1)
        self._place = np.zeros(len(keys), np.int64)
        rows = {key: row for row, key in enumerate(keys)}
        for number, file in enumerate(self.files):
            for place, key in enumerate(file.keys()):
                if (row := rows.get(key)) is not None:
                    self._file[row], self._place[row] = number, place

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Those of the rows that have no vector yet."""
        return rows[self._file[rows] < 0]

    def append(self, dataset: str, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Keep the vectors (n, D) of so many rows, in the dataset's file.

        Raises PipelineError where another process has written there meanwhile, or the disk is full.
        """
        path = self.folder / f"{_name(dataset)}.npy"
        number = next((number for number, file in enumerate(self.files) if file.path == path), len(self.files))
        if number == len(self.files):
            self.files.append(_File(path, self.dimension))
        file = self.files[number]
        first = file.count
        file.append(vectors, [self.keys[row] for row in rows])
        self._file[rows], self._place[rows] = number, np.arange(first, file.count)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The vectors (n, D) of rows none of which is missing."""
        vectors = np.empty((len(rows), self.dimension), np.float32)
        for number in np.unique(self._file[rows]):
            here = np.flatnonzero(self._file[rows] == number)
            vectors[here] = self.files[number].take(self._place[rows[here]])
        return vectors


class _File:
    """One dataset's."""

    def __init__(self, path: Path, dimension: int) -> None:
        self.path, self.keys_path, self.dimension = path, path.with_suffix(".keys"), dimension
        self.count = self.keys_path.stat().st_size // _KEY_BYTES if self.keys_path.exists() else 0
        self._opened: tuple[FileIO, FileIO] | None = None
        self._vectors = self._mapped() if self.count else None

    def keys(self) -> list[bytes]:
        data = self.keys_path.read_bytes() if self.count else b""
        return [data[start : start + _KEY_BYTES] for start in range(0, self.count * _KEY_BYTES, _KEY_BYTES)]

    def append(self, vectors: np.ndarray, keys: Sequence[bytes]) -> None:
        try:
            written, named = self._opened = self._opened or self._open()
            data = np.ascontiguousarray(vectors, "<f4").tobytes()
            _write(written, data, len(self._header(0)) + 4 * self.count * self.dimension)
            _write(written, self._header(self.count + len(keys)), 0)
            os.fsync(written.fileno())
            _write(named, b"".join(keys), self.count * _KEY_BYTES)
            os.fsync(named.fileno())
        except OSError as error:
            raise PipelineError(f"{self.path}: {error.strerror}; what is embedded so far is kept") from None
        self.count, self._vectors = self.count + len(keys), None

    def take(self, places: np.ndarray) -> np.ndarray:
        if self._vectors is None:
            self._vectors = self._mapped()
        return self._vectors[places]

    def _open(self) -> tuple[FileIO, FileIO]:
        for path in (self.path, self.keys_path):
            path.touch()
        written, named = (FileIO(path, "r+") for path in (self.path, self.keys_path))
        if os.fstat(named.fileno()).st_size // _KEY_BYTES != self.count:
            raise PipelineError(f"{self.path}: another evaluation has written it meanwhile; start this one again")
        return written, named

    def _mapped(self) -> np.ndarray:
        with suppress(OSError, ValueError):
            vectors = mapped(self.path)
            fits = vectors.dtype == np.dtype("<f4") and vectors.shape[1:] == (self.dimension,)
            if fits and len(vectors) >= self.count:
                return vectors
        raise PipelineError(
            f"{self.path} does not hold the {self.count} vectors of {self.dimension} float32 that "
            f"{self.keys_path.name} counts: remove both, and they are embedded anew"
        )

    def _header(self, count: int) -> bytes:
        """Of the same length for every count."""
        header = BytesIO()
        described = {"descr": "<f4", "fortran_order": False, "shape": (count, self.dimension)}
        np.lib.format.write_array_header_1_0(header, described)
        return header.getvalue()


def _write(file: FileIO, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(file.fileno(), data, offset)
        data, offset = data[written:], offset + written
