"""Fetch a model's files from the hub, and read them so that none can run code.

A missing, damaged or hostile file raises a PipelineError that names the file and says what to do.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.errors import PipelineError, first_few
from pipeline.models.sentence_transformers import MODULES, PROMPTS, READING
from pipeline.storage.documents import unique

# Configs, tokenizers and processors: the files besides the weights that a model's embeddings depend on.
SETTINGS = (".json", ".txt", ".model", ".jinja")

ADAPTERS = "adapter_model.safetensors"  # peft's weights

Tensors = dict[str, torch.Tensor]

_AGAIN = "copy or download it again"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_COUNTING = ("I64", "I32", "BOOL", torch.int64, torch.int32, torch.bool)  # of buffers such as position_ids


@dataclass(frozen=True)
class Stored:
    """A tensor as described by its file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: integers of a buffer


def fetched(path: str, *, weights: bool = True, adapters: bool = False) -> Path:
    """Return the local folder of a model, after a download for a hub name.  weights: whether weights are needed.

    adapters: whether adapters are wanted, not a model.

    Raises PipelineError if there is no such model, or adapters where a model is wanted and the other way round. If the
    hub is unreachable it fails at once, because `snapshot_download` does not retry.
    """
    folder = Path(path) if Path(path).is_dir() else _downloaded(path, weights)
    if (folder / "adapter_config.json").is_file() != adapters:
        if adapters:
            raise PipelineError(f"no adapters at {path!r}: it has no adapter_config.json")
        raise PipelineError(
            f"no model at {path!r}: it holds adapters (LoRA); merge them into their base model and name the result. Of "
            "VLM2Vec's, tools/convert_weights.py --adapters does it"
        )
    return folder


def _downloaded(path: str, weights: bool) -> Path:
    if Path(path).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise PipelineError(f"no model at {path!r}: there is no such folder")
    settings = [f"*{suffix}" for suffix in SETTINGS]
    try:
        folder = Path(snapshot_download(path, allow_patterns=[*settings, "*.safetensors"] if weights else settings))
        if weights and not any(folder.glob("*.safetensors")):  # some older models have only .bin files
            folder = Path(snapshot_download(path, allow_patterns=[*settings, "pytorch_model*.bin*"]))
        return folder
    except (OSError, ValueError) as error:
        raise PipelineError(f"no model at {path!r}: there is no such folder, and {_of_hub(error)}") from None


def _of_hub(error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return "the hub requires that you accept its terms: do so on its page, then run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or a private one: correct the name, or `hf auth login`"
    if isinstance(error, LocalEntryNotFoundError):
        offline = "may not be asked (HF_HUB_OFFLINE=1)" if constants.HF_HUB_OFFLINE else "cannot be reached from here"
        return f"the hub, whose cache here does not hold it, {offline}: name a folder, or see tools/offline.sh"
    return f"the hub says: {_line(error)}"


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in an untrusted JSON file. Raises PipelineError if it is not one."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except OSError as error:
        raise PipelineError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{file} is not JSON: {_damage(file, error)}") from None
    if not isinstance(values, dict):
        raise PipelineError(f"{file} is not a JSON object but a {type(values).__name__}: {_AGAIN}")
    return values


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _damage(file: Path, error: BaseException) -> str:
    try:
        with file.open("rb") as opened:
            begin = opened.read(200).strip()
    except OSError as why:
        return f"{why.strerror}"
    if not begin.strip(b"\0"):
        return f"it is empty; {_AGAIN}"
    if begin.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself; `git lfs pull` brings that"
    if begin.startswith(b"<"):
        return f"it is a web page, as a proxy or a log-in sends one, not the file; {_AGAIN}"
    return f"it is cut or damaged ({_line(error)}); {_AGAIN}"


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers would read; PipelineError if one is missing."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            files = [folder / name for name in sorted(set(_weight_map(index).values()))]
            if missing := [file.name for file in files if not file.is_file()]:
                raise PipelineError(f"{folder} lacks {first_few(missing)}, which {index.name} names: {_AGAIN}")
            return files
    raise PipelineError(
        f"{folder} has no weights: expected model.safetensors or pytorch_model.bin, or several files and their index"
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Return an index's tensor name -> file name; PipelineError if a file is outside the index's folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise PipelineError(f"{index} has no weight_map of file names by tensors' names: {_AGAIN}")
    suffix = index.suffixes[0]
    for name in sorted(set(weight_map.values())):
        if not re.fullmatch(r"[\w.-]+", name) or not name.endswith(suffix):
            raise PipelineError(f"{index} names {name!r}, which is no {suffix} file of its folder: do not trust it")
    return weight_map


def survey(folder: Path, files: list[Path] | None = None) -> dict[str, Stored]:
    """Return all tensors of a folder's weights by name. It reads the files' headers and some rows.

    files: the files to read; None reads those of `weight_files` and compares them with their index.

    Raises PipelineError if a file is missing, damaged, does not match its index, holds a duplicate or quantised tensor,
    could run code, or holds a layer (or embedding) whose matrices are all zero, as after a failed copy.
    """
    found: dict[str, Stored] = {}
    zeros: dict[str, bool] = {}  # layer or module -> whether all its matrices are zero; a single one is valid
    read = files or weight_files(folder)
    for file in read:
        for name, (shape, dtype, is_zero) in _header(file).items():
            if name in found:
                raise PipelineError(f"{name} is in {found[name].file} and in {file}: remove one of the two files")
            if dtype not in _DTYPES.values() and (dtype not in _COUNTING or name.endswith((".weight", ".bias"))):
                raise PipelineError(
                    f"{file}: {name} is {dtype}, of quantised weights: name a folder whose weights are float32, "
                    "float16 or bfloat16"
                )
            found[name] = Stored(file, shape, dtype if dtype in _DTYPES.values() else None)
            part = re.match(r".*?\.\d+(?=\.)|.+(?=\.weight$)", name)
            if part and len(shape) > 1:
                zeros[part[0]] = zeros.get(part[0], True) and is_zero
    if damaged := [part for part, is_zero in zeros.items() if is_zero]:
        raise PipelineError(
            f"{folder}: all weights of {first_few(damaged)} are zero, as a failed copy leaves them: {_AGAIN}"
        )
    for index in folder.glob("*.index.json") if files is None else ():
        for name, holder in _weight_map(index).items():
            if folder / holder in read and (name not in found or found[name].file.name != holder):
                raise PipelineError(f"{folder / holder} lacks {name}, which {index.name} says it holds: {_AGAIN}")
    return found


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], Any, bool]]:
    """Return tensor name -> (shape, dtype, whether it is a matrix of zeros)."""
    if file.suffix != ".safetensors":
        return {n: (tuple(t.shape), t.dtype, _is_zero(t, tuple(t.shape), t.dtype)) for n, t in _tensors(file).items()}
    try:
        found = {}
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                part = tensors.get_slice(name)
                shape, dtype = tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype())
                found[name] = shape, dtype, _is_zero(part, shape, dtype)
        return found
    except Exception as error:  # damaged files raise many kinds
        raise PipelineError(f"cannot read {file}: {_damage(file, error)}") from None


