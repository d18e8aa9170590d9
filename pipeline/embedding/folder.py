"""A folder of embeddings: KIND.npy, KIND.txt with one id per line, and embeddings.json with the model and their form.

KIND.npy has a row for each id: (N, D) float32 or int8, or (N, ceil(D / 8)) uint8 for binary, as `packed` returns them.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.data.arrays import mapped, npy_header
from pipeline.errors import PipelineError
from pipeline.models.compact import Form, VectorKind, packed, unpacked
from pipeline.storage import objects
from pipeline.storage.atomic import replacing
from pipeline.storage.documents import DocumentError, parse_json

KINDS = ("texts", "images", "videos")

_DTYPES = {"float32": "<f4", "int8": "|i1", "binary": "|u1"}
_BLOCK = 1 << 14  # rows that a search converts to float32 at a time


@dataclass(frozen=True)
class Identity:
    """The model that computed embeddings, and how they are stored.

    dimension: of the vectors, the model's or smaller.  vectors: type of their numbers; float32 in folders of versions
    that stored no other.  fingerprint: of the model's files, independent of their location.
    """

    model: str
    dimension: int
    fingerprint: str
    vectors: VectorKind = "float32"

    @property
    def form(self) -> Form:
        return Form(self.dimension, self.vectors)


@dataclass(frozen=True)
class EmbeddingFolder:
    """A folder of embeddings from one model, in one form.

    KIND.npy is written last: if it exists, KIND.txt and embeddings.json belong to it.
    """

    folder: Path

    def kinds(self) -> list[str]:
        return [kind for kind in KINDS if self._array(kind).exists()]

    def form(self) -> Form | None:
        """Return the form of the embeddings, or None if there are none."""
        return identity.form if self.kinds() and (identity := self._identity()) else None

    def check(self, identity: Identity, written: Iterable[str], overwrite: bool) -> None:
        """Raise PipelineError if this would overwrite embeddings without `overwrite`, or mix two models or forms."""
        existing = self.kinds()
        if (again := [str(self._array(kind)) for kind in existing if kind in written]) and not overwrite:
            raise PipelineError(f"{', '.join(again)}: already exists; add --overwrite, or choose another --out")
        if not (kept := [kind for kind in existing if kind not in written]):
            return
        if (before := self._identity()) is None:
            raise PipelineError(f"{self._about} does not name the model of {', '.join(kept)}: embed them again")
        remedy = "embed them again in one call with --overwrite, or choose another --out"
        if before.fingerprint != identity.fingerprint:
            model = identity.model
            theirs = f"{model} before its files changed" if before.model == model else f"{before.model}, not of {model}"
            raise PipelineError(f"{self.folder} has {', '.join(kept)} of {theirs}: {remedy}")
        if before.form != identity.form:
            raise PipelineError(
                f"{self.folder} has {', '.join(kept)} of {before.form} numbers, not {identity.form}: give --dimensions "
                f"{before.dimension} --vectors {before.vectors}; or {remedy}"
            )

    def write(self, kind: str, ids: Sequence[str], rows: Iterable[torch.Tensor], identity: Identity) -> None:
        """Write the rows of a kind, one for each id, as their parts (n, D) arrive. KIND.npy is replaced atomically."""
        dtype, width = _layout(identity.form)
        with replacing(self._array(kind), durable=False) as partial:
            with partial.open("wb") as file:
                file.write(npy_header(len(ids), width, dtype))
                for part in rows:
                    stored = part.numpy() if identity.vectors == "float32" else packed(part, identity.vectors)
                    file.write(stored.astype(dtype).tobytes())
            before = self._identity()
            same = before and (before.fingerprint, before.form) == (identity.fingerprint, identity.form)
            # Delete another model's embeddings, or those in another form; `check` ensured that each kind is written
            # again.
            for stale in [kind] if same else KINDS:
                self._array(stale).unlink(missing_ok=True)
            lines = "".join(f"{each}\n" for each in ids).encode(errors="surrogateescape")  # a path may not be UTF-8
            objects.write(str(self.folder / f"{kind}.txt"), lines)
            objects.write(str(self._about), (json.dumps(vars(identity), indent=1) + "\n").encode())

    def read(self, kind: str) -> tuple[list[str], np.ndarray]:
        """Return (ids, stored rows as a memory map). Raises PipelineError if they cannot be read or do not match."""
        path, identity = self._array(kind), self._identity()
        try:
            ids = path.with_suffix(".txt").read_bytes().decode(errors="surrogateescape").split("\n")[:-1]
            rows = mapped(path)
        except (OSError, ValueError) as error:
            raise PipelineError(f"{path} cannot be read ({error}): embed again with --overwrite") from None
        if rows.ndim != 2 or len(rows) != len(ids):
            raise PipelineError(f"{path} must have a row for each line of {kind}.txt: embed again with --overwrite")
        if identity and (rows.dtype.str, rows.shape[1]) != _layout(identity.form):
            raise PipelineError(
                f"{path} does not hold {identity.form} numbers, as {self._about.name} says: embed again with "
                "--overwrite"
            )
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


def _layout(form: Form) -> tuple[str, int]:
    """Return (numpy's name of the type, numbers in a row) of the array that stores vectors of a form."""
    return _DTYPES[form.kind], form.bytes if form.kind == "binary" else form.dimensions


def best(rows: np.ndarray, query: np.ndarray, top: int, form: Form) -> list[tuple[int, float]]:
    """Return (row, similarity) for the `top` stored rows most similar to the query (D,), most similar first.

    The query is a float32 unit vector for rows of any type: its own rounding would only add to the error.
    """
    if form.kind == "float32":
        similarities = rows @ query
    else:
        blocks = (rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK))
        similarities = np.concatenate([unpacked(block, form).numpy() @ query for block in blocks])
    return [(int(row), float(similarities[row])) for row in np.argsort(-similarities, kind="stable")[:top]]
