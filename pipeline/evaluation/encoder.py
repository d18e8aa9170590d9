"""The interface that evaluation needs from a model, and the hash that identifies a model's vectors."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK, Item
from pipeline.models.files import SETTINGS, fetched, fingerprint, survey

_VERSION = 5  # raise it when a change of prompts, tiles, pooling or `identity_of` changes an encoder's vectors


class Encoder(Protocol):
    """A model that maps items to vectors of one space.

    name: for the report.
    identity: a hash of its weights and of all other settings that change a vector.
    dimension: of the vectors.
    instructed: whether queries contain an instruction, as in MMEB. Otherwise items are only captions, pictures and
        videos; the text of a picture or video is its mark.
    """

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    @property
    def instructed(self) -> bool: ...

    def prepare(self, item: Item) -> Any:
        """Decode and tokenize an item for `embed`. Called in threads. Raises BadSample if the item cannot be used."""

    def embed(self, prepared: Sequence[Any]) -> torch.Tensor:
        """Return (n, dimension) float32 unit rows, on any device.

        In a process group, all ranks call this the same number of times, some perhaps without items.
        """


def without_marks(text: str) -> str:
    """Return an item's text without its image and video marks and the white space around them."""
    return re.sub(rf"\s*({IMAGE_MARK}|{VIDEO_MARK})\s*", " ", text).strip()


def model_folder(path: str) -> Path:
    """Return the folder with a model's files. Raises PipelineError if it does not exist or has no weights."""
    folder = fetched(path)
    survey(folder)  # raises the errors
    return folder


def identity_of(folder: Path, *options: object) -> str:
    """Return a hash, 16 hexadecimal digits, of a model folder and the options that change its vectors.

    Settings that change only the rounding are not included: device, attention, chunk size.
    """
    parts = [fingerprint(str(part)) for part in (folder, *sorted(file.parent for file in folder.glob("*/config.json")))]
    digest = hashlib.sha256(json.dumps([_VERSION, *parts, *options]).encode())
    for file in sorted([*folder.glob("*.*"), *folder.glob("*/config.json")]):  # used by sentence-transformers
        if not file.is_file():
            continue
        if file.suffix in SETTINGS:
            digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode() + file.read_bytes())
        elif file.suffix in (".bin", ".pt"):  # the fingerprint contains only their size
            digest.update(f"{file.relative_to(folder)} {file.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
