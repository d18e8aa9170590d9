"""Tars beside which a sidecar lies, and the records of their samples."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.lib.recfunctions import repack_fields

from pipeline.data.index import Shard, load_sidecar, read_records, read_samples
from pipeline.data.once import Once
from pipeline.storage import objects

PLACE = ("offset", "length", "crc32")  # the fields of a record that reading a sample needs: 16 bytes
PLACE_AND_HASHES = (*PLACE, "query_hash", "target_hash")  # those that parsing it needs, too: 32 bytes
_READ_BYTES = 16 << 20  # per ranged read of `Tar.samples`, unless a sample is larger


@dataclass(frozen=True)
class Tar:
    """A tar of samples, or of their stored vectors.  folder: its URL's folder.  sidecars: that of its sidecar.

    kept: the fields of all its samples' records, which are read once and kept, because samples are used one by one;
        empty: records are read as they are needed.
    """

    shard: Shard
    folder: str
    sidecars: str
    kept: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return objects.join(self.folder, self.shard.file)

    def records(self, start: int, stop: int) -> np.ndarray:
        """Return the sidecar's records of samples start..stop-1, or their `kept` fields. Recent results are cached."""
        if self.kept:
            return kept_records(self.sidecars, self.shard, self.kept)[start:stop]
        return _records(self.sidecars, self.shard, start, stop)

    def all_records(self) -> np.ndarray:
        """Read the sidecar's records of all samples, with all fields. Only the `kept` ones are kept."""
        records = load_sidecar(self.sidecars, self.shard)
        if self.kept:
            kept_records.put(repack_fields(records[list(self.kept)]), self.sidecars, self.shard, self.kept)
        return records

    def record(self, sample: int) -> np.ndarray:
        """Return (1,) record of a sample, with the fields `PLACE`; those of all samples are kept."""
        return kept_records(self.sidecars, self.shard, PLACE)[sample, None]

    def read(self, records: np.ndarray) -> list[bytes]:
        """Read the samples of consecutive records, by one ranged read."""
        return read_samples(self.folder, self.shard, records)

    def samples(self, start: int, stop: int) -> Iterator[tuple[np.void, bytes]]:
        """Yield (record, bytes) of samples start..stop-1, in ranged reads of about _READ_BYTES."""
        records = self.records(start, stop)
        pieces = np.cumsum(records["length"].astype(np.int64)) // _READ_BYTES
        for piece in np.split(records, np.flatnonzero(np.diff(pieces)) + 1):
            yield from zip(piece, self.read(piece), strict=True)


_records = lru_cache(maxsize=256)(read_records)  # a window's records are needed twice


def _kept_records(url: str, shard: Shard, fields: tuple[str, ...]) -> np.ndarray:
    return repack_fields(load_sidecar(url, shard)[list(fields)])


kept_records = Once(_kept_records)
