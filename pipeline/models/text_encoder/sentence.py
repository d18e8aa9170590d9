"""Trained sentence embedders in sentence-transformers' format, such as Qwen3-Embedding, E5-Mistral and BGE.

A folder has a transformer in transformers' format and these files:

    modules.json                        Transformer, Pooling, and any of Dense and Normalize, in this order
    1_Pooling/config.json               one pooling mode: mean, cls or lasttoken
    2_Dense/                            a linear layer with an activation
    sentence_bert_config.json           max_seq_length, do_lower_case
    config_sentence_transformers.json   prompts by name, such as query and document, and default_prompt_name

transformers' own model runs on padded texts, with the attention of its config: BERT both ways, a decoder causally
unless the config says otherwise.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Normalizers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from pipeline.data.batch import Encoded
from pipeline.errors import PipelineError, shown
from pipeline.models import loading
from pipeline.models.chunks import Packed, sent
from pipeline.models.files import fetched, read_json, read_tensors, survey, weight_files
from pipeline.models.sentence_transformers import FLAGS, MODULES, PROMPTS, READING, describes
from pipeline.models.text_encoder.processor import TextsAlone
from pipeline.models.text_encoder.templates import NONE
from pipeline.storage.documents import unique

Mode = Literal["mean", "cls", "last"]

_MODES: dict[str, Mode] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")  # classes of torch.nn
_DOCUMENT = ("document", "passage", "corpus")  # names of a document's prompt, the first found is used
_INPUT = "sentence_embedding"
_OFFSET = re.compile("roberta|camembert|mpnet")  # their positions begin after that of the padding token


@dataclass(frozen=True)
class Dense:
    """A linear layer on a pooled vector.  folder: that of its weights.  width: of its output."""

    folder: Path
    width: int
    bias: bool
    activation: str


@dataclass(frozen=True)
class SentenceFormat:
    """What a folder's files say beside the transformer.

    mode: of pooling.  with_prompt: whether the prompt's tokens are pooled.  after: the modules after pooling; None is
    normalisation.  prompt: the one for documents.  limits: maximum numbers of tokens.  lower: lowercase texts first.
    """

    folder: Path
    mode: Mode
    with_prompt: bool
    after: tuple[Dense | None, ...]
    prompt: str
    limits: tuple[int, ...]
    lower: bool

    @classmethod
    def load(cls, path: str) -> "SentenceFormat":
        """Read the files of a folder or hub name. Raises PipelineError for what is not supported."""
        folder = fetched(path, weights=False)
        modules = _modules(folder)
        names = [name for name, _ in modules]
        if names[:2] != ["Transformer", "Pooling"] or {"Transformer", "Pooling"} & {*names[2:]}:
            _refuse(
                folder / MODULES,
                f"its modules are {', '.join(names)}",
                "a Transformer, a Pooling, then any of Dense and Normalize",
            )
        if place := modules[0][1]:
            _refuse(
                folder / MODULES,
                f"its transformer is in {place}",
                "it in the folder itself: move its files up, and set its path to an empty string",
            )
        mode, with_prompt = _pooling(folder / modules[1][1] / "config.json")
        after = tuple(_after(name, folder / place) for name, place in modules[2:])
        limits, lower = _reading(folder / READING)
        return cls(folder, mode, with_prompt, after, _document_prompt(folder / PROMPTS), limits, lower)


def is_sentence_embedder(path: str, config: dict[str, Any]) -> bool:
    """Whether a folder or hub name is in sentence-transformers' format and embeds texts.  config: its config.json.

    A folder that this project marked as its own text encoder is not.
    """
    return describes(fetched(path, weights=False), config)


@dataclass(frozen=True)
class SentenceProcessor(TextsAlone):
    """Tokenizes texts with the tokenizer's own start and end tokens, as sentence-transformers does.

    max_tokens: at most the folder's own limit.  instruction: the prompt before each text, tokenized with it.
    pooled: whether its tokens are pooled.  end: an end token to append, () if the tokenizer does so itself.
    """

    tokenizer: Tokenizer
    max_tokens: int
    instruction: str
    pooled: bool
    end: tuple[int, ...] = ()

    template: ClassVar[str] = NONE

    @classmethod
    def load(cls, path: str, max_tokens: int) -> "SentenceProcessor":
        """Load from a folder or hub name."""
        files, config = SentenceFormat.load(path), load_config(path)
        tokenizer = loading.tokenizer(path, config.vocab_size)
        if files.lower:
            own = tokenizer.backend_tokenizer.normalizer
            tokenizer.backend_tokenizer.normalizer = Normalizers([Lowercase(), *([own] if own else [])])
        limits = [max_tokens, tokenizer.model_max_length, *files.limits]
        if positions := getattr(config, "max_position_embeddings", None):
            before = (config.pad_token_id or 0) + 1 if _OFFSET.search(config.model_type) else 0
            limits.append(positions - before)
        end = _missing_end(files.folder / "tokenizer_config.json", tokenizer)
        return cls(tokenizer, int(min(limits)), files.prompt, files.with_prompt, end)

    def tokenized(self, text: str, instruction: str = "") -> Encoded:
        """Encode a text with the prompt, cut to `max_tokens` with its end token kept.

        instruction: replaces the prompt, if it is not empty.
        """
        instruction = instruction or self.instruction
        ids = self._ids(instruction + text) or [self.tokenizer.eos_token_id or 0]
        skipped = 0 if self.pooled else self._length(instruction)
        return Encoded(np.array(ids, np.int32), skipped=min(skipped, len(ids) - 1))

    def _ids(self, text: str) -> list[int]:
        most = self.max_tokens - len(self.end)
        return [*self.tokenizer(text, truncation=True, max_length=most)["input_ids"], *self.end]

    def _length(self, instruction: str) -> int:
        """Return the number of tokens of a prompt, with the tokenizer's start tokens and without its end token."""
        if not instruction:
            return 0
        if instruction not in self._lengths:
            ids = self._ids(instruction)
            self._lengths[instruction] = len(ids) - (ids[-1] in self.tokenizer.all_special_ids)
        return self._lengths[instruction]

    @cached_property
    def _lengths(self) -> dict[str, int]:
        return {}


