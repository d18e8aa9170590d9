"""Merging models: the arithmetic, the files, what is refused, and memory."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sections import section
from transformers import CLIPImageProcessorPil

from pipeline import merge as program
from pipeline.config import EvaluationRun, load_recipe
from pipeline.embedding.embedder import Embedder
from pipeline.errors import PipelineError
from pipeline.evaluation.encoders import load_encoder
from pipeline.models import merging, tensor_files
from pipeline.models.alike import files_of
from pipeline.models.files import fingerprint
from pipeline.models.folder import note_sizes
from pipeline.models.llm2clip import model as llm2clip
from pipeline.models.llm2clip.model import Llm2Clip
from pipeline.models.merging import Part, merge
from pipeline.models.registry import training
from pipeline.models.tensor_files import rounded
from pipeline.models.text_encoder import model as decoder
from pipeline.models.text_encoder.processor import Settings
from pipeline.models.vision import VisionEncoder

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = SIZES | {"image_size": 24, "patch_size": 8, "projection_dim": 16}
TEXT = SIZES | {"vocab_size": 600, "num_key_value_heads": 4}
CORPUS = ["a small red star at the top left", "a large blue ring"]

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_model) -> dict[str, tuple[str, str]]:
    """Create a folder of each family, and a copy of it with other weights."""
    root = tmp_path_factory.mktemp("models")
    training("text_encoder").build(section("text_encoder", architecture={"text": TEXT}), CORPUS, 0, root / "decoder")
    encoder = decoder.TextEncoder.load(str(root / "decoder"), "auto")
    settings = Settings(instruction="find: ")
    weights = dict(encoder.named_parameters())
    decoder.save(encoder, weights, str(root / "decoder"), root / "text_encoder", None, settings)
    clip = {"vision": VISION, "text": SIZES | {"vocab_size": 600, "max_position_embeddings": 20}}
    training("clip").build(section("clip", architecture=clip), CORPUS, 0, root / "clip")
    VisionEncoder.build(VISION, 16, 0).save(root / "vision")
    model = Llm2Clip.load(str(root / "vision"), torch.float32, width=32)
    llm2clip.save(model, str(root / "text_encoder"), root / "llm2clip", None)
    shutil.copytree(tiny_model, root / "llave")
    found = {}
    for family in ("llave", "text_encoder", "clip", "llm2clip"):
        found[family] = str(root / family), changed(root / family, root / f"{family}-2", shaken)
    return found


def changed(source: str | Path, folder: Path, change: Change = lambda _: None) -> str:
    """Copy a folder, change the copy, and return it."""
    shutil.copytree(source, folder)
    change(folder)
    return str(folder)


def shaken(folder: Path) -> None:
    """Add noise to all weights of a folder."""
    generator = torch.Generator().manual_seed(7)
    for file in folder.rglob("*.safetensors"):
        noise = {name: torch.randn(each.shape, generator=generator) for name, each in load_file(file).items()}
        rewrite(file, lambda name, each, noise=noise: each + 0.1 * noise[name].to(each.dtype))


def rewrite(file: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    tensors = {name: change(name, each).contiguous() for name, each in load_file(file).items()}
    file.unlink()  # it may be a link to another model's file
    save_file(tensors, file, {"format": "pt"})


def folder_of(place: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Write a folder with these weights only, and a config that says nothing of them."""
    place.mkdir()
    (place / "config.json").write_text("{}")
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return str(place)


def as_fractions(tensor: torch.Tensor) -> list[Fraction]:
    return [Fraction(float(each)) for each in tensor.flatten()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mean_is_the_float64_mean_rounded_once(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "BLOCK", 7)  # blocks end inside rows
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(5, 9, generator=generator).to(dtype) for _ in range(3)]
    parts = [
        Part(folder_of(tmp_path / str(number), {"w": each, "scale": each[0, 0].clone()}), weight)
        for number, (each, weight) in enumerate(zip(drawn, (0.3, 2, 0.7), strict=True))
    ]
    assert merge(parts, tmp_path / "out") == 46
    found = load_file(tmp_path / "out/model.safetensors")
    exact = (0.3 * drawn[0].double().numpy() + 2 * drawn[1].double().numpy() + 0.7 * drawn[2].double().numpy()) / 3
    assert found["w"].dtype == dtype and found["w"].shape == (5, 9)
    for value, wanted in zip(as_fractions(found["w"]), exact.flatten(), strict=True):
        # No number of the dtype is nearer.
        near = torch.tensor(float(value), dtype=dtype)
        beside = [float(torch.nextafter(near, torch.tensor(end, dtype=dtype))) for end in (-math.inf, math.inf)]
        assert all(abs(value - Fraction(wanted)) <= abs(Fraction(each) - Fraction(wanted)) for each in beside)
    assert found["scale"] == found["w"][0, 0] and found["scale"].shape == ()


