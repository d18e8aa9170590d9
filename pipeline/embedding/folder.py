"""A folder of embeddings: KIND.npy (N, D), KIND.txt with an id a line, and embeddings.json, which names the model."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.data.index import NO_ARRAY
from pipeline.errors import PipelineError
from pipeline.storage.documents import DocumentError, parse_json

KINDS = ("texts", "images", "videos")


@dataclass(frozen=True)
class Identity:
    """Which model made embeddings. fingerprint: of its files, wherever they lie."""

    model: str
    dimension: int
    fingerprint: str


@dataclass(frozen=True)
class Store:
    """A folder of embeddings, all of one model.

    Of a kind, KIND.npy is put in place last: where it is, KIND.txt and embeddings.json are those that belong to it.
    """

    folder: Path

    def kinds(self) -> list[str]:
        return [kind for kind in KINDS if self._array(kind).exists()]

    def check(self, model: str, fingerprint: str, written: Iterable[str], overwrite: bool) -> None:
        """Raise PipelineError if a call that writes these kinds would overwrite some unasked, or mix two models."""
        there = self.kinds()
        if (again := [str(self._array(kind)) for kind in there if kind in written]) and not overwrite:
            raise PipelineError(f"{', '.join(again)}: there already; add --overwrite, or choose another --out")
        if not (kept := [kind for kind in there if kind not in written]):
            return
        if (made := self._identity()) is None:
            raise PipelineError(f"{self._about} does not say which model made {', '.join(kept)}: embed them again")
        if made.fingerprint != fingerprint:
            theirs = f"{model} before its files changed" if made.model == model else f"{made.model}, not of {model}"
            raise PipelineError(
                f"{self.folder} holds {', '.join(kept)} of {theirs}: embed them again in one call with --overwrite, or "
                "choose another --out"
            )

    def write(self, kind: str, ids: Sequence[str], rows: Iterable[torch.Tensor], identity: Identity) -> None:
        """Write parts (n, D) of the kind's rows, one row an id in all, as they come."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._array(kind).with_suffix(".npy.unfinished")
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(ids), identity.dimension)}
        try:
            with unfinished.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for part in rows:
                    file.write(part.numpy().astype("<f4").tobytes())
            made = self._identity()
            # Where another model made them, none may stay; `check` saw to it that each is made anew.
            for stale in [kind] if made and made.fingerprint == identity.fingerprint else KINDS:
                self._array(stale).unlink(missing_ok=True)
            lines = "".join(f"{each}\n" for each in ids).encode(errors="surrogateescape")  # a path may not be UTF-8
            _replace(self.folder / f"{kind}.txt", lines)
            _replace(self._about, (json.dumps(vars(identity), indent=1) + "\n").encode())
            unfinished.replace(self._array(kind))
        finally:
            unfinished.unlink(missing_ok=True)

    def read(self, kind: str) -> tuple[list[str], np.ndarray]:
        """(ids, rows (N, D), mapped into memory)."""
        path = self._array(kind)
        try:
            ids = path.with_suffix(".txt").read_bytes().decode(errors="surrogateescape").split("\n")[:-1]
            rows = mapped(path)
        except (OSError, ValueError) as error:
            raise PipelineError(f"{path} cannot be read ({error}): embed again with --overwrite") from None
        if rows.ndim != 2 or len(rows) != len(ids):
            raise PipelineError(f"{path} has not a row for each line of {kind}.txt: embed again with --overwrite")
        return ids, rows

    def _array(self, kind: str) -> Path:
        return self.folder / f"{kind}.npy"

    @property
    def _about(self) -> Path:
        return self.folder / "embeddings.json"

    def _identity(self) -> Identity | None:
        """None where there is none that can be read."""
        try:
            return parse_json(self._about.read_bytes(), str(self._about), Identity, remedy="")
        except (OSError, DocumentError):
            return None


def mapped(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped into memory; ValueError or OSError for what is none or not whole."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except NO_ARRAY as error:
        raise ValueError(str(error)) from None


def _replace(path: Path, data: bytes) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def best(rows: np.ndarray, query: np.ndarray, top: int) -> list[tuple[int, float]]:
    """The `top` rows of (N, D) most similar to the query (D,), the best first: (row, similarity)."""
    similarities = rows @ query
    return [(int(row), float(similarities[row])) for row in np.argsort(-similarities, kind="stable")[:top]]
