"""Stores for the embeddings of a collection's items: in memory, or on disk to resume a killed evaluation.

    FOLDER/<dataset>.npy    (N, D) float32, in the order in which items were embedded
    FOLDER/<dataset>.keys   N keys of items, 16 bytes each (see Collection)

Vectors are appended and synced to disk before their keys. The number of keys is the number of vectors; vectors beyond
it, from a killed process, are overwritten. An item is in the file of the dataset that needed it first, or in several
files if several jobs embedded it at the same time.
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
    """Prevent other processes from embedding these datasets into `folder`; see `lock.held`."""
    places = [folder / _name(dataset) for dataset in datasets]
    try:
        with lock.held(map(str, places)):
            yield
    finally:
        for place in places:
            with suppress(OSError):  # another process waits for it
                place.rmdir()


def _name(dataset: str) -> str:
    return re.sub(r"[^\w.-]+", "_", dataset)


class MemoryStore:
    """Embeddings of `count` items in memory, by their rows in the collection."""

    def __init__(self, count: int, dimension: int) -> None:
        self.vectors = np.zeros((count, dimension), np.float32)

    def missing(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def append(self, dataset: str, rows: np.ndarray, vectors: np.ndarray) -> None:
        self.vectors[rows] = vectors

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self.vectors[rows]


class DiskStore:
    """Embeddings of one encoder in `folder`."""

    def __init__(self, folder: Path, keys: Sequence[bytes], dimension: int) -> None:
        """Open the files in `folder`. Raises PipelineError if one has another dimension.  keys: the collection's."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.keys, self.dimension = folder, keys, dimension
        self.files = [_File(path, dimension) for path in sorted(folder.glob("*.npy"))]
        # For each row of the collection: the file with its vector, or -1, and the row in that file.
        self._file = np.full(len(keys), -1)
        self._row = np.zeros(len(keys), np.int64)
        rows = {key: row for row, key in enumerate(keys)}
        for number, file in enumerate(self.files):
            for place, key in enumerate(file.keys()):
                if (row := rows.get(key)) is not None:
                    self._file[row], self._row[row] = number, place

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows that have no vector yet."""
        return rows[self._file[rows] < 0]

    def append(self, dataset: str, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Append the vectors (n, D) of n rows to the dataset's file.

        Raises PipelineError if another process has written to the file, or if the disk is full.
        """
        path = self.folder / f"{_name(dataset)}.npy"
        number = next((number for number, file in enumerate(self.files) if file.path == path), len(self.files))
        if number == len(self.files):
            self.files.append(_File(path, self.dimension))
        file = self.files[number]
        first = file.count
        file.append(vectors, [self.keys[row] for row in rows])
        self._file[rows], self._row[rows] = number, np.arange(first, file.count)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors (n, D) of these rows; none may be missing."""
        vectors = np.empty((len(rows), self.dimension), np.float32)
        for number in np.unique(self._file[rows]):
            here = np.flatnonzero(self._file[rows] == number)
            vectors[here] = self.files[number].take(self._row[rows[here]])
        return vectors


class _File:
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
            vectors_file, keys_file = self._opened = self._opened or self._open()
            data = np.ascontiguousarray(vectors, "<f4").tobytes()
            _write(vectors_file, data, len(self._header(0)) + 4 * self.count * self.dimension)
            _write(vectors_file, self._header(self.count + len(keys)), 0)
            os.fsync(vectors_file.fileno())
            _write(keys_file, b"".join(keys), self.count * _KEY_BYTES)
            os.fsync(keys_file.fileno())
        except OSError as error:
            raise PipelineError(f"{self.path}: {error.strerror}; the vectors written before are kept") from None
        self.count, self._vectors = self.count + len(keys), None

    def take(self, places: np.ndarray) -> np.ndarray:
        if self._vectors is None:
            self._vectors = self._mapped()
        return self._vectors[places]

    def _open(self) -> tuple[FileIO, FileIO]:
        for path in (self.path, self.keys_path):
            path.touch()
        vectors_file, keys_file = (FileIO(path, "r+") for path in (self.path, self.keys_path))
        if os.fstat(keys_file.fileno()).st_size // _KEY_BYTES != self.count:
            raise PipelineError(f"{self.path}: another evaluation has written to it; start this one again")
        return vectors_file, keys_file

    def _mapped(self) -> np.ndarray:
        with suppress(OSError, ValueError):
            vectors = mapped(self.path)
            fits = vectors.dtype == np.dtype("<f4") and vectors.shape[1:] == (self.dimension,)
            if fits and len(vectors) >= self.count:
                return vectors
        raise PipelineError(
            f"{self.path} does not contain {self.count} vectors of {self.dimension} float32, as many as "
            f"{self.keys_path.name} has keys: delete both files, and the items are embedded again"
        )

    def _header(self, count: int) -> bytes:
        """Return the .npy header, which has the same length for every count."""
        header = BytesIO()
        described = {"descr": "<f4", "fortran_order": False, "shape": (count, self.dimension)}
        np.lib.format.write_array_header_1_0(header, described)
        return header.getvalue()


def _write(file: FileIO, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(file.fileno(), data, offset)
        data, offset = data[written:], offset + written
