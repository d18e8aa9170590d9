"""The text encoder compared with formulas in float64, and its attention pattern."""

import copy
import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close_in_norm
from pydantic import ValidationError
from sections import section
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from pipeline.config import EvaluationRun, load_recipe
from pipeline.data.batch import Encoded
from pipeline.data.sample import Item, Pair
from pipeline.data.shards import write_shards
from pipeline.embedding.dataset import open_datasets
from pipeline.embedding.embedder import Embedder
from pipeline.errors import PipelineError
from pipeline.evaluation.encoders import load_encoder
from pipeline.models.attention import KINDS, Segments
from pipeline.models.chunks import pack
from pipeline.models.llm2clip import model as llm2clip
from pipeline.models.llm2clip.model import Llm2Clip, TextAdapter
from pipeline.models.registry import saved, training
from pipeline.models.text_encoder import model as decoder
from pipeline.models.text_encoder.model import TextEncoder, pooled
from pipeline.models.text_encoder.processor import Settings, TextProcessor
from pipeline.models.text_encoder.templates import SEPARATOR
from pipeline.models.vision import VisionEncoder

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


@pytest.fixture(params=[(LlamaConfig, LlamaModel), (Qwen2Config, Qwen2Model)], ids=["llama", "qwen2"])
def encoder(request) -> TextEncoder:
    config, model = request.param
    torch.manual_seed(0)
    return TextEncoder(model._from_config(config(**SIZES), attn_implementation="packed_sdpa")).eval()


def texts(*lengths: int) -> list[Encoded]:
    generator = np.random.default_rng(0)
    return [Encoded(generator.integers(0, 50, length).astype(np.int32)) for length in lengths]


@torch.no_grad()
def test_packed_embeddings_match_single_texts_and_transformers(encoder):
    items, skipped = texts(5, 1, 9, 3), (2, 0, 4, 0)
    items = [replace(item, skipped=first) for item, first in zip(items, skipped, strict=True)]
    rows = encoder(pack(items))
    config = copy.deepcopy(encoder.language_model.config)
    config.is_causal = False
    plain = type(encoder.language_model)._from_config(config, attn_implementation="eager").eval()
    plain.load_state_dict(encoder.language_model.state_dict())
    for row, item, first in zip(rows, items, skipped, strict=True):
        ids = torch.from_numpy(item.input_ids).long()[None]
        hidden = plain(input_ids=ids, use_cache=False).last_hidden_state[0]
        assert_close_in_norm(row, F.normalize(hidden[first:].mean(0), dim=0))
        assert_close_in_norm(row, encoder(pack([item]))[0])