class SentenceEncoder(nn.Module):
    """Maps packed texts to unit vectors: transformer, pooling, then Dense layers and normalisation as stored.

    The vectors are unit vectors even if the folder has no Normalize module; only their direction is used.
    """

    always_with_images = False
    pads = True

    def __init__(self, transformer: PreTrainedModel, files: SentenceFormat) -> None:
        super().__init__()
        self.transformer, self.mode = transformer, files.mode
        width, self.after = int(transformer.config.hidden_size), nn.ModuleList()
        for part in files.after:
            if part is None:
                self.after.append(_Unit())
                continue
            self.after.append(nn.Sequential(_linear(part, width), getattr(nn, part.activation)()))
            width = part.width
        self.dimension = width

    @classmethod
    def load(cls, path: str, dtype: torch.dtype | Literal["auto"]) -> "SentenceEncoder":
        """Load from a folder or hub name.  dtype: of the transformer; the layers after it are in float32."""
        files, config = SentenceFormat.load(path), load_config(path)
        config.use_cache = False
        # BERT's pooler is not used, and some embedders come without its weights.
        transformer: PreTrainedModel = loading.open_model(
            AutoModel, path, config, dtype, attention=None, unused=("pooler.",)
        )
        return cls(transformer, files)

    def forward(self, packed: Packed, with_images: bool = False, features: None = None) -> torch.Tensor:
        """Map N packed texts to (N, dimension) float32 unit rows."""
        device = packed.input_ids.device
        lengths, skipped = (sent(torch.tensor(each), device) for each in (packed.lengths, packed.skipped))
        padding = self.transformer.config.pad_token_id or 0
        ids = pad_sequence(list(packed.input_ids.split(packed.lengths)), batch_first=True, padding_value=padding)
        places = torch.arange(ids.shape[1], device=device)
        filled = places < lengths[:, None]
        hidden = self.transformer(input_ids=ids, attention_mask=filled.long()).last_hidden_state
        rows = _pooled(hidden, places, lengths, skipped, self.mode)
        for layer in self.after:
            rows = layer(rows)
        return F.normalize(rows, dim=-1)


