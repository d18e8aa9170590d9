"""What tells a model's vectors from any other's, before the model is loaded."""

import hashlib
import json
from pathlib import Path

from pipeline.models.files import SETTINGS, fetched, fingerprint, survey

_VERSION = 3  # to be raised where prompts, tiles, pooling or anything here changes what vectors an encoder gives


def model_folder(path: str) -> Path:
    """Where the files of a folder or hub name lie. Raises PipelineError where there are none, or no weights."""
    folder = fetched(path)
    survey(folder)  # for its errors
    return folder


def identity_of(folder: Path, *options: object) -> str:
    """16 hexadecimal digits of a model folder and of the options that change its vectors.

    Not in it is what changes no more than their rounding: the device, its attention, the size of chunks.
    """
    parts = [fingerprint(str(part)) for part in (folder, *sorted(file.parent for file in folder.glob("*/config.json")))]
    digest = hashlib.sha256(json.dumps([_VERSION, *parts, *options]).encode())
    for file in sorted([*folder.glob("*.*"), *folder.glob("*/config.json")]):  # of sentence-transformers' modules
        if not file.is_file():
            continue
        if file.suffix in SETTINGS:
            digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode() + file.read_bytes())
        elif file.suffix in (".bin", ".pt"):  # of which the fingerprint knows the size alone
            digest.update(f"{file.relative_to(folder)} {file.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
