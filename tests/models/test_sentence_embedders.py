"""Sentence embedders in sentence-transformers' format: vectors compared with transformers' models on single texts."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from sections import section
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from pipeline.config import EvaluationRun
from pipeline.data.sample import Item
from pipeline.data.stored_vectors import CAPTIONS
from pipeline.embedding.dataset import EmbeddedDataset
from pipeline.embedding.embedder import Embedder
from pipeline.errors import PipelineError
from pipeline.evaluation.encoders import load_encoder
from pipeline.models.chunks import plan_chunks
from pipeline.models.files import fingerprint
from pipeline.models.llm2clip import model as llm2clip
from pipeline.models.llm2clip.model import Llm2Clip
from pipeline.models.merging import Part, merge
from pipeline.models.registry import family_of, saved, training
from pipeline.models.text_encoder.family import SAVED
from pipeline.models.text_encoder.model import FrozenTextEncoder
from pipeline.models.text_encoder.sentence import SentenceEncoder, SentenceProcessor
from pipeline.models.vision import VisionEncoder

CPU = torch.device("cpu")
# Of unit vectors with 32 values: a model of two layers in float32 rounds by less than 1e-6.
TOLERANCE = 1e-5
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
CORPUS = ["a small red star at the top left", "a Large blue ring", "passage: what a caption shows: ein großer Stern"]
# Of different lengths, so that they are padded; the second is longer than the limit of 24 tokens.
TEXTS = ["A red Star", "a large blue ring at the top left, " * 8, "ring", " ein großer Stern "]
LIMIT = 24


@dataclass(frozen=True)
class Kind:
    """A sort of embedder.  ends: the text around a sequence, by the tokenizer's special tokens.  mode: of pooling."""

    model: Callable[[int], PreTrainedModel]
    style: str
    ends: str
    special: tuple[str, ...]
    causal: bool
    mode: str
    files: dict[str, Any]
    modules: tuple[str, ...]


def flags(mode: str) -> dict[str, Any]:
    names = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
    every = {f"pooling_mode_{name}": False for name in ("max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")}
    return {"word_embedding_dimension": 32} | every | {name: key == mode for key, name in names.items()}


