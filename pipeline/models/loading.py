"""Load a model's config, tokenizer, image processor and weights, each checked before use.

Any fault of a folder raises a PipelineError that names the file and says what to do. No code of a folder is run, and
transformers never prompts for permission to run it.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_backends import PilBackend
from transformers.initialization import no_init_weights
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipeline.errors import PipelineError, shown
from pipeline.models.files import fetched, read_json, refuse_more_layers, refuse_not_finite, survey

# The precisions by their names in recipes and options; "auto" is the stored one.
DTYPES: dict[str, torch.dtype | Literal["auto"]] = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}

IMAGES = "image_reading"  # the config's field for `model.images`
_STORED_DTYPES = ("float32", "float16", "bfloat16", "float64")
# Config fields that are ignored: they set how a model runs and where its files are, which this project decides. A named
# kernel would be downloaded and run; the number of labels could be arbitrarily large.
_NOT_ASKED = (
    "_attn_implementation",
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation",
    "_experts_implementation_internal",
    "_name_or_path",
    "attn_implementation",
    "distributed_config",
    "experts_implementation",
    "fusion_config",
    "id2label",
    "label2id",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torchscript",
    "transformers_weights",
    "use_return_dict",
)
_MOST = 2**31 - 1
# Config fields that are whole numbers, and their maximum; null is valid for those in _NULLABLE.
_WHOLE = {
    "hidden_size": _MOST,
    "intermediate_size": _MOST,
    "num_hidden_layers": 10_000,  # configs build lists of this length
    "num_attention_heads": _MOST,
    "vocab_size": _MOST,
    "max_position_embeddings": _MOST,
    "image_size": 2**16,
    "patch_size": 2**16,
    "num_channels": 2**16,
    "num_patches": _MOST,
    "projection_dim": _MOST,
    "projection_size": _MOST,
    "num_key_value_heads": _MOST,
    "head_dim": _MOST,
}
_NULLABLE = ("num_key_value_heads", "head_dim", "projection_dim", "projection_size", "intermediate_size", "num_patches")
# Config fields that are numbers above 0.
_POSITIVE = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "factor")
_SECTIONS = ("text_config", "vision_config", "rope_parameters", "rope_scaling")
_TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.json", "vocab.txt", "tekken.json")

Model = TypeVar("Model", bound=PreTrainedModel)
Config = TypeVar("Config", bound=PreTrainedConfig)


def config_dict(path: str) -> dict[str, Any]:
    """Return the config.json of a folder or hub name without ignored fields; PipelineError if there is no model."""
    folder = fetched(path, weights=False)
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise PipelineError(
                f"no model at {path!r}: it holds adapters (LoRA); merge them into their base model and use that"
            )
        raise PipelineError(f"no model at {path!r}: it has no config.json")  # transformers would use its defaults
    values = read_json(file)
    _refuse_code(file, values)
    for name in ("quantization_config", "compression_config"):
        if values.get(name) is not None:
            raise PipelineError(f"{file} has a {name}: quantised models are not supported; use the original model")
    if not isinstance(values.get("model_type"), str | None):
        raise PipelineError(f"{file}: model_type={shown(values['model_type'])} is not a string")
    if not isinstance(values.get("architectures"), list | None):
        raise PipelineError(f"{file}: architectures={shown(values['architectures'])} is not a list of names")
    return checked(file, values)


def _refuse_code(file: Path, values: dict[str, Any]) -> None:
    for part in (values, *(part for part in values.values() if isinstance(part, dict))):
        if named := part.get("auto_map"):
            raise PipelineError(
                f"{file} has an auto_map ({shown(named)}): the model needs its own code, which this project does not "
                "run. Use a model that transformers itself implements; or, if transformers' own class computes the "
                "same, remove auto_map from the file"
            )


def checked(file: Path, values: dict[str, Any], section: str = "") -> dict[str, Any]:
    """Return a config's values without ignored fields; PipelineError for an impossible number."""

    def refuse(name: str, expected: str) -> None:
        raise PipelineError(f"{file}: {section}{name}={shown(values[name])} must be {expected}: is the file damaged?")

    kept = {}
    for name, value in values.items():
        if name in _NOT_ASKED and not ("pretrained_cfg" in values and name in ("num_labels", "id2label", "label2id")):
            continue
        if name in _WHOLE and not isinstance(value, list) and not (value is None and name in _NULLABLE):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _WHOLE[name]:
                refuse(name, f"a whole number of 1 to {_WHOLE[name]:,}")
        elif name in _POSITIVE and not (isinstance(value, list) or (value is None and "rope_" in section + name)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                refuse(name, "a number above 0")
        elif name in ("torch_dtype", "dtype") and value is not None:
            if str(value).removeprefix("torch.") not in _STORED_DTYPES:
                refuse(name, f"one of {', '.join(_STORED_DTYPES)}")
        elif name in _SECTIONS or "rope_" in section:
            value = checked(file, value, f"{section}{name}.") if isinstance(value, dict) else value
        kept[name] = value
    return kept


def config(path: str, kind: type[Config] | None = None) -> Config:
    """Return the config of a folder or hub name.

    kind: the config class, of a model or a part of one; None chooses it by model_type. The caller has already checked
    with `config_dict` that the model is of this class.
    """
    values, file = config_dict(path), fetched(path, weights=False) / "config.json"
    if kind is None:
        if (name := values.get("model_type")) not in CONFIG_MAPPING:
            raise PipelineError(f"{file}: model_type={name!r} is not a model type of the installed transformers")
        with reading(file):
            if name == "mistral" and "layer_types" in values:  # as in AutoConfig
                name = "ministral"
            kind = cast(type[Config], CONFIG_MAPPING[str(name)])
    for section in kind.sub_configs:
        if section in _SECTIONS and not isinstance(values.get(section), dict):
            found = shown(values[section]) if section in values else "missing"
            raise PipelineError(f"{file}: {section} is {found}, and not a part of the model: name a whole model")
    if kind.base_config_key and isinstance(values.get(kind.base_config_key), dict):
        values = values[kind.base_config_key]
    with reading(file):
        return cast(Config, deepcopy(_made(kind, json.dumps(values))))  # type: ignore[arg-type]  # classes are hashable


@lru_cache(maxsize=16)
def _made(kind: type[PreTrainedConfig], values: str) -> PreTrainedConfig:
    """Build a config, cached: transformers takes 40 ms to validate a model of several parts."""
    return kind.from_dict(json.loads(values))


@contextmanager
def reading(file: Path, *others: Path) -> Iterator[None]:
    """Convert any error of a library into a PipelineError about the first damaged JSON file, or else about `file`."""
    try:
        yield
    except (PipelineError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # panics in the Rust code of tokenizers are not Exceptions
        for other in (file, *others):
            if other.suffix == ".json" and other.is_file():
                read_json(other)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        said = lines[0] if len(lines) == 1 or not lines[0].endswith(":") else " ".join(lines[:2])
        if "trust_remote_code" in str(error) or "huggingface.co" in str(error):
            said = "transformers cannot read it"
        raise PipelineError(
            f"{file} cannot be used: {said[:300]}; is the file damaged, or of another version? Copy or download it "
            "again, or name another model"
        ) from error


def tokenizer(
    path: str, rows: int | None = None, kind: type[PreTrainedTokenizerBase] | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub name.

    rows: of the embedding matrix, to check token ids against.  kind: its class; None lets transformers choose.
    """
    folder = fetched(path, weights=False)
    if not any(file.is_file() for pattern in _TOKENIZERS for file in folder.glob(pattern)):
        raise PipelineError(f"{folder} has no tokenizer: expected tokenizer.json; copy it from where the model is from")
    names = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
    files = [folder / name for name in names if (folder / name).is_file()]
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        _refuse_code(settings, read_json(settings))
    main = next((file for file in files if file.name in ("tokenizer.json", "vocab.json")), folder / "tokenizer.json")
    with reading(main, *files):
        if kind:
            found = kind.from_pretrained(folder, local_files_only=True)
        else:
            its: PreTrainedConfig = config(path)
            its.name_or_path = path  # transformers recognises some models by their hub names
            found = AutoTokenizer.from_pretrained(folder, config=its, trust_remote_code=False, local_files_only=True)
        ids = found("A cat and 2 dogs", add_special_tokens=False)["input_ids"]
        vocabulary = found.get_vocab()
    if not ids or all(token == found.unk_token_id for token in ids):
        raise PipelineError(f"{main}: its tokenizer encodes no letters: it is damaged; copy or download it again")
    last = max(vocabulary, key=vocabulary.get)
    if rows is not None and (vocabulary[last] >= rows or max(ids) >= rows):
        raise PipelineError(
            f"{main} has token {vocabulary[last]} ({shown(last)}), and the model's embedding {rows:,} rows "
            "(vocab_size in config.json): the tokenizer is of another model, or has tokens that the model was not given"
        )
    return found


def image_processor(path: str, kind: type[PilBackend], **fields: Any) -> Any:
    """Return the image processor of a folder or hub name.  kind: its class.  fields: override its own."""
    folder = fetched(path, weights=False)
    names = ("preprocessor_config.json", "processor_config.json")
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files:
        raise PipelineError(f"no image processor at {path!r}: {folder / names[0]} is missing; copy it from the model")
    for file in files:
        _refuse_code(file, read_json(file))

    def require(right: bool, name: str, value: Any) -> None:
        if not right:
            value = list(value) if isinstance(value, tuple) else value
            raise PipelineError(f"{files[0]}: {name}={shown(value)} makes no picture: copy or download it again")

    with reading(files[0], *files):
        its: Any = kind.from_pretrained(folder, local_files_only=True, **fields)
    sides = [side for size in (its.size, its.crop_size) if size for side in dict(size).values() if side is not None]
    for side in sides:
        require(isinstance(side, int) and 0 < side <= _WHOLE["image_size"], "size", side)
    for name, least in (("image_mean", -math.inf), ("image_std", 0)):
        value = getattr(its, name)
        numbers = isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value)
        right = numbers and len(value) == 3 and all(least < v < math.inf for v in value)
        require(right or not its.do_normalize, name, value)
    scale = its.rescale_factor
    require(isinstance(scale, int | float) and 0 < scale < math.inf, "rescale_factor", scale)
    require(its.resample in range(6), "resample", its.resample)
    return its


def check_weights(path: str, kind: type[PreTrainedModel | _BaseAutoModelClass], config: PreTrainedConfig) -> None:
    """Raise PipelineError if a folder's weights, by their files' headers, cannot match its config.

    It compares the number of weights before memory of that size is allocated. A hub name is checked when opened.
    """
    if not Path(path).is_dir():
        return
    stored = survey(Path(path))
    held = sum(math.prod(tensor.shape) for tensor in stored.values())
    with reading(Path(path, "config.json")), no_init_weights(), torch.device("meta"):
        make = kind.from_config if issubclass(kind, _BaseAutoModelClass) else kind._from_config
        wanted = sum(parameter.numel() for parameter in make(deepcopy(config)).parameters())
    if wanted > 2 * held + 10**6:
        raise PipelineError(
            f"{path}: by its config.json the model has {wanted:,} weights, and its files hold {held:,}: they "
            "are not of one model"
        )


def open_model(
    kind: type[Model] | type[_BaseAutoModelClass],
    path: str,
    config: Config,
    dtype: torch.dtype | Literal["auto"],
    attention: str | None = "sdpa",
    check: Callable[[str, Config], None] | None = None,
) -> Model:
    """Return the model of a folder or hub name, on the CPU.

    dtype: "auto" is the stored one.  attention: transformers' name for it; None uses the config's.
    check: is called with (path, config) after the config is known to match the weights.
    Raises PipelineError if weights are damaged, missing, left over, of another shape, or not finite.
    """
    folder = fetched(path)
    check_weights(str(folder), kind, config)
    if check:
        check(path, config)
    stored = survey(folder)
    with reading(next(iter(stored.values())).file, folder / "generation_config.json"):
        read = cast(Callable[..., tuple[Model, dict[str, Any]]], kind.from_pretrained)  # (model, loading info)
        model, loaded = read(
            str(folder),
            config=config,
            dtype=dtype,
            **({"attn_implementation": attention} if attention else {}),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
            trust_remote_code=False,
            local_files_only=True,
            weights_only=True,
        )
    for name, found, expected in sorted(loaded["mismatched_keys"]):
        raise PipelineError(f"{path}: {name} is {list(found)}, but by its config {list(expected)}")
    if missing := sorted(loaded["missing_keys"]):
        raise PipelineError(f"{path} lacks {len(missing)} of the model's weights, {missing[0]} the first")
    refuse_more_layers(path, stored, set(loaded["unexpected_keys"]))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        refuse_not_finite(path, name, tensor.data)
    return model


def image_reading(path: str | None, images: str | None = None) -> str:
    """Return how a model reads images, `upright` or `as_stored`; see `rgb`.

    path: folder or hub name, or None for a model whose config does not say.  images: a recipe's value, which overrides
    the config's.
    """
    images = images or ("upright" if path is None else config_dict(path).get(IMAGES, "upright"))
    if images not in ("upright", "as_stored"):
        raise PipelineError(f"{path}: its config has {IMAGES}={images!r}; it can be upright or as_stored")
    return images


def reads_as_stored(path: str, images: str | None = None) -> bool:
    """Whether `image_reading` is `as_stored`."""
    return image_reading(path, images) == "as_stored"


def refuse_unknown(name: str, given: dict[str, Any], config: PreTrainedConfig) -> None:
    """Raise PipelineError for a field of model.architecture.NAME that the config lacks, or a value that it rejects."""
    known = config.to_dict()
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise PipelineError(f"unknown field model.architecture.{name}.{key}{hint}")
        if key.endswith(("size", "layers", "heads", "channels")) and isinstance(given[key], int) and given[key] < 1:
            raise PipelineError(f"model.architecture.{name}.{key} is {given[key]}: give a positive number")
    try:
        type(config)(**{key: value for key, value in given.items() if key != "model_type"})
    except Exception as error:  # each config class validates in its own way
        why = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise PipelineError(f"model.architecture.{name}: {why}") from None


def require_vocabulary(text: dict[str, Any]) -> None:
    """Raise PipelineError if model.architecture.text lacks the size of the tokenizer to train."""
    if "vocab_size" not in text:
        raise PipelineError("model.architecture.text.vocab_size is missing: the size of the tokenizer to train")
