"""Masking of a text, and the model that predicts masked tokens, compared with transformers text by text."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config import load_recipe
from pipeline.data.batch import Encoded
from pipeline.data.sample import Item, Pair
from pipeline.errors import PipelineError
from pipeline.models.chunks import Chunk, pack, plan_chunks
from pipeline.models.registry import family_of, training
from pipeline.models.text_encoder import masked
from pipeline.models.text_encoder import model as decoder
from pipeline.models.text_encoder.masked import MaskedLanguageModel
from pipeline.models.text_encoder.model import TextEncoder
from pipeline.models.text_encoder.processor import load_config
from pipeline.objectives.masked_tokens.config import MaskedNextTokenSection
from pipeline.objectives.masked_tokens.masks import MaskedText, mask, to_predict

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
SHAPES = {
    "llama": SIZES | {"model_type": "llama"},
    "qwen2": SIZES | {"tie_word_embeddings": True},
    "granite": SIZES | {"model_type": "granite", "logits_scaling": 0.5},
}
MASK, VOCABULARY = 7, 250  # a trained tokenizer has at least the 256 bytes


def text(length: int, seed: int = 0, skipped: int = 0) -> Encoded:
    return Encoded(np.random.default_rng(seed).integers(20, VOCABULARY, length).astype(np.int32), skipped=skipped)


def hidden(*lengths: int) -> list[MaskedText]:
    """Return texts with half of their tokens masked, starting with the second or third."""
    rate = MaskedNextTokenSection(mask_rate=0.5)
    return [mask(text(n, i, i % 2 * 2), rate, MASK, VOCABULARY, (0, i)) for i, n in enumerate(lengths)]


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / request.param
    decoder.build(SHAPES[request.param], ["a red star _ a blue ring"], 1, folder, AutoModelForCausalLM)
    return str(folder)


@torch.no_grad()
def loaded(folder: str) -> MaskedLanguageModel:
    """Load the model with larger weights, so that predictions depend on all tokens that it attends to."""
    model, generator = MaskedLanguageModel.load(folder, torch.float32), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def test_masking_replaces_tokens_at_the_default_rates():
    whole = text(50_000, skipped=400)
    masked = mask(whole, MaskedNextTokenSection(), MASK, VOCABULARY, (0, 3, 2**64 - 1))
    places, seen = masked.places, masked.input_ids[masked.places]
    assert len(places) / 50_000 == pytest.approx(0.2, abs=0.01)
    assert places.min() >= 400 and places.max() > 49_900
    assert (masked.targets == whole.input_ids[places]).all()
    untouched = np.setdiff1d(np.arange(50_000), places)
    assert (masked.input_ids[untouched] == whole.input_ids[untouched]).all()
    assert (seen == MASK).mean() == pytest.approx(0.8, abs=0.02)
    assert (seen == masked.targets).mean() == pytest.approx(0.1, abs=0.02)
    others = seen[(seen != MASK) & (seen != masked.targets)]
    assert len(others) / len(seen) == pytest.approx(0.1, abs=0.02)
    assert (others.min(), others.max()) == (0, VOCABULARY - 1)


def test_mask_depends_on_the_key():
    def of(*key: int) -> tuple[list[int], list[int]]:
        masked = mask(text(200), MaskedNextTokenSection(), MASK, VOCABULARY, key)
        return masked.places.tolist(), masked.input_ids.tolist()

    assert of(0, 1, 2) == of(0, 1, 2)
    assert len({str(of(*key)) for key in ((0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3))}) == 4


def test_first_token_and_instruction_are_never_masked():
    every = MaskedNextTokenSection(mask_rate=1.0, mask_random=0.0, mask_kept=0.0)
    for length, skipped, first in ((5, 0, 1), (5, 1, 1), (5, 3, 3), (1, 0, 1)):
        masked = mask(text(length, skipped=skipped), every, MASK, VOCABULARY, (0,))
        assert masked.places.tolist() == list(range(first, length))
        assert masked.input_ids[first:].tolist() == [MASK] * (length - first)


@torch.no_grad()
def test_losses_and_hits_match_previous_token_logits_of_transformers(folder):
    items = hidden(9, 1, 30, 4)
    model = loaded(folder)
    config = load_config(folder)
    config.is_causal = False
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    plain.load_state_dict(model.causal.state_dict())
    (chunk,) = plan_chunks(items, 1000, torch.device("cpu"))
    rows = model(chunk.packed, False, to_predict(chunk, chunk.packed))
    for row, item in zip(rows, chunk.items, strict=True):
        logits = plain(torch.from_numpy(item.input_ids).long()[None], use_cache=False).logits[0]
        costs = [
            -F.log_softmax(logits[at - 1].double(), 0)[of] for at, of in zip(item.places, item.targets, strict=True)
        ]
        hits = [int(logits[at - 1].argmax()) == of for at, of in zip(item.places, item.targets, strict=True)]
        assert row.tolist() == pytest.approx([float(sum(costs)), sum(hits)], rel=1e-5, abs=1e-6)
    assert (rows[:, 0] > 0).sum() == 3  # a text of one token has nothing to predict


def test_empty_chunk_has_zero_loss_and_zero_gradients(folder):
    model = MaskedLanguageModel.load(folder, torch.float32)
    dummy = Encoded(np.zeros(1, np.int32))
    chunk = Chunk(torch.zeros(0, dtype=torch.long), (dummy,), False, True)
    rows = model(chunk.packed, False, to_predict(chunk, chunk.packed))
    assert rows.tolist() == [[0, 0]]
    rows[:0].sum().backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


@torch.no_grad()
def test_prediction_depends_on_later_tokens_but_not_on_other_texts(folder):
    model = MaskedLanguageModel.load(folder, torch.float32)
    items = hidden(20, 20)
    changed = replace(items[0], input_ids=np.append(items[0].input_ids[:-1], 9).astype(np.int32))
    alone = [replace(item, places=item.places[:1], targets=item.targets[:1]) for item in (*items, changed)]
    assert alone[0].places[0] < 15
    rows = []
    for pair in ([alone[0], alone[1]], [alone[2], alone[1]]):
        chunk = Chunk(torch.arange(2), tuple(pair), False, True)
        rows.append(model(chunk.packed, False, to_predict(chunk, chunk.packed)))
    assert abs(float(rows[0][0, 0] - rows[1][0, 0])) > 1e-5
    assert torch.equal(rows[0][1], rows[1][1])


@torch.no_grad()
def test_saved_folder_loads_in_transformers_and_as_text_encoder(folder, tmp_path):
    source, out = str(shutil.copytree(folder, tmp_path / "source")), str(tmp_path / "out")
    config = json.loads(Path(source, "config.json").read_text()) | {decoder.SETTINGS: {"instruction": "Say: "}}
    Path(source, "config.json").write_text(json.dumps(config))
    model = loaded(source)
    masked.save(model, dict(model.named_parameters()), source, tmp_path / "out", None)
    assert family_of(out) is None
    ids = torch.tensor([[25, 31, 92, 11]])
    causal = AutoModelForCausalLM.from_pretrained(out).eval()
    places, packed = torch.arange(4), pack([Encoded(ids[0].numpy().astype(np.int32))])
    targets = causal(ids, use_cache=False).logits[0].argmax(1)
    assert model(packed, False, torch.stack([places, targets]))[0, 1] == 4
    assert model(packed, False, torch.stack([places, (targets + 1) % model.vocabulary]))[0, 1] == 0
    assert torch.equal(TextEncoder.load(out, torch.float32)(packed), model(packed))
    assert (tmp_path / "out/README.md").read_text().count(f"ids[0, 3] = {model.mask_token}\n") == 1
    assert AutoTokenizer.from_pretrained(out).convert_ids_to_tokens(model.mask_token) == "_"


def test_decoder_without_lm_head_is_refused(tmp_path):
    decoder.build(SIZES, ["a red star"], seed=1, folder=tmp_path)
    with pytest.raises(PipelineError, match=r"lacks 1 of the model's weights, lm_head\.weight"):
        MaskedLanguageModel.load(str(tmp_path), torch.float32)


def test_step_uses_one_caption_of_an_image_and_both_of_a_text_pair():
    kind, recipe = training("text_encoder", "masked_next_token"), load_recipe("demo_masked.yaml")
    image = Pair("0", "d", "", Item("<image>", (b"...",)), Item("one"), (Item("no"),), ("two",))
    for number, name in enumerate(("one", "two")):
        assert kind.trained_on(recipe, image, lambda count, number=number: number).items == (Item(name), Item(name))
    texts = Pair("1", "d", "", Item("one"), Item("two"))
    assert kind.trained_on(recipe, texts, lambda count: 0) == texts


@pytest.mark.parametrize(
    ("recipe", "override", "named"),
    [
        ("demo_masked", "objective.alpha=1", "unknown field objective.alpha; "),
        ("demo_masked", "batch.kept_chunks=auto", "batch.kept_chunks is not for objective.name=masked_next_token"),
        ("demo_masked", "batch.sub_batch=8", "batch.sub_batch is not for objective.name=masked_next_token"),
        ("demo_masked", "data.teacher=beside", "data.teacher is not for objective.name=masked_next_token"),
        (
            "demo_masked",
            "objective.mask_random=0.95",
            "objective.mask_random=0.95 and objective.mask_kept=0.1 are more than 1",
        ),
        ("demo_caption", "objective.mask_rate=0.3", "unknown field objective.mask_rate; "),
    ],
)
def test_fields_of_another_objective_are_refused(recipe, override, named):
    with pytest.raises(PipelineError) as error:
        load_recipe(f"pipeline/recipes/{recipe}.yaml", [override])
    assert named in str(error.value)


def test_recipe_matches_published_hyperparameters():
    ours = load_recipe("pipeline/recipes/masked_next_token.yaml", [])
    mistral = load_recipe("pipeline/recipes/masked_next_token.yaml", ["variant=mistral"])
    assert (ours.objective.mask_rate, ours.objective.mask_random, ours.objective.mask_kept) == (0.2, 0.1, 0.1)
    assert (mistral.objective.mask_rate, mistral.objective.mask_random, mistral.objective.mask_kept) == (0.8, 0, 0)
    assert (ours.model.max_tokens, ours.steps, ours.model.train.lora.rank, ours.model.train.lora.alpha) == (
        512,
        1000,
        16,
        32,
    )
