"""A hash of everything that determines a model's vectors, computed before the model is loaded."""

import hashlib
import json
from pathlib import Path

from pipeline.models.files import SETTINGS, fetched, fingerprint, survey

_VERSION = 3  # raise it when a change of prompts, tiles, pooling or this file changes an encoder's vectors


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