PREFIX = "sentence_transformers.models."
NEWER = "sentence_transformers.sentence_transformer.modules.pooling."
ENDS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
KINDS = {
    # like BGE
    "bert": Kind(
        lambda words: BertModel(BertConfig(**SIZES, vocab_size=words, max_position_embeddings=64)),
        "BertTokenizer",
        "[CLS] $A [SEP]",
        ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        False,
        "cls",
        {"1_Pooling/config.json": flags("cls")},
        ("Transformer", "Pooling", "Normalize"),
    ),
    # like Qwen3-Embedding: its tokenizer appends an end token
    "qwen3": Kind(
        lambda words: Qwen3Model(Qwen3Config(**GROUPED, vocab_size=words, eos_token_id=0, pad_token_id=0)),
        "Qwen2Tokenizer",
        "$A <|endoftext|>",
        ("<|endoftext|>",),
        True,
        "last",
        {
            "1_Pooling/config.json": flags("last") | {"include_prompt": True},
            "config_sentence_transformers.json": {
                "prompts": {"query": "Instruct: search\nQuery:", "document": ""},
                "default_prompt_name": None,
            },
        },
        ("Transformer", "Pooling", "Normalize"),
    ),
    # like E5-Mistral
    "mistral": Kind(
        lambda words: MistralModel(MistralConfig(**GROUPED, vocab_size=words)),
        "LlamaTokenizer",
        "<s> $A </s>",
        ("<unk>", "<s>", "</s>", "<pad>"),
        True,
        "last",
        {"1_Pooling/config.json": flags("last"), "config_sentence_transformers.json": {"prompts": {"sts": "Same: "}}},
        ("Transformer", "Pooling", "Normalize"),
    ),
    # like multilingual E5: positions begin after the padding token's; a prompt for passages
    "xlm-roberta": Kind(
        lambda words: XLMRobertaModel(
            XLMRobertaConfig(**SIZES, vocab_size=words, max_position_embeddings=26, pad_token_id=1)
        ),
        "PreTrainedTokenizerFast",
        "<s> $A </s>",
        ("<s>", "<pad>", "</s>", "<unk>"),
        False,
        "mean",
        {
            "1_Pooling/config.json": {"embedding_dimension": 32, "pooling_mode": "mean"},
            "sentence_bert_config.json": {"max_seq_length": 4096, "do_lower_case": True},
            "config_sentence_transformers.json": {"prompts": {"query": "query: ", "passage": "passage: "}},
        },
        ("Transformer", "Pooling", "Normalize"),
    ),
    # a decoder that attends both ways, without its prompt's tokens in the mean, and with layers after that
    "llama": Kind(
        lambda words: LlamaModel(LlamaConfig(**GROUPED, vocab_size=words, is_causal=False)),
        "PreTrainedTokenizerFast",
        "<s> $A",
        ("<unk>", "<s>", "</s>", "<pad>"),
        False,
        "mean",
        {
            "1_Pooling/config.json": {"embedding_dimension": 32, "pooling_mode": ["mean"], "include_prompt": False},
            "2_Dense/config.json": {
                "in_features": 32,
                "out_features": 40,
                "bias": True,
                "activation_function": "torch.nn.modules.activation.Tanh",
            },
            "3_Dense/config.json": {
                "in_features": 40,
                "out_features": 12,
                "bias": False,
                "activation_function": "torch.nn.modules.linear.Identity",
                "module_input_name": "sentence_embedding",
            },
            "config_sentence_transformers.json": {
                "prompts": {"any": "a caption:"},
                "default_prompt_name": "any",
            },
        },
        ("Transformer", "Pooling", "Dense", "Dense"),
    ),
}
PROMPTS = {"xlm-roberta": "passage: ", "llama": "a caption:"}


def write(file: Path, values: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values))


