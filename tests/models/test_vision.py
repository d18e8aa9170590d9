"""Vision encoders compared with transformers' classes, and their pixels with its image processors."""

import io
import json
import logging
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close_in_norm
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionModel,
)

from pipeline.data.dataset import Dataset
from pipeline.data.order import Order
from pipeline.data.sample import BadSample, Item
from pipeline.data.tiles import decode_image
from pipeline.errors import PipelineError
from pipeline.models.checkpointing import checkpoint_layers
from pipeline.models.patches import embed_bytes
from pipeline.models.vision import Pixels, RandomCrops, VisionEncoder, shape_of

CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SIZES | {"image_size": 24, "patch_size": 8}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
ALONE = {"clip": CLIPVisionModelWithProjection, "siglip": SiglipVisionModel}


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Set biases to nonzero and norms to non-one values, so that every weight affects the result."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("towers")
    clip = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=20))
    randomised(clip).save_pretrained(root / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24).save_pretrained(root / "clip")
    randomised(SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))).save_pretrained(root / "siglip")
    SiglipImageProcessorPil(size={"height": 24, "width": 24}, resample=2).save_pretrained(root / "siglip")
    return {kind: str(root / kind) for kind in ("clip", "siglip")}


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "dimension", "tokens"), [("clip", 20, 10), ("siglip", 32, 9)])
@torch.no_grad()
def test_embeddings_match_model_with_both_towers(both, pixels, kind, dimension, tokens, dtype):
    encoder, pixels = VisionEncoder.load(both[kind], dtype), pixels.to(dtype)
    whole = {"clip": CLIPModel, "siglip": SiglipModel}[kind].from_pretrained(both[kind], dtype=dtype)
    vectors = encoder(pixels)
    assert torch.equal(vectors, whole.get_image_features(pixel_values=pixels).pooler_output)
    assert vectors.dtype == dtype and vectors.shape == (3, encoder.dimension) == (3, dimension)
    assert encoder.tokens == tokens


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_saved_tower_loads_in_transformers_and_vision_encoder(both, pixels, kind, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    encoder = VisionEncoder.load(both[kind], torch.float32)
    assert "UNEXPECTED" not in caplog.text
    encoder.save(tmp_path)
    stored = {name for name in load_file(Path(both[kind], "model.safetensors")) if name.startswith("vis")}
    assert set(load_file(tmp_path / "model.safetensors")) == stored
    alone = ALONE[kind].from_pretrained(tmp_path)
    assert alone.config.architectures == [ALONE[kind].__name__]
    vectors = encoder(pixels)
    assert torch.equal(getattr(alone(pixels), "image_embeds" if kind == "clip" else "pooler_output"), vectors)
    found, inner = AutoModel.from_pretrained(tmp_path), getattr(alone, "vision_model", alone)
    assert torch.equal(found(pixels).pooler_output, inner(pixels).pooler_output)
    assert torch.equal(VisionEncoder.load(str(tmp_path), "auto")(pixels), vectors)
    assert Pixels.load(str(tmp_path)) == Pixels.load(both[kind])


def shapes(encoder: VisionEncoder) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in encoder.named_parameters()}


def test_random_weights_depend_on_seed_and_are_saved(pixels, tmp_path):
    encoder, same, other = (VisionEncoder.build(VISION, 20, seed) for seed in (1, 1, 2))
    assert torch.equal(encoder(pixels), same(pixels)) and not torch.equal(encoder(pixels), other(pixels))
    encoder.save(tmp_path)
    assert torch.equal(VisionEncoder.load(str(tmp_path), torch.float32)(pixels), encoder(pixels))
    assert (made := Pixels.load(str(tmp_path))).size == made.edge == 24
    assert shapes(shape_of(str(tmp_path))) == shapes(encoder)
    with pytest.raises(PipelineError, match=r"model.architecture.vision.patchsize; did you mean patch_size"):
        VisionEncoder.build({"patchsize": 8}, 20, 0)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_activation_checkpointing_recomputes_layers_for_equal_gradients(both, pixels, kind):
    encoder, runs = VisionEncoder.load(both[kind], torch.float32), []
    for layer in getattr(encoder.tower, "vision_model", encoder.tower).encoder.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients() -> dict[str, torch.Tensor]:
        runs.clear()
        encoder.zero_grad()
        encoder(pixels).square().sum().backward()
        return {name: parameter.grad for name, parameter in encoder.named_parameters()}

    plain = gradients()
    assert len(runs) == 2 and all(gradient is not None for gradient in plain.values())
    checkpoint_layers(encoder)
    torch.testing.assert_close(gradients(), plain, rtol=0, atol=0)
    assert len(runs) == 4