def test_rounding_happens_once():
    """Just above the middle of two bf16 numbers, float32 rounds to the middle, and a second rounding goes down."""
    middle = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 2.0**-133 * 1.5], dtype=torch.float64)
    for sign in (1, -1):
        above, below = sign * (middle * (1 + 2**-40)), sign * (middle * (1 - 2**-40))
        assert rounded(above, torch.bfloat16).tolist() == [sign * each for each in (1 + 2**-7, 1 + 2**-6, 2.0**-132)]
        assert rounded(below, torch.bfloat16).tolist() == [sign * each for each in (1, 1 + 2**-7, 2.0**-133)]
        assert rounded(sign * middle, torch.bfloat16).tolist() == [sign * each for each in (1, 1 + 2**-6, 2.0**-132)]
    assert rounded(torch.tensor([1 + 2**-11 + 2**-40], dtype=torch.float64), torch.float16).item() == 1 + 2**-10
    assert rounded(torch.tensor([70_000.0, 0.0], dtype=torch.float64), torch.float16).tolist() == [math.inf, 0]


def test_slerp_follows_the_arc_and_falls_back_to_the_mean(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "BLOCK", 7)
    generator = np.random.default_rng(0)
    one, two = (generator.normal(size=(6, 5)).astype(np.float32) for _ in range(2))
    near = (one + 0.01 * two).astype(np.float32)
    pairs = {"apart": (one, two), "near": (one, near), "back": (one, -one * 3), "zero": (one, 0 * two)}
    folders = [
        folder_of(tmp_path / str(number), {name: torch.tensor(pair[number]) for name, pair in pairs.items()})
        for number in (0, 1)
    ]
    parts = [Part(folders[0], 3), Part(folders[1], 1)]
    merge(parts, tmp_path / "out", "slerp")
    found = load_file(tmp_path / "out/model.safetensors")
    first, second = one.astype(np.float64), two.astype(np.float64)
    angle = np.arccos((first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second))
    arc = (np.sin(0.75 * angle) * first + np.sin(0.25 * angle) * second) / np.sin(angle)
    # float32 rounds to 2^-24 of a value; the formula in float64 is far closer.
    np.testing.assert_allclose(found["apart"].double().numpy(), arc, rtol=2**-23)
    for name in ("near", "back", "zero"):
        pair = [each.astype(np.float64) for each in pairs[name]]
        assert np.array_equal(found[name].numpy(), ((3 * pair[0] + pair[1]) / 4).astype(np.float32)), name


@pytest.mark.parametrize("family", ["llave", "text_encoder", "clip", "llm2clip"])
def test_merged_models_of_each_family_embed(family, models, tmp_path):
    one, two = models[family]
    merge([Part(one), Part(two)], tmp_path / "merged")
    items = ["a red star"] if family == "text_encoder" else ["a red star", Image.new("RGB", (30, 20), "red")]
    parts = [Embedder.load(path, "cpu").embed(items) for path in (one, two, tmp_path / "merged")]
    assert load_encoder(str(tmp_path / "merged"), EvaluationRun()).dimension == parts[2].shape[1]
    assert all(torch.allclose(rows.norm(dim=1), torch.ones(len(items))) for rows in parts)
    assert not torch.allclose(parts[2], parts[0]) and not torch.allclose(parts[2], parts[1])
    card = (tmp_path / "merged/README.md").read_text()
    assert f"| `{two}` | 0.5 | `{fingerprint(two, modules=True)}` |" in card
    merge([Part(one, 0.3), Part(one, 0.7)], tmp_path / "same")
    for file in (file for file in Path(one).rglob("*") if file.is_file() and file.name != "README.md"):
        again = tmp_path / "same" / file.relative_to(one)
        assert again.read_bytes() == file.read_bytes(), file