def _is_zero(tensor: Any, shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether a matrix, or its slice of a file, is all zeros. Three rows are read first, the rest only if needed."""
    if len(shape) < 2 or dtype not in _DTYPES.values():
        return False
    some_rows = (tensor[row : row + 1] for row in (0, shape[0] // 2, shape[0] - 1))
    return not any(rows.any() for rows in some_rows) and not tensor[:].any()


def read_tensors(file: Path) -> Tensors:
    """Return a file's tensors, memory-mapped where the format allows. Only tensors are unpickled.

    Raises PipelineError for a damaged file, and for NaN or infinity.
    """
    tensors = _tensors(file)
    for name, tensor in tensors.items():
        refuse_not_finite(file, name, tensor)
    return tensors


def _tensors(file: Path) -> Tensors:
    try:
        if file.suffix == ".safetensors":
            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except Exception as error:  # damaged files raise many kinds
        if "weights_only" in str(error) or "Unsupported" in str(error):
            why = "it is a pickle of more than tensors, which could run code; get the model as .safetensors"
        else:
            why = _damage(file, error)
        raise PipelineError(f"cannot read {file}: {why}") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise PipelineError(f"{file} is not a state dict (tensors by name): name a folder with the model's own weights")
    return tensors


def refuse_not_finite(where: str | Path, name: str, tensor: torch.Tensor) -> None:
    """Raise PipelineError for NaN or infinity in a weight."""
    # A sum takes an eighth of the time of isfinite and propagates NaN and infinity. It can overflow, so check again.
    if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise PipelineError(f"{where}: {name} has NaN or infinite weights: {_AGAIN}, or name an earlier checkpoint")


def refuse_more_layers(path: str, stored: dict[str, Stored], unexpected: set[str]) -> None:
    """Raise PipelineError if `unexpected` tensors, which the model did not load, belong to its modules or extra layers.

    Then the config is of another model. Heads, or the other tower of a CLIP, may be left out.
    """

    def numberless(name: str) -> str:
        return re.sub(r"\.\d+(?=\.)", ".#", name)

    read = {numberless(name) for name in stored.keys() - unexpected}
    modules = {name.rpartition(".")[0] for name in read} - {""}
    layers = tuple(found[0] for name in read if (found := re.match(r".*?\blayers\.#\.", name)))
    for name in sorted(unexpected):
        place = numberless(name)
        inside = place.rpartition(".")[0] in modules or place.startswith(layers)
        if inside and stored[name].dtype is not None and not name.endswith("inv_freq"):
            raise PipelineError(
                f"{path} holds {name}, which the model of its config.json lacks: is the file from another model?"
            )


def fingerprint(path: str | None, *, modules: bool = False) -> str | None:
    """Return the sha256 of a folder's config, tokenizer and weights, or None if `path` is not a folder.

    Of weights it reads the first 4 KiB of each tensor in .safetensors files, and only names and sizes of .bin files.
    modules: whether to include the modules of sentence-transformers, if the folder has any. They change a sentence
    embedder's vectors, and nothing of a model that training starts from.
    """
    if path is None or not (folder := Path(path)).is_dir():
        return None
    digest = hashlib.sha256()
    files = [folder / "config.json", folder / "tokenizer.json", *folder.glob("*.safetensors")]
    if modules and (folder / MODULES).is_file():
        files += [folder / name for name in (MODULES, PROMPTS, READING, "tokenizer_config.json")]
        files += [file for ending in ("json", "safetensors") for file in folder.glob(f"*/*.{ending}")]
    for file in sorted(files):
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            digest.update(file.read_bytes() if file.suffix == ".json" else _samples(file))
    for file in sorted(file for file in folder.glob("*.bin") if file.is_file()):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest()


def _samples(file: Path) -> bytes:
    """Return the header of a .safetensors file and the first 4 KiB of each tensor."""
    _header(file)  # raises if the file is damaged
    with file.open("rb") as opened:
        size = opened.read(8)
        header = opened.read(int.from_bytes(size, "little"))
        parts = [header]
        for name, tensor in sorted(json.loads(header).items()):
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                opened.seek(8 + len(header) + begin)
                parts.append(opened.read(min(end - begin, 4096)))
    return b"".join(parts)
