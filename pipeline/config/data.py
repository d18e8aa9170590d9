"""The sections of a recipe that say what is read, and how: the data and its store, and the frames of videos."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from pipeline.config.section import Fixed, Place, Section


class Store(Section):
    """How objects are read; endpoint and credentials come from the usual AWS environment."""

    timeout_s: float = Field(
        120, ge=0.1, le=24 * 3600, description="seconds without a byte after which a read is an error"
    )
    requester_pays: bool = Field(False, description="pay for reading from somebody else's requester-pays bucket")
    addressing: Literal["auto", "path", "virtual"] = Field(
        "auto", description="path: server/bucket/key; virtual: bucket.server/key; auto: path unless it is AWS"
    )

    def store(self) -> dict[str, Any]:
        """Arguments for `pipeline.storage.objects.configure`."""
        return self.model_dump(include=set(Store.model_fields))


class Part(Section):
    """A dataset in a mixture."""

    name: str = Field(pattern=r"^[^./][^/]*$", description="its folder below data.url")
    weight: float = Field(1.0, gt=0, description="how often an epoch uses each of its samples")
    cap: int | None = Field(None, gt=0, description="maximum samples per epoch, weighted or not; see data.cap_rows")


class Data(Store):
    url: Place = Field(description="s3://bucket/prefix or a folder: an index.json, or one per dataset below it")
    datasets: Annotated[list[Part], Fixed()] = Field(
        [], description="datasets below url: NAME or {name: NAME, weight: 1, cap: 50000}; empty: url is itself one"
    )
    text_embeddings: Place | None = Field(
        None,
        description="the captions' embeddings by pipeline.embed --shards: its --out, or `beside` the shards; null: the "
        "text encoder runs in every step",
    )
    teacher: Place | None = Field(
        None,
        description="another embedder's vectors of all items, by pipeline.embed --shards --items: its --out, or "
        "`beside` the shards; null: none",
    )
    negatives: Place | None = Field(
        None,
        description="mined negatives by pipeline.mine: its out=, or `beside` the shards; they follow the samples' own; "
        "null: none",
    )
    cap: Annotated[int | None, Fixed()] = Field(
        None, gt=0, description="maximum samples per dataset and epoch, unless the dataset has its own cap"
    )
    cap_rows: Annotated[Literal["rotating", "first"], Fixed()] = Field(
        "rotating", description="samples below a cap: rotating: others in each epoch; first: the first in the shards"
    )
    hard_negatives: Annotated[bool, Fixed()] = Field(
        True, description="use the samples' own hard negatives; false: only the batch's other pairs and mined negatives"
    )
    batches: Annotated[str, Fixed()] = Field(
        "mixed",
        description="mixed: from all datasets; homogeneous: from one; interleaved:K: K equal parts of one each; "
        "modality: from those whose queries have images, or from those whose queries have none (by their first "
        "sample); neighbours: clusters of samples that a teacher finds alike, by pipeline.mine clusters=SIZE",
    )
    neighbours: Place = Field(
        "beside",
        description="the clusters for batches=neighbours: the out= of pipeline.mine, or `beside` the shards",
    )
    lanes: Annotated[int, Fixed()] = Field(
        8, gt=0, description="parallel readers of an epoch; the world size must divide it"
    )
    block_samples: Annotated[int, Fixed()] = Field(
        64, gt=0, description="consecutive samples fetched by one ranged read"
    )
    window_blocks: Annotated[int, Fixed()] = Field(
        16,
        gt=0,
        description="blocks in a window, in which a lane shuffles samples and balances them by tokens",
    )
    memory_mb: int = Field(
        4096, gt=0, description="approximate MiB of encoded samples per rank, including prefetched ones"
    )
    scaled_jpeg: Annotated[bool, Fixed()] = Field(
        False,
        description="decode JPEGs at a half, a fourth or an eighth of their size, if that is at least twice what the "
        "model needs: photos of 12 megapixels take less than half the time, and pixels differ slightly",
    )
    workers: int = Field(2, ge=0, description="decoding processes per rank; 0: in the training process")
    max_bad_fraction: float = Field(
        0.001,
        ge=0,
        le=1,
        description="the run stops if more than this fraction of max(samples so far, 10,000) is unusable",
    )

    @field_validator("datasets", mode="before")
    @classmethod
    def names_are_parts(cls, datasets: Any) -> Any:
        if not isinstance(datasets, list):
            return datasets
        return [{"name": each} if isinstance(each, str) else each for each in datasets]

    @field_validator("datasets")
    @classmethod
    def names_differ(cls, datasets: list[Part]) -> list[Part]:
        names = [part.name for part in datasets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"data.datasets names {', '.join(twice)} twice; to use more of it, give it a weight")
        return datasets

    @field_validator("batches", mode="before")
    @classmethod
    def batches_are_known(cls, batches: Any) -> Any:
        if isinstance(batches, dict) and len(batches) == 1:  # YAML reads `interleaved: 4` as a mapping
            batches = ":".join(str(part) for part in next(iter(batches.items())))
        if not re.fullmatch(r"mixed|homogeneous|modality|neighbours|interleaved: *[1-9][0-9]*", str(batches)):
            raise ValueError(
                f"{str(batches)!r} is unknown; it can be mixed, homogeneous, modality, neighbours or interleaved:K, "
                "such as interleaved:4"
            )
        return batches

    @property
    def parts(self) -> int | None:
        """Number of parts of a batch, each of one dataset or modality; None if batches mix all datasets."""
        if self.batches in ("mixed", "neighbours"):
            return None
        return int(self.batches.partition(":")[2] or 1)


class Video(Section):
    frames: Annotated[int, Fixed()] = Field(8, gt=0, description="frames of a video that the model sees, evenly spaced")
