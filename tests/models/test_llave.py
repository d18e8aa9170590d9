import io
import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close_in_norm
from PIL import Image as Picture
from transformers import AutoTokenizer, LlavaOnevisionImageProcessorPil, LlavaOnevisionModel

from pipeline.data.sample import BadSample, Item
from pipeline.data.tiles import Tiling
from pipeline.data.video import sample_frames
from pipeline.errors import PipelineError
from pipeline.models.checkpointing import checkpoint_layers
from pipeline.models.chunks import pack
from pipeline.models.llave.checks import config_of_architecture
from pipeline.models.llave.config import LlaveArchitecture
from pipeline.models.llave.folder import save_folder
from pipeline.models.llave.model import Llave
from pipeline.models.llave.processor import SUFFIX, LlaveProcessor, prompt

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
MARK = -200  # the original code's placeholder of an image


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Picture.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def mp4(width: int, height: int, frames: int, seed: int = 0) -> bytes:
    buffer, rng = io.BytesIO(), np.random.default_rng(seed)
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5, width=width, height=height, pix_fmt="yuv420p")
        for _ in range(frames):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return [
        Item("red star"),
        Item("<image>\nRepresent the image.", (png(48, 48),)),
        Item("a longer text " * 9),
        Item("<image>\nFind the caption.", (png(24, 30),)),
        Item("<image>\nwide", (png(90, 31),)),
        Item("<image>\na thread", (png(2000, 1),)),
        Item("between <image> and <image> two", (png(24, 30), png(40, 20))),
        Item("<video>\nWhat moves?", video=mp4(64, 32, 20)),
        Item("<video> short, after it <image>", (png(48, 48),), mp4(16, 48, 3)),
        Item("<image> and then <video>", (png(30, 48),), mp4(32, 32, 9, seed=1)),
    ]


@pytest.mark.parametrize("case", CASES)
def test_prompts_and_token_ids_match_golden_cases(case):
    assert prompt(case["text"]) == case["prompt"]
    tiling = Tiling(size=16, patches=2, pinpoints=((16, 16),))
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN)
    processor = LlaveProcessor(tokenizer, tiling, image_token_id=MARK, video_token_id=MARK - 1, max_tokens=4096)
    images = (png(16, 16),) * case["text"].count("<image>")
    ids = processor.encode(Item(case["text"], images)).input_ids.tolist()
    # The original uses one placeholder per image, this project one per token.
    collapsed = [token for i, token in enumerate(ids) if token != MARK or ids[i - 1] != MARK]
    assert collapsed == case["input_ids"]


def test_tiles_and_embeddings_match_transformers(tiny_model, items):
    processor, model = LlaveProcessor.load(tiny_model, 512), Llave.load(tiny_model, torch.float32).eval()
    theirs = LlavaOnevisionModel.from_pretrained(tiny_model).eval()
    raw = LlavaOnevisionImageProcessorPil.from_pretrained(tiny_model, do_rescale=False, do_normalize=False)
    floats = LlavaOnevisionImageProcessorPil.from_pretrained(tiny_model)
    with torch.no_grad():
        embeddings = model(pack([processor.encode(item) for item in items]), True)
        for item, embedding in zip(items, embeddings, strict=True):
            encoded, inputs = processor.encode(item), {}
            if item.images:
                pictures = [Picture.open(io.BytesIO(image)).convert("RGB") for image in item.images]
                ours = [image for image in encoded.images if not image.video]
                for image, tiles in zip(ours, raw([pictures])["pixel_values"], strict=True):
                    assert np.array_equal(image.tiles, tiles[: len(image.tiles)])
                inputs = dict(floats([pictures], return_tensors="pt"))
            if item.video:
                inputs["pixel_values_videos"] = video_pixels(item.video, frames=8, size=24)
            ids = torch.from_numpy(encoded.input_ids).long()[None]
            hidden = theirs(input_ids=ids, use_cache=False, **inputs).last_hidden_state
            assert_close_in_norm(F.normalize(hidden[0, -1], dim=-1), embedding)


