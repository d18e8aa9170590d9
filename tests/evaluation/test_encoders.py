import io
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close_in_norm
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    GemmaTokenizer,
    Siglip2Config,
    Siglip2Model,
    Siglip2TextConfig,
    Siglip2Tokenizer,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from pipeline.config import EvaluationRun, load_recipe
from pipeline.data.sample import BadSample, Item
from pipeline.data.video import sample_frames
from pipeline.embedding.embedder import Embedder
from pipeline.errors import PipelineError
from pipeline.evaluation import clip as peers
from pipeline.evaluation.clip import PEERS
from pipeline.evaluation.encoders import ModelEncoder, load_encoder
from pipeline.models.chunks import pack
from pipeline.models.clip.family import TRAINING
from pipeline.models.llave.model import FrozenTower, Llave, TowerlessLlave
from pipeline.models.llave.processor import LlaveProcessor

CPU = torch.device("cpu")
CONTEXT, SIDE, PATCHES = 12, 32, 16
CONFIGS = {
    "clip": (CLIPConfig, CLIPTextConfig, CLIPVisionConfig, CLIPModel, CLIPTokenizer),
    "siglip": (SiglipConfig, SiglipTextConfig, SiglipVisionConfig, SiglipModel, GemmaTokenizer),
    "siglip2": (Siglip2Config, Siglip2TextConfig, Siglip2VisionConfig, Siglip2Model, Siglip2Tokenizer),
}
IMAGE_PROCESSORS = {
    "clip": {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
    "siglip": {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.2, 0.5, 0.7]},
    "siglip2": {"patch_size": 8, "max_num_patches": PATCHES, "image_std": [0.2, 0.5, 0.7]},
}


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def clip(frames: int = 9) -> bytes:
    buffer, rng = io.BytesIO(), np.random.default_rng(0)
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5, width=32, height=48, pix_fmt="yuv420p")
        for _ in range(frames):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (48, 32, 3), dtype=np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


VIDEO = clip()
ITEMS = [
    Item("a Red star"),
    Item("<image>\n", (png(40, 60),)),
    Item("a blue ring and a red star and a blue ring and a red star " * 3),
    Item("<image>\nWhat is red?", (png(90, 31, 1),)),
    Item("ring"),
    Item("between <image> and <image>", (png(20, 20, 2), png(64, 48, 3))),
    Item("<video>", video=VIDEO),
    Item("<video>\nWhat moves?", video=VIDEO),
]


def build(kind: str, folder: Path) -> str:
    """Write a model of random weights, of one of the types in PEERS."""
    config_class, text_class, vision_class, model_class, tokenizer_class = CONFIGS[kind]
    tokenizer = tokenizer_class().train_new_from_iterator(
        ["a Red star, a blue ring; what moves? What is red?"] * 4, 300, show_progress=False
    )
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = text_class(**shape, **special, vocab_size=len(tokenizer), max_position_embeddings=CONTEXT)
    image = {"num_patches": PATCHES} if kind == "siglip2" else {"image_size": SIDE}
    vision = vision_class(**shape, **image, patch_size=8)
    whole = {"projection_dim": 20} if kind == "clip" else {}
    torch.manual_seed(0)
    model = model_class(config_class(text_config=text.to_dict(), vision_config=vision.to_dict(), **whole))
    with torch.no_grad():
        for parameter in model.parameters():  # gives clearly different vectors for all inputs
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    PEERS[kind][1](**IMAGE_PROCESSORS[kind]).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session", params=list(PEERS))
def peer(request, tmp_path_factory) -> str:
    return build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> str:
    return build("clip", tmp_path_factory.mktemp("tiny-clip"))