@pytest.mark.parametrize(
    ("family", "name"),
    [("llave", "demo"), ("text_encoder", "demo_caption"), ("clip", "demo_clip"), ("llm2clip", "demo_llm2clip")],
)
def test_training_starts_from_a_merged_model(family, name, models, tmp_path):
    merge(list(map(Part, models[family])), tmp_path / "merged")
    fields = [f"model.path={tmp_path / 'merged'}"]
    if family == "llm2clip":
        fields.append(f"model.text_encoder={models['text_encoder'][0]}")
    recipe = load_recipe(f"pipeline/recipes/{name}.yaml", fields)
    training(family).check(recipe.model)
    found = dict(training(family).load_whole(recipe, recipe.model.path).named_parameters())
    stored = load_file(tmp_path / "merged/model.safetensors")
    alike = [name for name, each in stored.items() if any(torch.equal(each, own) for own in found.values())]
    assert len(alike) >= len(stored) - 1  # CLIP's logit scale is not trained


def test_several_files_and_another_dtype(models, tmp_path):
    from transformers import CLIPModel

    one, two = models["clip"]
    split = changed(one, tmp_path / "split", lambda folder: (folder / "model.safetensors").unlink())
    CLIPModel.from_pretrained(one).save_pretrained(split, max_shard_size="60KB")
    files = sorted(file.name for file in Path(split).glob("*.safetensors"))
    assert len(files) > 2
    merge([Part(one), Part(two)], tmp_path / "one")
    merge([Part(split), Part(two)], tmp_path / "out", dtype="bf16")
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == files
    found = {name: each for file in files for name, each in load_file(tmp_path / "out" / file).items()}
    for name, each in load_file(tmp_path / "one/model.safetensors").items():
        assert found[name].dtype == torch.bfloat16
        assert (found[name].float() - each).abs().max() <= 2**-8 * each.abs().max()
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in found.values())
    model = CLIPModel.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert Embedder.load(tmp_path / "out", "cpu").embed(["a red star"]).isfinite().all()


