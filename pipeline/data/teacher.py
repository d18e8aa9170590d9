"""A teacher's stored vectors of a dataset as arrays, without the samples themselves."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.data.sample import BadSample
from pipeline.data.source import Source
from pipeline.errors import PipelineError
from pipeline.storage.objects import ObjectError

_PIECE = 1024  # samples


@dataclass(frozen=True)
class PairVectors:
    """The vectors of consecutive samples of a shard.

    first: the number of the first sample in its shard.
    query, target: (n, width) float32 unit rows; the target's with its own text, not an alternative one.
    usable: (n,) bool; False for a sample that the teacher could not read, whose rows are zeros.
    """

    first: int
    query: np.ndarray
    target: np.ndarray
    usable: np.ndarray


def query_and_target_vectors(source: Source, shard: int) -> Iterator[PairVectors]:
    """Yield the teacher's vectors of a shard's queries and targets, in the order of the samples.

    Only the store is read, not the samples' tar, and only some megabytes of it at a time.
    Raises PipelineError if the source was opened without data.teacher, ObjectError if the vectors are damaged.
    """
    if not source.teacher:
        raise PipelineError(f"{source.data.url} was opened without data.teacher: name the place of its vectors")
    number, info = source.shards[shard]
    store, tar = source.teacher[number][1], source.tars(shard)[-1]
    width = store.metadata.width
    for first in range(0, info.samples, _PIECE):
        count = min(_PIECE, info.samples - first)
        rows, usable = np.zeros((2, count, width), np.float32), np.zeros(count, bool)
        for place, (_, data) in enumerate(tar.samples(first, first + count)):
            try:
                key, stored = store.rows_in(data)
                if len(stored) < 2 or stored.shape[1] != width:
                    raise ObjectError(f"sample {key!r} has vectors {stored.shape}, not at least 2 of {width}")
                rows[:, place] = store.float_rows(stored[:2])
            except BadSample:
                continue
            except ObjectError as error:
                raise ObjectError(f"{tar.url}: {error}") from None
            usable[place] = True
        yield PairVectors(first, rows[0], rows[1], usable)
