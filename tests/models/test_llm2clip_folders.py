"""Folders of LLM2CLIP's stages and of CLIP: in transformers alone, in the Embedder, and in the evaluation."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close_in_norm
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizer,
)

from pipeline.config import EvaluationRun, Lora
from pipeline.data.sample import Item
from pipeline.embedding.embedder import Embedder
from pipeline.errors import PipelineError
from pipeline.evaluation.encoders import load_encoder
from pipeline.models.clip import model as clip
from pipeline.models.clip.config import ClipArchitecture
from pipeline.models.llm2clip import model as llm2clip
from pipeline.models.lora import add_adapters, merge_adapters
from pipeline.models.registry import family_of, saved
from pipeline.models.text_encoder import model as decoder
from pipeline.models.text_encoder.model import TextEncoder
from pipeline.models.text_encoder.processor import Settings
from pipeline.models.vision import VisionEncoder

CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = SIZES | {"image_size": 24, "patch_size": 8, "projection_dim": 20}
CORPUS = ["a small red star at the top left", "a large blue ring", "what a caption shows: ein großer Stern, 一颗星"]
INSTRUCTIONS = {
    "llama": "what a caption shows: ",
    "qwen2": "what a caption shows: ",
    "llama-plain": "",
    "qwen2-plain": "",
}
TEXTS = ["a red star", "ein großer blauer Ring", "a large blue ring at the top left, " * 80, "a"]


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Set biases to nonzero and norms to non-one values, so that every weight affects the result."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, tuple[Path, TextEncoder]]:
    """Return folders of text encoders, and the models with adapters that were saved there."""
    root, lora = tmp_path_factory.mktemp("encoders"), Lora(rank=2)
    torch.manual_seed(0)
    made = {}
    for name, instruction in INSTRUCTIONS.items():
        base = root / f"{name}-base"
        if name.startswith("llama"):
            tokenizer = LlamaTokenizer().train_new_from_iterator(CORPUS, 300, show_progress=False)
            tokenizer.add_bos_token = True
            config = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=len(tokenizer))
            LlamaModel(config).save_pretrained(base)
            tokenizer.save_pretrained(base)
        else:
            decoder.build(SIZES | {"num_key_value_heads": 2, "vocab_size": 400}, CORPUS, 0, base)
        model = TextEncoder.load(str(base), torch.float32)
        add_adapters(model.language_model, lora, seed=0)
        randomised(model)
        merged = merge_adapters(dict(model.named_parameters()), lora)
        plain = TextEncoder.load(str(base), torch.float32)
        decoder.save(plain, merged, str(base), root / name, "someone/decoder", Settings(instruction=instruction))
        made[name] = root / name, model.eval()
    return made


@pytest.fixture(scope="module")
def folder(encoders, tmp_path_factory) -> Path:
    base, folder = (tmp_path_factory.mktemp("llm2clip") / name for name in ("base", "trained"))
    randomised(VisionEncoder.build(VISION, 20, 0)).save(base)
    model = randomised(llm2clip.Llm2Clip.load(str(base), torch.float32, width=32))
    llm2clip.save(model, str(encoders["llama"][0]), folder, None)
    return folder


def test_dimension_replaces_the_projection_unless_it_is_trained(folder, encoders, tmp_path):
    base = tmp_path / "base"
    VisionEncoder.build(VISION, 20, 0).save(base)
    model = llm2clip.Llm2Clip.load(str(base), torch.float32, width=32, dimension=48)
    assert model.dimension == model.vision.dimension == model.adapter.projection.out_features == 48
    llm2clip.save(model, str(encoders["llama"][0]), tmp_path / "saved", None)
    for dimension in (None, 48):  # an export continues with its own projection
        again = llm2clip.Llm2Clip.load(str(tmp_path / "saved"), torch.float32, width=32, seed=1, dimension=dimension)
        assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in again.state_dict().items())
    with pytest.raises(PipelineError, match=r"is an LLM2CLIP of 20 dimensions: set model\.dimension to that"):
        llm2clip.Llm2Clip.load(str(folder), torch.float32, width=32, dimension=48)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    base, folder = (tmp_path_factory.mktemp("clip") / name for name in ("base", "trained"))
    text = SIZES | {"vocab_size": 600, "max_position_embeddings": 20}
    clip.build(ClipArchitecture(vision=VISION, text=text), CORPUS, 0, base)
    clip.save(randomised(clip.Clip.load(str(base), torch.float32)), str(base), folder)
    return folder


def picture(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def run_example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Run the code of a folder's README inside the folder; return its names."""
    code, *_ = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(code, names)
    return names


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_text_encoder_readme_example_matches_embedder(name, encoders, monkeypatch):
    folder, trained = encoders[name]
    embed = run_example(folder, monkeypatch)["embed"]
    expected = torch.stack([embed(text) for text in TEXTS])
    assert_close_in_norm(Embedder.load(folder).embed(TEXTS), expected)
    processor = decoder.TextProcessor.load(str(folder), 4096)
    adapted = Embedder(trained, processor, CPU, 4096, instructed=False)
    assert_close_in_norm(adapted.embed(TEXTS), expected)
    assert abs(expected[0] @ expected[1]) < 0.999  # otherwise the comparison would prove nothing


