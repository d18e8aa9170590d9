"""Exports used by other software: with the code in their model card, any tokenizer, and earlier transformers.

The vectors were once compared in transformers 4.57. Here, tests check what it reads in the files.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipeline.config import EvaluationRun
from pipeline.embedding.embedder import Embedder
from pipeline.errors import PipelineError
from pipeline.evaluation.encoders import load_encoder
from pipeline.models.clip import model as clip
from pipeline.models.clip.config import ClipArchitecture
from pipeline.models.clip.processor import ClipTexts
from pipeline.models.llave.folder import save_folder
from pipeline.models.llave.model import Llave
from pipeline.models.llm2clip import model as llm2clip
from pipeline.models.text_encoder import masked
from pipeline.models.text_encoder import model as decoder
from pipeline.models.text_encoder.masked import MaskedLanguageModel
from pipeline.models.text_encoder.model import TextEncoder
from pipeline.models.text_encoder.processor import Settings, TextProcessor
from pipeline.models.vision import VisionEncoder

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = SIZES | {"image_size": 24, "patch_size": 8, "projection_dim": 20}
CORPUS = ["a small red star at the top left", "a large blue ring", "A cat and a dog", "_"]
TEXTS = ["a cat", "a large blue ring at the top left", "A"]
CPU = torch.device("cpu")

# (template around a text; end-of-text, padding and beginning-of-text tokens; the tokens then before a text)
MARKS = {
    "nothing": (None, "<|im_end|>", "<|endoftext|>", None, []),
    "ends with padding, as Qwen3-Embedding": ("$A <|endoftext|>", "<|im_end|>", "<|endoftext|>", None, []),
    "ends with its end": ("$A <|im_end|>", "<|im_end|>", "<|endoftext|>", None, []),
    "ends with two": ("$A <|im_end|> <|endoftext|>", "<|im_end|>", "<|endoftext|>", None, []),
    "begins, as Llama 3": ("<|im_start|> $A", "<|im_end|>", None, "<|im_start|>", ["<|im_start|>"]),
    "begins and ends": ("<|im_start|> $A <|im_end|>", "<|im_end|>", None, "<|im_start|>", ["<|im_start|>"]),
    "begins with its end": ("<|im_end|> $A", "<|im_end|>", None, "<|im_end|>", ["<|im_end|>"]),
    "begins as a text does": ("a $A a", "<|im_end|>", None, None, ["a"]),
}
# Cases in which a model card has to remove or repeat tokens.
OF_CARDS = ["ends with two", "begins and ends", "begins as a text does"]


def mark(folder: Path, marks: str) -> None:
    """Configure the folder's tokenizer as in MARKS."""
    template, eos, pad, bos, _ = MARKS[marks]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if template:
        ids = [(token, tokenizer.token_to_id(token)) for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "a")]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": pad, "bos_token": bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decoders") / "plain"
    decoder.build(SIZES | {"num_key_value_heads": 2, "vocab_size": 400}, CORPUS, 0, folder, AutoModelForCausalLM)
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        CORPUS, 280, new_special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False
    )
    tokenizer.save_pretrained(folder)
    config = CONFIG_MAPPING["qwen2"].from_pretrained(folder)
    assert len(tokenizer) <= config.vocab_size
    return folder


@pytest.fixture(params=MARKS)
def marked(request, plain, tmp_path) -> tuple[Path, str]:
    shutil.copytree(plain, tmp_path / "base")
    mark(tmp_path / "base", request.param)
    return tmp_path / "base", request.param


def run_example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    code, *_ = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(code, names)
    return names


@pytest.mark.parametrize("instruction", ["", "Represent: "])
def test_tokenizer_prefix_is_kept_and_suffix_removed(marked, instruction):
    folder, marks = marked
    processor = TextProcessor.load(str(folder), 64, instruction)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = tokenizer.convert_tokens_to_ids(MARKS[marks][-1])
    before += tokenizer(instruction, add_special_tokens=False)["input_ids"]
    for text in TEXTS:
        encoded = processor.tokenized(text)
        assert encoded.input_ids.tolist() == before + tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encoded.skipped == len(before)