PICTURES = [
    ("RGB", 24, 24),
    ("RGB", 61, 40),
    ("RGB", 17, 95),
    ("RGBA", 33, 70),
    ("L", 25, 90),
    ("P", 48, 31),
    ("1", 9, 9),
]


def picture(mode: str, width: int, height: int) -> Image.Image:
    bands = np.random.default_rng(width).integers(0, 256, (height, width, 4), dtype=np.uint8)
    rgba = Image.fromarray(bands, "RGBA")
    if mode == "P":  # as read from a file, with a transparent colour
        file = io.BytesIO()
        rgba.convert("RGB").quantize(16).save(file, "PNG", transparency=3)
        return Image.open(file)
    return rgba if mode == "RGBA" else rgba.convert("RGB").convert(mode)


SQUARE = {"height": 24, "width": 24}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("clip", {"size": {"shortest_edge": 24}, "crop_size": SQUARE}),
        ("clip", {"size": {"shortest_edge": 29}, "crop_size": SQUARE, "resample": 2}),
        ("clip", {"size": {"height": 31, "width": 31}, "crop_size": SQUARE, "image_mean": [0, 0, 0.5]}),
        ("siglip", {"size": SQUARE}),
        ("siglip", {"size": SQUARE, "resample": 2}),
    ],
)
def test_pixels_match_image_processor(both, tmp_path, kind, settings):
    processor = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}[kind](**settings)
    ours = prepared_by(both[kind], processor, tmp_path)
    for shape in PICTURES:
        tile = ours.prepare(picture(*shape))
        theirs = processor(picture(*shape), do_rescale=False, do_normalize=False)["pixel_values"][0]
        assert tile.dtype == np.uint8 and tile.flags.c_contiguous
        assert np.array_equal(tile, theirs), shape
        floats = torch.from_numpy(processor(picture(*shape))["pixel_values"][0])[None]
        assert_close_in_norm(normalised(ours, tile), floats[0])


def normalised(pixels: Pixels, tile: np.ndarray) -> torch.Tensor:
    """Return a tile (3, size, size) as the patch embedding sees it."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (pixels.mean, pixels.std))
    return (torch.from_numpy(tile) / 255 - mean) / std


def prepared_by(model: str, processor: PreTrainedModel, folder: Path) -> Pixels:
    """Load the pixels' settings from a folder with the model's config and this image processor."""
    (folder / "config.json").write_bytes(Path(model, "config.json").read_bytes())
    processor.save_pretrained(folder)
    return Pixels.load(str(folder))


TIMM = {
    "architecture": "eva02_base_patch16_clip_224",
    "num_classes": 20,
    "pretrained_cfg": {
        "input_size": [3, 24, 24],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
    },
}


def test_timm_pixels_are_center_cropped(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    ours = Pixels.load(str(tmp_path))
    assert (ours.size, ours.edge, ours.mean, ours.std) == (24, 26, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    for width, height in ((40, 26), (26, 27), (29, 26), (31, 26), (26, 26)):
        shown, begins = picture("RGB", width, height), (round((height - 24) / 2), round((width - 24) / 2))
        expected = np.asarray(shown)[begins[0] : begins[0] + 24, begins[1] : begins[1] + 24].transpose(2, 0, 1)
        assert np.array_equal(ours.prepare(shown), expected)  # the shorter edge is already 26


PAPERS = Path(__file__).parents[1] / "papers/llm2clip"
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def test_pixels_equal_those_of_published_code():
    """With resize, crop and mean of EVA02-CLIP's config on the hub, at the 56 pixels of the stored tensors."""
    pixels = Pixels(56, *OPENAI, 56, keeps_shape=True, resample=Image.Resampling.BICUBIC, to_even=True, as_stored=True)
    expected = load_file(PAPERS / "pixels.safetensors")
    assert len(expected) == 4
    for name, theirs in expected.items():
        shown = decode_image((PAPERS / "images" / name).read_bytes(), as_stored=True)
        assert torch.equal(normalised(pixels, pixels.prepare(shown)), theirs), name


