import json
import pickle
import re
import resource
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from sections import section
from transformers import LlavaOnevisionImageProcessorPil, LlavaOnevisionModel

from pipeline.config import load_recipe
from pipeline.data.batch import Encoded
from pipeline.errors import PipelineError
from pipeline.models.chunks import pack
from pipeline.models.llave import weights
from pipeline.models.llave.checks import tiling
from pipeline.models.llave.folder import save_folder
from pipeline.models.llave.model import Llave
from pipeline.models.llave.original import config_from, config_of, is_original
from pipeline.models.llave.processor import LlaveProcessor
from pipeline.models.llave.weights import convert_original, export_original, resolve
from pipeline.models.registry import training
from pipeline.storage import lock
from pipeline.training.export import write_folder

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
TENSORS = load_file(GOLDEN / "model.safetensors")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOWER = "model.vision_tower.vision_tower.vision_model."


def checkpoint(
    folder: Path, tensors: dict[str, torch.Tensor] = TENSORS, files: int = 1, suffix: str = "safetensors", **config
) -> Path:
    """Write the golden original checkpoint, in several files, with changed tensors or config fields (None: removed)."""
    shutil.copytree(GOLDEN, folder, ignore=shutil.ignore_patterns("*.png", "model.safetensors"))
    values = json.loads((GOLDEN / "config.json").read_text()) | config
    values = {name: value for name, value in values.items() if value is not None or name not in config}
    (folder / "config.json").write_text(json.dumps(values))
    stem, weight_map = "model" if suffix == "safetensors" else "pytorch_model", {}
    for number in range(files):
        name = f"{stem}.{suffix}" if files == 1 else f"{stem}-{number + 1:05d}-of-{files:05d}.{suffix}"
        part = {key: tensors[key] for key in list(tensors)[number::files]}
        save_file(part, folder / name) if suffix == "safetensors" else torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    if files > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Convert checkpoints whose video newlines are `grid`, and not given."""
    folder = tmp_path_factory.mktemp("weights")
    convert_original(GOLDEN, folder / "grid")
    convert_original(checkpoint(folder / "original", mm_newline_position=None), folder / "one_token")
    return {name: folder / name for name in ("grid", "one_token")}


@cache
def load(folder: Path) -> tuple[LlaveProcessor, Llave]:
    return LlaveProcessor.load(str(folder), 4096), Llave.load(str(folder), torch.float32).eval()


def encode(folder: Path, case: dict) -> Encoded:
    def opened(name: str) -> Image.Image:
        return Image.open(GOLDEN / name).convert("RGB")

    if "video" in case:
        text = case["text"].replace("<image>", "<video>")
        return load(folder)[0].encode_parts(text, [], lambda: [opened(name) for name in case["video"]])
    images = [lambda: opened(case["image"])] if "image" in case else []
    return load(folder)[0].encode_parts(case["text"], images, None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.get("image") or case.get("newline") or "text")
def test_converted_checkpoint_matches_golden_embeddings(folders, case):
    folder = folders[case.get("newline", "grid")]
    encoded = encode(folder, case)
    marks = {load(folder)[0].image_token_id: -200, load(folder)[0].video_token_id: -200}
    ids = [marks.get(token, token) for token in encoded.input_ids.tolist()]
    assert [token for i, token in enumerate(ids) if token != -200 or ids[i - 1] != -200] == case["input_ids"]
    with torch.no_grad():
        embedding = load(folder)[1](pack([encoded]), True)[0]
    assert F.cosine_similarity(embedding, torch.tensor(case["embedding"]), dim=0) > 1 - 1e-6


def test_video_placeholder_count_matches_newline_position(folders):
    """Use 4 frames of 27x27 patches, pooled to 14x14."""
    video = next(case for case in CASES if "video" in case)
    for name, count in (("grid", 4 * 14 * 15), ("one_token", 4 * 14 * 14 + 1)):
        assert (encode(folders[name], video).input_ids == load(folders[name])[0].video_token_id).sum() == count


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=["text", "image"])
def test_transformers_loads_converted_folder_with_equal_embeddings(folders, case):
    model, loaded = LlavaOnevisionModel.from_pretrained(folders["grid"], output_loading_info=True)
    assert not any(loaded.values())
    inputs = {}
    if "image" in case:
        processor = LlavaOnevisionImageProcessorPil.from_pretrained(folders["grid"])
        inputs = dict(processor([[Image.open(GOLDEN / case["image"]).convert("RGB")]], return_tensors="pt"))
    ids = torch.from_numpy(encode(folders["grid"], case).input_ids).long()[None]
    with torch.no_grad():
        hidden = model.eval()(input_ids=ids, use_cache=False, **inputs).last_hidden_state
    assert F.cosine_similarity(hidden[0, -1], torch.tensor(case["embedding"]), dim=0) > 1 - 1e-6


def test_conversion_round_trip_is_exact(folders, tmp_path):
    source = checkpoint(tmp_path / "source", image_grid_pinpoints=[[384, 384], [384, 1152]], rope_theta=1234.5)
    convert_original(source, tmp_path / "hf")
    export_original(tmp_path / "hf", tmp_path / "back")
    convert_original(tmp_path / "back", tmp_path / "again")
    assert same(stored(tmp_path / "back"), TENSORS | {HEAD: TENSORS[EMBEDDING]})
    assert same(stored(tmp_path / "again"), stored(tmp_path / "hf"))
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "hf" / name).read_text()) == json.loads((tmp_path / "again" / name).read_text())
    # Sizes are (width, height) in the original and (height, width) in transformers.
    assert json.loads((tmp_path / "hf/config.json").read_text())["image_grid_pinpoints"] == [[384, 384], [1152, 384]]
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert {name for name in before.keys() & after.keys() if before[name] != after[name]} == {"mm_tunable_parts"}
    assert "mm_vision_tower" in after["mm_tunable_parts"]  # otherwise the original reads the tower from elsewhere
    assert {"mm_projector_type", "mm_vision_tower", "rope_theta", "torch_dtype", "vocab_size"} <= after.keys()
    tower = json.loads((tmp_path / "back/vision_config.json").read_text())
    assert tower.items() <= json.loads((GOLDEN / "vision_config.json").read_text()).items()


@pytest.mark.slow
def test_export_matches_golden_embeddings_in_both_formats(folders, tmp_path):
    """original -> Hugging Face -> export -> original -> Hugging Face: compare all golden cases after both exports."""
    chosen = load_recipe("pipeline/recipes/demo.yaml", ["model.path=lab/original"])
    for newline, folder in folders.items():
        exported, again = tmp_path / f"{newline}-exported", tmp_path / f"{newline}-again"
        model = Llave.load(str(folder), "auto")
        write_folder(model, dict(model.named_parameters()), chosen, str(folder), exported)
        export_original(exported, tmp_path / f"{newline}-back")
        convert_original(tmp_path / f"{newline}-back", again)
        for case in (case for case in CASES if case.get("newline", newline) == newline):
            for written in (exported, again):
                with torch.no_grad():
                    embedding = load(written)[1](pack([encode(written, case)]), True)[0]
                assert F.cosine_similarity(embedding, torch.tensor(case["embedding"]), dim=0) > 1 - 1e-6


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_checkpoint_in_several_files_converts_to_several_files(folders, tmp_path, suffix):
    source = checkpoint(tmp_path / "source", files=2, suffix=suffix)
    convert_original(source, tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 2
    assert same(stored(tmp_path / "hf"), stored(folders["grid"]))
    loaded = dict(Llave.load(str(tmp_path / "hf"), "auto").named_parameters())
    assert same(loaded, dict(load(folders["grid"])[1].named_parameters()))
    export_original(tmp_path / "hf", tmp_path / "back")
    assert same(stored(tmp_path / "back"), TENSORS | {HEAD: TENSORS[EMBEDDING]})


def test_conversion_adds_placeholder_rows_and_preserves_dtype(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in TENSORS.items() if name != HEAD}  # as with tied embeddings
    tensors[EMBEDDING] = tensors[EMBEDDING][:384].contiguous()  # only the tokenizer's own tokens
    source = checkpoint(tmp_path / "source", tensors, vocab_size=384, tie_word_embeddings=True)
    convert_original(source, tmp_path / "hf")
    model, processor = Llave.load(str(tmp_path / "hf"), "auto"), LlaveProcessor.load(str(tmp_path / "hf"), 4096)
    rows = model.language_model.embed_tokens.weight
    assert model.dtype == torch.bfloat16
    assert {processor.image_token_id, processor.video_token_id} == {384, 385}
    assert torch.equal(rows, torch.cat([tensors[EMBEDDING], torch.zeros(2, 64, dtype=torch.bfloat16)]))
    assert processor.tokenizer("<image>")["input_ids"] == [384]
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["dtype"], config["tie_word_embeddings"]) == ("bfloat16", True)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mm_newline_position": "frame"}, "mm_newline_position='frame' is not supported; one_token or grid is"),
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear'"),
        ({"mm_patch_merge_type": None}, "mm_patch_merge_type='flat'"),
        ({"mm_vision_select_layer": -1}, "mm_vision_select_layer=-1"),
        ({"mm_spatial_pool_mode": "max"}, "mm_spatial_pool_mode='max'"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type='qformer'"),
        ({"image_aspect_ratio": "pad"}, "aspect_ratio='pad'"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "image_grid_pinpoints is not a list"),
        ({"rope_theta": None}, "lacks rope_theta"),
        ({"vocab_size": 513}, r"model.embed_tokens.weight has shape \[512, 64\], but its config needs \[513, 64\]"),
        ({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}, "is not an original checkpoint"),
    ],
)
def test_configs_of_other_models_are_refused(tmp_path, fields, named):
    with pytest.raises(PipelineError, match=named):
        convert_original(checkpoint(tmp_path / "source", **fields), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_null_config_fields_are_defaulted_or_refused(tmp_path):
    def nulled(name: str, *fields: str) -> Path:
        source = checkpoint(tmp_path / name)
        values = json.loads((source / "config.json").read_text()) | dict.fromkeys(fields)
        (source / "config.json").write_text(json.dumps(values))
        return source

    unread = ("mm_vision_select_feature", "mm_spatial_pool_stride", "mm_spatial_pool_mode", "mm_resampler_type")
    false = ("mm_use_im_start_end", "add_faster_video", "use_sliding_window")
    assert config_from(nulled("source", *unread, *false)).to_dict() == config_from(GOLDEN).to_dict()
    for name in ("projector_type", "patch_merge_type", "vision_select_layer", "newline_position"):
        with pytest.raises(PipelineError, match=rf"mm_{name}=\S+ is not supported"):
            config_from(nulled(name, f"mm_{name}"))


def test_original_checkpoint_is_recognized_by_its_architecture(folders, tmp_path):
    source = checkpoint(tmp_path / "source", model_type="llava")
    assert same(stored(Path(resolve(str(source), tmp_path / "cache"))), stored(folders["grid"]))
    with pytest.raises(PipelineError, match="is an original checkpoint, not one that"):
        Llave.load(str(source), "auto")
    assert is_original(checkpoint(tmp_path / "other", architectures=None))
    assert not is_original(folders["grid"])


def test_wrong_tensors_are_refused_by_name(tmp_path):
    norm, extra = "model.norm.weight", {"model.faster_token": torch.zeros(64), "head.bias": torch.zeros(2)}
    towerless = {name: tensor for name, tensor in TENSORS.items() if not name.startswith(TOWER)}
    for number, (tensors, named) in enumerate(
        [
            ({name: tensor for name, tensor in TENSORS.items() if name != norm}, f"lacks 1 of .*: {norm}"),
            (TENSORS | extra, "has 2 tensors that are not of this model: head.bias, model.faster_token"),
            (towerless, r"lacks \d+ of the model's tensors: model.vision_tower"),
        ]
    ):
        with pytest.raises(PipelineError, match=named):
            convert_original(checkpoint(tmp_path / f"source{number}", tensors), tmp_path / "hf")
    tower = checkpoint(tmp_path / "other", mm_vision_tower="openai/clip-vit-large-patch14-336")
    (tower / "vision_config.json").unlink()
    with pytest.raises(PipelineError, match="clip-vit-large-patch14-336' is not siglip-so400m-patch14-384"):
        convert_original(tower, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_missing_vision_config_defaults_to_so400m(tmp_path):
    source = checkpoint(tmp_path / "source")
    (source / "vision_config.json").unlink()
    vision = config_from(source).vision_config
    assert (vision.num_hidden_layers, vision.hidden_size, vision.intermediate_size) == (26, 1152, 4304)
    with pytest.raises(PipelineError, match=f"lacks .* of the model's tensors: {TOWER}encoder.layers.10"):
        convert_original(source, tmp_path / "hf")


def test_damaged_files_are_refused_without_unpickling(tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    source = checkpoint(tmp_path / "source", files=2, suffix="bin")
    second = source / "pytorch_model-00002-of-00002.bin"
    for content in (pickle.dumps({"x": Harmful()}), b"no weights"):
        second.write_bytes(content)
        with pytest.raises(PipelineError, match=f"cannot read {second}"):
            convert_original(source, tmp_path / "hf")
    torch.save({"x": Harmful()}, second)
    with pytest.raises(PipelineError, match=f"cannot read {second}"):
        convert_original(source, tmp_path / "hf")
    second.unlink()
    with pytest.raises(PipelineError, match=f"lacks {second.name}, which pytorch_model.bin.index.json names"):
        convert_original(source, tmp_path / "hf")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_conversion_needs_little_more_memory_than_one_file(tmp_path, suffix):
    """The kernel limits by RLIMIT_DATA the heap and private mappings, which both formats are read into."""
    wide, size = 16384, 3 * 16384 * 64 * 4
    tensors = dict(TENSORS)
    for layer in range(3):
        for name, shape in (("gate", (wide, 64)), ("up", (wide, 64)), ("down", (64, wide))):
            tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"] = torch.full(shape, float(layer))
    order = sorted(tensors, key=lambda name: name.split(".mlp.")[-1])  # splits a layer's large tensors over files
    source = checkpoint(
        tmp_path / "source", {n: tensors[n] for n in order}, files=3, suffix=suffix, intermediate_size=wide
    )
    largest = max(file.stat().st_size for file in source.glob(f"*.{suffix}"))
    assert size * 0.9 < largest < size * 1.3
    convert_original(GOLDEN, tmp_path / "small")  # allocates what is allocated only once

    def limited(spare: float, folder: str) -> None:
        before = resource.getrlimit(resource.RLIMIT_DATA)
        used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (int(used + spare * largest), before[1]))
        try:
            convert_original(source, tmp_path / folder)
            export_original(tmp_path / folder, tmp_path / f"{folder}-back")
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)

    limited(1.4, "hf")
    assert same(stored(tmp_path / "hf-back"), tensors | {HEAD: tensors[EMBEDDING]})
    with pytest.raises((PipelineError, MemoryError)):  # the limit is effective
        limited(0.6, "too-little")


def test_resolve_converts_once_and_again_after_a_change(folders, tmp_path, tiny_model):
    source, store = checkpoint(tmp_path / "LLaVE-tiny"), tmp_path / "cache"
    assert resolve(tiny_model, store) == tiny_model
    assert is_original(source) and not store.exists()
    first = Path(resolve(str(source), store))
    assert first.name.startswith("LLaVE-tiny-") and same(stored(first), stored(folders["grid"]))
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(source), store) == str(first)
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    save_file(TENSORS | {"model.norm.weight": torch.ones(64)}, source / "model.safetensors")  # a file of the same size
    second = Path(resolve(str(source), store))
    assert second != first and stored(second)["language_model.norm.weight"].eq(1).all()
    assert sorted(store.iterdir()) == sorted([first, second])


def test_original_checkpoint_on_hub_is_converted_from_its_snapshot(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789" * 4
    names = {"lab/original": checkpoint(tmp_path / "source"), "lab/converted": folders["grid"]}
    for name, content in names.items():
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(content, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(commit)
    assert config_of(section("llave", path="lab/original")).mm_newline_position == "grid"
    converted = Path(resolve("lab/original", tmp_path / "cache"))
    assert converted.name == "original-0123456789012345" and same(stored(converted), stored(folders["grid"]))
    snapshot = tmp_path / "hub/models--lab--original/snapshots" / commit
    (snapshot / "README.md").write_text("downloaded later")
    assert resolve("lab/original", tmp_path / "cache") == str(converted)
    former = converted.rename(converted.with_name(f"original-{weights._stamp(snapshot)}"))
    assert resolve("lab/original", tmp_path / "cache") == str(former)
    assert list((tmp_path / "cache").iterdir()) == [former]
    assert resolve("lab/converted", tmp_path / "cache") == "lab/converted"
    assert training("llave").converts("lab/original") and not training("llave").converts("lab/converted")
    with pytest.raises(PipelineError, match="no model at 'lab/unknown'"):
        resolve("lab/unknown", tmp_path / "cache")


def test_recipe_sets_image_grid_pinpoints(folders, tmp_path):
    pinpoints, source = [(384, 384), (768, 384)], str(checkpoint(tmp_path / "source"))
    for path in (source, str(folders["grid"])):
        assert tiling(config_of(section("llave", path=path, image_grid_pinpoints=pinpoints))).pinpoints == tuple(
            pinpoints
        )
        assert len(tiling(config_of(section("llave", path=path))).pinpoints) == 4
    path = str(folders["grid"])
    model = Llave.load(path, "auto", pinpoints)
    assert LlaveProcessor.load(path, 4096, pinpoints=pinpoints).tiling == tiling(model.config)
    save_folder(model, dict(model.named_parameters()), path, tmp_path / "saved")
    saved = str(tmp_path / "saved")
    assert LlaveProcessor.load(saved, 4096).tiling.pinpoints == tuple(pinpoints)
    sizes = LlavaOnevisionImageProcessorPil.from_pretrained(saved).image_grid_pinpoints
    assert [tuple(size) for size in sizes] == pinpoints


def test_recipe_sets_video_newline_position(folders, tmp_path):
    source, folder = str(checkpoint(tmp_path / "source")), str(folders["grid"])
    for path, newline in ((source, "one_token"), (folder, "one_token"), (str(folders["one_token"]), "grid")):
        assert tiling(config_of(section("llave", path=path, mm_newline_position=newline))).newline == newline
    shape = {"vision": {"image_size": 24}, "text": {"vocab_size": 99}, "image_grid_pinpoints": [(24, 24)]}
    assert tiling(config_of(section("llave", architecture=shape, mm_newline_position="grid"))).newline == "grid"
    model = Llave.load(folder, "auto", newline="one_token")
    processor = LlaveProcessor.load(folder, 4096, newline="one_token")
    assert processor.tiling == tiling(model.config)
    save_folder(model, dict(model.named_parameters()), folder, tmp_path / "saved")
    assert LlaveProcessor.load(str(tmp_path / "saved"), 4096).tiling == processor.tiling
    assert "mm_newline_position: one_token" in (tmp_path / "saved/README.md").read_text()
    case = next(case for case in CASES if case.get("newline") == "one_token")
    with torch.no_grad():
        embedding = load(tmp_path / "saved")[1](pack([encode(tmp_path / "saved", case)]), True)[0]
    assert F.cosine_similarity(embedding, torch.tensor(case["embedding"]), dim=0) > 1 - 1e-6


def test_training_and_export_use_newline_position_of_recipe(folders, tmp_path):
    fields = [f"model.path={folders['one_token']}", "model.mm_newline_position=grid", "model.train.vision_tower=false"]
    chosen, kind = load_recipe("pipeline/recipes/demo.yaml", fields), training("llave")
    path = chosen.model.path
    for make in (kind.load, kind.empty):
        assert make(chosen, path, "sdpa").config.mm_newline_position == "grid"
    model = kind.load_whole(chosen, path)
    assert kind.processor(chosen, path).tiling == tiling(model.config)
    write_folder(model, dict(model.named_parameters()), chosen, path, tmp_path / "out")
    assert LlaveProcessor.load(str(tmp_path / "out"), 4096).tiling.newline == "grid"


def test_failed_or_concurrent_conversion_leaves_no_files(tmp_path, monkeypatch):
    source, store = checkpoint(tmp_path / "source"), tmp_path / "cache"

    def fails(files, folder, renamed):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "_rewrite", fails)
        with pytest.raises(OSError, match="disk full"):
            resolve(str(source), store)
    assert list(store.iterdir()) == []

    def another_is_faster(source, folder):
        with pytest.raises(lock.InUse):
            resolve(str(source), store)
        convert_original(source, folder)
        shutil.copytree(folder, folder.with_name(re.sub(r"^\.|\.[^.]+\.partial$", "", folder.name)))

    monkeypatch.setattr(weights, "convert_original", another_is_faster)
    converted = resolve(str(source), store)
    assert list(store.iterdir()) == [Path(converted)]


def test_existing_folder_is_not_overwritten(folders, tmp_path):
    (tmp_path / "hf").mkdir()
    for write, source in ((convert_original, GOLDEN), (export_original, folders["grid"])):
        with pytest.raises(PipelineError, match="hf is there already"):
            write(source, tmp_path / "hf")
    with pytest.raises(PipelineError, match="is an original checkpoint"):
        export_original(GOLDEN, tmp_path / "out")


@pytest.mark.parametrize("position", ["grid", "one_token"])
def test_saved_folder_keeps_newlines_and_its_card_example_embeds(folders, tmp_path, monkeypatch, position):
    processor, model = load(folders[position])
    folder = tmp_path / "saved"
    save_folder(model, dict(model.named_parameters()), str(folders[position]), folder)
    assert json.loads((folder / "config.json").read_text())["mm_newline_position"] == position
    assert LlaveProcessor.load(str(folder), 4096).tiling == processor.tiling
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "feature-extraction")
    assert "base_model" not in front
    monkeypatch.chdir(folder)
    code = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], code)
    for case in CASES[:2]:
        assert F.cosine_similarity(code["embed"](case["text"]), torch.tensor(case["embedding"]), dim=0) > 1 - 1e-6


def test_card_names_its_base_model(folders, tmp_path, monkeypatch):
    _, model = load(folders["grid"])
    save_folder(
        model, dict(model.named_parameters()), str(folders["grid"]), tmp_path / "saved", base="zhibinlan/LLaVE-2B"
    )
    front = yaml.safe_load((tmp_path / "saved/README.md").read_text().split("---\n")[1])
    assert front["base_model"] == "zhibinlan/LLaVE-2B"


def test_unknown_newline_position_is_refused(folders, tmp_path):
    shutil.copytree(folders["grid"], tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text()) | {"mm_newline_position": "frame"}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    for load_from in (lambda path: Llave.load(path, "auto"), lambda path: LlaveProcessor.load(path, 4096)):
        with pytest.raises(PipelineError, match="mm_newline_position='frame' is not supported; one_token or grid is"):
            load_from(str(tmp_path / "hf"))


def test_grid_newlines_end_each_row_of_each_frame(folders):
    """Check the tokens of videos of one and three frames, packed with an image."""
    processor, model = load(folders["grid"])
    video = next(case for case in CASES if "video" in case)
    items = [encode(folders["grid"], CASES[2])]
    items += [encode(folders["grid"], video | {"video": video["video"][:frames]}) for frames in (1, 3)]
    packed = pack(items)
    features = torch.randn(len(packed.tiles), 27 * 27, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model.image_tokens(packed, features)
    marks = np.isin(packed.input_ids.numpy(), (processor.image_token_id, processor.video_token_id))
    assert len(tokens) == marks.sum()
    frames = tokens[-4 * 14 * 15 :].view(4, 14, 15, -1)
    assert torch.equal(frames[:, :, 14], model.image_newline.expand(4, 14, -1))
    assert not frames[:, :, :14].eq(model.image_newline).all(-1).any()


def test_only_a_trained_llave_reads_images_and_marks_as_its_code(tmp_path, folders):
    """The LLaVA-OneVision that training begins with has no alpha in its config."""
    base = checkpoint(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({name: config[name] for name in config if name != "alpha"}))
    convert_original(base, tmp_path / "converted")
    for folder, published in ((folders["grid"], True), (tmp_path / "converted", False)):
        processor = LlaveProcessor.load(str(folder), 512)
        assert (processor.as_stored, processor.published) == (published, published)
