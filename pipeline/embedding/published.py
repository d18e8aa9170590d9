"""Index the tars of vectors that LLM2CLIP's own code wrote beside img2dataset's tars. The tars do not change.

llm2clip/data/extract_embedding.py in github.com/microsoft/LLM2CLIP writes NAME_text_embeddings.tar. Each sample has a
member KEY.COLUMN for each column of captions, with the vector's float32 values and no header.
"""

import hashlib
import logging
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from pipeline.convert.img2dataset import Tape, read_tape
from pipeline.data.sample import BadSample
from pipeline.data.shards import members_of
from pipeline.data.stored_vectors import CAPTIONS, EmbeddingMetadata, columns_of, indexed, texts_by_column
from pipeline.embedding.dataset import EmbeddedDataset
from pipeline.errors import PipelineError
from pipeline.progress import progress_bar
from pipeline.storage import objects

logger = logging.getLogger(__name__)


def index_published(model: str, datasets: list[EmbeddedDataset], *, overwrite: bool) -> None:
    """Index the published vectors of these datasets, reading each tar of vectors and of images once.

    model: the name of the model that computed them, which the tars do not contain.
    Raises PipelineError for tars with other samples, or without vectors for a column of captions.
    """
    identity = hashlib.sha256(f"published {model}".encode()).hexdigest()[:16]
    for dataset in datasets:
        if (columns := columns_of(dataset.index)) is None:
            raise PipelineError(f"{dataset.url} has no tars from img2dataset: embed its captions without --published")
        width = _width(objects.join(dataset.tars_url, CAPTIONS.file_of(dataset.index.shards[0])), columns)
        made = EmbeddingMetadata(model, identity, width, "fp32", "", columns)
        dataset.begin(made, overwrite)
        files = [CAPTIONS.file_of(shard) for shard in dataset.index.shards]
        todo = [number for number, file in enumerate(files) if file not in dataset.parts]
        left = sum(dataset.index.shards[number].samples for number in todo)
        index_tar = partial(_index_tar, dataset, made)
        with (
            ThreadPoolExecutor(4) as pool,
            progress_bar(initial=dataset.samples - left, total=dataset.samples, desc="indexing", unit="sample") as bar,
        ):
            for number, lacking in zip(todo, pool.map(index_tar, todo), strict=True):
                bar.update(dataset.index.shards[number].samples)
                if lacking:
                    logger.warning("%s: %d samples have no embeddings", files[number], lacking)
        dataset.finish(made)


def _width(url: str, columns: tuple[str, ...]) -> int:
    tape = Tape(url)
    for sample in read_tape(tape):
        sizes = _sizes(tape.between(sample.begin, sample.end))
        if missing := [column for column in columns if column.lower() not in sizes]:
            raise PipelineError(f"{url} has vectors for {', '.join(sizes)}, but not for captions in {missing[0]}")
        return sizes[columns[0].lower()] // 4
    raise PipelineError(f"{url} has no samples: write the vectors again, or embed without --published")


def _sizes(data: bytes) -> dict[str, int]:
    """Return the sizes of a sample's members, by lower-case name."""
    return {name.lower(): len(content) for name, content in members_of(data)[1].items()}


def _index_tar(dataset: EmbeddedDataset, made: EmbeddingMetadata, number: int) -> int:
    """Index a shard's vectors, and return the number of its samples without vectors."""
    source, shard = dataset.source, dataset.index.shards[number]
    url, captions = objects.join(dataset.tars_url, CAPTIONS.file_of(shard)), dataset.index.captions
    assert captions  # `columns_of` is not None
    tape, entries = Tape(url), {}
    for sample in read_tape(tape):
        data = tape.between(sample.begin, sample.end) if sample.fault is None else b""
        vectors = {name for name, size in _sizes(data).items() if size == 4 * made.width} if data else set()
        entries[sample.key] = (sample.begin, len(data), zlib.crc32(data)), vectors
    places, reached = [], 0
    for record, data in source.tars(number)[0].samples(0, shard.samples):
        place, vectors = (reached, 0, 0), set()
        try:
            pair = source.parse(number, record, data)
            place, vectors = entries.get(pair.key, (place, vectors))
            if not vectors.issuperset(column.lower() for column in texts_by_column(pair, data, captions).values()):
                place = (reached, 0, 0)
        except BadSample:
            pass  # training reports it
        if place[0] < reached:
            raise PipelineError(
                f"{url} has the samples of {shard.file} in another order: embed its captions without --published"
            )
        places.append(place)
        reached = place[0] + place[1]
    lacking = sum(length == 0 for _, length, _ in places)
    if lacking == len(places):
        raise PipelineError(
            f"{url} has vectors of {made.width} float32 for no sample of {shard.file}: does it belong to other images?"
        )
    dataset.keep(shard, *indexed(CAPTIONS.file_of(shard), tape.size, tape.sha256.hexdigest(), places))
    return lacking