@torch.no_grad()
def by_transformers(folder: str, texts: list[str], pictures: list[Image.Image]) -> torch.Tensor:
    """Return unit vectors of the texts, then of the images, computed one by one."""
    kind = json.loads(Path(folder, "config.json").read_text())["model_type"]
    model = CONFIGS[kind][3].from_pretrained(folder).eval()
    tokenizer, processor = CONFIGS[kind][4].from_pretrained(folder), PEERS[kind][1].from_pretrained(folder)
    rows = []
    for text in texts:
        padding = {"padding": "max_length"} if kind != "clip" else {}
        ids = tokenizer(text, truncation=True, max_length=CONTEXT, return_tensors="pt", **padding)["input_ids"]
        rows.append(model.get_text_features(input_ids=ids).pooler_output)
    for picture in pictures:
        rows.append(model.get_image_features(**processor(picture, return_tensors="pt")).pooler_output)
    return F.normalize(torch.cat(rows), dim=-1)


def options(**fields: object) -> EvaluationRun:
    return EvaluationRun(**{"video": {"frames": 3}, "chunk_tokens": 40, "max_tokens": 256} | fields)


def test_peer_embeddings_match_fused_transformers_features(peer):
    encoder = load_encoder(peer, options(), CPU)
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for item in ITEMS for data in item.images]
    frames = sample_frames(VIDEO, 3)
    texts = ["a red star", ITEMS[2].text, "what is red?", "ring", "between and", "what moves?"]
    rows = by_transformers(peer, texts, [*pictures, *frames])
    text, (one, two, three, four), video = rows[:6], rows[6:10], F.normalize(rows[10:].mean(0), dim=0)
    both = F.normalize(three + four, dim=0)
    expected = torch.stack(
        [
            text[0],
            one,
            text[1],
            F.normalize((text[2] + two) / 2, dim=0),
            text[3],
            F.normalize((text[4] + both) / 2, dim=0),
            video,
            F.normalize((text[5] + video) / 2, dim=0),
        ]
    )
    embeddings = encoder.embed([encoder.prepare(item) for item in ITEMS])
    assert (embeddings.dtype, embeddings.shape) == (torch.float32, (len(ITEMS), encoder.dimension))
    assert_close_in_norm(embeddings, expected)
    assert (torch.cdist(expected, expected) + torch.eye(len(ITEMS))).min() > 1e-2  # a wrong order would be noticed
    assert (encoder.name, encoder.instructed) == (peer, False)


def test_peer_embeddings_are_independent_and_batches_bounded(peer, monkeypatch):
    encoder = load_encoder(peer, options(chunk_tokens=2 * PATCHES), CPU)
    prepared = [encoder.prepare(item) for item in ITEMS]
    alone = torch.cat([encoder.embed([one]) for one in prepared])
    sizes = {"text": [], "image": []}
    for name in sizes:
        function = getattr(encoder.model(), f"get_{name}_features")

        def counted(function=function, name=name, **inputs: torch.Tensor):
            sizes[name].append(len(next(iter(inputs.values()))))
            return function(**inputs)

        monkeypatch.setattr(encoder.model(), f"get_{name}_features", counted)
    assert_close_in_norm(encoder.embed(prepared[::-1]).flip(0), alone)
    assert sizes == {"text": [2, 2, 2], "image": [2] * 5}
    assert encoder.embed([]).shape == (0, encoder.dimension)


def test_peer_prepares_in_threads_with_uint8_pixels(peer):
    encoder = load_encoder(peer, options(), CPU)
    with ThreadPoolExecutor(8) as pool:
        prepared = list(pool.map(encoder.prepare, ITEMS * 8))
    assert all(p["pixel_values"].dtype == torch.uint8 for item in prepared for p in item.pictures)
    first = encoder.prepare(ITEMS[2])
    assert len(first.ids) == CONTEXT
    assert torch.equal(prepared[-6].ids, first.ids)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (Item("<image>\nbroken", (b"no image",)), "undecodable"),
        (Item("<image>", (png(8, 8),) * 2), "1 <image> marks in the text, 2 expected"),
        (Item("<video>"), "1 <video> marks in the text, 0 expected"),
    ],
)
def test_unusable_peer_item_raises_bad_sample(peer, item, reason):
    with pytest.raises(BadSample, match=reason):
        load_encoder(peer, options(), CPU).prepare(item)


