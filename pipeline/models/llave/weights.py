"""Convert between original LLaVE checkpoints and Hugging Face folders, one weight file at a time.

One file is in memory at a time, and only tensors are unpickled. original.py describes the original format.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from transformers import LlavaOnevisionConfig, LlavaOnevisionModel

from pipeline.errors import PipelineError, first_few
from pipeline.models import loading
from pipeline.models.converted import converted_once
from pipeline.models.files import Stored, Tensors, fetched, read_tensors, survey, weight_files
from pipeline.models.folder import finish
from pipeline.models.llave import checks
from pipeline.models.llave.checks import load_config, text_of, vision_of
from pipeline.models.llave.model import save_image_processor
from pipeline.models.llave.original import (
    CHOICES,
    SO400M,
    TEXT,
    VISION,
    config_from,
    is_original,
    marked_tokenizer,
    readings,
)
from pipeline.models.llave.processor import MARKS
from pipeline.models.loading import IMAGES, reading
from pipeline.progress import progress_bar
from pipeline.storage import lock
from pipeline.storage.atomic import remove_leftovers, replacing

# Prefixes of the original's tensor names, and those that transformers saves. The first match applies.
_PREFIXES = (
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("model.", "language_model."),
)
_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def resolve(path: str, cache: Path) -> str:
    """Return a folder or hub name for `Llave.load`: `path`, or the folder in `cache` with the converted original.

    An original is converted once, and again if the size or time of one of its files changes, or the hub's commit.
    Raises InUse while another process converts.
    """
    if not is_original(path):
        return path
    source = fetched(path)
    former = cache / f"{Path(path).resolve().name}-{_stamp(source)}"  # of a snapshot's copy, in runs that have one
    converted = former if former.exists() else cache / _copy_name(source)
    if not converted.exists():
        with lock.held([str(cache)]):
            remove_leftovers(cache)
            if not converted.exists():
                with replacing(converted, durable=False, keep=True) as partial:
                    convert_original(source, partial)
    return str(converted)


def opened(path: str) -> Path:
    """Return the folder for `Llave.load`: the model's own, or that of an original's copy, which any process may make.

    Raises PipelineError as `convert_original` and `converted_once` do.
    """
    source = fetched(path)
    if not is_original(source):
        return source
    size = sum(file.stat().st_size for file in weight_files(source))
    return converted_once(_copy_name(source), size, lambda folder: convert_original(source, folder))


def _copy_name(source: Path) -> str:
    """Return the name of a copy's folder in the cache: it has the hub's commit, or else the stamp."""
    source = source.resolve()
    repository = source.parent.parent.name
    # .../models--OWNER--NAME/snapshots/COMMIT, to which files may be added later. Other folders' files may change.
    if (
        source.parent.name == "snapshots"
        and repository.startswith("models--")
        and re.fullmatch("[0-9a-f]{40}", source.name)
    ):
        return f"{repository.rpartition('--')[2]}-{source.name[:16]}"
    return f"{source.name}-{_stamp(source)}"


def _stamp(source: Path) -> str:
    """Return a hash of the names, sizes and times of a folder's files."""
    files = [
        (str(file), file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(source.resolve().iterdir())
        if file.exists()
    ]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def convert_original(source: Path, folder: Path) -> None:
    """Convert an original checkpoint into a new folder in transformers' format, file by file and without rounding.

    The language model's head is dropped. The tower has one layer fewer than its config says: the original drops it, so
    the checkpoint lacks its tensors. The embedding gets rows of zeros for the image and video marks if it lacks them.
    config.json is written last: a folder without it is incomplete.

    Raises PipelineError for another LLaVA's config, missing, unknown or misshapen tensors, unreadable files, or if
    `folder` exists.
    """
    if not is_original(source):
        raise PipelineError(f"{source} is not an original checkpoint: its config.json is not of a {checks.ORIGINAL}")
    config = config_from(source)
    text = text_of(config)
    files, stored = weight_files(source), survey(source)
    _check(source, config, {name: tensor for name, tensor in stored.items() if name != _LM_HEAD}, _original)
    rows = text.vocab_size
    tokenizer = marked_tokenizer(source, config)

    def renamed(tensors: Tensors) -> Tensors:
        tensors.pop(_LM_HEAD, None)
        if _EMBEDDING in tensors and rows < text.vocab_size:
            padding = 0, 0, 0, text.vocab_size - rows
            tensors[_EMBEDDING] = torch.nn.functional.pad(tensors[_EMBEDDING], padding)
        return {_transformers(name): tensor for name, tensor in tensors.items()}

    _new_folder(folder)
    _rewrite(files, folder, renamed)
    tokenizer.save_pretrained(folder)
    save_image_processor(config, folder)
    config.dtype = stored[_EMBEDDING].dtype  # taken as the whole model's
    config.save_pretrained(folder)
    finish(folder, readings(source))


def export_original(folder: Path, out: Path) -> None:
    """Convert a folder that `save_folder` wrote into an original checkpoint in the new folder `out`.

    The LM head is a copy of the embedding. vision_config.json counts the layer that the original drops, which has no
    tensors, as in original checkpoints.

    Raises PipelineError as `convert_original` does.
    """
    config = load_config(str(folder))
    text, vision = text_of(config), vision_of(config)
    rope = cast(dict[str, Any], text.rope_parameters)
    if rope["rope_type"] != "default" or text.use_sliding_window:
        raise PipelineError(f"{folder}: the original format has plain rotary embeddings and full attention only")
    files, stored = weight_files(folder), survey(folder)
    _check(folder, config, stored)

    def renamed(tensors: Tensors) -> Tensors:
        tensors = {_original(name): tensor for name, tensor in tensors.items()}
        if _EMBEDDING in tensors:
            tensors[_LM_HEAD] = tensors[_EMBEDDING].clone()
        return tensors

    _new_folder(out)
    _rewrite(files, out, renamed)
    loading.tokenizer(str(folder)).save_pretrained(out)
    tower = {name: getattr(vision, name) for name in VISION}
    tower |= {"model_type": "siglip_vision_model", "num_hidden_layers": vision.num_hidden_layers + 1}
    _write_json(out / "vision_config.json", tower)
    original = {
        "architectures": [checks.ORIGINAL],
        "model_type": "llava_qwen",
        **{name: getattr(text, name) for name in TEXT},
        "rope_theta": rope["rope_theta"],
        "torch_dtype": str(stored[_transformers(_EMBEDDING)].dtype).removeprefix("torch."),
        **{name: value for name, (value, _) in CHOICES.items()},
        "use_mm_proj": True,
        "mm_use_im_patch_token": False,
        "mm_hidden_size": vision.hidden_size,
        "mm_vision_tower": f"google/{SO400M}",
        # Without mm_vision_tower in this list the original reads the tower from the hub, not from the checkpoint.
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_newline_position": checks.newline_position(config),
        "image_aspect_ratio": config.vision_aspect_ratio,
        "image_grid_pinpoints": [[width, height] for height, width in checks.pinpoints_of(config)],
        "tokenizer_model_max_length": text.max_position_embeddings,
        "tokenizer_padding_side": "right",
        **{name: value for name in (IMAGES, MARKS) if (value := getattr(config, name, None))},
    }
    _write_json(out / "config.json", original)
    finish(out)


def _check(
    source: Path, config: LlavaOnevisionConfig, found: dict[str, Stored], renamed: Callable[[str], str] = str
) -> None:
    """Raise PipelineError if the tensors are not those of the config's model.  renamed: changes expected names."""
    with reading(source / "config.json"), torch.device("meta"):
        model = LlavaOnevisionModel(config)
    expected = {renamed(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if missing := sorted(expected.keys() - found.keys()):
        raise PipelineError(f"{source} lacks {len(missing)} of the model's tensors: {first_few(missing)}")
    if unknown := sorted(found.keys() - expected.keys()):
        raise PipelineError(f"{source} has {len(unknown)} tensors that are not of this model: {first_few(unknown)}")
    for name, tensor in found.items():
        if tensor.shape != expected[name]:
            raise PipelineError(
                f"{source}: {name} has shape {list(tensor.shape)}, but its config needs {list(expected[name])}"
            )


def _transformers(name: str) -> str:
    theirs, ours = next(pair for pair in _PREFIXES if name.startswith(pair[0]))
    return ours + name.removeprefix(theirs)


def _original(name: str) -> str:
    theirs, ours = next(pair for pair in _PREFIXES if name.startswith(pair[1]))
    return theirs + name.removeprefix(ours)


def _rewrite(files: list[Path], folder: Path, renamed: Callable[[Tensors], Tensors]) -> None:
    """Write a .safetensors file with `renamed` tensors for each file, and an index if there are several."""
    weight_map: dict[str, str] = {}
    total = 0
    size = sum(file.stat().st_size for file in files)
    with progress_bar(total=size, desc="converting", unit="B", unit_scale=True) as bar:
        for number, file in enumerate(files, 1):
            single = len(files) == 1
            name = "model.safetensors" if single else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            tensors = {key: tensor.contiguous() for key, tensor in renamed(read_tensors(file)).items()}
            save_file(tensors, folder / name, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
            del tensors  # before the next file is mapped
            bar.update(file.stat().st_size)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _new_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise PipelineError(f"{folder} is there already; name a new folder or remove it") from None


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")
