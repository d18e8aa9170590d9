"""LLM2CLIP's released vision encoders, converted: compared with the original code and with transformers."""

import json
import math
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close_in_norm
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

from pipeline.config import EvaluationRun
from pipeline.data.sample import Item
from pipeline.errors import PipelineError
from pipeline.evaluation.encoders import load_encoder
from pipeline.models.llm2clip.model import Llm2Clip, TextAdapter
from pipeline.models.llm2clip.weights import convert_released
from pipeline.models.registry import family_of, saved
from pipeline.models.text_encoder import model as decoder
from pipeline.models.vision import Pixels

PAPERS = Path(__file__).parents[1] / "papers" / "llm2clip"
CPU = torch.device("cpu")
CORPUS = ["a small red star at the top left", "a large blue ring", "ein großer Stern, 一颗星"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
# The layouts' names for the adapter's tensors, and ours.
ADAPTER = (
    (r"(\d)\.ln\.", r"blocks.\1.norm."),
    (r"(\d)\.fn\.0\.", r"blocks.\1.up."),
    (r"(\d)\.fn\.3\.", r"blocks.\1.down."),
    (r"4\.", "norm."),
    (r"5\.", "projection."),
)

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("text_encoder")
    decoder.build(SIZES | {"num_key_value_heads": 2, "vocab_size": 400}, CORPUS, 0, folder)
    return str(folder)


def given(name: str) -> tuple[Tensors, Tensors]:
    """Return the state dict of an original model, and what it gives: see the README in tests/papers/llm2clip."""
    tensors = load_file(PAPERS / name / "model.safetensors")
    state = {key.removeprefix("state."): tensors.pop(key) for key in list(tensors) if key.startswith("state.")}
    return state, tensors


@pytest.fixture(scope="module")
def pixels() -> Tensors:
    return load_file(PAPERS / "pixels.safetensors")


def converted(state: Tensors, text_encoder: str, folder: Path) -> Path:
    torch.save(state, folder / "released.pt")
    convert_released(str(folder / "released.pt"), text_encoder, folder / "converted")
    return folder / "converted"


def refused(message: str, state: Tensors, text_encoder: str, folder: Path) -> None:
    with pytest.raises(PipelineError, match=message):
        converted(state, text_encoder, folder)
    assert not (folder / "converted").exists() and not list(folder.glob(".converted*"))


def eva02_by_hand(folder: Path, images: torch.Tensor) -> torch.Tensor:
    """Embed normalised images with a converted EVA02: its formulas on weights named as in timm, in float64."""
    weights = {name: weight.double() for name, weight in load_file(folder / "model.safetensors").items()}
    sizes = json.loads((folder / "config.json").read_text())["model_args"]
    width, heads, grid = sizes["embed_dim"], sizes["num_heads"], sizes["img_size"] // sizes["patch_size"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    half = width // heads // 2
    places = torch.arange(grid, dtype=torch.float64) * 16 / grid
    rows, columns = (each.flatten() for each in torch.meshgrid(places, places, indexing="ij"))
    rates = 10_000 ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)
    turn = torch.polar(torch.tensor(1.0).double(), torch.cat([rows[:, None] * rates, columns[:, None] * rates], 1))

    def rotated(x: torch.Tensor) -> torch.Tensor:
        """Turn each pair of channels of (n, heads, tokens, channels); the class token, the first, is left alone."""
        pairs = torch.view_as_complex(x[:, :, 1:].unflatten(-1, (-1, 2)).contiguous())
        return torch.cat([x[:, :, :1], torch.view_as_real(pairs * turn).flatten(-2)], 2)

    patches = F.conv2d(
        images.double(), *(weights[f"patch_embed.proj.{part}"] for part in ("weight", "bias")), stride=14
    )
    x = torch.cat([weights["cls_token"].expand(len(images), -1, -1), patches.flatten(2).mT], 1) + weights["pos_embed"]
    for block in (f"blocks.{number}" for number in range(sizes["depth"])):
        inner = norm(x, f"{block}.norm1")
        q, k, v = (linear(inner, f"{block}.attn.{n}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for n in "qkv")
        seen = (rotated(q) @ rotated(k).mT / math.sqrt(width // heads)).softmax(-1) @ v
        x = x + linear(norm(seen.transpose(1, 2).flatten(2), f"{block}.attn.norm"), f"{block}.attn.proj")
        inner = norm(x, f"{block}.norm2")
        hidden = F.silu(linear(inner, f"{block}.mlp.fc1_g")) * linear(inner, f"{block}.mlp.fc1_x")
        x = x + linear(norm(hidden, f"{block}.mlp.norm"), f"{block}.mlp.fc2")
    return F.normalize(linear(norm(x[:, 0], "norm"), "head"), dim=-1)


@torch.no_grad()
def test_eva02_matches_the_original(text_encoder, pixels, tmp_path):
    state, expected = given("eva02")
    folder = converted(state, text_encoder, tmp_path)
    images = torch.stack([pixels[name] for name in sorted(pixels)])
    assert_close_in_norm(eva02_by_hand(folder, images), expected["image_output"], torch.float32)
    sizes = json.loads((folder / "config.json").read_text())["model_args"]
    assert int(sizes["embed_dim"] * sizes["mlp_ratio"]) == 85  # timm's hidden size
    adapter = TextAdapter(32, 24)
    adapter.load_state_dict(load_file(folder / "adapter.safetensors"))
    assert_close_in_norm(adapter(expected["texts"]), expected["text_output"])
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}  # as given


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
@torch.no_grad()
def test_eva02_in_timm_matches_the_original(text_encoder, pixels, tmp_path):
    state, expected = given("eva02")
    folder = converted(state, text_encoder, tmp_path)
    model = Llm2Clip.load(str(folder), torch.float32, 32).eval()
    images = torch.stack([pixels[name] for name in sorted(pixels)])
    assert_close_in_norm(F.normalize(model.images(images), dim=-1), expected["image_output"])
    require_evaluation(folder, expected)


@torch.no_grad()
def test_clip_of_the_original_code_matches(text_encoder, pixels, tmp_path):
    state, expected = given("openai")
    folder = converted(state, text_encoder, tmp_path)
    tower = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32)
    images = torch.stack([pixels[name] for name in sorted(pixels)])
    assert_close_in_norm(F.normalize(tower(images).image_embeds, dim=-1), expected["image_output"])
    model = Llm2Clip.load(str(folder), torch.float32, 32).eval()
    assert_close_in_norm(F.normalize(model.images(images), dim=-1), expected["image_output"])
    assert_close_in_norm(model.adapter(expected["texts"]), expected["text_output"])


def require_evaluation(folder: Path, expected: Tensors) -> None:
    """Compare the evaluation's vectors of the images in tests/papers/llm2clip/images with the original's."""
    assert family_of(str(folder)) is saved("llm2clip")
    encoder = load_encoder(str(folder), EvaluationRun(precision="fp32"), CPU)
    items = [Item("<image>", (file.read_bytes(),)) for file in sorted((PAPERS / "images").iterdir())]
    rows = torch.from_numpy(np.asarray(encoder.embed([encoder.prepare(item) for item in [*items, Item("a red star")]])))
    assert_close_in_norm(rows[:-1].float(), expected["image_output"])
    assert math.isclose(rows[-1].norm(), 1, rel_tol=1e-5)


@pytest.mark.parametrize("name", ["eva02", "openai"])
def test_images_are_prepared_as_in_the_original(name, text_encoder, pixels, tmp_path):
    """The short side to the model's size, bicubic; centre crop; OpenAI's mean and deviation; no EXIF rotation."""
    prepare = Pixels.load(str(converted(given(name)[0], text_encoder, tmp_path)))
    assert prepare.as_stored
    for file in sorted((PAPERS / "images").iterdir()):
        with Image.open(file) as picture:
            tile = torch.from_numpy(prepare.prepare(picture))
        mean, std = (torch.tensor(values)[:, None, None] for values in (prepare.mean, prepare.std))
        assert_close_in_norm((tile / 255 - mean) / std, pixels[file.name], operations=4)
    for spare, left in ((1, 0), (2, 1), (3, 2), (5, 2), (7, 4)):  # torchvision's CenterCrop: round(spare / 2), to even
        columns = np.tile(np.arange(56 + spare, dtype=np.uint8), (56, 1))
        assert prepare.prepare(Image.fromarray(columns))[0, 0, 0] == left


def hub_folder(folder: Path, state: Tensors, **fields: str) -> tuple[CLIPModel, Tensors]:
    """Write a folder as microsoft/LLM2CLIP-Openai-*: CLIP's tower, and TextProj's weights as text_adapter.adaptor.*.

    fields: of vision_config.  Return the CLIP whose tower it is, and the adapter's weights by our names.
    """
    vision = SIZES | {"num_hidden_layers": 2, "image_size": 56, "patch_size": 14} | fields
    torch.manual_seed(0)
    text = SIZES | {"vocab_size": 10}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    weights = {n: t for n, t in clip.state_dict().items() if n.startswith(("vision_model.", "visual_", "logit_"))}
    adapter = {n.removeprefix("text.text_adaptor."): t.float() for n, t in state.items() if n.startswith("text.")}
    weights |= {f"text_adapter.adaptor.{name}": tensor for name, tensor in adapter.items()}
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # earlier versions of transformers save it
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LLM2CLIPModel"],
        "auto_map": {"AutoModel": "modeling_clip.LLM2CLIPModel"},
        "model_type": "clip",
        "projection_dim": 24,
        "text_config": {"hidden_size": 32, "model_type": "clip_text_model"},
        "vision_config": vision | {"model_type": "clip_vision_model", "projection_dim": 512, "torch_dtype": "float32"},
    }
    (folder / "config.json").write_text(json.dumps(config))

    def ours(name: str) -> str:
        return next(re.sub(f"^{theirs}", mine, name) for theirs, mine in ADAPTER if re.match(theirs, name))

    return clip, {ours(name): tensor for name, tensor in adapter.items()}


@pytest.mark.parametrize("fields", [{}, {"hidden_act": "gelu"}])  # by default it is quick_gelu
@torch.no_grad()
def test_folder_in_transformers_layout_matches_transformers(fields, text_encoder, pixels, tmp_path):
    state, expected = given("openai")
    (source := tmp_path / "source").mkdir()
    clip, adapter = hub_folder(source, state, **fields)
    convert_released(str(source), text_encoder, folder := tmp_path / "converted")
    images = torch.stack([pixels[name] for name in sorted(pixels)])
    alone = CLIPVisionModelWithProjection.from_pretrained(folder)
    assert torch.equal(alone(images).image_embeds, clip.get_image_features(pixel_values=images).pooler_output)
    model = Llm2Clip.load(str(folder), torch.float32, 32).eval()
    assert_close_in_norm(model.images(images), alone(images).image_embeds)
    written = load_file(folder / "adapter.safetensors")
    assert written.keys() == adapter.keys() and all(torch.equal(written[name], adapter[name]) for name in adapter)
    assert_close_in_norm(model.adapter(expected["texts"]), expected["text_output"])
    require_evaluation(folder, {"image_output": F.normalize(alone(images).image_embeds, dim=-1)})


def test_tensors_of_another_layout_are_refused(text_encoder, tmp_path):
    state, _ = given("eva02")
    block = "visual.blocks.1.mlp"
    more = state | {f"{block}.w4.weight": state[f"{block}.w3.weight"]}
    refused(r"has 1 tensors that are not of this model: blocks\.1\.mlp\.w4\.weight", more, text_encoder, tmp_path)
    less = {name: tensor for name, tensor in state.items() if name != f"{block}.w3.bias"}
    refused(r"lacks 1 of the model's tensors: blocks\.1\.mlp\.w3\.bias", less, text_encoder, tmp_path)
    cut = state | {f"{block}.w3.bias": torch.ones(31)}
    refused(r"1 tensors of another shape .*: blocks\.1\.mlp\.w3\.bias \[31\] for \[32\]", cut, text_encoder, tmp_path)
    other = state | {"text.transformer.weight": torch.ones(2)}
    refused(r"has 1 tensors that are not of this layout: text\.transformer", other, text_encoder, tmp_path)
    gap = {name.replace("blocks.1.", "blocks.2."): tensor for name, tensor in state.items()}
    refused(r"its blocks blocks\.\* are \[0, 2\]", gap, text_encoder, tmp_path)
    plain = state | {"visual.rope.freqs_cos": state["visual.rope.freqs_cos"].roll(1, 0)}
    refused(r"rope\.freqs_cos is not the table of rotary positions of a grid of 4x4", plain, text_encoder, tmp_path)
    mixed = state | {"text.text_adaptor.4.weight": torch.ones(31)}
    refused(r"\(its adapter\) has 1 tensors of another shape .*norm\.weight", mixed, text_encoder, tmp_path)
    blocks = {name.replace("adaptor.3.", "adaptor.6."): tensor for name, tensor in state.items()}
    refused(r"\(its adapter\) lacks 6 of the model's tensors: blocks\.3", blocks, text_encoder, tmp_path)
    alone = {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
    refused(r"has no tensors text\.text_adaptor\.\*", alone, text_encoder, tmp_path)
    timm = {name.replace("visual.", "visual.trunk."): tensor for name, tensor in state.items()}
    refused(r"its tower is neither EVA02 nor OpenAI's CLIP", timm, text_encoder, tmp_path)


def test_another_text_encoder_or_folder_is_refused(text_encoder, tmp_path):
    state, _ = given("eva02")
    sizes = SIZES | {"hidden_size": 64, "num_key_value_heads": 2, "vocab_size": 400}
    decoder.build(sizes, CORPUS, 0, wide := tmp_path / "wide")
    refused(r"text vectors 32 wide; those of .*wide are 64 wide", state, str(wide), tmp_path)
    (source := tmp_path / "source").mkdir()
    hub_folder(source, state)
    config = json.loads((source / "config.json").read_text())
    for changed in ({"model_type": "evaclip"}, {"architectures": ["EvaCLIPModel"]}, {"vision_config": None}):
        (source / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(PipelineError, match=r"is not supported; .* name the \.pt file"):
            convert_released(str(source), text_encoder, tmp_path / "out")
    (source / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    for changed, message in (
        (weights | {"text_projection.weight": torch.ones(24, 32)}, r"1 tensors .* not of this model: text_projection"),
        ({n: t for n, t in weights.items() if not n.startswith("text")}, r"\(its adapter\): 5\.weight is missing"),
        (weights | {"visual_projection.weight": torch.ones(24, 16)}, r"visual_projection\.weight \[24, 16\] for"),
    ):
        save_file(changed, source / "model.safetensors", {"format": "pt"})
        with pytest.raises(PipelineError, match=message):
            convert_released(str(source), text_encoder, tmp_path / "out")
    converted(state, text_encoder, tmp_path)
    with pytest.raises(PipelineError, match=r"converted is there already"):
        converted(state, text_encoder, tmp_path)