@torch.no_grad()
def test_trained_clip_is_embedded_as_in_training_and_another_as_in_mmeb(tiny_clip, tmp_path):
    family, recipe = (
        TRAINING["contrastive"],
        load_recipe("pipeline/recipes/demo_clip.yaml", [f"model.path={tiny_clip}"]),
    )
    family.save(recipe, family.load(recipe, tiny_clip, "sdpa"), {}, tiny_clip, tmp_path)
    picture = Item("<image>", (png(40, 30),))
    items = [replace(picture, text="<image>\nFind the caption."), picture]

    def embedded(path: Path | str) -> torch.Tensor:
        encoder = load_encoder(str(path), options(), CPU)
        return encoder.embed([encoder.prepare(item) for item in items])

    trained, published = embedded(tmp_path), embedded(tiny_clip)
    assert torch.equal(trained[0], trained[1])  # text beside a picture is ignored
    assert (published[0] - published[1]).norm() > 0.1
    assert_close_in_norm(trained[1:], published[1:])


@torch.no_grad()
def test_llave_embeddings_match_single_item_embeddings(tiny_model):
    encoder = load_encoder(tiny_model, options(chunk_tokens=100), CPU)
    embeddings = encoder.embed([encoder.prepare(item) for item in ITEMS])
    processor, model = LlaveProcessor.load(tiny_model, 256, video_frames=3), Llave.load(tiny_model, "auto").eval()
    expected = torch.cat([model(pack([processor.encode(item)]), True) for item in ITEMS])
    assert_close_in_norm(embeddings, expected)
    assert encoder.embed([]).shape == (0, encoder.dimension) == (0, 48)
    assert (encoder.name, encoder.instructed) == (tiny_model, True)


def test_engine_with_external_tower_gives_same_embeddings(tiny_model):
    class Engine:
        module = TowerlessLlave.load(tiny_model, torch.float32)

        def __call__(self, *arguments: object) -> torch.Tensor:
            return self.module(*arguments)

    whole, engine = load_encoder(tiny_model, options(), CPU), Engine()
    tower = FrozenTower.load(tiny_model, torch.float32, CPU, tiles_at_once=4)
    outside = ModelEncoder(
        name="a run",
        identity="step 100",
        dimension=48,
        model=lambda: (engine, tower.features_of),
        processor=whole.processor,
        chunk_tokens=100,
        device=CPU,
    )
    prepared = [whole.prepare(item) for item in ITEMS]
    assert_close_in_norm(outside.embed(prepared), whole.embed(prepared))


