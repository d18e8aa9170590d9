"""Compare the folders of two models: whether a weight of one means the same in the other."""

import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers.image_processing_backends import PilBackend

from pipeline.errors import PipelineError, shown
from pipeline.models import loading
from pipeline.models.files import SETTINGS, read_json
from pipeline.models.sentence_transformers import MODULES, PROMPTS, READING, describes
from pipeline.storage.documents import unique

# Fields in which models that are alike may differ: versions, places, how weights are stored and how they began.
_FREE = {
    "dtype",
    "torch_dtype",
    "transformers_version",
    "__version__",
    "_name_or_path",
    "architectures",  # the names of the tensors are compared
    "use_cache",
    "matryoshka_dimensions",  # the tensors are the same at all sizes; see `folder.note_sizes`
    "initializer_range",
    "initializer_factor",
    "logit_scale_init_value",
    "pruned_heads",  # see `folder.finish`
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
}
_EARLIER = {"rope_theta", "rope_scaling", "partial_rotary_factor"}  # the same as rope_parameters: see `folder.finish`
# Beside a model: hidden, of its training, in other formats.
_ELSE = re.compile(r"\..*|checkpoint.*|onnx|openvino|runs|trainer_state\.json|.*_results\.json")
_MODULE = re.compile(r"\d+_[A-Za-z]+")  # a folder of one of sentence-transformers' modules
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_IMAGES = ("preprocessor_config.json", "processor_config.json")
# Files of which nothing changes an embedding, or which are compared as the tokenizer loads them.
_UNREAD = {"generation_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", *_TOKENIZER}


def files_of(folder: Path, *suffixes: str) -> list[Path]:
    """Return a model's files with these suffixes, in its folder and those inside that are part of the model.

    A folder inside may be a link, as that of a text encoder which several models share.
    """
    found = []
    for name, inside, files in os.walk(folder, followlinks=True):
        place, whole = Path(name), Path(name).absolute()
        above = {each.resolve() for each in (whole, *whole.parents)}  # a link to one of these would have no end
        inside[:] = [each for each in inside if not _ELSE.fullmatch(each) and (place / each).resolve() not in above]
        found += [place / each for each in files if not _ELSE.fullmatch(each)]
    return sorted(file for file in found if file.suffix in suffixes and file.is_file())


def settings_of(folder: Path) -> dict[str, Any]:
    """Return what is compared of a model besides its weights, by "FILE: FIELD": all fields of its JSON files.

    Configs, tokenizers and image processors are read as the installed transformers reads them, which gives fields that
    a file lacks their defaults. Fields that change no embedding are left out; so are files that only the tokenizer
    reads, such as vocab.txt, chat templates, and files for sentence-transformers that this project does not follow.
    Raises PipelineError for a damaged file.
    """
    found: dict[str, Any] = {}
    places = sorted({file.parent for file in files_of(folder, *SETTINGS)})
    unread = [place for place in places if not _follows_modules(place)]
    for place in places:
        if place.parent in unread and _MODULE.fullmatch(place.name):
            continue
        where = "" if place == folder else f"{place.relative_to(folder)}/"
        for name, values in _documents(place):
            free = () if name in _TOKENIZER else _FREE  # a token can have any name
            if not (place in unread and name in (MODULES, PROMPTS, READING)):
                found |= {f"{where}{name}: {field}": value for field, value in _flat(values, free)}
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return in what two results of `settings_of` differ, "FIELD is ... and ..."."""
    said = []
    for field in sorted(one.keys() | other.keys()):
        values = [shown(each[field]) if field in each else "missing" for each in (one, other)]
        if field not in one or field not in other or one[field] != other[field]:
            said.append(f"{field} is {values[0]} and {values[1]}")
    return said


def _follows_modules(place: Path) -> bool:
    config = place / "config.json"
    return config.is_file() and describes(place, read_json(config))


def _documents(place: Path) -> Iterator[tuple[str, Any]]:
    if any((place / name).is_file() for name in _TOKENIZER):
        yield "tokenizer.json", _tokenizer(str(place))
    if any((place / name).is_file() for name in _IMAGES):
        yield _IMAGES[0], loading.image_processor(str(place), _kind(place)).to_dict()
    for file in files_of(place, ".json"):
        if file.parent != place or file.name in (*_UNREAD, *_IMAGES) or file.name.endswith(".index.json"):
            continue
        if file.name == "config.json" and "model_type" in read_json(file):
            yield file.name, loading.config(str(place)).to_dict()
        else:
            yield file.name, _parsed(file)


def _kind(place: Path) -> type[PilBackend]:
    """Return the class of an image processor, which has the defaults of the fields that earlier versions left out."""
    values = read_json(next(place / name for name in _IMAGES if (place / name).is_file()))
    values = values.get("image_processor", values)
    named = str(values.get("image_processor_type") or values.get("feature_extractor_type"))
    name = re.sub("(FeatureExtractor|ImageProcessor)(Fast|Pil)?$", "ImageProcessorPil", named)
    kind = getattr(transformers, name, None) if name.endswith("ImageProcessorPil") else None
    return kind if isinstance(kind, type) and issubclass(kind, PilBackend) else PilBackend


def _tokenizer(path: str) -> dict[str, Any]:
    found = loading.tokenizer(path)
    backend = getattr(found, "backend_tokenizer", None)
    stages = json.loads(backend.to_str()) if backend else {"model": found.get_vocab()}
    marks = {name: str(value) for name, value in found.special_tokens_map.items()}
    # Each text is cut by this project itself, and none is padded by the tokenizer.
    kept = {name: value for name, value in stages.items() if name not in ("truncation", "padding", "version")}
    return kept | {"model_max_length": found.model_max_length, "special": marks}


def _parsed(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except OSError as error:
        raise PipelineError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise PipelineError(f"{file} is not JSON: copy or download it again") from None


def _flat(values: Any, free: Collection[str], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of all fields but the `free` ones."""
    if not isinstance(values, dict) or not values:
        yield before or "its content", values
        return
    for name, value in values.items():
        if name not in free and not (name in _EARLIER and "rope_parameters" in values):
            yield from _flat(value, free, f"{before}.{name}" if before else str(name))
