"""Compare Qwen-VL with transformers' own models and processors, with the same weights."""

import io
import json
import re
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import eager_kernels
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import OPERATIONS, assert_close_in_norm
from PIL import Image as Picture
from qwen_sizes import SIZES, fields_of
from sections import section
from tokenizers import Tokenizer, processors
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoTokenizer,
    BaseVideoProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from pipeline.config import load_recipe
from pipeline.data.batch import Encoded
from pipeline.data.sample import BadSample, Item
from pipeline.data.video import sample_frames
from pipeline.embedding.embedder import Embedder
from pipeline.errors import PipelineError
from pipeline.models.attention import KINDS as KINDS_OF_ATTENTION
from pipeline.models.attention import head_size
from pipeline.models.checkpointing import checkpoint_layers
from pipeline.models.chunks import CachedFeatures, embed_chunks, pack, plan_chunks
from pipeline.models.qwen_vl import checks
from pipeline.models.qwen_vl import family as family_module
from pipeline.models.qwen_vl.config import QwenVLArchitecture
from pipeline.models.qwen_vl.folder import save_folder
from pipeline.models.qwen_vl.model import FrozenQwenTower, QwenVL, TowerlessQwenVL, build
from pipeline.models.qwen_vl.patches import Grid, Patches, positions
from pipeline.models.qwen_vl.processor import QwenVLProcessor
from pipeline.models.qwen_vl.prompts import PREFIX, PROMPTS, SUFFIX
from pipeline.models.qwen_vl.tower import grid_of, normalised
from pipeline.models.registry import family_of, saved, training

