"""Model families: recognized by their folders; and recipes that do not fit their family."""

import io
import json
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from closeness import assert_close_in_norm
from PIL import Image
from sections import section

from pipeline.config import Recipe, load_recipe
from pipeline.data.batch import Encoded
from pipeline.data.dataset import Dataset
from pipeline.data.order import Order
from pipeline.data.sample import Item
from pipeline.embedding.embedder import Embedder
from pipeline.errors import PipelineError
from pipeline.models.registry import family_of, saved, training
from pipeline.models.text_encoder import model as decoder
from pipeline.models.text_encoder.processor import Settings
from pipeline.training.export import write_folder

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION = SIZES | {"image_size": 24, "patch_size": 8, "projection_dim": 16}
TEXT = SIZES | {"vocab_size": 600, "num_key_value_heads": 4}
ARCHITECTURES = {
    "text_encoder": {"text": TEXT},
    "llm2clip": {"vision": VISION},
    "clip": {"vision": VISION, "text": SIZES | {"vocab_size": 600, "max_position_embeddings": 20}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Build an untrained model for each of LLM2CLIP's families and CLIP, and a text encoder; return their folders."""
    root = tmp_path_factory.mktemp("families")
    found = {"text_encoder": str(root / "text_encoder")}
    for kind, architecture in ARCHITECTURES.items():
        found[kind] = str(root / kind)
        model = section(kind, architecture=architecture, **needed(kind, found))
        training(kind).build(model, ["a red star"], 0, root / kind)
    return found


def needed(kind: str, folders: dict[str, str]) -> dict[str, str]:
    return {"text_encoder": folders["text_encoder"]} if kind == "llm2clip" else {}


@pytest.fixture(scope="module")
def error_of(folders) -> Callable[..., str]:
    """Return a function that returns the error for a family and fields of its section."""

    def error_of(kind: str, **fields: object) -> str:
        with pytest.raises(PipelineError) as error:
            training(kind).check(section(kind, **needed(kind, folders) | fields))
        return str(error.value)

    return error_of


@pytest.mark.parametrize(
    ("recipe", "override", "named"),
    [
        ("demo", "model.train.adapter=false", "unknown field model.train.adapter; known here: "),
        ("demo_caption", "model.train.merger=1e-4", "unknown field model.train.merger; known here: "),
        ("demo_clip", "model.train.adapter=1e-4", "unknown field model.train.adapter; known here: "),
        ("demo_llm2clip", "model.train.language_model=false", "unknown field model.train.language_model; known here: "),
        (
            "demo_llm2clip",
            "model.train.lora.rank=4",
            "unknown field model.train.lora; known here: vision_tower, adapter",
        ),
        ("demo_clip", "model.train.lora.rank=4", "unknown field model.train.lora; known here: vision_tower"),
        ("demo_clip", "model.train={language_model: true}", "model.train.vision_tower is missing"),
        (
            "demo_caption",
            "model.train.language_model=false",
            "nothing is trained: set one of model.train.language_model",
        ),
        ("demo_llm2clip", "model.text_encoder=null", "model.text_encoder: it is empty"),
        ("demo_clip", "model.text_encoder=folder", "unknown field model.text_encoder; "),
        ("demo_llm2clip", "model.instruction=find", "unknown field model.instruction; "),
        ("demo_caption", "model.architecture.vision={hidden_size: 8}", "unknown field model.architecture.vision; "),
        ("demo_clip", "model.architecture.text={}", "model.architecture.text: Dictionary should have at least 1 item"),
        ("demo_clip", "model.family=blip", "model.family is 'blip': set it to one of llave, qwen_vl, "),
        ("demo_caption", "model.images=as_stored", "unknown field model.images; "),
        ("demo", "model.images=turned", "model.images: Input should be 'upright' or 'as_stored', got 'turned'"),
        ("demo_clip", "objective.name=masked_next_token", "unknown field objective.alpha; "),
        (
            "demo_clip",
            "objective={name: masked_next_token}",
            "masked_next_token is not for model.family=clip, which is",
        ),
        ("demo_clip", "objective.name=guessing", "objective.name is 'guessing': set it to one of contrastive, "),
    ],
)
def test_unsupported_recipe_fields_of_a_family_are_refused(recipe, override, named):
    with pytest.raises(PipelineError) as error:
        load_recipe(f"pipeline/recipes/{recipe}.yaml", [override])
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("kind", "architecture", "named"),
    [
        (
            "text_encoder",
            {"text": TEXT | {"hiden_size": 8}},
            "model.architecture.text.hiden_size; did you mean hidden_size",
        ),
        (
            "text_encoder",
            {"text": TEXT | {"model_type": "llamma"}},
            "model_type=llamma is no model that transformers has",
        ),
        ("text_encoder", {"text": SIZES}, "model.architecture.text.vocab_size is missing"),
        ("clip", {"vision": VISION, "text": SIZES}, "model.architecture.text.vocab_size is missing"),
        ("clip", {"vision": VISION | {"patch": 8}, "text": TEXT}, "model.architecture.vision.patch"),
        ("llm2clip", {"vision": VISION | {"patch": 8}}, "model.architecture.vision.patch"),
    ],
)
def test_invalid_architecture_is_refused_before_building(kind, architecture, named, error_of):
    assert named in error_of(kind, architecture=architecture)


def test_family_is_detected_from_its_folder(folders, tiny_model, tmp_path):
    assert family_of(tiny_model) is saved("llave")
    assert family_of(folders["clip"]) is saved("clip")
    assert family_of(folders["text_encoder"]) is None  # any decoder is like this
    assert family_of(folders["llm2clip"]) is None  # it is only a vision tower
    encoder = decoder.TextEncoder.load(folders["text_encoder"], "auto")
    decoder.save(
        encoder, dict(encoder.named_parameters()), folders["text_encoder"], tmp_path / "encoder", None, Settings()
    )
    assert family_of(str(tmp_path / "encoder")) is saved("text_encoder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PipelineError, match=r"no model at .*empty.*: it has no config\.json"):
        family_of(str(tmp_path / "empty"))


def photo(orientation: int) -> bytes:
    """Return an image that is red at the left, with this EXIF orientation."""
    picture, exif, data = Image.new("RGB", (48, 32), (0, 0, 255)), Image.Exif(), io.BytesIO()
    picture.paste((255, 0, 0), (0, 0, 16, 32))
    exif[0x0112] = orientation
    picture.save(data, "PNG", exif=exif)
    return data.getvalue()


@pytest.mark.parametrize("kind", ["llave", "llm2clip", "clip"])
def test_jpegs_decoded_smaller_change_pixels_alone(kind, folders, tiny_model):
    name, path = ("demo", tiny_model) if kind == "llave" else (f"demo_{kind}", folders[kind])
    fields = [f"model.{name}={value}" for name, value in needed(kind, folders).items()] + [f"model.path={path}"]
    pixels = np.random.default_rng(0).integers(0, 256, (304, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data := io.BytesIO(), "JPEG")
    one = Item("<image>\nWhat?", (data.getvalue(),))

    def encoded(item: Item, scaled: bool, *more: str) -> Encoded:
        recipe = load_recipe(f"pipeline/recipes/{name}.yaml", [*fields, f"data.scaled_jpeg={scaled}", *more])
        processor = training(kind).processor(recipe, path)
        draws = partial(Order((Dataset("a", np.array([9])),), 1, 1, 1, 1, seed=0).draw_of_step, 0)
        return training(kind).augmented(recipe, processor, draws).encode(item)

    whole, scaled = encoded(one, False), encoded(one, True)
    assert np.array_equal(whole.input_ids, scaled.input_ids)
    assert whole.images[0].tiles.shape == scaled.images[0].tiles.shape
    assert not np.array_equal(whole.images[0].tiles, scaled.images[0].tiles)
    if kind == "llave":  # the padding to squares would be rounded
        two = Item("<image> <image>", 2 * one.images)
        assert encoded(two, True).key == encoded(two, False).key
    if kind == "llm2clip":
        crops = "model.crop_scale=[0.1, 0.2]"
        assert encoded(one, True, crops).key == encoded(one, False, crops).key


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llave", "llm2clip", "clip"])
def test_image_orientation_setting_is_applied_and_exported(kind, folders, tiny_model, tmp_path):
    name, path = ("demo", tiny_model) if kind == "llave" else (f"demo_{kind}", folders[kind])
    fields = [f"model.{name}={value}" for name, value in needed(kind, folders).items()]
    item, upright = Item("<image>\nWhere?", (photo(6),)), Item("<image>\nWhere?", (photo(1),))

    def recipe(path: str, *images: str) -> Recipe:
        return load_recipe(f"pipeline/recipes/{name}.yaml", [*fields, f"model.path={path}", *images])

    plain = recipe(path)
    turned, stored = (
        training(kind).processor(plain, path),
        training(kind).processor(recipe(path, "model.images=as_stored"), path),
    )
    assert (turned.as_stored, stored.as_stored) == (False, True)
    assert turned.encode(item).key != stored.encode(item).key == turned.encode(upright).key
    given = path
    for images, as_stored in (("as_stored", True), (None, True), ("upright", False)):  # each continues the previous one
        chosen = recipe(given, *([f"model.images={images}"] if images else []))
        model, out = training(kind).load_whole(chosen, given), tmp_path / f"out{images}"
        write_folder(model, dict(model.named_parameters()), chosen, given, out)
        reader = saved(kind).reader(str(out), 512, 8)
        assert reader.as_stored == training(kind).processor(chosen, given).as_stored == as_stored
        if kind == "llave":
            assert reader.encode(item).key == (stored if as_stored else turned).encode(item).key
        given = str(out)
    (tmp_path / "photo.png").write_bytes(photo(6))
    (tmp_path / "upright.png").write_bytes(photo(1))
    with Image.open(tmp_path / "photo.png") as opened:
        pictures = [tmp_path / "photo.png", opened, tmp_path / "upright.png", Image.open(tmp_path / "upright.png")]
        for out, equal in (("outNone", True), ("outupright", False)):
            rows = Embedder.load(tmp_path / out, device="cpu").embed(pictures)
            assert_close_in_norm(rows[1::2], rows[::2])
            assert (float((rows[0] - rows[2]).norm()) < 1e-4) == equal


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("text_encoder", []), ("llm2clip", []), ("llm2clip", ["model.dimension=24"]), ("clip", [])],
)
def test_dimension_is_known_before_loading(kind, fields, folders):
    name = {"text_encoder": "demo_caption"}.get(kind, f"demo_{kind}")
    own = [f"model.{field}={path}" for field, path in needed(kind, folders).items()]
    chosen = load_recipe(f"pipeline/recipes/{name}.yaml", [f"model.path={folders[kind]}", *own, *fields])
    family = training(kind)
    found = family.dimension(chosen.model, saved(kind).dimension(folders[kind]))
    assert found == family.load(chosen, folders[kind], "sdpa").dimension == (24 if fields else found)


@pytest.mark.parametrize("family", ["clip", "text_encoder", "llm2clip"])
def test_export_names_the_sizes_of_its_vectors(family, folders, tmp_path):
    recipe = {"clip": "demo_clip", "text_encoder": "demo_caption", "llm2clip": "demo_llm2clip"}[family]
    given, size = folders[family], saved(family).dimension(folders[family])
    cases = (  # each continues the previous one
        ([f"objective.dimensions=[4,8,{size}]"], [4, 8, size], ["cut to their first 4, 8 numbers, and"]),
        (["objective.dimensions=[4]", "objective.quantized=int8"], [4], ["first 4 numbers", "number (int8)"]),
        (["objective.quantized=binary"], None, ["number, its sign (binary)"]),
        ([f"objective.dimensions=[{size}]"], [size], []),
        ([], None, []),
    )
    for number, (fields, sizes, notes) in enumerate(cases):
        fields = [f"model.path={given}", *fields]
        if family == "llm2clip":
            fields.append(f"model.text_encoder={folders['text_encoder']}")
        chosen = load_recipe(f"pipeline/recipes/{recipe}.yaml", fields)
        model, out = training(family).load_whole(chosen, given), tmp_path / str(number)
        write_folder(model, dict(model.named_parameters()), chosen, given, out)
        assert json.loads((out / "config.json").read_text()).get("matryoshka_dimensions") == sizes
        card = (out / "README.md").read_text()
        assert card.count("## Smaller vectors") == bool(notes)
        assert all(note in card for note in notes)
        given = str(out)


def test_model_of_another_family_is_refused_before_loading(folders, error_of, tmp_path):
    decoder, clip, tower = (folders[kind] for kind in ("text_encoder", "clip", "llm2clip"))
    assert "is a clip model; expected a text-only decoder" in error_of("text_encoder", path=clip)
    assert "is a qwen2 model; expected clip" in error_of("clip", path=decoder)
    assert "is a qwen2 model; expected a vision encoder: clip" in error_of("llm2clip", path=decoder)
    assert "expected a text-only decoder" in error_of("llm2clip", path=tower, text_encoder=clip)
    missing = str(tmp_path / "missing")
    for kind in ("text_encoder", "clip"):
        assert f"no model at '{missing}'" in error_of(kind, path=missing)
