"""Merge models of one architecture into one: each weight is a mean of theirs, or lies on the arc between two.

Model soups (arXiv 2203.05482) and WiSE-FT (2109.01903) average the weights of models fine-tuned from one model. The arc
between each two tensors (slerp; Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985): two tensors of
equal norm keep it, while a mean of two unlike directions is shorter. It is taken as mergekit takes it (2403.13257), for
each tensor as one vector.

Blocks of tensors are in memory, never a model. Headers, settings and buffers are compared before anything is written.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from pipeline.errors import PipelineError, disk_errors
from pipeline.models import released
from pipeline.models.alike import differences, files_of, settings_of
from pipeline.models.files import SETTINGS, fetched, fingerprint, read_json, survey, weight_files
from pipeline.models.folder import SIZES, finish, smaller_vectors, without_smaller_vectors, write_card
from pipeline.models.registry import family_of
from pipeline.models.tensor_files import WEIGHTS, Place, places_in, rounded, write_tensors
from pipeline.progress import progress_bar
from pipeline.storage.atomic import remove_leftovers, replacing

Method = Literal["mean", "slerp"]
Name = tuple[str, str]  # file of its own, or folder of weights, inside the model's folder; and the tensor's name

_PARALLEL = 0.9995  # the cosine from which on slerp is the mean, as in mergekit
_MAIN = ("model.safetensors", "pytorch_model.bin")
_FORMATS = (".safetensors", ".bin")
_COMPUTED = ("position_ids", "inv_freq")  # buffers that models compute, and that earlier versions stored
_DTYPES = {"bf16": ("BF16", "bfloat16"), "fp32": ("F32", "float32")}  # names in a header, and in a config


@dataclass(frozen=True)
class Part:
    """A model to merge.  path: as given.  weight: its share of the sum of all parts' weights."""

    path: str
    weight: float = 1.0

    @cached_property
    def folder(self) -> Path:
        return _folder_of(self.path)

    @cached_property
    def places(self) -> dict[Name, Place]:
        return _places_of(self.folder)

    @cached_property
    def settings(self) -> dict[str, Any]:
        return settings_of(self.folder)

    @cached_property
    def card(self) -> str:
        file = self.folder / "README.md"
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def merge(
    parts: Sequence[Part], out: Path, method: Method = "mean", dtype: str = "auto", overwrite: bool = False
) -> int:
    """Write the merged model of two or more parts to the folder `out`, and return its number of weights.

    method: "mean" is the weighted mean of each weight, computed in float64 and rounded once. "slerp" is for two parts.
    dtype: of the merged weights, "bf16" or "fp32"; "auto": that of the first part.

    Files besides the weights are those of the first part; only the note of the sizes to which vectors can be cut is
    left out unless all parts have it. Raises PipelineError, and writes nothing, for parts whose tensors, configs,
    tokenizers or other settings differ, and for a value that is too large for its dtype.
    """
    _check_request(parts, out, method, overwrite)
    for part in parts[1:]:
        _require_alike(parts[0], part)
    _require_equal_buffers(parts)
    remove_leftovers(out.parent, out.name)
    with disk_errors(out), replacing(out) as partial:
        _copy_settings(parts[0].folder, partial)
        files: dict[Path, dict[str, Name]] = {}
        for name, place in parts[0].places.items():
            files.setdefault(place.file, {})[name[1]] = name
        total = sum(place.bytes for part in parts for place in part.places.values())
        with progress_bar(total=total, desc="merging", unit="B", unit_scale=True) as bar:
            for file, names in files.items():
                _write(file, names, parts, method, dtype, partial / file.relative_to(parts[0].folder), bar)
        for index in files_of(parts[0].folder, ".json"):
            if index.name.endswith(".safetensors.index.json"):
                _write_index(index, partial / index.relative_to(parts[0].folder))
        for config in files_of(partial, ".json"):
            if config.name == "config.json" and "model_type" in (values := read_json(config)):
                source = parts[0].folder / config.parent.relative_to(partial)
                finish(config.parent, released.fields_of(source, values) | _retyped(values, dtype))
        if not (agree := _sizes_agree(parts)):
            finish(partial, {SIZES: None})
        _write_card(parts, method, partial, sizes=agree)
    return sum(place.count for place in parts[0].places.values())


def _check_request(parts: Sequence[Part], out: Path, method: Method, overwrite: bool) -> None:
    if len(parts) < 2 or (method == "slerp" and len(parts) != 2):
        wanted = "exactly two" if method == "slerp" else "two or more"
        raise PipelineError(f"{method} merges {wanted} models, and {len(parts)} are given")
    for part in parts:
        if not 0 < part.weight < math.inf:
            raise PipelineError(f"the weight of {part.path} is {part.weight:g}; it must be above 0")
        if any(place in out.resolve().parents for place in _real_folders(part)):
            raise PipelineError(f"{out} is inside {part.path}, which is to be merged: name another folder")
    if not out.exists():
        return
    if not overwrite:
        raise PipelineError(f"{out} is there already: add --overwrite, name another folder, or delete it")
    if not (out / "config.json").is_file():
        raise PipelineError(f"{out} is there already and holds no model to overwrite: name another folder")
    for part in parts:
        if any(place.is_relative_to(out.resolve()) for place in _real_folders(part)):
            raise PipelineError(f"{out} holds {part.path}, which is to be merged: name another folder")


