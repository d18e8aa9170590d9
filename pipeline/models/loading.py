"""Load a model's config, tokenizer, image processor and weights, each checked before use.

Any fault of a folder raises a PipelineError that names the file and says what to do. No code of a folder is run, and
transformers never prompts for permission to run it.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_backends import PilBackend
from transformers.initialization import no_init_weights
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipeline.errors import PipelineError, shown
from pipeline.models import released
from pipeline.models.files import fetched, read_json, refuse_more_layers, refuse_not_finite, survey

# The precisions by their names in recipes and options; "auto" is the stored one.
DTYPES: dict[str, torch.dtype | Literal["auto"]] = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}

IMAGES = "image_reading"  # the config's field for `model.images`
# Config fields that are ignored: they set how a model runs and where its files are, which this project decides. A named
# kernel would be downloaded and run; the number of labels could be arbitrarily large, but timm's is the dimension.
_NOT_ASKED = re.compile(
    r"_?(attn|experts)_implementation(_internal)?|_?name_or_path|_commit_hash|(use_)?return_dict|distributed_config|"
    "fusion_config|output_attentions|output_hidden_states|torchscript|transformers_weights"
)
_LABELS = ("id2label", "label2id", "num_labels")
# Config fields whose whole numbers are 1 or more: transformers checks their types, not their values.
_SIZES = re.compile(
    "(hidden|intermediate|vocab|projection|image|patch)_size|head_dim|projection_dim|max_position_embeddings|"
    "num_(hidden_layers|attention_heads|key_value_heads|channels|patches)"
)
_MOST, _MOST_LAYERS = 2**31 - 1, 10_000  # configs build lists with an item for each layer
_PARTS = ("text_config", "vision_config")
_TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.json", "vocab.txt", "tekken.json")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# The files that transformers reads beside the one that it was asked for.
_OTHERS = (
    "tokenizer.json",
    "vocab.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer_config.json",
    *_PROCESSORS,
    "generation_config.json",
)

Model = TypeVar("Model", bound=PreTrainedModel)
Config = TypeVar("Config", bound=PreTrainedConfig)


def config_dict(path: str) -> dict[str, Any]:
    """Return the config.json of a folder or hub name without ignored fields; PipelineError if there is no model.

    A published model in released.py gets the fields that its own code stands for.
    """
    file = fetched(path, weights=False) / "config.json"
    if not file.is_file():
        raise PipelineError(f"no model at {path!r}: it has no config.json")  # transformers would use its defaults
    values = read_json(file)
    if why := released.refusal(values):
        raise PipelineError(f"{file}: {why}")
    fields = released.fields_of(file.parent, values)
    values = {name: value for name, value in (values | fields).items() if name not in fields or value is not None}
    _refuse_code(file, values)
    for name in ("quantization_config", "compression_config"):
        if values.get(name) is not None:
            raise PipelineError(f"{file} has a {name}: quantised models are not supported; use the original model")
    if not isinstance(values.get("model_type"), str | None):
        raise PipelineError(f"{file}: model_type={shown(values['model_type'])} is not a string")
    return checked(file, values)


def _read(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises PipelineError if it names code to run."""
    values = read_json(file)
    _refuse_code(file, values)
    return values


def _refuse_code(file: Path, values: dict[str, Any]) -> None:
    for part in (values, *(part for part in values.values() if isinstance(part, dict))):
        if named := part.get("auto_map"):
            raise PipelineError(
                f"{file} has an auto_map ({shown(named)}): the model needs its own code, which this project does not "
                "run. Use a model that transformers itself implements; or, if transformers' own class computes the "
                "same, remove auto_map from the file"
            )