def _pooled(
    hidden: torch.Tensor, places: torch.Tensor, lengths: torch.Tensor, skipped: torch.Tensor, mode: Mode
) -> torch.Tensor:
    """Pool hidden (N, L, D), padded at the end, to (N, D) float32.

    places: 0 to L - 1.  lengths: tokens of each text.  skipped: tokens at its beginning that are not pooled.
    """
    if mode != "mean":
        place = lengths - 1 if mode == "last" else skipped
        return hidden[torch.arange(len(hidden), device=hidden.device), place].float()
    taken = ((places < lengths[:, None]) & (places >= skipped[:, None])).float()
    return torch.einsum("nld,nl->nd", hidden.float(), taken) / taken.sum(dim=1, keepdim=True)


class _Unit(nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return F.normalize(rows, dim=-1)


def load_config(path: str) -> PreTrainedConfig:
    """Return the transformer's config. Raises PipelineError for an encoder-decoder or a model of more than texts."""
    config: PreTrainedConfig = loading.config(path)
    parts = [name for name in type(config).sub_configs if re.search("text|vision|audio", name)]
    sizes = all(hasattr(config, name) for name in ("hidden_size", "vocab_size"))
    if config.is_encoder_decoder or parts or not sizes:
        raise PipelineError(
            f"{path} is a {config.model_type} model; a sentence embedder can be a text encoder such as bert, or a "
            "decoder such as qwen3, mistral or llama"
        )
    return config


def dimension_of(path: str) -> int:
    """Return the width of the vectors of a folder or hub name."""
    widths = [part.width for part in SentenceFormat.load(path).after if part]
    return widths[-1] if widths else int(load_config(path).hidden_size)


def check_folder(path: str) -> None:
    """Raise PipelineError if the folder or hub name is not supported, without loading its weights."""
    SentenceProcessor.load(path, max_tokens=64)
    loading.check_weights(str(fetched(path)), AutoModel, load_config(path))
    for part in SentenceFormat.load(path).after:
        if part:
            survey(part.folder, weight_files(part.folder))


def _refuse(file: Path, found: str, expected: str) -> NoReturn:
    raise PipelineError(f"{file}: {found}, which is not supported; expected {expected}")


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Return (class name, folder inside the model's) of each module."""
    file = folder / MODULES
    try:
        listed = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
        modules = [
            (str(module["type"]), str(module["path"])) for module in sorted(listed, key=lambda each: each["idx"])
        ]
    except OSError as error:
        raise PipelineError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise PipelineError(f"{file} is not a list of modules with idx, type and path: copy it again") from None
    found = []
    for kind, place in modules:
        name = kind.rpartition(".")[2]
        if not kind.startswith("sentence_transformers.") or name not in (
            "Transformer",
            "Pooling",
            "Dense",
            "Normalize",
        ):
            _refuse(
                file, f"it has a module {kind}", "Transformer, Pooling, Dense and Normalize of sentence_transformers"
            )
        if not re.fullmatch(r"[\w.-]*", place) or place.startswith("."):
            raise PipelineError(f"{file}: path={shown(place)} is no folder inside it: do not trust it")
        found.append((name, place))
    return found


def _pooling(file: Path) -> tuple[Mode, bool]:
    """Return the pooling mode, and whether the prompt's tokens are pooled."""
    values = read_json(file)
    modes = values.get("pooling_mode", [mode for flag, mode in FLAGS.items() if values.get(flag)] or "mean")
    if isinstance(modes, list) and len(modes) == 1:
        modes = modes[0]
    if not isinstance(modes, str) or modes not in _MODES:
        _refuse(file, f"its pooling mode is {shown(modes)}", f"one of {', '.join(_MODES)}")
    return _MODES[modes], bool(values.get("include_prompt", True))


def _of_vectors(file: Path, values: dict[str, Any]) -> None:
    for name in ("module_input_name", "module_output_name"):
        if (value := values.get(name)) not in (None, _INPUT):
            _refuse(file, f"{name} is {shown(value)}", _INPUT)


def _after(name: str, folder: Path) -> Dense | None:
    """Return a Dense module, or None for Normalize."""
    file = folder / "config.json"
    if name == "Normalize" and not file.is_file():  # earlier versions write none
        return None
    values = read_json(file)
    _of_vectors(file, values)
    return None if name == "Normalize" else _dense(file, values)


def _dense(file: Path, values: dict[str, Any]) -> Dense:
    package, _, activation = str(values.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")
    if not re.match(r"torch\.nn\b", package) or activation not in _ACTIVATIONS:
        _refuse(
            file,
            f"activation_function is {shown(values['activation_function'])}",
            f"torch.nn's {', '.join(_ACTIVATIONS)}",
        )
    if values.get("use_residual"):
        _refuse(file, "use_residual is true", "false")
    width = values.get("out_features")
    if isinstance(width, bool) or not isinstance(width, int) or not 0 < width < 2**20:
        raise PipelineError(f"{file}: out_features={shown(width)} is no width: copy it again")
    return Dense(file.parent, width, bool(values.get("bias", True)), activation)


def _linear(part: Dense, width: int) -> nn.Linear:
    """Return a Dense module's layer with its weights in float32. Raises PipelineError if they do not match."""
    files = weight_files(part.folder)
    survey(part.folder, files)
    layer, file = nn.Linear(width, part.width, part.bias), files[0]
    with loading.reading(file):
        layer.load_state_dict({name.removeprefix("linear."): weight for name, weight in read_tensors(file).items()})
    return layer


def _reading(file: Path) -> tuple[tuple[int, ...], bool]:
    """Return the maximum numbers of tokens, and whether texts are lowercased."""
    values = read_json(file) if file.is_file() else {}
    task = values.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        _refuse(file, f"transformer_task is {shown(task)}", "feature-extraction")
    texts = {"method": "forward", "method_output_name": "last_hidden_state"}
    if (modes := values.get("modality_config")) is not None and (
        not isinstance(modes, dict) or modes.get("text") != texts
    ):
        _refuse(file, f"modality_config is {shown(modes)}", f"text, with {texts}")
    for name in ("tokenizer_args", "processor_kwargs", "processing_kwargs", "config_args", "config_kwargs"):
        if values.get(name):
            _refuse(file, f"{name} is {shown(values[name])}", f"no {name}: write them into the files that they change")
    limits = [values[name] for name in ("max_seq_length", "document_length") if values.get(name) is not None]
    if any(isinstance(limit, bool) or not isinstance(limit, int) or limit < 1 for limit in limits):
        raise PipelineError(f"{file}: a length is {shown(limits)}, not a number of tokens: copy it again")
    return tuple(limits), bool(values.get("do_lower_case"))


def _missing_end(file: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the end token if tokenizer_config.json asks for it and tokenizer.json has none.

    transformers 5 follows tokenizer.json alone; earlier versions followed add_eos_token.
    """
    values = read_json(file) if file.is_file() else {}
    end = tokenizer.eos_token_id
    missing = values.get("add_eos_token") is True and end is not None and tokenizer("A cat")["input_ids"][-1] != end
    return (end,) if missing else ()


def _document_prompt(file: Path) -> str:
    """Return the prompt for documents, or else the default one; "" without either."""
    values = read_json(file) if file.is_file() else {}
    prompts, default = values.get("prompts") or {}, values.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str | None) for prompt in prompts.values()):
        raise PipelineError(f"{file}: prompts={shown(prompts)} is no object of texts: copy it again")
    names = (name for name in (*_DOCUMENT, default) if isinstance(name, str) and isinstance(prompts.get(name), str))
    name = next(names, None)
    if name is None and default is not None:
        raise PipelineError(f"{file}: default_prompt_name={shown(default)} is none of its prompts: copy it again")
    return "" if name is None else str(prompts[name])