@torch.no_grad()
def test_attention_is_bidirectional_and_only_within_a_text(encoder):
    items = texts(6, 4)

    def hidden(items: list[Encoded]) -> torch.Tensor:
        packed, kept = pack(items), []
        encoder.language_model.norm.register_forward_hook(lambda *given: kept.append(given[2][0]), always_call=True)
        encoder(packed)
        return kept[-1]

    before = hidden(items)
    changed = items[0].input_ids.copy()
    changed[-1] = (changed[-1] + 1) % 50
    after = hidden([Encoded(changed), items[1]])
    moved = (before - after).abs().amax(dim=1)
    assert (moved[:6] > 1e-6).all()
    assert (moved[6:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("others", "told"), [({"softcap": 50.0}, "a cap on"), ({"sliding_window": 8}, "beyond 8 tokens")]
)
def test_unsupported_attention_options_are_refused(kind, others, told):
    states = torch.zeros(1, 2, 12, 4)
    segments = Segments((3, 9), torch.device("cpu"), causal=False)
    with pytest.raises(PipelineError, match=told):
        KINDS[kind](None, states, states, states, None, segments=segments, scaling=1.0, **others)


def test_pooling_matches_formula():
    torch.manual_seed(0)
    hidden = torch.randn(9, 5, dtype=torch.float64)
    rows = pooled(hidden, (4, 2, 3), (1, 0, 2))
    for row, part in zip(rows, (hidden[1:4], hidden[4:6], hidden[8:9]), strict=True):
        mean = part.mean(0)
        assert_close_in_norm(row, mean / mean.norm())


def test_adapter_matches_formula():
    torch.manual_seed(0)
    adapter = TextAdapter(width=6, dimension=4).double()
    texts = torch.randn(3, 6, dtype=torch.float64)

    def norm(x: torch.Tensor, layer: torch.nn.LayerNorm) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias

    x = texts / texts.norm(dim=-1, keepdim=True)
    assert len(adapter.blocks) == 4
    for block in adapter.blocks:
        inner = norm(x, block.norm) @ block.up.weight.T + block.up.bias
        inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
        x = x + inner @ block.down.weight.T + block.down.bias
    x = norm(x, adapter.norm) @ adapter.projection.weight.T + adapter.projection.bias
    expected = x / x.norm(dim=-1, keepdim=True)
    assert_close_in_norm(adapter(texts), expected)
    assert_close_in_norm(adapter(7 * texts), adapter(texts))


PAPER = Path(__file__).parents[1] / "papers/llm2clip"


def rows_of_paper() -> list[tuple[int, str, str, dict]]:
    """Return (length limit, instruction, text, what the published code gives) of both stages."""
    stage1 = json.loads((PAPER / "stage1_texts.json").read_text())
    extraction = json.loads((PAPER / "extraction_texts.json").read_text())
    rows = []
    for limit in (512, 32):
        for sample in stage1[f"max_length_{limit}"]:
            for name in ("query", "positive", "negative"):
                instruction, text = sample[name]["text"].split(SEPARATOR)
                rows.append((limit, instruction, text, sample[name]))
    for name in ("without_instruction", "with_instruction", "max_length_32"):
        given = extraction[name]
        rows += [(given["max_length"], row["instruction"], row["text"], row) for row in given["rows"]]
    return rows


@torch.no_grad()
def test_tokens_and_embeddings_equal_those_of_the_papers_code():
    folder = str(PAPER / "text_encoder")
    encoder = TextEncoder.load(folder, torch.float32).eval()
    processor = TextProcessor.load(folder, 512, template="llama3")
    rows, items = rows_of_paper(), []
    for limit, instruction, text, expected in rows:
        item = replace(processor, max_tokens=limit).encode(Item(text, instruction=instruction))
        assert item.input_ids.tolist() == expected["input_ids"]
        assert len(item.input_ids) - item.skipped == expected["pooled_last"]
        items.append(item)
    assert len(items) == 99
    embeddings = F.normalize(torch.tensor([row["embedding"] for *_, row in rows]), dim=1)
    # Texts of all lengths are packed together; the published code pads them.
    torch.testing.assert_close(encoder(pack(items)), embeddings, rtol=0, atol=1e-5)


def test_separators_in_a_text_end_its_pooled_part_as_in_the_papers_code():
    """The code splits at all separators, tokenizes the whole without them, and counts the tokens of the second part.

    If that part is empty, it takes the mean of the last 0 states, which in Python are all.
    """
    processor = TextProcessor.load(str(PAPER / "text_encoder"), 512, "Retrieve: ", "llama3")

    def ids(text: str) -> list[int]:
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    begin = "<|start_header_id|>user<|end_header_id|>\n\nRetrieve: "
    for text, joined, first in (
        (f"a red{SEPARATOR} star{SEPARATOR}!\n", "a red star!", "a red"),
        (f"a star{SEPARATOR}", "a star", "a star"),
        (f"{SEPARATOR}a star", "a star", None),
    ):
        item = processor.encode(Item(text))
        assert item.input_ids.tolist() == processor.start + ids(begin + joined + "<|eot_id|>")
        assert len(item.input_ids) - item.skipped == (len(ids(first)) if first else len(item.input_ids))


def test_papers_variant_puts_the_published_instructions_before_queries():
    recipe, family = load_recipe("llm2clip_caption.yaml", ["variant=paper"]), training("text_encoder")
    assert recipe.model.template == "llama3"
    assert {part.name for part in recipe.data.datasets} == recipe.model.query_instructions.keys()
    rows = json.loads((PAPER / "stage1_texts.json").read_text())["max_length_512"]
    for row in rows:
        given = [row[name]["text"].split(SEPARATOR) for name in ("query", "positive", "negative")]
        items = [Item(text) for _, text in given]
        pair = Pair("0", row["task"], "t", items[0], items[1], (items[2],))
        drawn = [family.trained_on(recipe, pair, lambda n, number=number: (number << 32) % n) for number in (0, 1)]
        # Those of a list alternate in the published code, and are drawn here.
        assert given[0][0] in [pair.query.instruction for pair in drawn]
        assert all(not item.instruction for pair in drawn for item in pair.items[1:])
    assert {row["task"] for row in rows} == {"cc3m", "allnli", "hotpot_qa"}
    shards = tuple((number, SimpleNamespace(images=0, videos=0)) for number in range(3))
    names = tuple(part.name for part in recipe.data.datasets)
    source = SimpleNamespace(names=names, embedding_metadata=None, shards=shards)
    family.check_data(recipe, source)
    mined = load_recipe("llm2clip_caption.yaml", ["variant=paper", "data.negatives=beside"])
    family.check_data(mined, source)
    source.shards[1][1].images = 5
    family.check_data(recipe, source)
    with pytest.raises(PipelineError, match=rf"^data.negatives: dataset {names[1]} has images or videos, whose capt"):
        family.check_data(mined, source)


@pytest.fixture(scope="module")
def templated(tmp_path_factory) -> Path:
    """Return a text encoder's folder as a run with the paper's template and an instruction exports it."""
    folder, base = tmp_path_factory.mktemp("templated"), str(PAPER / "text_encoder")
    model = TextEncoder.load(base, torch.float32)
    settings = Settings(instruction=" Retrieve: ", template="llama3")
    decoder.save(model, dict(model.named_parameters()), base, folder, None, settings)
    return folder


TEXTS = ["a cat", " two  dogs\n", "", "the <|eot_id|> token, 12,345.67 and a caf\u00e9"]
TEXTS += [f"a{SEPARATOR}b", f"{SEPARATOR}c"]


@torch.no_grad()
def test_exported_folder_keeps_its_template(templated, monkeypatch):
    processor = TextProcessor.load(str(PAPER / "text_encoder"), 512, " Retrieve: ", "llama3")
    assert TextProcessor.load(str(templated), 512).encode(Item("a")).key == processor.encode(Item("a")).key
    expected = TextEncoder.load(str(templated), torch.float32)(pack([processor.encode(Item(text)) for text in TEXTS]))
    without = TextProcessor.load(str(templated), 512, template="none")
    assert without.encode(Item("a")).key != processor.encode(Item("a")).key
    # The model card's code and the Embedder.
    code, *_ = re.findall(r"```python\n(.*?)```", (templated / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(templated)
    names: dict = {}
    exec(code, names)
    torch.testing.assert_close(torch.stack([names["embed"](text) for text in TEXTS]), expected, rtol=0, atol=1e-5)
    filled = [number for number, text in enumerate(TEXTS) if text]  # the Embedder refuses an empty text
    rows = Embedder.load(templated, device="cpu").embed([TEXTS[number] for number in filled])
    torch.testing.assert_close(rows, expected[filled], rtol=0, atol=1e-5)
    encoder = load_encoder(str(templated), EvaluationRun(), torch.device("cpu"))
    rows = encoder.embed([encoder.prepare(Item(text)) for text in TEXTS])
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)


def test_llm2clip_reads_texts_in_its_teachers_template(templated, tmp_path):
    processor = TextProcessor.load(str(templated), 512)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "projection_dim": 8}
    VisionEncoder.build(vision, 8, 0).save(tmp_path / "vision")
    overrides = [f"model.path={tmp_path / 'vision'}", f"model.text_encoder={templated}", "model.max_tokens=512"]
    overrides.append("data.text_embeddings=null")
    recipe = load_recipe("demo_llm2clip.yaml", overrides)
    trained = training("llm2clip").processor(recipe, str(tmp_path / "vision"))
    llm2clip.save(Llm2Clip.load(str(tmp_path / "vision"), torch.float32, 64), str(templated), tmp_path / "out", None)
    for reader in (trained, saved("llm2clip").reader(str(tmp_path / "out"), 512, 8)):
        assert [reader.encode(Item(text)).key for text in TEXTS] == [processor.encode(Item(t)).key for t in TEXTS]
    # Stored vectors of captions that were embedded in another way are refused.
    write_shards([Pair("0", "d", "t", Item("<image>", (b"image",)), Item("a"))], tmp_path / "shards", dataset="d")
    (dataset,) = open_datasets([str(tmp_path / "shards")], None)
    metadata = dataset.made(load_encoder(str(templated), EvaluationRun(max_tokens=512), torch.device("cpu")), "fp16")
    assert (metadata.template, metadata.instruction) == ("llama3", " Retrieve: ")
    for changed, said in (
        ({}, ""),
        ({"template": "none"}, "template='none', which is 'llama3'"),
        ({"instruction": ""}, "instruction='', which is ' Retrieve: '"),
        ({"template": None, "instruction": ""}, ""),  # of a version that stored no template, or of the published code
        ({"width": 32}, "width=32, which is 64"),
    ):
        source = SimpleNamespace(embedding_metadata=replace(metadata, **changed))
        with pytest.raises(PipelineError, match=re.escape(said)) if said else nullcontext():
            training("llm2clip").check_data(recipe, source)


def test_template_needs_its_tokens_and_a_known_name(tmp_path):
    decoder.build(SIZES | {"vocab_size": 300}, ["a red star"], 0, tmp_path)
    check = training("text_encoder").check
    check(section("text_encoder", path=str(tmp_path)))
    with pytest.raises(
        PipelineError, match=r"has no <\|start_header_id\|>, which the template llama3 needs: set model"
    ):
        check(section("text_encoder", path=str(tmp_path), template="llama3"))
    with pytest.raises(ValidationError, match=r"template llama3 needs model\.path"):
        section("text_encoder", architecture={"text": SIZES}, template="llama3")
    config = json.loads((tmp_path / "config.json").read_text()) | {"text_encoder": {"template": "llama4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PipelineError, match="template, none or llama3: was it written by a later version"):
        TextProcessor.load(str(tmp_path), 64)