def _real_folders(part: Part) -> set[Path]:
    """Return the folders of a part's files, without links."""
    return {part.folder.resolve(), *(file.parent.resolve() for file in files_of(part.folder, *SETTINGS, *_FORMATS))}


def _folder_of(path: str) -> Path:
    """Return the folder of a model: a folder, a run directory's export, or a hub name's files."""
    folder = Path(path)
    if (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file():
        if not (folder / "export").is_dir():
            raise PipelineError(f"{path} has no export yet: python -m pipeline.export {path} OUT; then name OUT")
        return folder / "export"
    run = folder.parent.parent
    if folder.parent.name == "checkpoints" and (run / "recipe.yaml").is_file():
        step = int(number[0]) if (number := re.search(r"\d+$", folder.name)) else "N"
        raise PipelineError(
            f"{path} is a checkpoint of training, without what it did not train: python -m pipeline.export {run} OUT "
            f"--step {step}; then name OUT"
        )
    if family := family_of(path):
        family.dimension(path)  # raises the family's own errors
        return family.folder(path)
    return fetched(path)


def _places_of(folder: Path) -> dict[Name, Place]:
    """Return all tensors of a folder and of those inside it. Raises PipelineError for damaged or pickled weights."""
    found: dict[Name, Place] = {}
    inside = {file.parent for file in files_of(folder, *_FORMATS, ".json")} - {folder}
    for place in (folder, *sorted(inside)):
        main = [name for name in _MAIN if any((place / f"{name}{end}").is_file() for end in ("", ".index.json"))]
        files = weight_files(place) if main or place == folder else []
        if pickled := [file for file in files if file.suffix != ".safetensors"]:
            raise PipelineError(
                f"{pickled[0]} is a pickle, which is not read in parts: load the model with transformers, save it with "
                "save_pretrained, which writes .safetensors, and name that folder"
            )
        if files:
            survey(place)
        group = str(place.relative_to(folder))
        found |= {(group, name): each for file in files for name, each in places_in(file)[0].items()}
        for file in sorted({*place.glob("*.safetensors")} - {*files}):
            survey(place, [file])
            group = str(file.relative_to(folder))
            found |= {(group, name): each for name, each in places_in(file)[0].items()}
    return found


def _require_alike(first: Part, other: Part) -> None:
    """Raise PipelineError that names the first differences of two parts."""
    said = differences(first.settings, other.settings)
    for name in sorted(first.places.keys() | other.places.keys()):
        one, two = first.places.get(name), other.places.get(name)
        if one and two:
            if one.shape != two.shape:
                said.append(f"{_shown(name)} has shape {list(one.shape)} and {list(two.shape)}")
            elif (one.kind in WEIGHTS) != (two.kind in WEIGHTS):
                said.append(f"{_shown(name)} is {one.kind} and {two.kind}")
        elif not name[1].endswith(_COMPUTED):
            said.append(f"{_shown(name)} is only in {first.path if one else other.path}")
    if said:
        more = f"; and {len(said) - 3} more" if len(said) > 3 else ""
        raise PipelineError(
            f"{first.path} and {other.path} are not alike: {'; '.join(said[:3])}{more}. Only models of one "
            "architecture that read their input alike can be merged"
        )


def _require_equal_buffers(parts: Sequence[Part]) -> None:
    for name, place in parts[0].places.items():
        if place.kind in WEIGHTS:
            continue
        for other in parts[1:]:
            if there := other.places.get(name):
                blocks = zip(place.blocks(name[1]), there.blocks(name[1]), strict=True)
                if not all(torch.equal(one, two) for one, two in blocks):
                    raise PipelineError(
                        f"{_shown(name)} of {parts[0].path} and {other.path} differ, and have no mean: they are "
                        f"{place.kind}, no weights"
                    )


def _shown(name: Name) -> str:
    return name[1] if name[0] == "." else f"{name[0]}: {name[1]}"


def _write(
    file: Path, names: dict[str, Name], parts: Sequence[Part], method: Method, dtype: str, target: Path, bar: tqdm
) -> None:
    """Write the merged tensors of one file of the first part."""
    places, metadata = places_in(file)
    held = {name: [part.places[named] for part in parts if named in part.places] for name, named in names.items()}
    # The others are buffers, which are equal or not in all parts.
    meant = {name for name in names if places[name].kind in WEIGHTS and len(held[name]) == len(parts)}
    kinds = {name: _DTYPES[dtype][0] if name in meant and dtype != "auto" else places[name].kind for name in names}

    def blocks() -> Iterator[torch.Tensor]:
        weights = [part.weight for part in parts]
        for name, kind in kinds.items():
            if name in meant:
                for block in _merged(name, held[name], weights, method, WEIGHTS[kind]):
                    _refuse_overflow(_shown(names[name]), block)
                    yield block
            else:
                yield from places[name].blocks(name)
            bar.update(sum(place.bytes for place in held[name]))

    target.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(target, {name: (kind, places[name].shape) for name, kind in kinds.items()}, blocks(), metadata)


def _refuse_overflow(name: str, block: torch.Tensor) -> None:
    """Raise PipelineError if a merged block, of finite values before it was rounded, has an infinite one."""
    # As in `refuse_not_finite`: a sum is faster, and may overflow itself.
    if not block.sum().isfinite() and not block.isfinite().all():
        dtype = str(block.dtype).removeprefix("torch.")
        remedy = "leave out the part with such weights" if dtype == "float32" else "give --dtype fp32"
        raise PipelineError(f"{name} overflows {dtype}: {remedy}")


def _merged(
    name: str, places: Sequence[Place], weights: Sequence[float], method: Method, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """Yield the merged blocks of a tensor, computed in float64 and rounded once."""
    arc = _arc(name, places, weights) if method == "slerp" else None
    factors, divisor = arc or weights, 1.0 if arc else sum(weights)
    for blocks in zip(*(place.blocks(name) for place in places), strict=True):
        total = torch.zeros(len(blocks[0]), dtype=torch.float64)
        for block, factor in zip(blocks, factors, strict=True):
            total += block.double().mul_(factor)  # a fused multiply-add would round as the processor has one or not
        yield rounded(total.div_(divisor), dtype)


def _arc(name: str, places: Sequence[Place], weights: Sequence[float]) -> tuple[float, float] | None:
    """Return slerp's factors of two tensors; None where it is the mean: a zero tensor, or directions nearly parallel.

    With the angle w between the tensors as vectors, and t the second's share: sin((1 - t) w) / sin w, sin(t w) / sin w.
    """
    sums = []
    for blocks in zip(*(place.blocks(name) for place in places), strict=True):
        one, two = (block.double().numpy() for block in blocks)
        # numpy adds in an order that does not depend on threads, unlike torch and BLAS.
        sums.append([float(np.add.reduce(product)) for product in (one * two, one * one, two * two)])
    dot, *squares = (math.fsum(column) for column in zip(*sums, strict=True))
    norms = math.sqrt(squares[0]) * math.sqrt(squares[1])
    if norms == 0 or abs(cosine := dot / norms) > _PARALLEL:
        return None
    angle, share = math.acos(cosine), weights[1] / sum(weights)
    return math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)


def _copy_settings(source: Path, folder: Path) -> None:
    """Copy configs, tokenizers, processors and cards, and no code."""
    for file in files_of(source, *SETTINGS, ".tiktoken", ".md"):
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _write_index(index: Path, target: Path) -> None:
    """Write an index with the size of the merged files."""
    values = read_json(index)
    files = {target.parent / name for name in values["weight_map"].values()}
    size = sum(place.bytes for file in files for place in places_in(file)[0].values())
    metadata = values.get("metadata") or {}
    if metadata.get("total_size", size) != size:
        values["metadata"] = metadata | {"total_size": size}
        target.write_text(json.dumps(values, indent=2) + "\n")


def _retyped(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return the fields of a config that change with the weights' dtype."""
    if dtype == "auto":
        return {}
    name = _DTYPES[dtype][1]

    def changed(values: dict[str, Any]) -> dict[str, Any]:
        own = {field: name for field in ("dtype", "torch_dtype") if values.get(field)}
        nested = {field: value | changed(value) for field, value in values.items() if isinstance(value, dict)}
        return {field: value for field, value in (nested | own).items() if value != values.get(field)}

    return changed(config) | {"dtype": name}


def _sizes_agree(parts: Sequence[Part]) -> bool:
    """Return whether all parts have the same note of smaller vectors, in config.json and on their cards."""
    notes = [(read_json(part.folder / "config.json").get(SIZES), smaller_vectors(part.card)) for part in parts]
    return all(note == notes[0] for note in notes)


def _write_card(parts: Sequence[Part], method: Method, folder: Path, *, sizes: bool) -> None:
    """Write the card, with the first part's own.  sizes: whether its section on smaller vectors is true of the result.

    The licence is named if all parts have it.
    """
    total = sum(part.weight for part in parts)
    rows = [
        {
            "path": part.path,
            "share": f"{part.weight / total:.4g}",
            "fingerprint": fingerprint(str(part.folder), modules=True),
        }
        for part in parts
    ]
    heads, bodies = zip(*(_parted(part.card) for part in parts), strict=True)
    licences = [re.findall(r"^license(?:_name|_link)?: *\S.*$", head, re.MULTILINE) for head in heads]
    write_card(
        folder,
        Path(__file__).with_name("merged.md.jinja"),
        parts=rows,
        method=method,
        body=(bodies[0] if sizes else without_smaller_vectors(bodies[0])).strip(),
        on_hub=[part.path for part in parts if not Path(part.path).exists()],
        licence=licences[0] if all(each == licences[0] for each in licences) else [],
    )


def _parted(card: str) -> tuple[str, str]:
    """Return a card's fields, which are YAML, and its text."""
    found = re.match(r"---\n(.*?\n)---\n", card, flags=re.DOTALL)
    return (found[1], card[found.end() :]) if found else ("", card)
