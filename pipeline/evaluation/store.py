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
from pathlib import Path

import numpy as np

from pipeline.data.arrays import mapped, npy_header
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
        self._paths = sorted(folder.glob("*.npy"))
        self._counts = [_count(path) for path in self._paths]
        # For each row of the collection: the file with its vector, or -1, and the row in that file.
        self._file = np.full(len(keys), -1)
        self._row = np.zeros(len(keys), np.int64)
        rows = {key: row for row, key in enumerate(keys)}
        for number, count in enumerate(self._counts):
            if count:
                self._mapped(number)  # raises the errors
                data = _keys_of(self._paths[number]).read_bytes()
            for place in range(count):
                if (row := rows.get(data[place * _KEY_BYTES : (place + 1) * _KEY_BYTES])) is not None:
                    self._file[row], self._row[row] = number, place

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows that have no vector yet."""
        return rows[self._file[rows] < 0]

    def append(self, dataset: str, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Append the vectors (n, D) of n rows to the dataset's file.

        Raises PipelineError if another process has written to the file, or if the disk is full.
        """
        path = self.folder / f"{_name(dataset)}.npy"
        if path not in self._paths:
            self._paths.append(path)
            self._counts.append(0)
        number = self._paths.index(path)
        first, count = self._counts[number], self._counts[number] + len(rows)
        if _count(path) != first:
            raise PipelineError(f"{path}: another evaluation has written to it; start this one again")
        header = npy_header(count, self.dimension)  # it has the same length for every count
        try:
            with _synced(path) as file:
                _write(file, vectors.astype("<f4").tobytes(), len(header) + 4 * first * self.dimension)
                _write(file, header, 0)
            with _synced(_keys_of(path)) as file:
                _write(file, b"".join(self.keys[row] for row in rows), first * _KEY_BYTES)
        except OSError as error:
            raise PipelineError(f"{path}: {error.strerror}; the vectors written before are kept") from None
        self._counts[number] = count
        self._file[rows], self._row[rows] = number, np.arange(first, count)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors (n, D) of these rows; none may be missing."""
        vectors = np.empty((len(rows), self.dimension), np.float32)
        for number in np.unique(self._file[rows]):
            here = np.flatnonzero(self._file[rows] == number)
            vectors[here] = self._mapped(number)[self._row[rows[here]]]
        return vectors

    def _mapped(self, number: int) -> np.ndarray:
        path, count = self._paths[number], self._counts[number]
        with suppress(OSError, ValueError):
            vectors = mapped(path)
            fits = vectors.dtype == np.dtype("<f4") and vectors.shape[1:] == (self.dimension,)
            if fits and len(vectors) >= count:
                return vectors
        raise PipelineError(
            f"{path} does not contain {count} vectors of {self.dimension} float32, as many as {_keys_of(path).name} "
            "has keys: delete both files, and the items are embedded again"
        )


def _keys_of(path: Path) -> Path:
    return path.with_suffix(".keys")


def _count(path: Path) -> int:
    """Return the number of vectors in a file, by its keys."""
    keys = _keys_of(path)
    return keys.stat().st_size // _KEY_BYTES if keys.exists() else 0


@contextmanager
def _synced(path: Path) -> Iterator[int]:
    """Open a file for `_write`, and sync it to disk afterwards."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield file
        os.fsync(file)
    finally:
        os.close(file)


def _write(file: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