def test_differences_that_do_not_matter_are_allowed(models, tmp_path):
    """Another version's image processor, buffers that models compute, dtypes, and places are no difference."""

    def older(folder: Path) -> None:
        processor = CLIPImageProcessorPil.from_pretrained(folder)
        values = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 24, "crop_size": 24}
        values |= {"image_mean": processor.image_mean, "image_std": processor.image_std, "resample": 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(values))
        config = json.loads((folder / "config.json").read_text())
        config |= {"_name_or_path": "elsewhere", "dtype": "float16", "transformers_version": "4.0.0"}
        (folder / "config.json").write_text(json.dumps(config))
        file = folder / "model.safetensors"
        tensors = {name: each.half() for name, each in load_file(file).items()}
        tensors["text_model.embeddings.position_ids"] = torch.arange(20)[None]
        save_file(tensors, file, {"format": "pt"})

    one, two = models["clip"]
    other = changed(two, tmp_path / "other", older)
    merge([Part(one), Part(other)], tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(Path(one, "model.safetensors")).keys()
    merge([Part(other), Part(one)], tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    assert torch.equal(back["text_model.embeddings.position_ids"], torch.arange(20)[None])
    assert back["logit_scale"].dtype == torch.float16
    assert Embedder.load(tmp_path / "back", "cpu").embed(["a red star"]).isfinite().all()


def test_exports_without_files_for_sentence_transformers_are_alike(models, tmp_path):
    """As those of earlier versions, and published models that exports were trained from."""

    def earlier(folder: Path) -> None:
        for name in ("1_Pooling", "2_Normalize"):
            shutil.rmtree(folder / name)
        for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
            (folder / name).unlink()
        (folder / "processor_config.json").unlink()
        (folder / "chat_template.jinja").unlink()

    one, two = models["llave"]
    before = changed(two, tmp_path / "before", earlier)
    merge([Part(one), Part(before)], tmp_path / "out")
    merge([Part(before), Part(one)], tmp_path / "back")
    assert (tmp_path / "out/modules.json").is_file() and not (tmp_path / "back/modules.json").exists()
    rows = [Embedder.load(tmp_path / name, "cpu").embed(["a red star"]) for name in ("out", "back")]
    assert torch.equal(*rows)


def config(section: str = "", file: str = "config.json", **fields: object) -> Change:
    def change(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        (values[section] if section else values).update(fields)
        (folder / file).write_text(json.dumps(values))

    return change


def weights(change: Callable[[str, torch.Tensor], torch.Tensor], file: str = "model.safetensors") -> Change:
    return lambda folder: rewrite(folder / file, change)


def renamed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["other"] = tensors.pop("visual_projection.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def retokenized(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    ids = values["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (folder / "tokenizer.json").write_text(json.dumps(values))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("clip", config("vision_config", hidden_act="gelu"), r"vision_config.hidden_act is 'quick_gelu' and 'gelu'"),
        ("clip", config(image_reading="as_stored"), "config.json: image_reading is missing and 'as_stored'"),
        ("clip", config(file="preprocessor_config.json", resample=2), "preprocessor_config.json: resample is 3 and 2"),
        ("clip", retokenized, r"clip and .* are not alike: tokenizer.json: model.vocab.a is \d+ and \d+;"),
        ("clip", renamed, "other is only in .*/changed; visual_projection.weight is only in .*/clip"),
        ("clip", weights(lambda name, each: each[..., :15] if name == "text_projection.weight" else each), "shape"),
        ("clip", pickled, "pytorch_model.bin is a pickle.*save_pretrained"),
        ("llave", config(architectures=["LlavaQwenForCausalLM"]), "mm_projector_type='linear' is not supported"),
        ("clip", config(file="tokenizer.json"), None),  # written differently, and the same
        ("llave", config("text_config", rms_norm_eps=0.1), "text_config.rms_norm_eps is 1e-06 and 0.1"),
        ("llave", config(vision_aspect_ratio="anyres_max_4"), "vision_aspect_ratio is 'anyres_max_9' and 'anyres_max_"),
        ("text_encoder", config("text_encoder", instruction="other: "), "text_encoder.instruction is 'find: ' and 'ot"),
        ("llm2clip", weights(lambda _, each: each[..., :31], "adapter.safetensors"), "adapter.safetensors: blocks.0"),
        ("llm2clip", config("text_encoder", "text_encoder/config.json", instruction=""), "text_encoder/config.json: t"),
    ],
)
def test_unlike_models_are_refused(family, change, said, models, tmp_path):
    other = changed(models[family][1], tmp_path / "changed", change)
    if said is None:
        merge([Part(models[family][0]), Part(other)], tmp_path / "out")
        return
    with pytest.raises(PipelineError, match=said):
        merge([Part(models[family][0]), Part(other)], tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_notes_of_training_are_neither_compared_nor_copied(models, tmp_path):
    def trained(folder: Path) -> None:
        for name in ("trainer_state.json", "all_results.json", "eval_results.json"):
            (folder / name).write_text(json.dumps({"loss": str(folder)}))

    parts = [Part(changed(path, tmp_path / str(number), trained)) for number, path in enumerate(models["clip"])]
    merge(parts, tmp_path / "out")
    files = {file.name for file in Path(models["clip"][0]).iterdir()} | {"README.md"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files


def linked(place: Path) -> Change:
    """Replace the text encoder's folder by a link."""

    def change(folder: Path) -> None:
        (folder / "text_encoder").rename(place)
        (folder / "text_encoder").symlink_to(place)
        (place / "back").symlink_to(folder)  # without end

    return change


def test_linked_folders_are_compared_and_copied(models, tmp_path):
    one, two = models["llm2clip"]
    links = [changed(path, tmp_path / f"link{n}", linked(tmp_path / f"text{n}")) for n, path in enumerate((one, two))]
    merge([Part(one), Part(two)], tmp_path / "plain")
    merge(list(map(Part, links)), tmp_path / "out")
    files = {file.relative_to(tmp_path / "plain") for file in (tmp_path / "plain").rglob("*") if file.is_file()}
    assert files == {file.relative_to(tmp_path / "out") for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert Path("text_encoder/model.safetensors") in files
    for file in files - {Path("README.md")}:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file
    assert not (tmp_path / "out/text_encoder").is_symlink()
    config("text_encoder", instruction="other: ")(tmp_path / "text1")
    with pytest.raises(PipelineError, match=r"text_encoder/config.json: text_encoder.instruction is 'find: ' and 'oth"):
        merge(list(map(Part, links)), tmp_path / "unlike")
    with pytest.raises(PipelineError, match=r"text1/new is inside .*link1, which is to be merged"):
        merge(list(map(Part, links)), tmp_path / "text1/new")
    with pytest.raises(PipelineError, match=r"text1 holds .*link1, which is to be merged"):
        merge(list(map(Part, links)), tmp_path / "text1", overwrite=True)


def test_link_to_a_folder_above_is_no_part_of_a_model(tmp_path, monkeypatch):
    folder_of(tmp_path / "model", {})
    (tmp_path / "model/up").symlink_to(tmp_path.parent)
    monkeypatch.chdir(tmp_path)
    for folder in (Path("model"), tmp_path / "model"):
        assert files_of(folder, ".json") == [folder / "config.json"]


def test_sizes_and_licence_are_kept_where_all_parts_have_them(models, tmp_path):
    one, two = models["clip"]

    def part(name: str, *, sizes: list[int], kind: str | None = None, licence: str = "license: mit\n") -> Part:
        def change(folder: Path) -> None:
            (folder / "README.md").write_text(f"---\nlibrary_name: x\n{licence}---\n\n# Own\n\n## Use\n\nlike this\n")
            note_sizes(folder, 16, sizes, kind)
            (folder / "README.md").open("a").write("\n## Licence\n\nsee above\n")

        return Part(changed(two, tmp_path / name, change))

    def merged(*parts: Part) -> tuple[object, str]:
        merge(parts, tmp_path / "out", overwrite=True)
        values = json.loads((tmp_path / "out/config.json").read_text())
        return values.get("matryoshka_dimensions"), (tmp_path / "out/README.md").read_text()

    same = part("a", sizes=[4, 8]), part("b", sizes=[4, 8])
    sizes, card = merged(*same)
    assert sizes == [4, 8] and card.count("first 4, 8 numbers") == card.count("license: mit\n") == 1
    assert card.count("library_name") == 1 and "see above" in card and "like this" in card
    unlike = Part(one), part("c", sizes=[4]), part("d", sizes=[4, 8], kind="int8", licence="license: apache-2.0\n")
    for other in unlike:
        for pair in ((same[0], other), (other, same[0])):
            sizes, card = merged(*pair)
            assert sizes is None and "Smaller vectors" not in card
            assert ("license:" in card) == (other is unlike[1])
            assert ("see above" in card and "like this" in card) == (pair[0] is not unlike[0])


def test_overflow_is_refused(tmp_path):
    """The mean fits in float32, in which the second part is stored, but not in float16 as in the first."""
    small = folder_of(tmp_path / "small", {"a": torch.ones(2), "w": torch.full((3, 2), 60_000.0).half()})
    large = folder_of(tmp_path / "large", {"a": torch.ones(2), "w": torch.full((3, 2), 80_000.0)})
    with pytest.raises(PipelineError, match=r"^w overflows float16: give --dtype fp32$"):
        merge([Part(small), Part(large)], tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    merge([Part(small), Part(large)], tmp_path / "out", dtype="fp32")
    assert (load_file(tmp_path / "out/model.safetensors")["w"] == 70_000).all()


def test_buffers_and_damaged_weights(tmp_path):
    marks = torch.tensor([True, False])
    weight = torch.ones(2, 3)
    one = folder_of(tmp_path / "one", {"w": weight, "marks": marks})
    with pytest.raises(PipelineError, match=r"marks of .* differ, and have no mean: they are BOOL"):
        merge([Part(one), Part(folder_of(tmp_path / "two", {"w": weight, "marks": ~marks}))], tmp_path / "out")
    broken = weight.clone()
    broken[1, 2] = math.nan
    with pytest.raises(PipelineError, match="w has NaN or infinite weights"):
        merge([Part(one), Part(folder_of(tmp_path / "nan", {"w": broken, "marks": marks}))], tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    merge([Part(one), Part(one)], tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["marks"], marks)

    numbers = [
        folder_of(
            tmp_path / f"{number}{dtype}", {"w": weight, "numbers": torch.arange(number, number + 3, dtype=dtype)}
        )
        for number, dtype in ((0, torch.int64), (0, torch.int32), (1, torch.int32))
    ]
    merge([Part(numbers[0]), Part(numbers[1])], tmp_path / "numbers")
    assert load_file(tmp_path / "numbers/model.safetensors")["numbers"].dtype == torch.int64
    with pytest.raises(PipelineError, match=r"numbers of .* differ, and have no mean: they are I64"):
        merge([Part(numbers[0]), Part(numbers[2])], tmp_path / "other")


def test_requests_that_cannot_be_met(models, tmp_path):
    one, two = map(Part, models["clip"])
    out, run = tmp_path / "out", tmp_path / "run"
    (run / "checkpoints/step-00000040").mkdir(parents=True)
    (run / "recipe.yaml").write_text("")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters/adapter_config.json").write_text("{}")
    out.mkdir()
    for parts, options, said in [
        ([one], {}, "mean merges two or more models, and 1 are given"),
        ([one, two, one], {"method": "slerp"}, "slerp merges exactly two models, and 3 are given"),
        ([one, Part(two.path, 0)], {}, "the weight of .*clip-2 is 0; it must be above 0"),
        ([one, Part(two.path, math.nan)], {}, "the weight of .*clip-2 is nan"),
        ([one, two], {}, "out is there already: add --overwrite"),
        ([one, two], {"overwrite": True}, "out is there already and holds no model to overwrite"),
        ([one, Part(str(tmp_path / "none"))], {"out": tmp_path / "new"}, "no model at .*none"),
        (
            [one, Part(str(run))],
            {"out": tmp_path / "new"},
            r"run has no export yet: python -m pipeline.export .*run OUT",
        ),
        (
            [one, Part(str(run / "checkpoints/step-00000040"))],
            {"out": tmp_path / "new"},
            "pipeline.export .* --step 40",
        ),
        (
            [one, Part(str(tmp_path / "adapters"))],
            {"out": tmp_path / "new"},
            "adapters .LoRA.; merge them into .* --adapters",
        ),
        ([one, two], {"out": Path(two.path), "overwrite": True}, "clip-2 holds .*clip-2, which is to be merged"),
        ([one, two], {"out": Path(two.path) / "new"}, "clip-2/new is inside .*clip-2, which is to be merged"),
    ]:
        with pytest.raises(PipelineError, match=said):
            merge(parts, **{"out": out, "method": "mean", "overwrite": False} | options)


def test_program_merges_runs_by_their_weights(models, tmp_path, monkeypatch, capsys):
    one, two = models["text_encoder"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("")
    Path(tmp_path / "run/export").symlink_to(two)
    out = tmp_path / "out"
    for overwrite in ([], ["--overwrite"]):
        monkeypatch.setattr(sys, "argv", ["merge", str(out), f"{one}:3", str(tmp_path / "run"), *overwrite])
        program.main()
        assert f"{out}: mean of 2 models, 2.7e-05 B weights" in capsys.readouterr().out
    first, second = (load_file(Path(path, "model.safetensors")) for path in (one, two))
    for name, found in load_file(out / "model.safetensors").items():
        mean = (3 * first[name].double().numpy() + second[name].double().numpy()) / 4
        assert np.array_equal(found.numpy(), mean.astype(np.float32)), name
    assert program._part("a/b:1e-3") == Part("a/b", 1e-3) and program._part("a:b") == Part("a:b")
    monkeypatch.setattr(sys, "argv", ["merge", "--help"])
    with pytest.raises(SystemExit):
        program.main()
    assert "RUN/export" in capsys.readouterr().out


def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    """Merge two tensors of 16 MB each; in float64 one would need 64 MB."""
    monkeypatch.setattr(merging, "settings_of", lambda folder: {})
    weight = torch.linspace(-1, 1, 2**23).half().reshape(2**11, 2**12)
    parts = [Part(folder_of(tmp_path / str(number), {"a": weight, "b": weight.flip(0)})) for number in (0, 1)]
    del weight

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

    for method in ("mean", "slerp"):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
        before = peak()
        merge(parts, tmp_path / method, method)
        assert peak() - before < 8e6
