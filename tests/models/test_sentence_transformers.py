"""Exports loaded by sentence-transformers: its vectors are those of `Embedder`."""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image as Picture
from safetensors.torch import load_file, save_file
from test_exports_elsewhere import MARKS, mark, run_example
from test_qwen_vl import ARCHITECTURES
from test_text_encoder import PAPER
from transformers import AutoModel, AutoModelForCausalLM, BaseVideoProcessor, LlavaOnevisionConfig, Qwen2Tokenizer
from transformers.models.auto import video_processing_auto
from transformers.utils import is_torchvision_available

from pipeline.config import Recipe, load_recipe
from pipeline.embedding.embedder import Embedder
from pipeline.errors import PipelineError
from pipeline.export import _check_adapters
from pipeline.models.clip import model as clip
from pipeline.models.clip.config import ClipArchitecture
from pipeline.models.files import ADAPTERS
from pipeline.models.llave import weights
from pipeline.models.llave.folder import save_folder as save_llave
from pipeline.models.llave.model import Llave
from pipeline.models.llm2clip import model as llm2clip
from pipeline.models.qwen_vl.config import QwenVLArchitecture
from pipeline.models.qwen_vl.folder import save_folder as save_qwen
from pipeline.models.qwen_vl.model import QwenVL
from pipeline.models.qwen_vl.model import build as build_qwen
from pipeline.models.registry import training_of
from pipeline.models.text_encoder import model as decoder
from pipeline.models.text_encoder.model import TextEncoder
from pipeline.models.text_encoder.processor import Settings, TextProcessor
from pipeline.training.engine import adapt, freeze
from pipeline.training.export import write_adapters, write_folder

pytestmark = pytest.mark.slow  # the import

