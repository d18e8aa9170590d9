"""Kinds of model: told by their folders; and recipes that do not fit theirs."""

import io
from pathlib import Path

import pytest
from closeness import assert_close_in_norm
from PIL import Image

from pipeline.config import Model, Recipe, load_recipe
from pipeline.data.sample import Item
from pipeline.embedding.embedder import Embedder
from pipeline.errors import PipelineError
from pipeline.models import decoder
from pipeline.models.kinds import KINDS, kind_of
from pipeline.training.export import write_folder

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION = SIZES | {"image_size": 24, "patch_size": 8, "projection_dim": 16}
TEXT = SIZES | {"vocab_size": 600, "num_key_value_heads": 4}
ARCHITECTURES = {
    "caption": {"text": TEXT},
    "llm2clip": {"vision": VISION},
    "clip": {"vision": VISION, "text": SIZES | {"vocab_size": 600, "max_position_embeddings": 20}},
}


def error_of(kind: str, *overrides: str) -> str:
    with pytest.raises(PipelineError) as error:
        load_recipe(f"pipeline/recipes/demo{kind and '_' + kind}.yaml", list(overrides))
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "override", "named"),
    [
        ("", "train.adapter=false", "train.adapter is not for model.kind=llave"),
        (
            "caption",
            "train.projector=1e-4",
            "train.projector is not for model.kind=caption; its parts are language_model",
        ),
        ("clip", "train.adapter=1e-4", "train.adapter is not for model.kind=clip"),
        ("llm2clip", "train.language_model=false", "train.language_model is not for model.kind=llm2clip"),
        ("llm2clip", "train.lora.rank=4", "train.lora is for the language models of llave"),
        ("clip", "train.lora.rank=4", "train.lora is for the language models of llave"),
        ("caption", "train.language_model=false", "nothing is trained: set one of train.language_model"),
        ("llm2clip", "model.text_encoder=null", "model.text_encoder is missing: the export of a run of kind caption"),
        ("clip", "model.text_encoder=folder", "model.text_encoder is for model.kind=llm2clip, and this is clip"),
        ("llm2clip", "model.instruction=find", "model.instruction is for model.kind=caption, and this is llm2clip"),
        ("caption", "model.architecture.vision={hidden_size: 8}", "vision is not for model.kind=caption"),
        ("clip", "model.architecture.text={}", "model.architecture.text is missing"),
        ("clip", "model.kind=blip", "model.kind"),
        (
            "caption",
            "model.images=as_stored",
            "model.images is for model.kind=llave, llm2clip or clip, and this is cap",
        ),
        ("", "model.images=turned", "model.images: Input should be 'upright' or 'as_stored', got 'turned'"),
    ],
)
def test_what_a_kind_does_not_have_is_refused(kind, override, named):
    assert named in error_of(kind, override)


