"""Clusters of neighbours: samples of a dataset that a teacher finds alike, for batches of hard in-batch negatives.

    neighbours.npy     (N,) uint32: the numbers of the dataset's samples, over all shards. Each run of `size` of them is
                       a cluster; fewer than `size` may remain at the end
    neighbours.json    how the clusters were made, and a hash of the shards to which they belong

Batches composed of such clusters are those of B3 (arXiv 2505.11293).
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pipeline.data.arrays import array_bytes, array_of
from pipeline.data.dataset import is_arrangement
from pipeline.data.index import (
    Digest,
    Index,
    IndexedFile,
    Positive,
    as_json,
    checksum_of,
    index_content,
    index_text,
    validated,
)
from pipeline.data.mined import content_of
from pipeline.storage import objects
from pipeline.storage.documents import FIXED
from pipeline.storage.objects import ObjectError

FORMAT = 1
NEIGHBOURS_FILE = "neighbours.json"
ARRAY_FILE = "neighbours.npy"
_REMEDY = "mine the dataset again, with clusters=SIZE and overwrite=true"


@dataclass(frozen=True)
class Neighbours:
    """The index of a dataset's clusters.

    size: samples of a cluster.  shards: see `content_of`.  array: the file `neighbours.npy`.
    made: how the clusters were made, by name: the model, the options, and counts.
    """

    __pydantic_config__ = FIXED

    size: Positive
    shards: Digest
    array: IndexedFile
    made: dict[str, str | int | float | bool | None]

    def to_json(self) -> str:
        content = {"format": FORMAT, **as_json(self)}
        return index_text(content, checksum_of(content))

    @classmethod
    def load(cls, url: str) -> "Neighbours":
        """Read the index in the folder `url`. Raises ObjectError if it is missing, damaged or of another format."""
        with index_content(objects.join(url, NEIGHBOURS_FILE), FORMAT, _REMEDY) as (content, _):
            return validated(cls, content)

    def check(self, url: str, dataset: str, index: Index) -> None:
        """Raise ObjectError unless these clusters, in the folder `url`, belong to the current shards of `dataset`."""
        if self.shards != content_of(index):
            name = objects.join(url, NEIGHBOURS_FILE)
            raise ObjectError(f"{name} belongs to other shards or captions than those of {dataset}: {_REMEDY}")

    def clusters(self, url: str, samples: int) -> np.ndarray:
        """Read the (samples,) uint32 array in the folder `url`. Raises ObjectError if it is missing or damaged."""
        name = objects.join(url, ARRAY_FILE)
        data = self.array.read(name, _REMEDY)
        try:
            numbers = array_of(data)
        except ValueError as error:
            raise ObjectError(f"{name}: {error}: {_REMEDY}") from None
        if numbers.dtype != np.dtype("<u4") or numbers.shape != (samples,):
            raise ObjectError(f"{name} does not list each of {samples} samples once: {_REMEDY}")
        return numbers


def load_neighbours(urls: Sequence[str], indexes: Sequence[tuple[str, Index]]) -> tuple[tuple[str, Neighbours], ...]:
    """Return (URL, index) of the clusters in these folders, one for each dataset's (URL, index).

    Raises ObjectError if one is missing, if it belongs to other shards, or if clusters differ in size.
    """

    def load(url: str) -> Neighbours:
        if not objects.exists(name := objects.join(url, NEIGHBOURS_FILE)):
            raise ObjectError(f"{name} is missing: python -m pipeline.mine MODEL SHARDS clusters=SIZE writes it")
        return Neighbours.load(url)

    with ThreadPoolExecutor(8) as pool:
        found = tuple(zip(urls, pool.map(load, urls), strict=True))
    first_url, first = found[0]
    for (url, neighbours), (dataset, index) in zip(found, indexes, strict=True):
        neighbours.check(url, dataset, index)
        if neighbours.size != first.size:
            raise ObjectError(
                f"the clusters in {first_url} have {first.size} samples, but those in {url} have {neighbours.size}: "
                "mine all datasets with clusters of one size"
            )
    return found


def write_neighbours(
    url: str, index: Index, clusters: np.ndarray, size: int, made: Mapping[str, str | int | float | bool | None]
) -> Neighbours:
    """Write the clusters of the dataset with this index to the folder `url`, and return their index.

    clusters: integers (N,), the numbers of its samples; see the module.  made: see `Neighbours`.
    Raises ObjectError if they do not list each sample once, or if it has 2**32 samples or more.
    """
    if not is_arrangement(clusters, index.samples) or index.samples >= 2**32:
        raise ObjectError(f"{url}: the clusters do not list each of {index.samples} samples once, or are too many")
    data = array_bytes(clusters.astype("<u4"))
    neighbours = Neighbours(size, content_of(index), IndexedFile.of(data), dict(made))
    objects.delete(objects.join(url, NEIGHBOURS_FILE))  # an earlier one would not match the array
    objects.write(objects.join(url, ARRAY_FILE), data)
    objects.write(objects.join(url, NEIGHBOURS_FILE), neighbours.to_json().encode())
    return neighbours