def video_pixels(data: bytes, frames: int, size: int) -> torch.Tensor:
    """Return the pixels that transformers' LlavaOnevisionVideoProcessor, which needs torchvision, computes."""
    pictures = [frame.resize((size, size), Picture.Resampling.BICUBIC) for frame in sample_frames(data, frames)]
    pixels = np.stack([np.asarray(picture) for picture in pictures]).astype(np.float32)
    return torch.from_numpy((pixels / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)[None]


def test_video_only_chunk_trains_the_parameters_of_an_image_chunk(tiny_model, items):
    processor, model = LlaveProcessor.load(tiny_model, 512), Llave.load(tiny_model, torch.float32)
    trained = {}
    for name, item in (("text", items[0]), ("image", items[1]), ("video", items[7])):
        model.zero_grad(set_to_none=True)
        model(pack([processor.encode(item)]), True).sum().backward()
        trained[name] = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained["video"] == trained["image"] == trained["text"]


@pytest.mark.parametrize("frozen", [(), ("language_model.embed_tokens",), ("language_model", "vision_tower")])
def test_activation_checkpointing_recomputes_layers_for_equal_gradients(tiny_model, items, frozen):
    processor, model = LlaveProcessor.load(tiny_model, 512), Llave.load(tiny_model, torch.float32)
    packed = pack([processor.encode(item) for item in items])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    runs, layers = [], [*model.language_model.layers, *model.vision_tower.encoder.layers]
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    found = []
    for _ in range(2):
        with torch.no_grad():
            without = model(packed, True)
        assert runs == [False] * len(layers)
        runs.clear()
        embeddings = model(packed, True)
        assert torch.equal(embeddings, without)
        embeddings[:, :3].sum().backward()
        found.append((len(runs), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
        runs.clear()
        checkpoint_layers(model)
    assert model.language_model.embed_tokens(packed.input_ids).requires_grad == (not frozen)
    (once, expected), (twice, gradients) = found
    assert once == len(layers)
    # A frozen tower needs no backward pass.
    assert twice == len(layers) + (2 if "vision_tower" in frozen else len(layers))
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_sdpa_pads_and_varlen_does_not(tiny_model):
    assert Llave.load(tiny_model, torch.float32, attention="sdpa").pads
    assert not Llave.load(tiny_model, torch.float32, attention="varlen").pads


def test_video_frames_setting_determines_tiles_and_placeholders(tiny_model, items):
    placeholder = AutoTokenizer.from_pretrained(tiny_model).convert_tokens_to_ids("<video>")
    for frames in (1, 3, 8):
        encoded = LlaveProcessor.load(tiny_model, 512, video_frames=frames).encode(items[7])
        assert encoded.images[0].tiles.shape == (frames, 3, 24, 24)
        assert (encoded.input_ids == placeholder).sum() == frames * 2 * 2 + 1  # 3x3 patches pooled 2x2


def test_packed_item_does_not_depend_on_its_neighbours(tiny_model, items):
    processor, model = LlaveProcessor.load(tiny_model, 512), Llave.load(tiny_model, torch.float32).eval()
    encoded = [processor.encode(item) for item in items]
    with torch.no_grad():
        alone = torch.cat([model(pack([one]), True) for one in encoded])
        together = model(pack(encoded[::-1]), True).flip(0)
    assert_close_in_norm(together, alone)


def test_long_text_is_truncated_before_the_prompt_suffix(tiny_model):
    whole, cut = (LlaveProcessor.load(tiny_model, n).encode(Item("star " * 200)).input_ids for n in (4096, 64))
    end = len(LlaveProcessor.load(tiny_model, 64).tokenizer(SUFFIX)["input_ids"])
    assert len(cut) == 64 < len(whole)
    assert cut[-end:].tolist() == whole[-end:].tolist()
    assert cut[:-end].tolist() == whole[: 64 - end].tolist()


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (Item("<image>\nbroken", (b"no image",)), "undecodable"),
        (Item("<image> <image>", (png(8, 8),)), "2 <image> marks in the text, 1 images"),
        (Item("<image>\nbig", (png(48, 48),)), "its images or video do not fit in max_tokens"),
        (Item("<image>\ncut off", (png(48, 48)[:500],)), "undecodable"),
        (Item("<video>", video=b""), "not a video in one of the formats"),
        (Item("<video>"), "1 <video> marks in the text, 0 videos"),
        (Item("no mark", video=mp4(16, 16, 1)), "0 <video> marks in the text, 1 videos"),
        (Item("<video> <video>", video=mp4(16, 16, 1)), "2 <video> marks in the text, 1 videos"),
        (Item("<image>", (png(8, 8),) * 2), "1 <image> marks in the text, 2 images"),
        (
            Item("<image> " + "star " * 20 + "<video>", (png(8, 8),), mp4(16, 16, 1)),
            "its images or video do not fit in max_tokens",
        ),
    ],
)
def test_unusable_items_raise_bad_sample(tiny_model, item, reason):
    with pytest.raises(BadSample, match=reason):
        LlaveProcessor.load(tiny_model, 60).encode(item)


def test_saved_folder_loads_in_llave_and_in_transformers(tiny_model, items, tmp_path):
    model = Llave.load(tiny_model, torch.float32)
    with torch.no_grad():
        model.image_newline.add_(1)
    save_folder(model, dict(model.named_parameters()), tiny_model, tmp_path / "saved")
    again = Llave.load(str(tmp_path / "saved"), torch.float32)
    theirs = LlavaOnevisionModel.from_pretrained(tmp_path / "saved")
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter, dict(model.named_parameters())[name], atol=0, rtol=0)
        torch.testing.assert_close(parameter, dict(again.named_parameters())[name], atol=0, rtol=0)
    encoded = LlaveProcessor.load(str(tmp_path / "saved"), 512).encode(items[1])
    assert np.array_equal(encoded.input_ids, LlaveProcessor.load(tiny_model, 512).encode(items[1]).input_ids)
    assert json.loads((tmp_path / "saved/config.json").read_text())["architectures"] == ["LlavaOnevisionModel"]


@pytest.mark.parametrize(
    ("part", "key", "named"),
    [
        ("text", "hidden_sise", "did you mean hidden_size"),
        ("vision", "layers", "model.architecture.vision.layers"),
        ("text", None, "vocab_size is missing"),
    ],
)
def test_unknown_or_missing_architecture_field_is_refused(part, key, named):
    parts = {"vision": {"image_size": 8}, "text": {"vocab_size": 300} if key else {"hidden_size": 8}}
    if key:
        parts[part] = parts[part] | {key: 7}
    with pytest.raises(PipelineError, match=named):
        config_of_architecture(LlaveArchitecture(**parts, image_grid_pinpoints=[(8, 8)]))


def test_missing_model_and_missing_weights_raise(tiny_model, tmp_path):
    with pytest.raises(PipelineError, match="no model at"):
        Llave.load(str(tmp_path / "nothing"), torch.float32)
    model = Llave.load(tiny_model, torch.float32)
    weights = dict(model.named_parameters())
    del weights["multi_modal_projector.linear_1.weight"]
    save_folder(model, weights, tiny_model, tmp_path / "partial")
    with pytest.raises(PipelineError, match="lacks 1 of the model's weights"):
        Llave.load(str(tmp_path / "partial"), torch.float32)