CPU = torch.device("cpu")
LONGER = 4 * OPERATIONS  # eight layers instead of a few, and sums over a thousand patches
# The real ones' ratios: heads of a quarter of the width and less, grouped keys, an MLP of the width times 1.5 to 5, a
# tower narrower than the language model, windows of four tokens a side, deepstack from the first and middle blocks.
TEXT = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 340, "initializer_range": 0.15}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 2, 2]}
VISION = {"hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 56, "num_heads": 2, "patch_size": 4}
VISION |= {"depth": 4, "initializer_range": 0.15}
ARCHITECTURES = {
    "qwen2_vl": {
        "vision": {"embed_dim": 32, "hidden_size": 48, "depth": 3, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
        "text": TEXT | {"rope_parameters": ROPE},
    },
    "qwen2_5_vl": {
        "vision": VISION | {"window_size": 32, "fullatt_block_indexes": [1, 3]},
        "text": TEXT | {"rope_parameters": ROPE},
    },
    "qwen3_vl": {
        "vision": VISION | {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1, 2]},
        "text": TEXT | {"head_dim": 16, "rope_parameters": ROPE | {"mrope_section": [4, 2, 2]}},
    },
}
KINDS = list(ARCHITECTURES)
PROCESSORS = {
    "qwen2_vl": (Qwen2VLProcessor, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLProcessor, Qwen3VLForConditionalGeneration),
}


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Picture.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


ITEMS = [
    Item("red star"),
    Item("<image>\nRepresent the image.", (png(48, 48),)),
    Item("a longer text " * 9),
    Item("<image>\nsmall", (png(9, 5, 1),)),
    Item("<image>\nwide", (png(130, 31, 2),)),
    Item("<image>\na thread", (png(2, 300, 3),)),
    Item("large <image>", (png(150, 132, 4),)),
    Item("between <image> and <image> two", (png(24, 30, 5), png(40, 66, 6))),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Build a model of each version; return their folders."""
    root = tmp_path_factory.mktemp("qwen_vl")
    for kind, architecture in ARCHITECTURES.items():
        given = QwenVLArchitecture(model_type=kind, **architecture)
        build(given, ["a small red star at the top left", "Represent the image."], 1, root / kind)
        with torch.no_grad():  # norms and biases begin as ones and zeros, which would hide where they belong
            model = AutoModel.from_pretrained(root / kind)
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.2)
            model.save_pretrained(root / kind)
    return {kind: str(root / kind) for kind in KINDS}


def theirs_of(folder: str, kind: str, max_pixels: int = 1800 * 8 * 8) -> tuple[Any, Any]:
    """Return transformers' model and processor, which resizes images to 4 tokens to `max_pixels`."""
    processor, _ = PROCESSORS[kind]
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    assert dict(images.size) == {"shortest_edge": 4 * 8 * 8, "longest_edge": max_pixels}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    videos = object.__new__(BaseVideoProcessor)  # to make a real one needs torchvision
    return AutoModel.from_pretrained(folder).eval(), processor(images, tokenizer, videos)


def their_inputs(
    processor: Any, item: Item, instruction: str = "Represent the user's input."
) -> dict[str, torch.Tensor]:
    """Return the inputs that transformers' processor makes of the prompt."""
    text = re.sub(r"<image>\s*", "<|vision_start|><|image_pad|><|vision_end|>", item.text)
    prompt = PREFIX.format(instruction) + text + SUFFIX
    images = [Picture.open(io.BytesIO(each)) for each in item.images]
    return dict(processor(text=[prompt], images=images or None, return_tensors="pt"))


def theirs_embedded(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.normalize(model(**inputs, use_cache=False).last_hidden_state[:, -1].float(), dim=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_patches_embeddings_and_gradients_match_transformers(kind, folders):
    processor, model = QwenVLProcessor.load(folders[kind], 2048), QwenVL.load(folders[kind], torch.float32)
    theirs, their_processor = theirs_of(folders[kind], kind)
    encoded, inputs = [processor.encode(item) for item in ITEMS], [their_inputs(their_processor, i) for i in ITEMS]
    version = checks.VERSIONS[kind]
    mean, std = (np.array(each, np.float32)[:, None, None] for each in (version.mean, version.std))
    for ours, their in zip(encoded, inputs, strict=True):
        assert ours.input_ids.tolist() == their["input_ids"][0].tolist()
        if ours.images:
            tiles = np.concatenate([image.tiles for image in ours.images])
            pixels = np.repeat(((tiles.astype(np.float32) / 255 - mean) / std)[:, :, None], 2, axis=2)
            assert_close_in_norm(pixels.reshape(len(tiles), -1), their["pixel_values"], operations=16)
            places, _ = theirs.get_rope_index(their["input_ids"], their["mm_token_type_ids"], their["image_grid_thw"])
            assert ours.positions.tolist() == places[:, 0].tolist()
    expected = torch.cat([theirs_embedded(theirs, each) for each in inputs])
    mine = model(pack(encoded), True)
    assert_close_in_norm(mine, expected)
    directions = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    wanted = [dict(each.named_parameters()) for each in (model, theirs)]
    assert wanted[0].keys() == wanted[1].keys()
    found = [
        dict(zip(own, torch.autograd.grad((rows * directions).sum(), own.values()), strict=True))
        for own, rows in zip(wanted, (mine, expected), strict=True)
    ]
    assert all(gradient.any() for gradient in found[1].values())
    assert_close_in_norm(*found, operations=LONGER)
    returned = []
    model.language_model.layers[0].register_forward_hook(lambda layer, given, result: returned.append(type(result)))
    with eager_kernels.installed():  # as on a GPU
        on_gpu = model(pack(encoded), True)
        again = torch.autograd.grad((on_gpu * directions).sum(), wanted[0].values())
    assert returned == [tuple]
    assert_close_in_norm(on_gpu, expected)
    assert_close_in_norm(dict(zip(wanted[0], again, strict=True)), found[1], operations=LONGER)
    checkpoint_layers(model)
    again = torch.autograd.grad((model(pack(encoded), True) * directions).sum(), wanted[0].values())
    assert_close_in_norm(dict(zip(wanted[0], again, strict=True)), found[1], operations=LONGER)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_as_near_to_float32_as_transformers(kind, folders):
    items = [*ITEMS, Item("<image>\n" + "word " * 900, (png(60, 60, 7),))]
    encoded = [QwenVLProcessor.load(folders[kind], 4096).encode(item) for item in items]
    assert encoded[-1].positions.max() > 1000  # bf16 has no such numbers one by one
    _, processor = theirs_of(folders[kind], kind)
    theirs = AutoModel.from_pretrained(folders[kind], dtype=torch.bfloat16).eval()
    model = QwenVL.load(folders[kind], torch.bfloat16)
    for each in (model, theirs):
        frequencies = each.language_model.rotary_emb.inv_freq, each.visual.rotary_pos_emb.inv_freq
        assert [of.dtype for of in frequencies] == [torch.float32] * 2
    with torch.no_grad():
        exact, half = (each(pack(encoded), True) for each in (QwenVL.load(folders[kind], torch.float32), model))
        their = torch.cat([theirs_embedded(theirs, their_inputs(processor, item)) for item in items])
    off, their_off = ((each - exact).norm(dim=1) for each in (half, their))
    assert half.dtype == torch.float32
    assert 0 < off.mean() < 1.5 * their_off.mean() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_has_the_directions_of_float32(kind, tmp_path):
    """With weights as small as published models begin with, bf16 itself has cosines above 0.9999."""
    parts = {name: part | {"initializer_range": 0.02} for name, part in ARCHITECTURES[kind].items()}
    folder = str(tmp_path / "model")
    build(QwenVLArchitecture(model_type=kind, **parts), ["a small red star"], 1, Path(folder))
    packed = pack([QwenVLProcessor.load(folder, 2048).encode(item) for item in ITEMS])
    theirs, processor = theirs_of(folder, kind)
    half, model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval(), QwenVL.load(folder, torch.bfloat16)
    inputs = [their_inputs(processor, item) for item in ITEMS]
    with torch.no_grad():
        exact, their = (torch.cat([theirs_embedded(each, given) for given in inputs]) for each in (theirs, half))
        ours = model(packed, True)
        with eager_kernels.installed():
            on_gpu = model(packed, True)
    for rows in (their, ours, on_gpu):
        assert 0.9999 < (rows * exact).sum(dim=1).min() < 1 - 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_tower_outside_gives_the_same_embeddings(kind, folders):
    encoded = [QwenVLProcessor.load(folders[kind], 2048).encode(item) for item in ITEMS]
    whole, without = (each.load(folders[kind], torch.float32) for each in (QwenVL, TowerlessQwenVL))
    tower = FrozenQwenTower.load(folders[kind], torch.float32, CPU)
    names = [{name for name, _ in each.named_parameters()} for each in (whole, without, tower)]
    assert names[0] == names[1] | names[2] and not names[1] & names[2]
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    chunks = plan_chunks(encoded, 300, CPU)
    assert len(chunks) > 2
    expected, seen = embed_chunks(whole, chunks, len(encoded)), []
    tower.visual.patch_embed.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    largest = max(len(image.tiles) for item in encoded for image in item.images)
    for at_once in (1 << 20, 300, 1):
        tower.patches_at_once = at_once
        features = CachedFeatures(tower, 1 << 30)
        for _ in range(2):  # computed first, then cached
            assert_close_in_norm(embed_chunks(without, chunks, len(encoded), features), expected)
        assert sum(seen) == sum(len(image.tiles) for item in encoded for image in item.images)
        assert max(seen) <= max(at_once, largest)
        seen.clear()


@pytest.mark.parametrize("kind", KINDS)
def test_variable_length_kernels_get_the_tower_s_pieces(kind, folders):
    """With another kernel's name, the tower attends by the function that transformers knows by it."""
    AttentionInterface.register("packed_other", KINDS_OF_ATTENTION["sdpa"])
    encoded = [QwenVLProcessor.load(folders[kind], 2048).encode(item) for item in ITEMS]
    model = QwenVL.load(folders[kind], torch.float32)
    expected = model(pack(encoded), True)
    for part in (model.visual, model.language_model):
        part.config._attn_implementation = "packed_other"
    assert not model.pads
    assert_close_in_norm(model(pack(encoded), True), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_of_each_part_is_chosen_by_its_own_heads(kind, folders, monkeypatch):
    """The tower's have 16 values, the language model's 12 or 16."""
    sizes = []

    def chosen(wanted: str, device: str, dtype: torch.dtype, config: Any) -> str:
        assert (wanted, device, dtype) == ("auto", "cpu", torch.float32)
        sizes.append(head_size(config))
        return "varlen"

    monkeypatch.setattr(family_module, "choose", chosen)
    path = ["model.architecture=null", f"model.path={folders[kind]}"]
    own, family = 16 if kind == "qwen3_vl" else 12, training("qwen_vl")
    for trained in (True, False):
        recipe = load_recipe("demo_qwen.yaml", [*path, f"model.train.vision_tower={trained}"])
        for model in (family.load(recipe, folders[kind], "sdpa"), family.empty(recipe, folders[kind], "sdpa")):
            parts = model.language_model, model.visual
            assert [each.config._attn_implementation for each in parts] == ["packed_sdpa", "packed_varlen"]
    assert family.frozen(recipe, folders[kind], CPU).visual.config._attn_implementation == "packed_varlen"
    assert sizes == [16] * 5
    saved("qwen_vl").open(folders[kind], "fp32", CPU)
    assert sizes[5:] == [own, 16]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outside", [False, True])
def test_blank_image_reaches_every_parameter_and_changes_nothing(kind, outside, folders):
    processor = QwenVLProcessor.load(folders[kind], 512)
    model = (TowerlessQwenVL if outside else QwenVL).load(folders[kind], torch.float32)
    packed = pack([processor.encode(Item("red star")), processor.encode(Item("a ring"))])
    rows = model(packed, True)
    assert torch.equal(rows, model(packed, False))
    found = torch.autograd.grad(rows[:, 0].sum(), list(model.visual.parameters()))
    assert all(not gradient.any() for gradient in found)


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_match_published_models(size):
    *_, (hidden, *_, vocabulary), published, head = SIZES[size]
    shape = QwenVLArchitecture(**fields_of(size))
    with torch.device("meta"):
        whole, without, tower = (
            each(checks.config_of_architecture(shape)) for each in (QwenVL, TowerlessQwenVL, FrozenQwenTower)
        )
    count, *parts = (sum(parameter.numel() for parameter in each.parameters()) for each in (whole, without, tower))
    assert count + head * vocabulary * hidden == published
    assert count == sum(parts)


def test_deepstack_may_reach_the_pooled_layer(tmp_path):
    architecture = ARCHITECTURES["qwen3_vl"]
    text = architecture["text"] | {"num_hidden_layers": 3}  # as many as deepstack's
    folder = tmp_path / "model"
    build(QwenVLArchitecture(model_type="qwen3_vl", vision=architecture["vision"], text=text), ["a"], 0, folder)
    theirs, processor = theirs_of(str(folder), "qwen3_vl")
    expected = torch.cat([theirs_embedded(theirs, their_inputs(processor, item)) for item in ITEMS])
    own = QwenVLProcessor.load(str(folder), 2048)
    assert_close_in_norm(QwenVL.load(str(folder), torch.float32)(pack([own.encode(i) for i in ITEMS]), True), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_published_layouts_of_checkpoints_load(kind, folders, tmp_path):
    """With an LM head, with the names of earlier and current versions, and with the text's fields at the top level."""
    model = AutoModel.from_pretrained(folders[kind])
    with_head = PROCESSORS[kind][1](model.config)
    with_head.model.load_state_dict(model.state_dict())
    for number, (each, original) in enumerate([(with_head, True), (with_head, False), (model, True)]):
        folder = tmp_path / str(number)
        shutil.copytree(folders[kind], folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        each.save_pretrained(folder, save_original_format=original)
        if original and kind != "qwen3_vl":
            config = json.loads((folder / "config.json").read_text())
            text = config.pop("text_config")
            text |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}, "rope_theta": 10_000.0}
            text.pop("rope_parameters")
            (folder / "config.json").write_text(json.dumps(text | config))
        own = QwenVL.load(str(folder), torch.float32)
        for name, tensor in model.state_dict().items():
            assert torch.equal(own.state_dict()[name], tensor)
        found = {training("qwen_vl").own_name(name) for name in _stored(folder)} - {"lm_head.weight"}
        assert found == model.state_dict().keys()
        item = [QwenVLProcessor.load(str(folder), 512).encode(ITEMS[1])]
        reference = QwenVL.load(folders[kind], torch.float32)(pack(item), True)
        assert_close_in_norm(own(pack(item), True), reference)  # files are mapped, and alignment changes rounding
        assert torch.equal(
            FrozenQwenTower.load(str(folder), torch.float32, CPU).visual.blocks[0].attn.qkv.weight,
            model.visual.blocks[0].attn.qkv.weight,
        )


def _stored(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("kind", KINDS)
def test_token_counts_are_known_from_sizes(kind, folders):
    rng, processor = np.random.default_rng(0), QwenVLProcessor.load(folders[kind], 4096)
    for _ in range(20):
        width, height = (int(each) for each in np.exp(rng.uniform(0, 6.5, 2)))
        counted = processor.patches.tokens(height, width, anyres=True)
        if max(width, height) > 200 * min(width, height):
            assert counted == 0
            continue
        item = Item("<image>\nx", (png(width, height),))
        encoded = processor.encode(item)
        assert counted == 2 + int((encoded.input_ids == processor.image_token_id).sum())
        assert len(encoded.images[0].tiles) == 4 * (counted - 2)


@pytest.mark.parametrize("limits", [(256, 512), (1024, 1024), (64, 10_000)])
def test_patches_match_transformers_at_all_limits(limits, folders):
    patches = Patches(4, 2, *limits)
    theirs = Qwen2VLImageProcessorPil(
        size={"shortest_edge": limits[0], "longest_edge": limits[1]},
        patch_size=4,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    )
    for width, height in [(40, 40), (17, 90), (200, 11), (8, 8), (3, 3), (64, 16)]:
        picture = Picture.open(io.BytesIO(png(width, height)))
        tiles, resized_height, resized_width = patches.cut(picture)
        their = theirs(picture, return_tensors="np")
        assert their["image_grid_thw"].tolist() == [[1, resized_height // 4, resized_width // 4]]
        pixels = np.repeat(tiles[:, :, None], 2, axis=2).reshape(len(tiles), -1)
        assert np.array_equal(np.round(their["pixel_values"] * 255), pixels)


def mp4(width: int, height: int, frames: int, rate: int) -> bytes:
    buffer, rng = io.BytesIO(), np.random.default_rng(0)
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate, width=width, height=height, pix_fmt="yuv420p")
        for _ in range(frames):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


class Videos:
    """In place of transformers' video processor, which needs torchvision to resize: returns what is given."""

    merge_size = temporal_patch_size = 2

    def __init__(self, **processed: object) -> None:
        self.processed = processed

    def __call__(self, videos: object, **others: object) -> dict[str, Any]:
        return self.processed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("frames", "rate", "count", "fps"), [(30, 5, 5, None), (9, 3, 8, 1.0), (1, 5, 4, None), (24, 1, 8, None)]
)
def test_videos_match_transformers(frames, rate, count, fps, kind, folders):
    """Of Qwen3-VL, the prompt as transformers 4.57 writes it; 5.17 leaves marks around the whole video, too."""
    folder, version = folders[kind], checks.VERSIONS[kind]
    own = QwenVLProcessor.load(folder, 1024, count, video_fps=fps)
    data = mp4(64, 48, frames, rate)
    item = Item("before <image> between <video>\nafter", (png(24, 24),), data)
    ours, shown = own.encode(item), sample_frames(data, count, fps)
    image, video = ours.images
    assert (image.video, video.video) == (False, True)
    numbers = [round(frame.info["seconds"] * rate) for frame in shown]
    pairs, rows, columns = grid_of(video, 4)
    assert pairs == -(-len(shown) // 2)
    assert 0 < rows * columns // 4 * pairs <= 1024 * 3 // 4
    # The other steps of transformers' video processor, which all versions share, on frames resized here.
    scaled = np.stack([frame.resize((4 * columns, 4 * rows), Picture.Resampling.BICUBIC) for frame in shown])
    mean, std = (torch.tensor(each)[:, None, None] for each in (version.mean, version.std))
    pixels = torch.from_numpy(scaled).permute(0, 3, 1, 2).float().div(255).sub(mean).div(std)[None]
    (patches,), *grid = Qwen3VLVideoProcessor.patchify(None, pixels, 4, 2, 2)
    assert grid == [pairs, rows, columns]
    found = normalised(torch.from_numpy(video.tiles), [video], version.mean, version.std, CPU, torch.float32)
    assert_close_in_norm(found.flatten(1), patches, operations=16)
    theirs, processor = theirs_of(folder, kind)
    processor.video_processor = Videos(
        pixel_values_videos=patches,
        video_grid_thw=torch.tensor([grid]),
        video_metadata=[VideoMetadata(total_num_frames=frames, fps=rate, frames_indices=numbers)],
    )
    processed, (pads,) = processor._process_videos([scaled])
    marked = pads if kind == "qwen3_vl" else f"<|vision_start|>{pads}<|vision_end|>"
    inputs = their_inputs(processor, Item(f"before <image> between {marked}after", item.images))
    assert ours.input_ids.tolist() == inputs["input_ids"][0].tolist()
    inputs |= {name: value for name, value in processed.items() if name != "video_metadata"}
    places, _ = theirs.get_rope_index(**inputs)
    assert ours.positions.tolist() == places[:, 0].tolist()
    packed, model = pack([own.encode(ITEMS[0]), ours, own.encode(ITEMS[3])]), QwenVL.load(folder, torch.float32)
    mine, expected = model(packed, True)[1], theirs_embedded(theirs, inputs)[0]
    assert_close_in_norm(mine, expected)
    directions, names = torch.randn(48, generator=torch.Generator().manual_seed(0)), dict(model.named_parameters())
    gradients = [
        torch.autograd.grad((row * directions).sum(), [dict(each.named_parameters())[name] for name in names])
        for row, each in ((mine, model), (expected, theirs))
    ]
    # Gradients of q_norm and k_norm are sums over all tokens and heads, which cancel each other.
    assert_close_in_norm(*gradients, operations=4 * LONGER)
    tower, without = FrozenQwenTower.load(folder, torch.float32, CPU), TowerlessQwenVL.load(folder, torch.float32)
    assert_close_in_norm(without(packed, True, tower.features_of(None, packed))[1], expected)


def test_frames_share_the_tokens_that_a_video_may_have():
    patches = Patches(16, 2, 4096, 4096 * 450, 3072)
    for count, tokens in ((1, 768), (8, 757), (16, 373), (64, 85)):
        tiles, height, width = patches.cut_frames([Picture.new("RGB", (1280, 720))] * count)
        found = height * width // 32**2
        assert 0.8 * tokens < found <= tokens
        assert len(tiles) == 2 * -(-count // 2) * 4 * found
        assert (found + 11) * -(-count // 2) <= patches.video_tokens(count) <= 3072
    _, height, width = patches.cut_frames([Picture.new("RGB", (50, 10_000))] * 64)  # about 85, but at least one across
    assert (height // 32, width // 32) == (130, 1)
    assert patches.fits(472) and not patches.fits(474)
    with pytest.raises(BadSample, match="474 frames are too many for a video's 3072 tokens"):
        patches.cut_frames([Picture.new("RGB", (32, 32))] * 474)


def test_frames_without_times_have_the_sizes_of_transformers_or_share_the_tokens_that_a_video_may_have():
    """Of Qwen2-VL and Qwen2.5-VL: 128 to 768 tokens for each two frames, by their video processor's `size`."""
    for size in ((1280, 720), (64, 64), (500, 400)):
        frames = [Picture.new("RGB", size)] * 6
        _, *found = Patches(14, 2, 3136, 100_000, 1 << 20, stamped=False).cut_frames(frames)
        assert found == list(smart_resize(*size[::-1], 28, 128 * 28**2, 768 * 28**2))
    patches = Patches(14, 2, 3136, 100_000, 3072, stamped=False)
    for count, tokens in ((1, 768), (8, 767), (16, 383), (64, 95)):
        _, height, width = patches.cut_frames([Picture.new("RGB", (1280, 720))] * count)
        found = height * width // 28**2
        assert 0.8 * tokens < found <= tokens
        assert found * -(-count // 2) + 2 <= patches.video_tokens(count) <= 3072
    assert patches.fits(3070) and not patches.fits(3072)


def test_many_frames_fit_beside_their_times_and_the_prompt(tmp_path):
    """64 frames of 512 tokens cannot: they are refused before a video is decoded."""
    architecture = QwenVLArchitecture(model_type="qwen3_vl", **ARCHITECTURES["qwen3_vl"])
    build(architecture, ["Represent the video.", *(f"<{n / 4:.1f} seconds>" for n in range(40))], 0, tmp_path / "timed")
    processor = QwenVLProcessor.load(str(tmp_path / "timed"), 512, 32)
    assert len(processor.tokenizer("<12.5 seconds>")["input_ids"]) == 7  # few, as in published tokenizers
    encoded = processor.encode(Item("<video>\nRepresent the video.", video=mp4(64, 64, 32, 4)))
    assert 0.5 * 512 < len(encoded.input_ids) <= 512
    family = training("qwen_vl")
    for frames, tokens, refused in ((64, 512, True), (8, 512, False), (64, 1024, False), (8, 64, True)):
        recipe = load_recipe("demo_qwen.yaml", [f"video.frames={frames}", f"model.max_tokens={tokens}"])
        for videos in (0, 3):
            shard = SimpleNamespace(videos=videos)
            source: Any = SimpleNamespace(shards=[(0, shard)], names=["clips"], embedding_metadata=None)
            match = rf"clips has videos, of which video\.frames={frames} .* model\.max_tokens={tokens}"
            with pytest.raises(PipelineError, match=match) if refused and videos else nullcontext():
                family.check_data(recipe, source)
    recipe = load_recipe("demo_qwen.yaml", ["data.scaled_jpeg=true"])
    with pytest.raises(PipelineError, match=r"data\.scaled_jpeg would change an image's number of tokens"):
        family.check_data(recipe, source)


def test_exports_embed_videos_as_they_were_trained(folders, tmp_path):
    recipe = load_recipe("demo_qwen.yaml", ["model.architecture=null", f"model.path={folders['qwen3_vl']}"])
    family = training("qwen_vl")
    model = family.load_whole(recipe, folders["qwen3_vl"])
    family.save(recipe, model, dict(model.named_parameters()), folders["qwen3_vl"], tmp_path / "out")
    video = mp4(160, 120, 8, 8)
    trained = family.processor(recipe, folders["qwen3_vl"]).encode(Item("<video>\nx", video=video))
    for tokens in (512, 4096):
        read = saved("qwen_vl").reader(str(tmp_path / "out"), tokens, 8).encode(Item("<video>\nx", video=video))
        assert read.key == trained.key
    with pytest.raises(BadSample, match="its images do not fit in max_tokens=256"):
        saved("qwen_vl").reader(str(tmp_path / "out"), 256, 8).encode(Item("<video>\nx", video=video))
    changes = ["model.architecture=null", f"model.path={tmp_path / 'out'}", "model.max_tokens=2048"]
    again = load_recipe("demo_qwen.yaml", changes)
    assert family.lengths(again).tiling.max_video_tokens == 1536


def test_positions_of_text_images_and_videos():
    found = positions([2, Grid(2, 3), 1])
    assert found.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert positions([1, Grid(1, 2, pairs=3, interval=5), 2]).tolist() == [
        [0, 1, 1, 6, 6, 11, 11, 3, 4],
        [0, 1, 1, 1, 1, 1, 1, 3, 4],
        [0, 1, 2, 1, 2, 1, 2, 3, 4],
    ]


def test_long_texts_are_cut_and_images_that_do_not_fit_are_refused(folders):
    whole, short = (QwenVLProcessor.load(folders["qwen3_vl"], tokens) for tokens in (512, 60))
    item = Item("<image>\n" + "word " * 40, (png(24, 24),))
    long, cut = whole.encode(item), short.encode(item)
    assert len(long.input_ids) > len(cut.input_ids) == 60
    suffix = whole.tokenizer(SUFFIX, add_special_tokens=False)["input_ids"]
    assert cut.input_ids.tolist() == [*long.input_ids[: 60 - len(suffix)].tolist(), *suffix]
    assert cut.positions.tolist() == long.positions[:, :60].tolist()
    ends = "<|vision_end|>" * 60  # a text's own control tokens are cut like other text
    assert len(short.encode(Item(ends)).input_ids) == 60
    assert len(short.encode(Item("<image>\n" + ends, (png(24, 24),))).input_ids) == 60
    with pytest.raises(BadSample, match="its images do not fit in max_tokens=60"):
        short.encode(Item("<image>\nx", (png(90, 90),)))
    with pytest.raises(BadSample, match="one side is more than 200 times the other"):
        whole.encode(Item("<image>\nx", (png(300, 1),)))
    with pytest.raises(BadSample, match="which stand for parts of images"):
        whole.encode(Item("a <|image_pad|>"))
    with pytest.raises(BadSample, match="which stand for parts of images"):
        whole.encode(Item("a", instruction="Find <|video_pad|>"))
    with pytest.raises(BadSample, match="2 <image> marks in the text, 1 images"):
        whole.encode(Item("<image> <image>", (png(8, 8),)))


@pytest.mark.parametrize("kind", KINDS)
def test_export_keeps_settings_and_loads_in_transformers(kind, folders, tmp_path):
    fields = {"instruction": "Find the picture.", "max_pixels": 4096, "path": folders[kind]}
    recipe = load_recipe(
        "pipeline/recipes/demo_qwen.yaml",
        ["model.architecture=null", *(f"model.{name}={value}" for name, value in fields.items())],
    )
    family = training("qwen_vl")
    model = family.load_whole(recipe, folders[kind])
    family.save(recipe, model, dict(model.named_parameters()), folders[kind], tmp_path / "out")
    folder = str(tmp_path / "out")
    assert family_of(folder) is saved("qwen_vl")
    reader, trained = saved("qwen_vl").reader(folder, 512, 8), family.processor(recipe, folders[kind])
    assert reader.instruction == "Find the picture." and reader.patches.max_pixels == 4096
    assert [reader.encode(item).key for item in ITEMS] == [trained.encode(item).key for item in ITEMS]
    items = [reader.encode(item) for item in ITEMS]
    expected = model(pack(items), True)
    assert_close_in_norm(saved("qwen_vl").open(folder, "fp32", CPU)[0](pack(items), True), expected)
    theirs, processor = theirs_of(folder, kind, 4096)
    assert items[6].images[0].height * items[6].images[0].width <= 4096 < 150 * 132  # a large image is reduced
    for place in (0, 6):
        inputs = their_inputs(processor, ITEMS[place], instruction="Find the picture.")
        assert items[place].input_ids.tolist() == inputs["input_ids"][0].tolist()
        assert_close_in_norm(theirs_embedded(theirs, inputs)[0], expected[place])
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["rope_scaling"]["mrope_section"] == text["rope_parameters"]["mrope_section"]  # before transformers 5
    plain = QwenVL.load(folders[kind], torch.float32)
    save_folder(plain, dict(plain.named_parameters()), folders[kind], tmp_path / "plain")
    recorded = json.loads((tmp_path / "plain" / "config.json").read_text())["embedding"]
    sizes = {"min_pixels": 4 * 8 * 8, "max_pixels": 1800 * 8 * 8, "max_video_tokens": 3072}
    assert recorded == {"instruction": PROMPTS["chat"].instruction, "prompt": "chat"} | sizes
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace('FOLDER = "."', f"FOLDER = {folder!r}")
    space: dict[str, Any] = {}
    exec(code, space)
    assert_close_in_norm(space["embed"](ITEMS[0].text), expected[0])


def test_tokens_that_the_tokenizer_adds_end_the_prompt(folders, tmp_path):
    """As of Qwen3-Embedding's. The last of them is pooled."""
    shutil.copytree(folders["qwen3_vl"], tmp_path / "ends")
    tokenizer = Tokenizer.from_file(str(tmp_path / "ends" / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing("$A <|endoftext|>", None, [("<|endoftext|>", end)])
    tokenizer.save(str(tmp_path / "ends" / "tokenizer.json"))
    folder = str(tmp_path / "ends")
    theirs, their_processor = theirs_of(folder, "qwen3_vl")
    for tokens in (2048, 40):
        processor = QwenVLProcessor.load(folder, tokens)
        ours = processor.encode(ITEMS[0])
        assert ours.input_ids[-1] == end
        assert len(processor.encode(ITEMS[2]).input_ids) <= tokens
        expected = theirs_embedded(theirs, their_inputs(their_processor, ITEMS[0]))
        assert_close_in_norm(QwenVL.load(folder, torch.float32)(pack([ours]), False), expected)


def test_unsupported_models_are_refused_by_name(folders, tmp_path):
    def refused(**fields: object) -> str:
        with pytest.raises(PipelineError) as error:
            training("qwen_vl").check(section("qwen_vl", **fields))
        return str(error.value)

    def changed(kind: str, file: str, **values: object) -> str:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folders[kind], folder)
        config = json.loads((folder / file).read_text())
        for name, value in values.items():
            part, _, field = name.rpartition("__")
            (config[part] if part else config)[field] = value
        (folder / file).write_text(json.dumps(config))
        return str(folder)

    experts = changed("qwen3_vl", "config.json", model_type="qwen3_vl_moe")
    assert "with experts, which are not supported" in refused(path=experts)
    with pytest.raises(PipelineError, match="with experts"):
        saved("qwen_vl").reader(experts, 512, 8)
    assert "expected qwen2_vl, qwen2_5_vl, qwen3_vl" in refused(
        path=changed("qwen3_vl", "config.json", model_type="llava")
    )
    assert "output width=40" in refused(path=changed("qwen3_vl", "config.json", vision_config__out_hidden_size=40))
    other = changed("qwen3_vl", "config.json", image_token_id=3)
    assert "image_token_id=3 in its config.json" in refused(path=other)
    other = changed("qwen2_vl", "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    assert "its image processor has image_mean" in refused(path=other)
    settings = changed("qwen2_vl", "config.json", embedding={"pooling": "mean"})
    assert "was it written by a later version?" in refused(path=settings)
    architecture = {"model_type": "qwen3_vl"} | ARCHITECTURES["qwen3_vl"]
    wrong = architecture | {"text": architecture["text"] | {"rope_parameters": ROPE}}
    assert "mrope_section=[2, 2, 2] is not supported; three numbers, 8 in all, is" in refused(architecture=wrong)
    wrong = architecture | {"vision": architecture["vision"] | {"patch": 3}}
    assert "unknown field model.architecture.vision.patch" in refused(architecture=wrong)
    assert "min_pixels=200000 is more than model.max_pixels=115200" in refused(
        path=folders["qwen3_vl"], min_pixels=200_000
    )


def test_embedder_reads_texts_and_pictures(folders):
    embedder = Embedder.load(folders["qwen3_vl"], device="cpu", precision="fp32")
    rows = embedder.embed(["red star", Picture.open(io.BytesIO(png(48, 48)))])
    processor, model = QwenVLProcessor.load(folders["qwen3_vl"], 512), QwenVL.load(folders["qwen3_vl"], torch.float32)
    items: Sequence[Encoded] = [processor.encode(Item("red star"))]
    assert_close_in_norm(rows[0], model(pack(items), False)[0])
    assert rows.shape == (2, 48)


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_picture_of_an_item_are_shown(kind, folders):
    processor = QwenVLProcessor.load(folders[kind], 4096)
    data = png(80, 40)
    text, picture, aspect = processor.shown(processor.encode(Item("<image>\na small red star", (data,))))
    assert text == "a small red star"
    assert aspect == pytest.approx(2, rel=0.5)  # sides are rounded to whole tokens
    mean = np.asarray(Picture.open(io.BytesIO(data)).convert("RGB")).mean(axis=(0, 1))
    assert np.abs(picture.mean(axis=(1, 2)) - mean).max() < 8
    assert processor.shown(processor.encode(Item("a small red star"))) == ("a small red star", None, 1.0)