@pytest.mark.parametrize(
    ("kind", "architecture", "named"),
    [
        ("caption", {"text": TEXT | {"hiden_size": 8}}, "model.architecture.text.hiden_size; did you mean hidden_size"),
        ("caption", {"text": TEXT | {"model_type": "llamma"}}, "model_type=llamma is no model that transformers has"),
        ("caption", {"text": SIZES}, "model.architecture.text.vocab_size is missing"),
        ("clip", {"vision": VISION, "text": SIZES}, "model.architecture.text.vocab_size is missing"),
        ("clip", {"vision": VISION | {"patch": 8}, "text": TEXT}, "model.architecture.vision.patch"),
        ("llm2clip", {"vision": VISION | {"patch": 8}}, "model.architecture.vision.patch"),
    ],
)
def test_what_transformers_does_not_know_is_refused_before_anything_is_built(kind, architecture, named, folders):
    encoder = {"text_encoder": folders["caption"]} if kind == "llm2clip" else {}
    with pytest.raises(PipelineError) as error:
        KINDS[kind].check(Model(kind=kind, architecture=architecture, **encoder))
    assert named in str(error.value)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Of each of LLM2CLIP's kinds and of CLIP one of random weights as a run begins with, and a text encoder's."""
    root = tmp_path_factory.mktemp("kinds")
    found = {}
    for kind, architecture in ARCHITECTURES.items():
        encoder = {"text_encoder": found["caption"]} if kind == "llm2clip" else {}
        found[kind] = str(root / kind)
        model = Model(kind=kind, architecture=architecture, **encoder)
        KINDS[kind].build(model, ["a red star"], 0, root / kind)
    return found


def test_kinds_are_told_by_their_folders(folders, tiny_model, tmp_path):
    assert kind_of(tiny_model) is KINDS["llave"]
    assert kind_of(folders["clip"]) is KINDS["clip"]
    assert kind_of(folders["caption"]) is None  # any decoder
    assert kind_of(folders["llm2clip"]) is None  # a vision tower
    encoder = decoder.TextEncoder.load(folders["caption"], "auto")
    decoder.save(encoder, dict(encoder.named_parameters()), folders["caption"], tmp_path / "encoder", None, "")
    assert kind_of(str(tmp_path / "encoder")) is KINDS["caption"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(PipelineError, match=r"no model at .*empty.*: it has no config\.json"):
        kind_of(str(tmp_path / "empty"))


def photo(orientation: int) -> bytes:
    """Red at its left, and stored as a camera that was held so has it."""
    picture, exif, data = Image.new("RGB", (48, 32), (0, 0, 255)), Image.Exif(), io.BytesIO()
    picture.paste((255, 0, 0), (0, 0, 16, 32))
    exif[0x0112] = orientation
    picture.save(data, "PNG", exif=exif)
    return data.getvalue()


@pytest.mark.parametrize("kind", ["llave", "llm2clip", "clip"])
def test_pictures_are_read_as_the_recipe_says_and_so_by_its_export(kind, folders, tiny_model, tmp_path):
    name, path = ("demo", tiny_model) if kind == "llave" else (f"demo_{kind}", folders[kind])
    fields = [f"model.path={path}"] + [f"model.text_encoder={folders['caption']}"] * (kind == "llm2clip")
    item, upright = Item("<image>\nWhere?", (photo(6),)), Item("<image>\nWhere?", (photo(1),))

    def recipe(path: str, *images: str) -> Recipe:
        return load_recipe(f"pipeline/recipes/{name}.yaml", [*fields, f"model.path={path}", *images])

    plain = recipe(path)
    assert "images" not in plain.model.model_dump()  # the conditions of runs that began before it could be set
    turned, stored = (
        KINDS[kind].processor(plain, path),
        KINDS[kind].processor(recipe(path, "model.images=as_stored"), path),
    )
    assert (turned.as_stored, stored.as_stored) == (False, True)
    assert turned.encode(item).key != stored.encode(item).key == turned.encode(upright).key
    given = path
    for images, as_stored in (("as_stored", True), (None, True), ("upright", False)):  # each trained on from the last
        chosen = recipe(given, *([f"model.images={images}"] if images else []))
        model, out = KINDS[kind].load_whole(chosen, given), tmp_path / f"out{images}"
        write_folder(model, dict(model.named_parameters()), chosen, given, out)
        reader = KINDS[kind].reader(str(out), 512, 8)
        assert reader.as_stored == KINDS[kind].processor(chosen, given).as_stored == as_stored
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


def test_a_model_of_another_kind_is_refused_before_it_is_loaded(folders, tmp_path):
    def error(kind: str, path: str, **fields: str) -> str:
        with pytest.raises(PipelineError) as error:
            KINDS[kind].check(Model(kind=kind, path=path, **fields))
        return str(error.value)

    assert "is a clip model; expected a decoder of texts" in error("caption", folders["clip"])
    assert "is a qwen2 model; expected clip" in error("clip", folders["caption"])
    assert "is a qwen2 model; a vision encoder is a clip" in error(
        "llm2clip", folders["caption"], text_encoder=folders["caption"]
    )
    assert "expected a decoder of texts" in error("llm2clip", folders["llm2clip"], text_encoder=folders["clip"])
    missing = str(Path(tmp_path, "missing"))
    for kind in ("caption", "clip"):
        assert f"no model at '{missing}'" in error(kind, missing)