def boxes(scale: tuple[float, float], draws: list[float], *sizes: tuple[int, int]) -> list[tuple[int, ...]]:
    """Return the boxes for images of these sizes.  draws: the first ones, as torchvision would draw them; then 0.5."""
    given = np.array((draws + [0.5] * 22)[:20] + draws[20:] + [0.5] * (2 - len(draws[20:])))
    crops = RandomCrops(scale, lambda content, count: given[:count])
    item = Item("", tuple(bytes([number]) for number in range(len(sizes))))
    return crops.boxes(item, [Image.new("RGB", size) for size in sizes])


def test_random_crops_follow_torchvision():
    """Boxes computed by hand as RandomResizedCrop.get_params does, with its ratio of 3/4 to 4/3."""
    # Area 0.95 of 10,000 at ratio 1: a side of sqrt(9500) = 97.47. Of the offsets 0 to 3, 0.5 draws the third.
    assert boxes((0.9, 1.0), [], (100, 100)) == [(2, 2, 99, 99)]
    # Area 0.9 at ratio 4/3: sqrt(9000 * 4/3) = 109.5 is too wide, so the next draws are taken.
    assert boxes((0.9, 1.0), [0.0, 1.0, 0.0, 0.5], (100, 100)) == [(3, 3, 98, 98)]  # sqrt(9000) = 94.9
    # Area 0.4 at ratio (4/3)^0.5: sqrt(4000 * 1.1547) = 67.96 wide, sqrt(4000 / 1.1547) = 58.86 high.
    corner = [0.0, 0.75, *[0.5] * 18, 0.0, 0.99]
    assert boxes((0.4, 1.0), corner, (100, 100)) == [(32, 0, 100, 59)]
    # No box of 0.9 of the area fits: the largest one in the middle at ratio 4/3 or 3/4.
    assert boxes((0.9, 1.0), [], (400, 20), (20, 400)) == [(186, 0, 213, 20), (0, 186, 20, 213)]


def test_random_crops_cover_their_scale():
    order = Order((Dataset("a", np.array([9])),), 1, 1, 1, 1, seed=0)
    shares, ratios, offsets = [], [], set()
    for step in range(300):
        crops = RandomCrops((0.5, 0.8), partial(order.draw_of_step, step))
        ((left, top, right, bottom),) = crops.boxes(Item("", (b"image",)), [Image.new("RGB", (200, 200))])
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 200
        shares.append((right - left) * (bottom - top) / 40_000)
        ratios.append((right - left) / (bottom - top))
        offsets.add((left, top))
    rounding = 2 * 0.5 / 120  # both sides are rounded, and are at least 122 long
    assert 0.5 * (1 - rounding) <= min(shares) < 0.53 and 0.77 < max(shares) <= 0.8 * (1 + rounding)
    assert 0.75 * (1 - rounding) <= min(ratios) < 0.8 and 1.25 < max(ratios) <= 4 / 3 * (1 + rounding)
    assert len(offsets) > 250


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
@torch.no_grad()
def test_timm_embeddings_and_pixels_match_timm(tmp_path):
    import timm

    config = TIMM | {"model_args": {"embed_dim": 48, "depth": 2, "num_heads": 2, "img_size": 32}}
    config["pretrained_cfg"] = TIMM["pretrained_cfg"] | {"input_size": [3, 32, 32]}
    model = randomised(timm.create_model(TIMM["architecture"], num_classes=20, **config["model_args"])).eval()
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder, pixels = VisionEncoder.load(str(tmp_path), torch.float32), torch.randn(3, 3, 32, 32)
    assert_close_in_norm(encoder(pixels), model(pixels))
    assert (encoder.dimension, encoder.tokens) == (20, 5)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(config["pretrained_cfg"]))
    ours = Pixels.load(str(tmp_path))
    for shape in PICTURES:
        shown = picture(*shape).convert("RGB")
        assert_close_in_norm(normalised(ours, ours.prepare(shown)), transform(shown))
    tile = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    expected = encoder(normalised(ours, tile[0].numpy())[None])
    embed_bytes(encoder, ours.mean, ours.std)
    assert_close_in_norm(encoder(tile), expected)
    encoder.save(tmp_path / "saved")
    again = VisionEncoder.load(str(tmp_path / "saved"), "auto")
    assert torch.equal(again(pixels), encoder(pixels)) and Pixels.load(str(tmp_path / "saved")) == ours
    assert shapes(shape_of(str(tmp_path))) == shapes(encoder)
    again.renew_projection(30, 0)
    again.save(tmp_path / "renewed")
    renewed = VisionEncoder.load(str(tmp_path / "renewed"), "auto")
    assert again.dimension == renewed.dimension == shape_of(str(tmp_path / "renewed")).dimension == 30
    assert torch.equal(renewed(pixels), again(pixels)) and not renewed.tower.timm_model.head.bias.any()
    with torch.enable_grad():
        plain = torch.autograd.grad(encoder(pixels).square().sum(), list(encoder.parameters()))
        checkpoint_layers(encoder)
        again = torch.autograd.grad(encoder(pixels).square().sum(), list(encoder.parameters()))
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


