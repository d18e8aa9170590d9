"""Published embedders on Qwen2-VL, from folders laid out like theirs, compared with what their own code gave."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close_in_norm
from peft import PeftModel
from PIL import Image as Picture
from published_qwen import IDS, QWEN2_VL, dump, picture, write_adapters, write_gme, write_qwen2_vl, write_qwen3_vl
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from pipeline.config import EvaluationRun, load_recipe
from pipeline.data.batch import Encoded
from pipeline.data.sample import BadSample, Item
from pipeline.embedding.embedder import Embedder, Parts
from pipeline.errors import PipelineError
from pipeline.evaluation.encoders import load_encoder
from pipeline.models.chunks import pack
from pipeline.models.loading import config_dict
from pipeline.models.qwen_vl import checks
from pipeline.models.qwen_vl.adapters import merge_vlm2vec
from pipeline.models.qwen_vl.model import FrozenQwenTower, QwenVL, TowerlessQwenVL
from pipeline.models.qwen_vl.patches import video_limit
from pipeline.models.registry import family_of, saved, training

CPU = torch.device("cpu")
REFERENCE = Path(__file__).parents[1] / "papers/qwen_vl"


def rows_of(name: str) -> list[tuple[Item, list[int], torch.Tensor]]:
    """Return items with the token ids and embeddings that the published code gave for them."""
    found = []
    for row in json.loads((REFERENCE / f"{name}.json").read_text()):
        item = Item(
            row["text"], tuple(picture(*size) for size in row.get("images", ())), instruction=row.get("instruction", "")
        )
        ids: list[int] = []
        for part in row["ids"]:
            ids += [part[0]] * part[1] if isinstance(part, list) else [part]
        found.append((item, ids, torch.tensor(row["embedding"])))
    return found


def assert_as_published(folder: Path, rows: list[tuple[Item, list[int], torch.Tensor]]) -> list[Encoded]:
    assert family_of(str(folder)) is saved("qwen_vl")
    reader = saved("qwen_vl").reader(str(folder), 2048, 8)
    encoded = [reader.encode(item) for item, _, _ in rows]
    assert [each.input_ids.tolist() for each in encoded] == [ids for _, ids, _ in rows]
    model, _ = saved("qwen_vl").open(str(folder), "fp32", CPU)
    with torch.no_grad():
        found = model(pack(encoded), True)
    torch.testing.assert_close(found, torch.stack([row for _, _, row in rows]), rtol=0, atol=1e-5)
    return encoded


@pytest.fixture(scope="module")
def gme(tmp_path_factory) -> Path:
    return write_gme(tmp_path_factory.mktemp("gme") / "code", "code")


@pytest.fixture(scope="module")
def vlm2vec(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vlm2vec") / "merged"
    return write_qwen2_vl(folder, embedding={"prompt": "vlm2vec"})


def test_gme_embeds_as_its_own_code(gme, tmp_path):
    rows = rows_of("gme")
    encoded = assert_as_published(gme, rows)
    assert min(len(each.images[0].tiles) for each in encoded if each.images) >= 4 * 256
    assert_as_published(write_gme(tmp_path / "script", "script"), rows[:3])
    alone = next((item, row) for item, _, row in rows if item.text == "<image>")
    image = tmp_path / "image.png"
    image.write_bytes(alone[0].images[0])
    embedder, (asked, _, asked_row) = Embedder.load(gme, "cpu", "fp32"), rows[1]
    query: Parts = {"text": asked.text, "instruction": asked.instruction}
    found = embedder.embed([image, Picture.open(image), rows[0][0].text, query])
    torch.testing.assert_close(found, torch.stack([alone[1], alone[1], rows[0][2], asked_row]), rtol=0, atol=1e-5)
    assert load_encoder(str(gme), EvaluationRun(), CPU).system_turn


def test_vlm2vec_embeds_as_its_own_code(vlm2vec):
    encoded = assert_as_published(vlm2vec, rows_of("vlm2vec"))
    assert all(each.positions is None for each in encoded)
    with pytest.raises(BadSample, match="an empty text without images"):
        saved("qwen_vl").reader(str(vlm2vec), 512, 8).encode(Item(""))
    with pytest.raises(BadSample, match="an instruction apart from the text"):
        saved("qwen_vl").reader(str(vlm2vec), 512, 8).encode(Item("x", instruction="Find it."))
    assert not load_encoder(str(vlm2vec), EvaluationRun(), CPU).system_turn


def test_qwen3_vl_embedding_embeds_as_its_own_code(tmp_path):
    folder, rows = write_qwen3_vl(tmp_path / "embedding"), rows_of("qwen3_vl_embedding")
    assert_as_published(folder, rows)
    item, _, expected = next(row for row in rows if row[0].text == "<image>")
    embedder = Embedder.load(folder, "cpu", "fp32")
    found = embedder.embed(
        [Picture.open(io.BytesIO(item.images[0])), {"text": rows[1][0].text, "instruction": "Find it"}]
    )
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], rows[1][2], rtol=0, atol=1e-5)


def test_adapters_merge_as_in_peft(tmp_path):
    base = write_qwen2_vl(tmp_path / "base")
    adapters = write_adapters(tmp_path / "adapters", base)
    with pytest.raises(PipelineError, match=r"it holds adapters.*tools/convert_weights\.py --adapters"):
        family_of(str(adapters))
    merge_vlm2vec(str(adapters), tmp_path / "merged")
    renamed = write_adapters(tmp_path / "renamed", base)
    tensors = load_file(adapters / "adapter_model.safetensors")
    tensors = {name.replace(".layers.", ".language_model.layers."): tensor for name, tensor in tensors.items()}
    save_file(tensors, renamed / "adapter_model.safetensors")  # of the present transformers, for peft
    theirs = PeftModel.from_pretrained(Qwen2VLForConditionalGeneration.from_pretrained(base), renamed)
    expected = theirs.merge_and_unload().model.state_dict()
    ours = QwenVL.load(str(tmp_path / "merged"), torch.float32).state_dict()
    before = QwenVL.load(str(base), torch.float32).state_dict()
    assert ours.keys() == expected.keys()
    assert sum(not torch.equal(ours[name], before[name]) for name in ours) == 3
    for name, tensor in ours.items():
        assert_close_in_norm(tensor, expected[name])
    reader = saved("qwen_vl").reader(str(tmp_path / "merged"), 512, 8)
    assert reader.encode(Item("ab")).input_ids.tolist() == [IDS["a"], IDS["b"]]
    for changes, said in (
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"bias": "all"}, "bias='all' in its adapter_config.json is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' in its adapter_config.json is not"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' in its adapter_config.json is not supported"),
        ({"lora_alpha": None}, "lora_alpha=None in its adapter_config.json is no number"),
        ({"base_model_name_or_path": str(tmp_path / "none")}, "no model at"),
    ):
        values = json.loads((renamed / "adapter_config.json").read_text())
        dump(renamed / "adapter_config.json", values | changes)
        with pytest.raises(PipelineError, match=said):
            merge_vlm2vec(str(renamed), tmp_path / "again")
        dump(renamed / "adapter_config.json", values)
    with pytest.raises(PipelineError, match="is there already"):
        merge_vlm2vec(str(adapters), tmp_path / "merged")
    with pytest.raises(PipelineError, match="no adapters at"):
        merge_vlm2vec(str(base), tmp_path / "again")
    save_file(
        {name.replace("layers.0", "layers.9"): tensor for name, tensor in tensors.items()},
        renamed / "adapter_model.safetensors",
    )
    with pytest.raises(PipelineError, match=r"layers\.9\.self_attn\.q_proj\.lora_A\.weight is an adapter of no layer"):
        merge_vlm2vec(str(renamed), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def recipe_of(folder: Path, *changes: str) -> Any:
    return load_recipe("demo_qwen.yaml", ["model.architecture=null", f"model.path={folder}", *changes])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gme", "vlm2vec"])
def test_trained_further_and_exported_they_keep_their_prompt(kind, request, tmp_path):
    folder, family = request.getfixturevalue(kind), training("qwen_vl")
    rows = rows_of(kind)
    recipe = recipe_of(folder, "model.max_tokens=2048")
    family.check(recipe.model)
    assert family.conditions(recipe.model)["model.prompt"] == kind
    processor = family.processor(recipe, str(folder))
    encoded = [processor.encode(item) for item, _, _ in rows]
    assert [each.input_ids.tolist() for each in encoded] == [ids for _, ids, _ in rows]
    model = family.load_whole(recipe, str(folder))
    family.save(recipe, model, dict(model.named_parameters()), str(folder), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["embedding"]["prompt"] == kind and "auto_map" not in config
    assert_as_published(tmp_path / "out", rows)
    tower, without = (
        FrozenQwenTower.load(str(folder), torch.float32, CPU),
        TowerlessQwenVL.load(str(folder), torch.float32),
    )
    packed = pack(encoded[:4])
    found = without(packed, True, tower.features_of(None, packed))  # type: ignore[arg-type]
    torch.testing.assert_close(found.detach(), torch.stack([row for _, _, row in rows[:4]]), rtol=0, atol=1e-5)
    gradients = torch.autograd.grad(found[:, 0].sum(), list(without.parameters()))
    assert all(gradient.any() for gradient in gradients)
    card = (tmp_path / "out/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace('FOLDER = "."', f"FOLDER = {str(tmp_path / 'out')!r}")
    space: dict[str, Any] = {}
    exec(code, space)
    torch.testing.assert_close(space["embed"](rows[0][0].text), rows[0][2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gme", "vlm2vec"])
def test_lengths_are_known_from_an_image_s_size(kind, request):
    patches = saved("qwen_vl").reader(str(request.getfixturevalue(kind)), 2048, 8).patches
    for item, ids, _ in rows_of(kind):
        sizes = [Picture.open(io.BytesIO(image)).size for image in item.images]
        counted = sum(patches.tokens(height, width, anyres=True) for width, height in sizes)
        marks = ids.count(IDS["<|vision_start|>"]) + ids.count(IDS["<|vision_end|>"])
        assert counted == ids.count(IDS["<|image_pad|>"]) + marks


def test_recipe_overrides_the_prompt(gme):
    chat = recipe_of(gme, "model.prompt=chat").model
    videos = {"max_video_tokens": video_limit(chat.max_tokens)}
    config = checks.config_of(chat)
    own = {"instruction": "Represent the user's input.", "min_pixels": 4 * 784, "max_pixels": 1800 * 784}
    assert config.embedding == own | videos | {"prompt": "chat"}
    config = checks.config_of(recipe_of(gme, "model.prompt=gme", "model.max_pixels=800000").model)
    own = {"instruction": "You are a helpful assistant.", "min_pixels": 256 * 784, "max_pixels": 800_000}
    assert config.embedding == own | videos | {"prompt": "gme"}
    config = checks.config_of(recipe_of(gme, "model.prompt=vlm2vec").model)
    assert (config.embedding["instruction"], config.embedding["max_pixels"]) == ("", 1280 * 784)
    with pytest.raises(PipelineError, match=r"model\.instruction: the prompt vlm2vec has no turn for it"):
        checks.config_of(recipe_of(gme, "model.prompt=vlm2vec", "model.instruction=x").model)


def test_gme_is_recognised_by_its_files_alone(gme, tmp_path):
    assert config_dict(str(gme))["embedding"] == {"prompt": "gme"}
    limits = {"min_image_tokens": 64, "max_image_tokens": 512}
    other = write_gme(tmp_path / "limits", "code")
    values = json.loads((other / "config.json").read_text())
    dump(other / "config.json", values | limits)
    assert config_dict(str(other))["embedding"] == {"prompt": "gme", "min_pixels": 64 * 784, "max_pixels": 512 * 784}
    dump(other / "config.json", values | {"auto_map": {"AutoModel": "other.Model"}})
    with pytest.raises(PipelineError, match="auto_map"):
        config_dict(str(other))
    cached = write_qwen2_vl(tmp_path / "models--Alibaba-NLP--gme-Qwen2-VL-2B-Instruct/snapshots/0")
    assert config_dict(str(cached))["embedding"] == {"prompt": "gme"}
    plain = write_qwen2_vl(tmp_path / "plain")
    assert "embedding" not in config_dict(str(plain))
    dump(plain / "config.json", QWEN2_VL | {"embedding": {"prompt": "of_later"}})
    with pytest.raises(PipelineError, match=r"a prompt of chat, gme, vlm2vec: was it written by a later version"):
        saved("qwen_vl").reader(str(plain), 512, 8)
