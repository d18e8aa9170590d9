"""A decoder such as Llama or Qwen2 as a text encoder, with bidirectional attention and mean pooling."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, Qwen2Tokenizer
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipeline.errors import PipelineError
from pipeline.models import loading
from pipeline.models.attention import PackingModel, Segments, implementation
from pipeline.models.chunks import Chunk, Packed, pack, sent
from pipeline.models.flops import StepFlops, Tower, attention_width, known
from pipeline.models.folder import finish, write_card
from pipeline.models.lean import keep_less
from pipeline.models.loading import refuse_unknown
from pipeline.models.packing import check_packing
from pipeline.models.text_encoder import sentence_files
from pipeline.models.text_encoder.processor import SETTINGS, Settings, TextProcessor, load_config, require_decoder
from pipeline.models.text_encoder.templates import SEPARATOR, TEMPLATES


class TextEncoder(PackingModel, nn.Module):
    """Maps packed texts to unit vectors as in LLM2Vec (arXiv 2404.05961) and LLM2CLIP (2411.04997).

    language_model: a decoder without its LM head.
    """

    always_with_images = False

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        keep_less(language_model)
        self.language_model = language_model

    @classmethod
    def load(cls, path: str, dtype: torch.dtype | Literal["auto"], attention: str = "sdpa") -> "TextEncoder":
        """Load from a folder or hub name.  dtype: "auto" is the stored one.  attention: see attention.py."""
        attention = implementation(attention)
        return cls(loading.open_model(AutoModel, path, load_config(path), dtype, attention, check))

    @classmethod
    def empty(cls, path: str, attention: str) -> "TextEncoder":
        """Build the model that `load` returns, without loading weights."""
        return cls.of_config(load_config(path), attention)

    @classmethod
    def of_config(cls, config: PreTrainedConfig, attention: str = "sdpa") -> "TextEncoder":
        return cls(AutoModel.from_config(config, attn_implementation=implementation(attention)))

    def forward(self, packed: Packed, with_images: bool = False, features: None = None) -> torch.Tensor:
        """Map N packed texts to (N, hidden) float32 unit rows, the normalised means of their last hidden states.

        The first `packed.skipped` tokens of each text, those of the instruction, are excluded from pooling.
        """
        hidden = self.language_model(
            input_ids=packed.input_ids[None],
            position_ids=packed.positions,
            segments=Segments(packed.lengths, packed.input_ids.device, causal=False),
            use_cache=False,
        ).last_hidden_state[0]
        return pooled(hidden, packed.lengths, packed.skipped)


def step_flops(model: nn.Module) -> StepFlops | None:
    """Return what counts the FLOPs of a TextEncoder or SentenceEncoder; None if they are unknown."""
    transformer = cast(PreTrainedModel, model.language_model if isinstance(model, TextEncoder) else model.transformer)
    if not known(transformer):
        return None
    tower = Tower.of(transformer, attention_width(transformer.config))
    return lambda items, _: sum(tower.flops(len(item.input_ids)) for item in items)


def pooled(hidden: torch.Tensor, lengths: tuple[int, ...], skipped: tuple[int, ...]) -> torch.Tensor:
    """Pool hidden (T, D) to (N, D) float32 unit rows: each item's normalised mean, without its first `skipped` rows."""
    counts, first = torch.tensor(lengths), torch.tensor(skipped)
    owner = torch.arange(len(lengths)).repeat_interleave(counts)
    place = torch.arange(len(owner)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    taken = (place >= first.repeat_interleave(counts)).nonzero()[:, 0]
    sums = hidden.new_zeros(len(lengths), hidden.shape[1], dtype=torch.float32)
    owner, taken = sent(owner[taken], hidden.device), sent(taken, hidden.device)
    sums = sums.index_add(0, owner, hidden[taken].float())
    return F.normalize(sums, dim=-1)  # sum and mean have the same direction


class FrozenTextEncoder:
    """A text encoder whose vectors are another model's input: see `chunks.Frozen`."""

    reads_tiles: ClassVar[bool] = False

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model.eval().requires_grad_(False).to(device), device

    @torch.no_grad()
    def features_of(self, chunk: Chunk, packed: Packed) -> torch.Tensor | None:
        """Return (texts, width) float32 unit rows for the chunk's texts in their order; None if it has no text."""
        texts = [item for item in chunk.items if not item.images]
        return cast(torch.Tensor, self.model(pack(texts).to(self.device))) if texts else None


def check(path: str, config: PreTrainedConfig) -> None:
    """Raise PipelineError if a decoder does not keep packed texts independent.  path: for errors."""
    check_packing(path, config, TextEncoder.of_config)


def check_folder(path: str, kind: type[_BaseAutoModelClass] = AutoModel, template: str | None = None) -> None:
    """Raise PipelineError if the decoder at a folder or hub name cannot be a text encoder.

    kind: see `build`.  template: see `TextProcessor.load`.
    """
    config = load_config(path)
    loading.check_weights(path, kind, config)
    check(path, config)
    TextProcessor.load(path, 0, template=template)


def random_config(text: dict[str, Any]) -> PreTrainedConfig:
    """Return the config of model.architecture.text. Raises PipelineError for an unknown model_type or field."""
    kind = text.get("model_type", "qwen2")
    if kind not in CONFIG_MAPPING:
        raise PipelineError(f"model.architecture.text.model_type={kind} is no model that transformers has")
    config = CONFIG_MAPPING[kind]
    refuse_unknown("text", text, config())
    made = config(**{name: value for name, value in text.items() if name != "model_type"})
    require_decoder("model.architecture.text", made)
    check("model.architecture.text", made)
    return made


def build(
    text: dict[str, Any],
    texts: Iterable[str],
    seed: int,
    folder: Path,
    kind: type[_BaseAutoModelClass] = AutoModel,
) -> None:
    """Write a folder with a decoder of random weights and a tokenizer trained on `texts`.

    kind: AutoModelForCausalLM adds an LM head.
    """
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, int(text["vocab_size"]), show_progress=False)
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = random_config(text | tokens | {"vocab_size": len(tokenizer)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save(
    model: TextEncoder,
    weights: dict[str, torch.Tensor],
    source: str,
    folder: Path,
    base: str | None,
    settings: Settings,
) -> None:
    """Write `weights` (the model's parameters by name) as a folder in transformers' format, with a model card.

    source: folder or hub name of the tokenizer.  base: the model that training started from; the card names it if it is
    on the hub.  settings: how the model was trained to embed a text.
    """
    own = {name.removeprefix("language_model."): weight for name, weight in weights.items()}
    model.language_model.save_pretrained(folder, state_dict=own)
    tokenizer = loading.tokenizer(source)
    tokenizer.save_pretrained(folder)
    processor, template = TextProcessor(tokenizer, 0), TEMPLATES.get(settings.template)
    before = processor.start if template else processor.before(settings.instruction)
    finish(folder, {"is_causal": False, SETTINGS: settings.stored()})
    alike = sentence_files.write(folder, model.dimension, settings)
    names = {"instruction": settings.instruction, "before": before, "turn": template, "separator": SEPARATOR}
    write_card(folder, Path(__file__).with_name("card.md.jinja"), base, **names, alike=alike, prompted=bool(before))
