"""A hash of everything that determines a model's vectors, computed before the model is loaded."""

import hashlib
import json
from pathlib import Path

from pipeline.models.files import SETTINGS, fetched, fingerprint, survey

_VERSION = 3  # raise it if a change of prompts, tiles, pooling or of this file changes the vectors of an encoder


def model_folder(path: str) -> Path:
    """The folder with the files of a model. PipelineError if there is none, or if it has no weights."""
    folder = fetched(path)
    survey(folder)  # raises the errors
    return folder


def identity_of(folder: Path, *options: object) -> str:
    """16 hexadecimal digits for a model folder and the options that change its vectors.

    Settings that change only the rounding are not included: device, attention, chunk size.
    """
    parts = [fingerprint(str(part)) for part in (folder, *sorted(file.parent for file in folder.glob("*/config.json")))]
    digest = hashlib.sha256(json.dumps([_VERSION, *parts, *options]).encode())
    for file in sorted([*folder.glob("*.*"), *folder.glob("*/config.json")]):  # of sentence-transformers
        if not file.is_file():
            continue
        if file.suffix in SETTINGS:
            digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode() + file.read_bytes())
        elif file.suffix in (".bin", ".pt"):  # the fingerprint contains only their size
            digest.update(f"{file.relative_to(folder)} {file.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