GOLDEN = Path(__file__).parents[1] / "golden"
SITE = Path(sys.prefix, "sentence_transformers")
TOLERANCE = 1e-5
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXTS = ["a small red star at the top left", "A", "a longer text " * 9, " white space ", 'quotes "so" \\ {x} {{ y }}']
STRIPPED = [text.strip() for text in TEXTS]
CORPUS = [*TEXTS, "Represent the given image.", "a large blue ring", "A cat and a dog"]


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    """Import sentence-transformers from its own folder; tests/sentence_transformers.txt says why.

    A processor of videos needs torchvision, and transformers makes one with every processor. No test needs it.
    """
    if not SITE.is_dir():
        pytest.skip(f"sentence-transformers is not in {SITE}: bash tests/run.sh installs it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(SITE)])
        if not is_torchvision_available():
            patch.setattr(video_processing_auto, "AutoVideoProcessor", _NoVideos)
        import_module("sentence_transformers")
        yield


class _Videos(dict, BaseVideoProcessor):
    """Of no fields, which transformers logs as JSON."""


class _NoVideos:
    @staticmethod
    def from_pretrained(*_: Any, **__: Any) -> _Videos:
        return dict.__new__(_Videos)


def picture(width: int, height: int, seed: int = 0) -> Picture.Image:
    return Picture.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def encoded(model: Any, items: Sequence[Any], **options: Any) -> torch.Tensor:
    return model.encode(list(items), convert_to_tensor=True, batch_size=3, **options).cpu()


def opened(folder: Path) -> Any:
    assert (folder / "modules.json").is_file()  # without it, sentence-transformers makes up modules
    return sys.modules["sentence_transformers"].SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def randomised(model: torch.nn.Module) -> None:
    """Change norms and biases, which begin as ones and zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.2)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def qwen(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    build_qwen(QwenVLArchitecture(model_type=request.param, **ARCHITECTURES[request.param]), CORPUS, 1, root / "base")
    model = QwenVL.load(str(root / "base"), torch.float32)
    randomised(model)
    (root / "out").mkdir()
    save_qwen(model, dict(model.named_parameters()), str(root / "base"), root / "out")
    return root / "out"


def test_qwen_vl_texts_and_images(qwen):
    model, ours = opened(qwen), Embedder.load(qwen)
    assert_same(encoded(model, TEXTS), ours.embed(TEXTS))
    pictures = [picture(48, 48), picture(130, 31, 1), picture(9, 5, 2), picture(2, 300, 3)]
    assert_same(encoded(model, pictures), ours.embed(pictures))
    beside = [(text, [picture(40, 66, number)]) for number, text in enumerate(TEXTS)]
    beside.append(("two images", [picture(24, 30, 8), picture(66, 40, 9)]))
    given = [{"text": text, "image": images if len(images) > 1 else images[0]} for text, images in beside]
    expected = ours.embed([{"text": text, "images": images} for text, images in beside])
    assert_same(encoded(model, given), expected)
    assert_same(encoded(model, [dict(reversed(item.items())) for item in given]), expected)
    assert_same(
        encoded(model, [TEXTS[0], pictures[0], given[1]]),
        torch.stack([ours.embed(TEXTS[:1])[0], ours.embed(pictures[:1])[0], expected[1]]),
    )


def test_qwen_vl_prompt_is_the_system_turn(qwen, tmp_path):
    model = opened(qwen)
    assert model.prompts["query"] == "Represent the user's input."
    shutil.copytree(qwen, tmp_path / "other")
    config = json.loads((qwen / "config.json").read_text())
    config["embedding"]["instruction"] = "Find the picture."
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    expected = Embedder.load(tmp_path / "other").embed(TEXTS)
    assert_same(encoded(model, TEXTS, prompt="Find the picture."), expected)
    assert (expected - encoded(model, TEXTS)).abs().max() > 100 * TOLERANCE


def test_qwen_vl_long_texts_keep_the_prompts_end(qwen):
    model = opened(qwen)
    model.max_seq_length = 64
    text = "a longer text " * 99
    assert_same(encoded(model, [text, "A"]), Embedder.load(qwen, max_tokens=64).embed([text, "A"]))


def test_videos_are_refused(qwen):
    model, frames = opened(qwen), np.zeros((2, 3, 24, 24), np.uint8)
    with pytest.raises(ValueError, match="'video' is not supported"):
        model.encode([{"video": frames}])
    with pytest.raises(Exception, match="part of type video, which this folder does not read"):
        model.encode([[{"role": "user", "content": [{"type": "video", "video": frames}]}]])


@pytest.fixture(scope="module")
def llave(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llave") / "out"
    model = Llave.load(tiny_model, torch.float32)
    randomised(model)
    save_llave(model, dict(model.named_parameters()), tiny_model, folder)
    return folder


def test_llave_texts_and_images(llave):
    model, ours = opened(llave), Embedder.load(llave)
    assert_same(encoded(model, TEXTS), ours.embed(TEXTS))
    assert_same(encoded(model, ["a star"], prompt="Find: "), ours.embed(["Find: a star"]))
    pictures = [picture(48, 48), picture(130, 31, 1), picture(9, 5, 2), picture(20, 99, 3), picture(47, 31, 4)]
    assert_same(encoded(model, pictures), ours.embed(pictures))
    given = [{"text": text, "image": picture(40, 66, number)} for number, text in enumerate(TEXTS)]
    expected = [{"text": item["text"], "images": [item["image"]]} for item in given]
    assert_same(encoded(model, given), ours.embed(expected))
    two = [picture(24, 30, 8), picture(66, 40, 9)]
    assert_same(encoded(model, [{"image": two, "text": "two"}]), ours.embed([{"text": "two", "images": two}]))


@pytest.mark.parametrize("marks", ["begins and ends", "ends with two"])
def test_llave_ignores_the_tokens_that_its_tokenizer_adds(marks, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "base")
    mark(tmp_path / "base", marks)
    settings = tmp_path / "base/tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"pad_token": "<|endoftext|>"}))
    model = Llave.load(str(tmp_path / "base"), torch.float32)
    save_llave(model, dict(model.named_parameters()), str(tmp_path / "base"), tmp_path / "out")
    assert_same(encoded(opened(tmp_path / "out"), TEXTS), Embedder.load(tmp_path / "out").embed(TEXTS))


def test_llave_whose_image_token_has_another_name_reads_texts_alone(llave, tmp_path):
    shutil.copytree(llave, tmp_path / "base")
    config = LlavaOnevisionConfig.from_pretrained(llave)
    config.image_token_id, config.video_token_id = config.video_token_id, config.image_token_id
    config.save_pretrained(tmp_path / "base")
    model = Llave.load(str(tmp_path / "base"), torch.float32)
    save_llave(model, dict(model.named_parameters()), str(tmp_path / "base"), tmp_path / "out")
    assert "Only texts are supported here" in (tmp_path / "out/README.md").read_text()
    theirs = opened(tmp_path / "out")
    assert_same(encoded(theirs, TEXTS), Embedder.load(tmp_path / "out").embed(TEXTS))
    with pytest.raises(ValueError, match="'image' is not supported"):
        theirs.encode([picture(24, 24)])


@pytest.fixture(scope="module")
def decoders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decoders") / "plain"
    text = SIZES | {"num_key_value_heads": 2, "vocab_size": 400}
    decoder.build(text, CORPUS, 0, folder, AutoModelForCausalLM)
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        CORPUS, 280, new_special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False
    )
    tokenizer.save_pretrained(folder)
    return folder


def saved(base: Path, out: Path, settings: Settings) -> Path:
    model = TextEncoder.load(str(base), torch.float32)
    randomised(model)
    decoder.save(model, dict(model.named_parameters()), str(base), out, None, settings)
    return out


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("instruction", ["", "Represent:\n"])
def test_text_encoder_with_any_tokens_of_its_tokenizer(marks, instruction, decoders, tmp_path):
    shutil.copytree(decoders, tmp_path / "base")
    mark(tmp_path / "base", marks)
    folder = saved(tmp_path / "base", tmp_path / "out", Settings(instruction=instruction))
    if marks == "begins with its end" and not instruction:  # no token is left for padding
        assert not (folder / "modules.json").exists()
        return
    assert_same(encoded(opened(folder), STRIPPED), Embedder.load(folder).embed(STRIPPED))


@pytest.mark.parametrize("instruction", ["", "Retrieve:\n\n"])
def test_text_encoder_in_a_chat_template(instruction, tmp_path):
    folder = saved(PAPER / "text_encoder", tmp_path / "out", Settings(instruction=instruction, template="llama3"))
    assert_same(encoded(opened(folder), STRIPPED), Embedder.load(folder).embed(STRIPPED))


def test_instruction_that_merges_with_texts_is_not_exported(decoders, tmp_path):
    """Here instruction and text are tokenized apart, in sentence-transformers together."""
    settings = Settings(instruction="Represent: ")
    folder = saved(decoders, tmp_path / "out", settings)
    assert not (folder / "modules.json").exists()
    assert "The folder is not for sentence-transformers" in (folder / "README.md").read_text()
    assert TextProcessor.load(str(folder), 64).instruction == "Represent: "


def test_text_encoder_inside_an_llm2clip_is_no_ready_embedder(decoders, tmp_path):
    encoder = saved(decoders, tmp_path / "encoder", Settings())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text('{"architectures": ["CLIPVisionModel"]}')
    llm2clip.save_beside({"weight": torch.ones(1)}, 32, str(encoder), tmp_path / "out", None)
    assert "a decoder with bidirectional attention" in (tmp_path / "out/README.md").read_text()
    assert_same(encoded(opened(tmp_path / "out/text_encoder"), STRIPPED), Embedder.load(encoder).embed(STRIPPED))


def test_clip_texts_and_images(tmp_path):
    vision = SIZES | {"image_size": 24, "patch_size": 8, "projection_dim": 20}
    text = SIZES | {"vocab_size": 600, "max_position_embeddings": 20}
    clip.build(ClipArchitecture(vision=vision, text=text), CORPUS, 0, tmp_path / "base")
    model = clip.Clip.load(str(tmp_path / "base"), torch.float32)
    randomised(model)
    clip.save(model, str(tmp_path / "base"), tmp_path / "out")
    ours, theirs = Embedder.load(tmp_path / "out"), opened(tmp_path / "out")
    assert_same(encoded(theirs, TEXTS), ours.embed(TEXTS))
    pictures = [picture(48, 48), picture(130, 31, 1), picture(20, 99, 3)]
    assert_same(encoded(theirs, pictures), ours.embed(pictures))


def adapted(family: str, base: Path, fields: list[str], source: Path | None = None) -> tuple[torch.nn.Module, Recipe]:
    """Return a model with adapters that change it, and the recipe.  source: of the weights, if it is not `base`."""
    name = {"qwen_vl": "demo_qwen", "llave": "demo", "text_encoder": "demo_caption"}[family]
    alone = [] if family == "text_encoder" else ["model.train.projector=false", "model.train.vision_tower=false"]
    fields = ["model.architecture=null", f"model.path={base}", "model.train.lora.rank=2", *alone, *fields]
    recipe = load_recipe(f"pipeline/recipes/{name}.yaml", fields)
    model = training_of(recipe).load_whole(recipe, str(source or base)).eval()
    freeze(model, recipe)
    adapt(model, recipe)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return model, recipe


@pytest.mark.parametrize("family", ["qwen_vl", "llave", "text_encoder"])
def test_unmerged_adapters_give_the_merged_vectors(family, tiny_model, decoders, tmp_path, monkeypatch):
    if family == "qwen_vl":
        build_qwen(QwenVLArchitecture(model_type="qwen3_vl", **ARCHITECTURES["qwen3_vl"]), CORPUS, 1, tmp_path / "base")
    elif family == "llave":
        shutil.copytree(tiny_model, tmp_path / "base")
    else:
        saved(decoders, tmp_path / "base", Settings())
    base, merged, alone = (tmp_path / name for name in ("base", "merged", "alone"))
    model, recipe = adapted(family, base, ["objective.dimensions=[8]"])
    write_adapters(model, recipe, str(base), alone)
    _check_adapters(model, training_of(recipe).adapter_prefix(recipe, str(base)), alone)
    write_folder(model, dict(model.named_parameters()), recipe, str(base), merged)
    expected = Embedder.load(merged).embed(STRIPPED)
    assert (expected - Embedder.load(base).embed(STRIPPED)).abs().max() > 100 * TOLERANCE
    assert_same(encoded(opened(alone), STRIPPED), expected)
    assert_same(encoded(opened(merged), STRIPPED), expected)
    assert "truncate_dim=8" in (alone / "README.md").read_text()
    small = encoded(opened(merged), STRIPPED, truncate_dim=8, normalize_embeddings=True)
    assert_same(small, Embedder.load(merged).embed(STRIPPED, dimensions=8))
    embed = run_example(alone, monkeypatch)["embed"]
    assert_same(torch.stack([embed(text) for text in STRIPPED]), expected)
    both = PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(alone)).merge_and_unload()
    weights = AutoModel.from_pretrained(merged).state_dict()
    torch.testing.assert_close(dict(both.state_dict()), dict(weights), rtol=1e-5, atol=1e-6)
    with pytest.raises(PipelineError, match="holds adapters"):
        Embedder.load(alone)
    tensors = load_file(alone / ADAPTERS)
    save_file({name: tensor + (name == min(tensors)) for name, tensor in tensors.items()}, alone / ADAPTERS)
    with pytest.raises(PipelineError, match="do not give the checkpoint's"):
        _check_adapters(model, training_of(recipe).adapter_prefix(recipe, str(base)), alone)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_unmerged_adapters_of_a_qwen_vl_keep_the_recipe_s_settings(kind, tmp_path):
    """The config.json beside them, in which the settings are recorded, is the base model's."""
    build_qwen(QwenVLArchitecture(model_type=kind, **ARCHITECTURES[kind]), CORPUS, 1, tmp_path / "base")
    settings = ["instruction=Find the picture.", "min_pixels=6400", "max_pixels=12800"]
    given = [*STRIPPED, picture(48, 48), picture(330, 231, 1)]
    assert_alone_as_merged("qwen_vl", tmp_path / "base", [f"model.{each}" for each in settings], given)


@pytest.mark.parametrize("template", ["none", "llama3"])
def test_unmerged_adapters_of_a_text_encoder_keep_the_recipe_s_settings(template, tmp_path, monkeypatch):
    saved(PAPER / "text_encoder", tmp_path / "base", Settings())
    fields = [f"model.template={template}", 'model.instruction="Retrieve:\\n"']
    expected = assert_alone_as_merged("text_encoder", tmp_path / "base", fields, STRIPPED)
    embed = run_example(tmp_path / "alone", monkeypatch)["embed"]
    assert_same(torch.stack([embed(text) for text in STRIPPED]), expected)


def test_unmerged_adapters_of_a_llave_read_images(tiny_model, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    given = [*STRIPPED, picture(48, 48), picture(130, 31, 1)]
    assert_alone_as_merged("llave", base, [], given)


def assert_alone_as_merged(family: str, base: Path, fields: list[str], given: list[Any]) -> torch.Tensor:
    """Compare adapters beside `base` with the merged export, whose vectors differ from `base`'s; return these."""
    merged, alone = base.parent / "merged", base.parent / "alone"
    model, recipe = adapted(family, base, fields)
    write_adapters(model, recipe, str(base), alone)
    write_folder(model, dict(model.named_parameters()), recipe, str(base), merged)
    expected = Embedder.load(merged).embed(given)
    assert ((expected - Embedder.load(base).embed(given)).abs().amax(dim=1) > 100 * TOLERANCE).all()
    assert_same(encoded(opened(alone), given), expected)
    return expected


def test_adapters_of_a_llave_that_tiles_otherwise_are_refused(tiny_model, tmp_path):
    """transformers' model would cut images by the config.json of the base model."""
    stored = json.loads(Path(tiny_model, "config.json").read_text())["image_grid_pinpoints"]
    for field in (f"image_grid_pinpoints={stored[:-1]}", "mm_newline_position=grid"):
        model, recipe = adapted("llave", Path(tiny_model), [f"model.{field}"])
        with pytest.raises(PipelineError, match="mm_newline_position is not what the config"):
            write_adapters(model, recipe, tiny_model, tmp_path / "out")
    model, recipe = adapted(
        "llave", Path(tiny_model), [f"model.image_grid_pinpoints={stored}", "model.mm_newline_position=one_token"]
    )
    write_adapters(model, recipe, tiny_model, tmp_path / "out")


def test_adapters_of_an_original_llave_name_its_converted_copy(tmp_path, caplog):
    original = shutil.copytree(GOLDEN, tmp_path / "LLaVE-tiny")
    source = weights.resolve(str(original), tmp_path / "run/init")
    model, recipe = adapted("llave", original, [], Path(source))
    write_adapters(model, recipe, source, tmp_path / "alone")
    named = json.loads((tmp_path / "alone/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == source != str(original)
    assert f"the converted copy of {original} in the run, {source}: keep it there" in caplog.text


def test_adapters_that_are_not_the_whole_model_are_refused(tiny_model, decoders, tmp_path):
    model, recipe = adapted("llave", Path(tiny_model), ["model.train.projector=true"])
    with pytest.raises(PipelineError, match="this run also trained image_newline"):
        write_adapters(model, recipe, tiny_model, tmp_path / "out")
    model, recipe = adapted("text_encoder", decoders, [])
    with pytest.raises(PipelineError, match="attends causally"):
        write_adapters(model, recipe, str(decoders), tmp_path / "out")
    recipe = load_recipe("pipeline/recipes/demo.yaml", ["model.architecture=null", f"model.path={tiny_model}"])
    with pytest.raises(PipelineError, match="trained no adapters"):
        write_adapters(model, recipe, tiny_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