def by_hand(folder: Path, text: str) -> torch.Tensor:
    """Embed a text with transformers' classes and the adapter's formula, in float64."""
    instruction = INSTRUCTIONS["llama"]
    encoder = AutoModel.from_pretrained(folder / "text_encoder", attn_implementation="eager").double().eval()
    assert encoder.config.is_causal is False
    tokenizer = AutoTokenizer.from_pretrained(folder / "text_encoder")
    before, ids = tokenizer(instruction)["input_ids"], tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
    hidden = encoder(torch.tensor([before + ids]), use_cache=False).last_hidden_state[0, len(before) :]
    weights = {name: weight.double() for name, weight in load_file(folder / "adapter.safetensors").items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    x = F.normalize(hidden.mean(0), dim=0)
    for block in (f"blocks.{number}" for number in range(4)):
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm"), f"{block}.up")), f"{block}.down")
    return F.normalize(linear(norm(x, "norm"), "projection"), dim=0)


@torch.no_grad()
def test_llm2clip_embeddings_match_manual_computation(folder, tmp_path):
    first, second = picture(), picture(31, 90)
    second.save(tmp_path / "second.png")
    items = [TEXTS[0], first, tmp_path / "second.png", TEXTS[2], {"images": [first, second]}, TEXTS[1]]
    embedder = Embedder.load(folder)
    rows = embedder.embed(items)
    assert rows.dtype == torch.float32 and embedder.dimension == 20
    tower = CLIPVisionModelWithProjection.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = torch.from_numpy(np.stack(processor([first, second])["pixel_values"]))
    alone = tower(pixels).image_embeds
    assert_close_in_norm(embedder.model.images(pixels), alone)
    found = AutoModel.from_pretrained(folder)
    assert torch.equal(found(pixels).pooler_output, tower.vision_model(pixels).pooler_output)
    one, other = F.normalize(tower.double()(pixels.double()).image_embeds, dim=-1)
    said = [by_hand(folder, text) for text in TEXTS[:3]]
    expected = [said[0], one, other, said[2], F.normalize(one + other, dim=0), said[1]]
    assert_close_in_norm(rows, torch.stack(expected))
    few = Embedder.load(folder, chunk_tokens=1).embed(items)
    assert_close_in_norm(few, rows)


def test_text_with_image_in_one_item_is_refused(folder, clip_folder, encoders):
    for path in (folder, clip_folder):
        with pytest.raises(PipelineError, match="item 1: a text beside an image: for this model they are two items"):
            Embedder.load(path).embed(["a red star", {"text": "a red star", "images": [picture()]}])
    with pytest.raises(PipelineError, match="item 0: the model reads texts alone"):
        Embedder.load(encoders["llama"][0]).embed([picture()])


def test_llm2clip_readme_example_matches_embedder(folder, monkeypatch):
    shutil.copytree(folder, copy := folder.with_name("copy"))
    picture().save(copy / "star.png")
    embeddings = run_example(copy, monkeypatch)["embeddings"]
    assert_close_in_norm(embeddings, Embedder.load(folder).embed(["a red star", picture()]))


def test_evaluation_matches_embedder_for_each_family(folder, clip_folder, encoders, tmp_path):
    """Evaluation and Embedder give the same vectors, although CLIP has a separate encoder there."""
    picture().save(tmp_path / "image.png")
    image = Item("<image>", ((tmp_path / "image.png").read_bytes(),))
    for path, kind in ((encoders["qwen2"][0], "text_encoder"), (folder, "llm2clip"), (clip_folder, "clip")):
        assert family_of(str(path)) is saved(kind)
        encoder, embedder = load_encoder(str(path), EvaluationRun(), CPU), Embedder.load(path)
        items, given = [Item(text) for text in TEXTS], list(TEXTS)
        if kind != "text_encoder":
            items, given = [image, *items], [picture(), *given]
        assert encoder.dimension == embedder.dimension and not encoder.instructed
        rows = encoder.embed([encoder.prepare(item) for item in items])
        assert_close_in_norm(rows, embedder.embed(given))


def changed(folder: Path, copy: Path, file: str) -> str:
    """Return the identity of a copy in which a file's last number is changed."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / file)
    last = weights[max(weights)].flatten()[-1:]
    last += 1
    save_file(weights, copy / file, metadata={"format": "pt"})
    return identity(copy)


def identity(folder: Path, **options: int) -> str:
    return load_encoder(str(folder), EvaluationRun(**options), CPU).identity


def test_encoder_identity_depends_on_all_parts(folder, clip_folder, encoders, tmp_path):
    """Otherwise an evaluation would reuse another model's stored vectors."""
    files = ("model.safetensors", "adapter.safetensors", "text_encoder/model.safetensors")
    found = [changed(folder, tmp_path / str(number), file) for number, file in enumerate(files)]
    found += [identity(folder), identity(folder, max_tokens=64)]
    shutil.copytree(folder, other := tmp_path / "other")
    config = json.loads((other / "text_encoder/config.json").read_text())
    config["text_encoder"]["instruction"] = "another"
    (other / "text_encoder/config.json").write_text(json.dumps(config))
    found += [identity(other), identity(clip_folder), *(identity(encoders[name][0]) for name in INSTRUCTIONS)]
    assert len(set(found)) == len(found)
    shutil.copytree(folder, tmp_path / "same")
    assert identity(tmp_path / "same") == identity(folder)