def write_tokenizer(kind: Kind, folder: Path) -> int:
    """Write tokenizer.json with start and end tokens in its post-processor; return the number of tokens."""
    if kind.style == "BertTokenizer":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = (
            normalizers.BertNormalizer(lowercase=True),
            pre_tokenizers.BertPreTokenizer(),
        )
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=list(kind.special), show_progress=False)
        settings = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=320, special_tokens=list(kind.special), initial_alphabet=alphabet, show_progress=False
        )
        names = ENDS if "</s>" in kind.special else {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        settings = {name: token for name, token in names.items() if token in kind.special}
    made.train_from_iterator(CORPUS, trainer)
    around = [(token, made.token_to_id(token)) for token in kind.ends.split() if token != "$A"]
    made.post_processor = processors.TemplateProcessing(single=kind.ends, special_tokens=around)
    made.save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", settings | {"tokenizer_class": kind.style, "model_max_length": 512})
    return made.get_vocab_size()


def build(kind: Kind, folder: Path) -> Path:
    torch.manual_seed(0)
    folder.mkdir()
    model = kind.model(write_tokenizer(kind, folder)).eval()
    with torch.no_grad():  # biases and norms too, so that every weight affects the result
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    places = ["", *(f"{place}_{name}" for place, name in enumerate(kind.modules[1:], 1))]
    write(
        folder / "modules.json",
        [
            {"idx": place, "name": str(place), "path": path, "type": f"{NEWER if 'type' in path else PREFIX}{name}"}
            for place, (name, path) in enumerate(zip(kind.modules, places, strict=True))
        ],
    )
    for name, values in ({"sentence_bert_config.json": {"max_seq_length": LIMIT}} | kind.files).items():
        write(folder / name, values)
        if "out_features" in values:
            weights = {"linear.weight": torch.randn(values["out_features"], values["in_features"])}
            if values["bias"]:
                weights["linear.bias"] = torch.randn(values["out_features"])
            save_file(weights, folder / name.replace("config.json", "model.safetensors"))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("embedders")
    return {name: build(kind, root / name) for name, kind in KINDS.items()}


def tokens_of(name: str, folder: Path, text: str, limit: int = LIMIT) -> list[int]:
    """Tokenize with the `tokenizers` library alone."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(limit)
    lowered = text.lower() if name == "xlm-roberta" else text
    return tokenizer.encode(lowered).ids


@torch.no_grad()
def by_hand(name: str, folder: Path, text: str, prompt: str | None = None) -> torch.Tensor:
    """Embed a text alone, without padding, and with a mask of attention that is written out."""
    kind, prompt = KINDS[name], PROMPTS.get(name, "") if prompt is None else prompt
    ids = tokens_of(name, folder, prompt + text)
    skipped = len(tokens_of(name, folder, prompt)) if name == "llama" and prompt else 0
    model = type(kind.model(400)).from_pretrained(folder, attn_implementation="eager").eval()
    shape = (len(ids), len(ids))
    mask = torch.full(shape, torch.finfo(torch.float32).min).triu(1) if kind.causal else torch.zeros(shape)
    hidden = model(input_ids=torch.tensor([ids]), attention_mask=mask[None, None]).last_hidden_state[0]
    row = {"cls": hidden[0], "last": hidden[-1], "mean": hidden[skipped:].mean(dim=0)}[kind.mode]
    if name == "llama":
        first = SentenceWeights(folder / "2_Dense")
        row = torch.tanh(first.weight @ row + first.bias)
        row = SentenceWeights(folder / "3_Dense").weight @ row
    return F.normalize(row, dim=0)


class SentenceWeights:
    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file

        weights = load_file(folder / "model.safetensors")
        self.weight, self.bias = weights["linear.weight"], weights.get("linear.bias")


@pytest.mark.parametrize("name", KINDS)
def test_vectors_match_single_texts_in_transformers(name, folders):
    folder = folders[name]
    embedder = Embedder.load(folder, "cpu")
    expected = torch.stack([by_hand(name, folder, text) for text in TEXTS])
    rows = embedder.embed(TEXTS)
    assert embedder.dimension == expected.shape[1] == (12 if name == "llama" else 32)
    assert (rows - expected).abs().max() < TOLERANCE
    assert (rows[0] - rows[2]).abs().max() > 1e-2  # otherwise the comparison would prove nothing


def test_item_instruction_replaces_the_prompt(folders):
    for name, given in (("xlm-roberta", "query: "), ("llama", "star:")):
        folder = folders[name]
        encoder = load_encoder(str(folder), EvaluationRun(), CPU)
        (row,) = encoder.embed([encoder.prepare(Item("a red star", instruction=given))])
        assert (row - by_hand(name, folder, "a red star", given)).abs().max() < TOLERANCE
        assert (row - by_hand(name, folder, "a red star")).abs().max() > 1e-2
        assert encoder.processor.instruction == PROMPTS[name]  # is stored with the vectors of shards


def test_texts_are_tokenized_whole_with_their_end_token(folders):
    for name, kind in KINDS.items():
        processor = SentenceProcessor.load(str(folders[name]), max_tokens=20)
        for text in TEXTS:
            expected = tokens_of(name, folders[name], PROMPTS.get(name, "") + text, 20)
            assert processor.encode(Item(text)).input_ids.tolist() == expected
        ends = kind.ends.split()[-1]
        assert ends == "$A" or processor.tokenizer.convert_ids_to_tokens(expected[-1]) == ends
    empty = SentenceProcessor.load(str(folders["llama"]), 20).tokenized("")
    assert len(empty.input_ids) > empty.skipped  # something is pooled


@pytest.mark.parametrize("ends", ["<s> $A </s>", "<s> $A"])
def test_end_token_is_added_once_if_the_tokenizer_config_asks_for_it(ends, folders, tmp_path):
    """transformers 5 takes end tokens from tokenizer.json alone."""
    folder = build(replace(KINDS["mistral"], ends=ends), tmp_path / "mistral")
    file = folder / "tokenizer_config.json"
    write(file, json.loads(file.read_text()) | {"add_eos_token": True})
    rows = Embedder.load(folder, "cpu").embed(TEXTS)
    assert (rows - Embedder.load(folders["mistral"], "cpu").embed(TEXTS)).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("stored", "prompt"),
    [
        ({"prompts": {"corpus": "c", "passage": "p", "document": "d"}, "default_prompt_name": "corpus"}, "d"),
        ({"prompts": {"corpus": "c", "passage": "p", "document": None}}, "p"),
        ({"prompts": {"document": "", "query": "q"}, "default_prompt_name": "query"}, ""),
        ({"prompts": {"query": "q"}, "default_prompt_name": "query"}, "q"),
        ({"prompts": {"query": "q"}}, ""),
        ({}, ""),
    ],
)
def test_prompt_is_that_of_documents_or_else_the_default(stored, prompt, folders, tmp_path):
    folder = shutil.copytree(folders["bert"], tmp_path / "bert")
    write(folder / "config_sentence_transformers.json", stored)
    assert SentenceProcessor.load(str(folder), 64).instruction == prompt


def test_missing_pooler_and_modules_in_bf16(folders, tmp_path):
    model = BertModel.from_pretrained(folders["bert"], add_pooling_layer=False)
    folder = shutil.copytree(folders["bert"], tmp_path / "bert")
    model.save_pretrained(folder)
    expected = Embedder.load(folders["bert"], "cpu").embed(TEXTS)
    assert torch.equal(Embedder.load(folder, "cpu").embed(TEXTS), expected)
    shutil.rmtree(folder / "2_Normalize", ignore_errors=True)  # is empty in earlier versions, and git keeps no folder
    modules = json.loads((folder / "modules.json").read_text())
    write(folder / "modules.json", modules[:2])
    # Without Normalize they are unit vectors, too.
    assert (Embedder.load(folder, "cpu").embed(TEXTS) - expected).abs().max() < TOLERANCE
    embedder = Embedder.load(folders["llama"], "cpu", precision="bf16")
    assert (
        embedder.model.transformer.dtype == torch.bfloat16 and embedder.model.after[0][0].weight.dtype == torch.float32
    )
    expected = Embedder.load(folders["llama"], "cpu").embed(TEXTS)
    assert (F.cosine_similarity(embedder.embed(TEXTS), expected) > 0.99).all()


def test_weights_of_a_missing_layer_are_refused(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    save_file({"linear.weight": torch.ones(40, 31)}, folder / "2_Dense/model.safetensors")
    with pytest.raises(PipelineError, match=r"2_Dense/model\.safetensors cannot be used"):
        SentenceEncoder.load(str(folder), torch.float32)
    (folder / "2_Dense/model.safetensors").unlink()
    with pytest.raises(PipelineError, match="2_Dense has no weights"):
        SAVED.check(str(folder))


def kinds(*names: str) -> list[dict[str, Any]]:
    return [{"idx": i, "name": str(i), "path": f"{i}_x" if i else "", "type": name} for i, name in enumerate(names)]


ROUTER = "sentence_transformers.models.Router"
TRANSFORMER, POOLING = f"{PREFIX}Transformer", f"{PREFIX}Pooling"


@pytest.mark.parametrize(
    ("file", "values", "told"),
    [
        ("modules.json", kinds(ROUTER), "it has a module sentence_transformers.models.Router, which is not supported"),
        ("modules.json", kinds(TRANSFORMER, POOLING, f"{PREFIX}Asym"), r"it has a module .*\.Asym"),
        ("modules.json", kinds("custom_st.Transformer", POOLING), "it has a module custom_st.Transformer"),
        ("modules.json", kinds(TRANSFORMER), "its modules are Transformer, which is not supported; expected a Tr"),
        ("modules.json", kinds(TRANSFORMER, POOLING, POOLING), "its modules are Transformer, Pooling, Pooling"),
        ("modules.json", {"0": TRANSFORMER}, "is not a list of modules"),
        ("modules.json", [kinds(TRANSFORMER)[0] | {"path": "0_T"}, kinds("", POOLING)[1]], "its transformer is in 0_T"),
        ("modules.json", [kinds(TRANSFORMER)[0] | {"path": "../T"}, kinds("", POOLING)[1]], "do not trust it"),
        ("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "its pooling mode is 'weightedmean', which is not"),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, r"its pooling mode is \['cls', 'mean'\]"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "its pooling mode is 'max', which is not supp"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            r"its pooling mode is \['cls', 'mean'\]",
        ),
        ("2_Dense/config.json", {"out_features": 4, "activation_function": "os.system"}, "activation_function is 'os"),
        ("2_Dense/config.json", {"out_features": 4, "use_residual": True}, "use_residual is true"),
        ("2_Dense/config.json", {"out_features": 4, "module_input_name": "token_embeddings"}, "module_input_name is"),
        ("2_Dense/config.json", {"out_features": 0}, "out_features=0 is no width"),
        ("sentence_bert_config.json", {"transformer_task": "text-generation"}, "transformer_task is 'text-generation'"),
        ("sentence_bert_config.json", {"modality_config": {"message": {}}}, "modality_config is"),
        ("sentence_bert_config.json", {"config_kwargs": {"is_causal": False}}, "config_kwargs is"),
        ("sentence_bert_config.json", {"max_seq_length": "512"}, "a length is"),
        ("config_sentence_transformers.json", {"prompts": ["a"]}, "is no object of texts"),
        ("config_sentence_transformers.json", {"default_prompt_name": "none"}, "is none of its prompts"),
    ],
)
def test_unsupported_parts_are_refused_by_file(file, values, told, folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    write(folder / file, values)
    with pytest.raises(PipelineError, match=rf"{file}: .*{told}|{file} {told}"):
        SAVED.check(str(folder))
    with pytest.raises(PipelineError, match=file):
        Embedder.load(folder, "cpu")


@pytest.mark.parametrize(
    "fields", [{"is_encoder_decoder": True, "model_type": "t5", "d_model": 32}, {"model_type": "vit"}]
)
def test_model_that_is_no_text_encoder_is_refused(fields, folders, tmp_path):
    folder = shutil.copytree(folders["bert"], tmp_path / "bert")
    write(folder / "config.json", fields)
    with pytest.raises(PipelineError, match=f"is a {fields['model_type']} model; a sentence embedder can be"):
        SAVED.check(str(folder))


VISION = SIZES | {"image_size": 24, "patch_size": 8, "projection_dim": 20}


@pytest.mark.parametrize("name", ["qwen3", "llama"])
@torch.no_grad()
def test_llm2clip_learns_from_its_vectors_and_its_export_holds_it(name, folders, tmp_path):
    folder, base = folders[name], tmp_path / "vision"
    VisionEncoder.build(VISION, 20, 0).save(base)
    training("llm2clip").check(section("llm2clip", path=str(base), text_encoder=str(folder)))
    reader, expected = SentenceProcessor.load(str(folder), 512), torch.stack([by_hand(name, folder, t) for t in TEXTS])
    (chunk,) = plan_chunks([reader.encode(Item(text)) for text in TEXTS], 4096, CPU)
    frozen = FrozenTextEncoder(SentenceEncoder.load(str(folder), torch.float32), CPU)
    features = frozen.features_of(chunk, chunk.packed)
    assert (features - expected[chunk.rows]).abs().max() < TOLERANCE

    model = Llm2Clip.load(str(base), torch.float32, width=expected.shape[1])
    llm2clip.save(model, str(folder), tmp_path / "export", None)
    card = (tmp_path / "export/README.md").read_text()
    assert "a sentence embedder in sentence-transformers' format" in card and "bidirectional" not in card
    embedder = Embedder.load(tmp_path / "export", "cpu")
    rows = embedder.embed([TEXTS[0], TEXTS[2], Image.new("RGB", (30, 20), "red")])
    texts = torch.stack([by_hand(name, folder, text) for text in (TEXTS[0], TEXTS[2])])
    assert (rows[:2] - model.adapter(texts)).abs().max() < TOLERANCE
    assert saved("llm2clip").dimension(str(tmp_path / "export")) == rows.shape[1] == 20


def test_folder_is_identified_by_its_modules(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    assert family_of(str(folder)) is SAVED
    found = {fingerprint(str(folder), modules=True)}
    for file, values in (
        ("1_Pooling/config.json", {"pooling_mode": "cls"}),
        ("config_sentence_transformers.json", {}),
        ("sentence_bert_config.json", {"max_seq_length": 8}),
    ):
        write(folder / file, values)
        found.add(fingerprint(str(folder), modules=True))
    save_file({"linear.weight": torch.ones(12, 40)}, folder / "3_Dense/model.safetensors")
    found.add(fingerprint(str(folder), modules=True))
    assert len(found) == 5
    # A run that starts from the folder's weights does not read its modules.
    assert fingerprint(str(folder)) == fingerprint(str(folders["llama"]))
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", config | {"text_encoder": {"pooling": "mean"}})
    assert not isinstance(SAVED.reader(str(folder), 64), SentenceProcessor)


def test_stored_vectors_are_refused_after_a_change_of_the_folder(folders, tmp_path):
    folder = shutil.copytree(folders["qwen3"], tmp_path / "qwen3")
    dataset = EmbeddedDataset(CAPTIONS, "", None, "", SimpleNamespace(captions=None))
    made = dataset.made(load_encoder(str(folder), EvaluationRun(max_tokens=512), CPU), "fp16")
    assert (made.max_tokens, made.width, made.instruction) == (LIMIT, 32, "")
    vision = tmp_path / "vision"
    model = section("llm2clip", path=str(vision), text_encoder=str(folder), max_tokens=256)
    recipe, source = SimpleNamespace(model=model), SimpleNamespace(embedding_metadata=made)
    training("llm2clip").check_data(recipe, source)
    write(folder / "config_sentence_transformers.json", {"prompts": {"document": "a caption: "}})
    with pytest.raises(PipelineError, match=r"made by .* with instruction='', which is 'a caption: '"):
        training("llm2clip").check_data(recipe, source)
    write(folder / "config_sentence_transformers.json", {})
    write(folder / "1_Pooling/config.json", flags("mean"))
    with pytest.raises(PipelineError, match=r"made by .* with weights="):
        training("llm2clip").check_data(recipe, source)


def test_merged_embedders_have_merged_dense_layers(folders, tmp_path):
    """The layers after the transformer are merged too; another pooling or prompt is refused."""
    one, two = folders["llama"], shutil.copytree(folders["llama"], tmp_path / "two")
    layer = {name: 3 * each for name, each in load_file(two / "3_Dense/model.safetensors").items()}
    save_file(layer, two / "3_Dense/model.safetensors")
    merge([Part(str(one)), Part(str(two))], tmp_path / "merged")
    (before,) = load_file(one / "3_Dense/model.safetensors").values()
    (found,) = load_file(tmp_path / "merged/3_Dense/model.safetensors").values()
    assert torch.equal(found, ((before.double() + 3 * before.double()) / 2).float())
    # A factor of the last layer leaves unit vectors as they are
    rows = [Embedder.load(str(path), "cpu").embed(TEXTS) for path in (one, tmp_path / "merged")]
    torch.testing.assert_close(rows[0], rows[1], atol=TOLERANCE, rtol=0)
    for name, values, said in [
        ("config_sentence_transformers.json", {"prompts": {"document": "other:"}}, "json: prompts.any is 'a caption:'"),
        ("1_Pooling/config.json", flags("last"), "1_Pooling/config.json: "),
    ]:
        other = shutil.copytree(one, tmp_path / name.replace("/", "-"))
        write(other / name, values)
        with pytest.raises(PipelineError, match=f"are not alike: .*{said}"):
            merge([Part(str(one)), Part(str(other))], tmp_path / "refused")