@pytest.mark.parametrize("marked", OF_CARDS, indirect=True)
@pytest.mark.parametrize("instruction", ["", "Represent: "])
def test_text_encoder_card_example_matches_embedder(marked, instruction, tmp_path, monkeypatch):
    base, _ = marked
    model = TextEncoder.load(str(base), torch.float32)
    decoder.save(
        model, dict(model.named_parameters()), str(base), tmp_path / "out", None, Settings(instruction=instruction)
    )
    embed = run_example(tmp_path / "out", monkeypatch)["embed"]
    expected = torch.stack([embed(text) for text in TEXTS])
    torch.testing.assert_close(Embedder.load(tmp_path / "out").embed(TEXTS), expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize("marked", OF_CARDS, indirect=True)
def test_masked_model_card_example_tokenizes_as_training(marked, tmp_path, monkeypatch):
    base, _ = marked
    model = MaskedLanguageModel.load(str(base), torch.float32)
    masked.save(model, dict(model.named_parameters()), str(base), tmp_path / "out", None)
    ids = run_example(tmp_path / "out", monkeypatch)["ids"][0].tolist()
    expected = TextProcessor.load(str(base), 64, "").tokenized("A cat and a dog").input_ids.tolist()
    expected[3] = model.mask_token
    assert ids == expected


@pytest.mark.parametrize("marks", OF_CARDS)
def test_llave_card_example_matches_embedder(marks, tiny_model, tmp_path, monkeypatch):
    shutil.copytree(tiny_model, tmp_path / "base")
    mark(tmp_path / "base", marks)
    model = Llave.load(str(tmp_path / "base"), torch.float32)
    save_folder(model, dict(model.named_parameters()), str(tmp_path / "base"), tmp_path / "out")
    embed = run_example(tmp_path / "out", monkeypatch)["embed"]
    expected = torch.stack([embed(text) for text in TEXTS])
    torch.testing.assert_close(Embedder.load(tmp_path / "out").embed(TEXTS), expected, atol=3e-6, rtol=0)


def test_clip_whose_tokenizer_lacks_the_pooled_end_token_is_refused(tmp_path):
    text = SIZES | {"vocab_size": 600, "max_position_embeddings": 20}
    clip.build(ClipArchitecture(vision=VISION, text=text), CORPUS, 0, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    end = config["text_config"]["eos_token_id"]

    def open_both() -> None:
        ClipTexts.load(str(tmp_path), 20)
        load_encoder(str(tmp_path), EvaluationRun(), CPU)

    open_both()
    config["text_config"]["eos_token_id"] = 2  # as in old published configs
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    if end == max(tokenizer["model"]["vocab"].values()):
        open_both()
    config["text_config"]["eos_token_id"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    for way in (
        lambda: ClipTexts.load(str(tmp_path), 20),
        lambda: load_encoder(str(tmp_path), EvaluationRun(), CPU),
    ):
        with pytest.raises(PipelineError, match=r"ends texts with .*, and its model pools token 7"):
            way()


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ROPES = [
    (
        "qwen2",
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_theta": 1e6, "rope_scaling": None},
    ),
    ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    (
        "phi",
        {"rope_parameters": {"rope_theta": 2e4, "rope_type": "default", "partial_rotary_factor": 0.25}},
        {"rope_theta": 2e4, "rope_scaling": None, "partial_rotary_factor": 0.25},
    ),
]


@pytest.mark.parametrize(("kind", "fields", "earlier"), ROPES, ids=[kind for kind, *_ in ROPES])
def test_rotary_config_is_written_in_both_formats_and_read_alike(kind, fields, earlier, plain, tmp_path):
    text = SIZES | {"num_key_value_heads": 2, "vocab_size": 400, "model_type": kind, "max_position_embeddings": 128}
    decoder.build(text | fields, CORPUS, 0, tmp_path / "base")
    model = TextEncoder.load(str(tmp_path / "base"), torch.float32)
    decoder.save(model, dict(model.named_parameters()), str(tmp_path / "base"), tmp_path / "out", None, Settings())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert earlier.items() <= config.items()
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == model.language_model.config.rope_parameters
    decoder.save(model, dict(model.named_parameters()), str(tmp_path / "base"), tmp_path / "other", None, Settings())
    for name in {*earlier, "pruned_heads"}:
        config.pop(name)
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    new, old = (Embedder.load(tmp_path / name).embed(TEXTS) for name in ("out", "other"))
    assert torch.equal(new, old)


def test_bidirectional_export_raises_in_earlier_transformers(plain, tmp_path):
    model = MaskedLanguageModel.load(str(plain), torch.float32)
    masked.save(model, dict(model.named_parameters()), str(plain), tmp_path / "out", None)
    config = json.loads((tmp_path / "out/config.json").read_text())
    # transformers 4 converts these keys to int in every config.
    with pytest.raises(ValueError, match="attends both ways, which needs transformers 5 or later"):
        {int(layer): heads for layer, heads in config["pruned_heads"].items()}
    assert config["is_causal"] is False
    assert decoder.SETTINGS not in config


def test_llave_config_and_tokenizer_are_written_in_both_formats(tiny_model, tmp_path):
    model = Llave.load(tiny_model, torch.float32)
    save_folder(model, dict(model.named_parameters()), tiny_model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["text_config"]["rope_theta"] == config["text_config"]["rope_parameters"]["rope_theta"]
    assert config["text_config"]["rope_scaling"] is None
    assert "pruned_heads" not in config  # this model is causal in all versions
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in settings  # transformers 4 fails on a list with this name
    assert {"<image>", "<video>"} <= set(settings["additional_special_tokens"])
    ours, its = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_model, tmp_path / "out"))
    prompt = "<|im_start|>a <image> star<|im_end|>"
    assert ours(prompt)["input_ids"] == its(prompt)["input_ids"]
    assert set(ours.all_special_tokens) == set(its.all_special_tokens)


def test_text_encoder_from_older_export_is_copied_and_updated(plain, tmp_path):
    source = tmp_path / "source"
    model = TextEncoder.load(str(plain), torch.float32)
    decoder.save(model, dict(model.named_parameters()), str(plain), source, None, Settings())
    config = json.loads((source / "config.json").read_text())
    for name in ("rope_theta", "rope_scaling", "pruned_heads"):
        del config[name]
    old = json.dumps(config)
    (source / "config.json").write_text(old)
    (source / "model.safetensors").chmod(0o600)
    source.chmod(0o555)
    VisionEncoder.build(VISION, 20, 0).save(tmp_path / "vision")
    llm2clip.save(
        llm2clip.Llm2Clip.load(str(tmp_path / "vision"), torch.float32, 32), str(source), tmp_path / "out", None
    )
    copied = json.loads((tmp_path / "out/text_encoder/config.json").read_text())
    assert copied["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert "pruned_heads" in copied
    assert (source / "config.json").read_text() == old
    assert (source / "model.safetensors").stat().st_mode & 0o777 == 0o600
    source.chmod(0o755)
