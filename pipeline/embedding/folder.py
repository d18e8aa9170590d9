"""A folder of embeddings: KIND.npy (N, D), KIND.txt with one id per line, and embeddings.json with the model."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from pipeline.data.index import NO_ARRAY
from pipeline.errors import PipelineError
from pipeline.storage import objects
from pipeline.storage.atomic import replacing
from pipeline.storage.documents import DocumentError, parse_json

KINDS = ("texts", "images", "videos")


@dataclass(frozen=True)
class Identity:
    """The model that computed embeddings.  fingerprint: of its files, independent of their location."""

    model: str
    dimension: int
    fingerprint: str


@dataclass(frozen=True)
class EmbeddingFolder:
    """A folder of embeddings from one model.

    KIND.npy is written last: if it exists, KIND.txt and embeddings.json belong to it.
    """

    folder: Path

    def kinds(self) -> list[str]:
        return [kind for kind in KINDS if self._array(kind).exists()]

    def check(self, model: str, fingerprint: str, written: Iterable[str], overwrite: bool) -> None:
        """Raise PipelineError if this would overwrite embeddings without `overwrite`, or mix two models."""
        existing = self.kinds()
        if (again := [str(self._array(kind)) for kind in existing if kind in written]) and not overwrite:
            raise PipelineError(f"{', '.join(again)}: already exists; add --overwrite, or choose another --out")
        if not (kept := [kind for kind in existing if kind not in written]):
            return
        if (before := self._identity()) is None:
            raise PipelineError(f"{self._about} does not name the model of {', '.join(kept)}: embed them again")
        if before.fingerprint != fingerprint:
            theirs = f"{model} before its files changed" if before.model == model else f"{before.model}, not of {model}"
            raise PipelineError(
                f"{self.folder} has {', '.join(kept)} of {theirs}: embed them again in one call with --overwrite, or "
                "choose another --out"
            )

    def write(self, kind: str, ids: Sequence[str], rows: Iterable[torch.Tensor], identity: Identity) -> None:
        """Write the rows of a kind, one for each id, as their parts (n, D) arrive. KIND.npy is replaced atomically."""
        with replacing(self._array(kind), durable=False) as partial:
            with partial.open("wb") as file:
                file.write(npy_header(len(ids), identity.dimension))
                for part in rows:
                    file.write(part.numpy().astype("<f4").tobytes())
            before = self._identity()
            # Delete another model's embeddings; `check` ensured that each kind is written again.
            for stale in [kind] if before and before.fingerprint == identity.fingerprint else KINDS:
                self._array(stale).unlink(missing_ok=True)
            lines = "".join(f"{each}\n" for each in ids).encode(errors="surrogateescape")  # a path may not be UTF-8
            objects.write(str(self.folder / f"{kind}.txt"), lines)
            objects.write(str(self._about), (json.dumps(vars(identity), indent=1) + "\n").encode())

    def read(self, kind: str) -> tuple[list[str], np.ndarray]:
        """Return (ids, rows (N, D) as a memory map). Raises PipelineError if they cannot be read or do not match."""
        path = self._array(kind)
        try:
            ids = path.with_suffix(".txt").read_bytes().decode(errors="surrogateescape").split("\n")[:-1]
            rows = mapped(path)
        except (OSError, ValueError) as error:
            raise PipelineError(f"{path} cannot be read ({error}): embed again with --overwrite") from None
        if rows.ndim != 2 or len(rows) != len(ids):
            raise PipelineError(f"{path} must have a row for each line of {kind}.txt: embed again with --overwrite")
        return ids, rows

    def _array(self, kind: str) -> Path:
        return self.folder / f"{kind}.npy"

    @property
    def _about(self) -> Path:
        return self.folder / "embeddings.json"

    def _identity(self) -> Identity | None:
        """Return the model in embeddings.json, or None if it cannot be read."""
        try:
            return parse_json(self._about.read_bytes(), str(self._about), Identity, remedy="")
        except (OSError, DocumentError):
            return None


def npy_header(count: int, dimension: int) -> bytes:
    """Return the header of a .npy file of `count` float32 rows."""
    header = BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": (count, dimension)}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


def mapped(path: Path) -> np.ndarray:
    """Return a .npy file's array as a memory map. Raises ValueError or OSError if the file is invalid or incomplete."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except NO_ARRAY as error:
        raise ValueError(str(error)) from None


def best(rows: np.ndarray, query: np.ndarray, top: int) -> list[tuple[int, float]]:
    """Return (row, similarity) for the `top` rows of (N, D) most similar to the query (D,), most similar first."""
    similarities = rows @ query
    return [(int(row), float(similarities[row])) for row in np.argsort(-similarities, kind="stable")[:top]]