@pytest.mark.parametrize("pads", [True, False])
def test_padding_counts_only_with_padded_attention(tiny_model, monkeypatch, pads):
    monkeypatch.setattr(Llave, "pads", pads)
    calls, original = [], Llave.forward
    monkeypatch.setattr(Llave, "forward", lambda *given: calls.append(given[1].lengths) or original(*given))
    texts = ["star " * 30, "red", "star", "blue", "ring"]
    processor = LlaveProcessor.load(tiny_model, 256)
    budget = sum(len(processor.encode(Item(text)).input_ids) for text in texts)
    encoder = load_encoder(tiny_model, options(chunk_tokens=budget), CPU)
    ours = encoder.embed([encoder.prepare(Item(text)) for text in texts])
    assert len(calls) == (2 if pads else 1)
    users = Embedder.load(tiny_model, device="cpu", max_tokens=256, chunk_tokens=budget).embed(texts)
    assert calls[len(calls) // 2 :] == calls[: len(calls) // 2]
    assert torch.equal(ours, users)


@pytest.mark.parametrize("kind", ["llave", "clip"])
def test_videos_are_read_at_video_fps(tiny_clip, tiny_model, kind):
    expected = sample_frames(VIDEO, 7, 2)
    assert len(expected) < 7
    for video, pictures in (({"frames": 7, "fps": 2}, expected), ({"frames": 7}, sample_frames(VIDEO, 7))):
        encoder = load_encoder({"llave": tiny_model, "clip": tiny_clip}[kind], options(video=video), CPU)
        prepared = encoder.prepare(Item("<video>", video=VIDEO))
        if kind == "llave":
            whole = encoder.processor.encode_parts("<video>", [], lambda pictures=pictures: pictures)
            assert (prepared.key, len(prepared.images[0].tiles)) == (whole.key, len(pictures))
        else:
            pixels = [encoder._pixels(picture)["pixel_values"] for picture in pictures]
            assert torch.equal(torch.cat([each["pixel_values"] for each in prepared.pictures]), torch.cat(pixels))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llave", "clip"])
def test_identity_depends_on_weights_and_options_not_path(tiny_clip, tiny_model, tmp_path, kind):
    source = {"llave": tiny_model, "clip": tiny_clip}[kind]
    given = load_encoder(source, options(), CPU).identity
    shutil.copytree(source, tmp_path / "copy")
    copy = str(tmp_path / "copy")
    assert load_encoder(copy, options(), CPU).identity == given
    assert load_encoder(copy, options(chunk_tokens=77, out="elsewhere"), CPU).identity == given
    changes = [{"precision": "bf16"}, {"precision": "fp32"}, {"video": {"frames": 4}}]
    changes += [{"video": {"frames": 3, "fps": 2}}]
    changes += [{"max_tokens": 100}] if kind == "llave" else []  # the context length of a peer is fixed
    identities = {load_encoder(copy, options(**change), CPU).identity for change in changes}
    assert len(identities | {given}) == len(changes) + 1
    settings = Path(copy, "preprocessor_config.json")
    kept = settings.read_bytes()
    settings.write_text(json.dumps(json.loads(kept) | {"do_convert_rgb": False}))
    assert load_encoder(copy, options(), CPU).identity != given
    settings.write_bytes(kept)
    Path(copy, "pytorch_model.bin").write_bytes(b"before")
    given = load_encoder(copy, options(), CPU).identity
    Path(copy, "pytorch_model.bin").write_bytes(b"behind")
    assert load_encoder(copy, options(), CPU).identity != given
    Path(copy, "pytorch_model.bin").unlink()
    given = load_encoder(copy, options(), CPU).identity
    weights = Path(copy, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")  # the last tensor is shorter than 4 KiB
    assert load_encoder(copy, options(), CPU).identity != given


def test_weights_are_loaded_at_first_embedding(tiny_clip, tiny_model, monkeypatch):
    loads = []
    for owner, name in ((Llave, "load"), (CLIPModel, "from_pretrained")):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *given, original=original, **named: loads.append(given[0]) or original(*given, **named)
        )
    for folder in (tiny_clip, tiny_model):
        encoder = load_encoder(folder, options(), CPU)
        prepared = [encoder.prepare(item) for item in ITEMS]
        assert len(encoder.identity) == 16
        assert encoder.dimension
        assert loads == []
        for _ in range(2):
            encoder.embed(prepared)
        assert loads == [folder]
        loads.clear()


USERS = """
import torch

class Lengths:
    name, dimension, instructed = "lengths", 2, False

    def __init__(self, path, options):
        self.identity = f"{path} {options.max_tokens}"

    def prepare(self, item):
        return len(item.text)

    def embed(self, prepared):
        return torch.nn.functional.normalize(torch.tensor([[1.0, n] for n in prepared]).reshape(-1, 2))

def nothing(path, options):
    return torch.nn.Identity()
"""


def test_user_function_creates_encoder(tmp_path, monkeypatch):
    (tmp_path / "users_encoder.py").write_text(USERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    for where in (f"{tmp_path}/users_encoder.py", "users_encoder"):
        encoder = load_encoder("any/path", options(encoder=f"{where}:Lengths"), CPU)
        assert encoder.identity == "any/path 256"
        assert_close_in_norm(encoder.embed([encoder.prepare(Item("red"))]), torch.tensor([[1, 3]]) / 10**0.5)
    for wrong, reason in (
        ("users_encoder", "write it as module:function"),
        ("users_encoder:Width", "users_encoder has no function Width"),
        ("users_encoders:Lengths", "there is no module users_encoders; write it as"),
        ("users_package.none:Lengths", r"there is no module users_package\.none; write it as"),
        (f"{tmp_path}/none.py:Lengths", r"there is no file .*none\.py; write it as"),
        ("users_encoder:nothing", "returned a Identity without name, identity, dimension, instructed, prepare, embed"),
    ):
        with pytest.raises(PipelineError, match=reason):
            load_encoder("any/path", options(encoder=wrong), CPU)
    del sys.modules["users_encoder"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import users_missing", ModuleNotFoundError),
        ("open('users_missing')", FileNotFoundError),
        ("int('x')", ValueError),
    ],
)
def test_errors_inside_user_module_propagate(tmp_path, monkeypatch, code, error):
    (tmp_path / "users_broken").mkdir()
    (tmp_path / "users_broken/__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    for where in (f"{tmp_path}/users_broken/__init__.py", "users_broken", "users_broken.encoder"):
        with pytest.raises(error):
            load_encoder("any/path", options(encoder=f"{where}:Lengths"), CPU)


def test_invalid_model_folders_are_refused(tiny_clip, tmp_path, monkeypatch):
    def changed(name: str, removed: str = "", **fields: str) -> str:
        folder = shutil.copytree(tiny_clip, tmp_path / name)
        for file in ("config.json", "tokenizer_config.json"):
            values = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps(values | {key: v for key, v in fields.items() if key in values}))
        if removed:
            (folder / removed).unlink()
        return str(folder)

    monkeypatch.setattr(peers, "find_spec", lambda name: None)  # as in an environment without the package
    for path, reason in (
        (str(tmp_path), "no config.json"),
        (changed("bert", model_type="bert"), r"is a bert model; .* siglip2\. For another model write a function"),
        (changed("weightless", removed="model.safetensors"), "has no weights"),
        (changed("blind", removed="preprocessor_config.json"), "no clip model at"),
        (changed("pieces", tokenizer_class="SiglipTokenizer"), "pip install sentencepiece"),
    ):
        with pytest.raises(PipelineError, match=reason):
            load_encoder(path, options(), CPU)
    CLIPModel.from_pretrained(tiny_clip).text_model.save_pretrained(tmp_path / "half")
    halved = changed("halved", removed="model.safetensors")
    shutil.copy(tmp_path / "half/model.safetensors", halved)
    encoder = load_encoder(halved, options(), CPU)
    with pytest.raises(PipelineError, match=r"lacks \d+ of the model's weights"):
        encoder.embed([encoder.prepare(Item("red"))])


@pytest.mark.parametrize(
    ("file", "fields", "named"),
    [
        ("preprocessor_config.json", {"max_num_patches": "many"}, "preprocessor_config.json cannot be used"),
        ("preprocessor_config.json", {"image_std": [0, 0.5, 0.5]}, r"image_std=\[0, 0.5, 0.5\]"),
        ("tokenizer_config.json", {"pad_token": None}, "tokenizer_config.json cannot be used"),
        ("config.json", {"auto_map": {"AutoModel": "code.Model"}}, "config.json has an auto_map"),
        ("config.json", {"text_config": None}, "config.json: text_config is None"),
    ],
)
def test_invalid_siglip2_files_are_refused_at_load(tmp_path, file, fields, named):
    folder = Path(build("siglip2", tmp_path))
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | fields))
    with pytest.raises(PipelineError, match=named):
        load_encoder(str(folder), options(), CPU)