def checked(where: str | Path, values: dict[str, Any], section: str = "") -> dict[str, Any]:
    """Return a config's values without ignored fields; PipelineError for an impossible size.  where: for errors."""
    kept = {}
    for name, value in values.items():
        if _NOT_ASKED.fullmatch(name) or (name in _LABELS and "pretrained_cfg" not in values):
            continue
        most = _MOST_LAYERS if name == "num_hidden_layers" else _MOST
        if _SIZES.fullmatch(name) and isinstance(value, int) and not 1 <= value <= most:
            raise PipelineError(f"{where}: {section}{name}={value} must be a whole number of 1 to {most:,}")
        if name.endswith(("_eps", "_epsilon")) and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise PipelineError(f"{where}: {section}{name}={shown(value)} must be a number above 0")
        nested = name in _PARTS and isinstance(value, dict)
        kept[name] = checked(where, value, f"{name}.") if nested else value
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
        if section in _PARTS and not isinstance(values.get(section), dict):
            found = shown(values[section]) if section in values else "missing"
            raise PipelineError(f"{file}: {section} is {found}, and not a part of the model: name a whole model")
    if kind.base_config_key and isinstance(values.get(kind.base_config_key), dict):
        values = values[kind.base_config_key]
    with reading(file):
        return kind.from_dict(values)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Convert any error of a library into a PipelineError about the first damaged JSON file, or else about `file`."""
    try:
        yield
    except (PipelineError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # panics in the Rust code of tokenizers are not Exceptions
        for other in (file, *(file.parent / name for name in _OTHERS)):
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
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        _read(settings)
    main = folder / ("tokenizer.json" if (folder / "tokenizer.json").is_file() else "vocab.json")
    with reading(main):
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
    """Return the image processor of a folder or hub name.  kind: its class.  fields: values that replace its own."""
    folder = fetched(path, weights=False)
    files = [folder / name for name in _PROCESSORS if (folder / name).is_file()]
    values, missing = [_read(file) for file in files], folder / _PROCESSORS[0]
    # processor_config.json may hold the image processor, or only what combines it with the tokenizer.
    if not (missing in files or any("image_processor" in each for each in values)):
        raise PipelineError(f"no image processor at {path!r}: {missing} is missing; copy it from the model")
    with reading(files[0]):
        its: Any = kind.from_pretrained(folder, local_files_only=True, **fields)
        mean, std = list(its.image_mean), list(its.image_std)
        numbers = np.isfinite([*mean, *std, its.rescale_factor, its.resample]).all()
    if not (numbers and len(mean) == len(std) == 3 and min(std) > 0):
        raise PipelineError(
            f"{files[0]}: image_mean={shown(mean)}, image_std={shown(std)}, rescale_factor={its.rescale_factor} and "
            f"resample={its.resample} make no picture: copy or download it again"
        )
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
    unused: tuple[str, ...] = (),
) -> Model:
    """Return the model of a folder or hub name, on the CPU.

    dtype: "auto" is the stored one.  attention: transformers' name for it; None uses the config's.
    check: is called with (path, config) after the config is known to match the weights.
    unused: prefixes of weights that may be missing, because nothing depends on them.
    Raises PipelineError if weights are damaged, missing, left over, of another shape, or not finite.
    """
    folder = fetched(path)
    check_weights(str(folder), kind, config)
    if check:
        check(path, config)
    stored = survey(folder)
    with reading(next(iter(stored.values())).file):
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
        raise PipelineError(f"{path}: {name} has shape {list(found)}, but its config needs {list(expected)}")
    if missing := sorted(name for name in loaded["missing_keys"] if not name.startswith(unused)):
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
    return recorded(path, IMAGES, ("upright", "as_stored"), images)


def recorded(path: str | None, name: str, known: tuple[str, str], given: str | None = None) -> str:
    """Return the value of the field `name` that this project adds to a model's config; the first of `known` by default.

    path, given: as in `image_reading`.  Raises PipelineError for a value that is not known.
    """
    value = given or (known[0] if path is None else config_dict(path).get(name, known[0]))
    if value not in known:
        raise PipelineError(f"{path}: its config has {name}={value!r}; it can be {' or '.join(known)}")
    return str(value)


def reads_as_stored(path: str, images: str | None = None) -> bool:
    """Whether `image_reading` is `as_stored`."""
    return image_reading(path, images) == "as_stored"


def refuse_unknown(name: str, given: dict[str, Any], config: PreTrainedConfig) -> None:
    """Raise PipelineError for a field of model.architecture.NAME that the config lacks, or a value that it rejects.

    name: "vision" or "text", which must have vocab_size.
    """
    known = config.to_dict()
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise PipelineError(f"unknown field model.architecture.{name}.{key}{hint}")
    checked(f"model.architecture.{name}", given)
    try:
        type(config)(**{key: value for key, value in given.items() if key != "model_type"})
    except Exception as error:  # each config class validates in its own way
        why = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise PipelineError(f"model.architecture.{name}: {why}") from None
    if name == "text" and "vocab_size" not in given:
        raise PipelineError("model.architecture.text.vocab_size is missing: the size of the tokenizer to train")