@torch.no_grad()
def test_new_projection_starts_near_zero_and_is_saved(both, pixels, tmp_path):
    """As LLM2CLIP's code makes it: trunc_normal_(std=.02) times init_scale, 0.001, in eva_clip/eva_vit_model.py."""
    encoder, same, other = (VisionEncoder.load(both["clip"], torch.float32) for _ in range(3))
    before = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    for each, seed in ((encoder, 1), (same, 1), (other, 2)):
        each.renew_projection(70, seed)
    weight = encoder.tower.visual_projection.weight
    assert weight.shape == (70, 32) and float(weight.std()) == pytest.approx(2e-5, rel=0.1)  # 7 standard errors
    assert torch.equal(encoder(pixels), same(pixels)) and not torch.equal(encoder(pixels), other(pixels))
    kept = {name: value for name, value in encoder.state_dict().items() if "visual_projection" not in name}
    assert len(kept) == len(before) - 1 and all(torch.equal(value, before[name]) for name, value in kept.items())
    encoder.save(tmp_path)
    again = VisionEncoder.load(str(tmp_path), "auto")
    assert again.dimension == shape_of(str(tmp_path)).dimension == encoder.dimension == 70
    assert torch.equal(again(pixels), encoder(pixels)) and encoder(pixels).shape == (3, 70)
    with pytest.raises(PipelineError, match=r"has no projection, which model\.dimension would replace"):
        VisionEncoder.load(both["siglip"], torch.float32).renew_projection(70, 1)
    with pytest.raises(PipelineError, match=r"has no projection, which model\.dimension would replace"):
        VisionEncoder.check(both["siglip"], new_projection=True)


def test_unusable_folders_and_images_are_refused(both, tmp_path, monkeypatch):
    def write(model: dict | None = None, processor: dict | None = None) -> str:
        """Write a SigLIP folder; `model` replaces config.json, and `processor` updates its image processor's config."""
        (tmp_path / "config.json").write_text(json.dumps(model or config))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | (processor or {})))
        return str(tmp_path)

    def refused(message: str, **given: dict) -> None:
        with pytest.raises(PipelineError, match=message):
            VisionEncoder.load(write(**given), torch.float32)

    def pixels_refused(message: str, **given: dict) -> None:
        with pytest.raises(PipelineError, match=message):
            Pixels.load(write(**given))

    names = ("config.json", "preprocessor_config.json")
    config, settings = (json.loads(Path(both["siglip"], name).read_text()) for name in names)
    with pytest.raises(PipelineError, match=r"no model at .*: it has no config.json"):
        VisionEncoder.load(str(tmp_path), torch.float32)
    refused(r"is a siglip2 model; expected a vision encoder: clip, siglip", model={"model_type": "siglip2"})
    refused(r"no pooling head", model=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False})
    refused(r"has no weights")
    weights = load_file(Path(both["siglip"], "model.safetensors"))
    kept = {name: weight for name, weight in weights.items() if "probe" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    refused(r"lacks 1 of the model's weights, head.probe the first")
    monkeypatch.setitem(sys.modules, "timm", None)
    refused(r"needs timm .*: pip install timm", model=TIMM)
    pixels_refused(r"its image processor is not supported", processor={"do_normalize": False})
    pixels_refused(r"its image processor is not supported", processor={"size": {"height": 24, "width": 32}})
    pixels_refused(r"makes 32 pixels a side, its model takes 24", processor={"size": {"height": 32, "width": 32}})
    framed = TIMM | {"pretrained_cfg": TIMM["pretrained_cfg"] | {"crop_mode": "border"}}
    pixels_refused(r"crop_mode=border .* is not supported", model=framed)
    with pytest.raises(BadSample, match=r"200000x1 pixels, too long"):
        Pixels.load(both["clip"]).prepare(Image.new("RGB", (200_000, 1)))
