"""Foreign, damaged and hostile folders: each gives one clear error, and no code in them is run."""

import builtins
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from sections import section

from pipeline.config import EvaluationRun
from pipeline.data.sample import Item
from pipeline.embedding.embedder import Embedder
from pipeline.errors import PipelineError
from pipeline.evaluation.encoders import load_encoder
from pipeline.models import files
from pipeline.models.llm2clip import model as llm2clip
from pipeline.models.llm2clip.model import Llm2Clip
from pipeline.models.registry import saved, training
from pipeline.models.text_encoder import model as decoder
from pipeline.models.text_encoder.masked import MaskedLanguageModel
from pipeline.models.text_encoder.processor import Settings
from pipeline.models.vision import VisionEncoder

CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = SIZES | {"image_size": 24, "patch_size": 8, "projection_dim": 16}
TEXT = SIZES | {"vocab_size": 600, "num_key_value_heads": 4}
CORPUS = ["a small red star at the top left", "a large blue ring"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model) -> dict[str, Path]:
    """Create an intact folder of each family."""
    root = tmp_path_factory.mktemp("whole")
    training("text_encoder").build(section("text_encoder", architecture={"text": TEXT}), CORPUS, 0, root / "decoder")
    encoder = decoder.TextEncoder.load(str(root / "decoder"), "auto")
    decoder.save(
        encoder,
        dict(encoder.named_parameters()),
        str(root / "decoder"),
        root / "text_encoder",
        None,
        Settings(instruction="find: "),
    )
    clip = {"vision": VISION, "text": SIZES | {"vocab_size": 600, "max_position_embeddings": 20}}
    training("clip").build(section("clip", architecture=clip), CORPUS, 0, root / "clip")
    VisionEncoder.build(VISION, 16, 0).save(root / "vision")
    model = Llm2Clip.load(str(root / "vision"), torch.float32, width=32)
    llm2clip.save(model, str(root / "text_encoder"), root / "llm2clip", None)
    return {"llave": Path(tiny_model)} | {name: root / name for name in ("text_encoder", "clip", "llm2clip")}


def use(kind: str, folder: Path) -> None:
    """Open the folder in every public way for its family, and embed."""
    path, picture = str(folder), Image.new("RGB", (30, 20), "red")
    if kind == "llm2clip":
        training(kind).check(section(kind, path=path, text_encoder=str(folder / "text_encoder")))
    else:
        training(kind).check(section(kind, path=path))
    items = ["a red star"] if kind == "text_encoder" else ["a red star", picture]
    rows = Embedder.load(path, "cpu").embed(items)
    assert rows.isfinite().all()


def error_of(kind: str, folder: Path) -> list[str]:
    """Return the errors of a run's check and loading, of the Embedder, and of the evaluation."""

    def checked() -> None:
        fields = {"text_encoder": str(folder / "text_encoder")} if kind == "llm2clip" else {}
        training(kind).check(section(kind, path=str(folder), **fields))
        saved(kind).open_trained(str(folder)) if kind == "llm2clip" else saved(kind).open(str(folder), "auto", CPU)

    def embedded() -> None:
        Embedder.load(folder, "cpu").embed(["a red star"])

    def evaluated() -> None:
        encoder = load_encoder(str(folder), EvaluationRun(), CPU)
        encoder.embed([encoder.prepare(Item("a red star"))])

    found = []
    for way in (checked, embedded, evaluated):
        with pytest.raises(PipelineError) as error:
            way()
        found.append(str(error.value))
    return found


Damage = Callable[[Path], None]


def config(section: str = "", file: str = "config.json", **fields: object) -> Damage:
    """Return damage that sets fields of a JSON file or of one of its sections; ... removes a field."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        part = values[section] if section else values
        part.update(fields)
        for name in [name for name, value in fields.items() if value is ...]:
            del part[name]
        (folder / file).write_text(json.dumps(values))

    return damage


def write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content) and None


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def cut(name: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object], name: str = "model.safetensors") -> Damage:
    def damage(folder: Path) -> None:
        weights = load_file(folder / name)
        change(weights)
        save_file(weights, folder / name, {"format": "pt"})

    return damage


def last(weights: dict[str, torch.Tensor]) -> str:
    return max(name for name in weights if name.endswith("proj.weight"))


def empty_layer(weights: dict[str, torch.Tensor]) -> None:
    """Zero one matrix of the first layer, which is legitimate, and all of the second."""
    first, *_ = (name for name in weights if "layers.0." in name and weights[name].ndim > 1)
    for name in (first, *(name for name in weights if "layers.1." in name)):
        weights[name].zero_()


def spoil(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[last(weights)].view(-1)[3] = value

    return change


def sharded(index: Callable[[dict[str, str]], object], drop: int | None = None, twice: bool = False) -> Damage:
    """Return damage that splits the weights into two files with an index, which `index` changes."""

    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        weight_map = {}
        for number in range(2):
            part = {name: weights[name] for name in list(weights)[number::2]}
            if twice and number:
                part[next(iter(weights))] = next(iter(weights.values()))
            name = f"model-{number}.safetensors"
            if number != drop:
                save_file(part, folder / name, {"format": "pt"})
            weight_map |= dict.fromkeys(part, name)
        index(weight_map)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


class Harmful:
    """An object that creates a file next to the tests' when unpickled."""

    touched: Path

    def __reduce__(self):
        return os.system, (f"touch {self.touched}",)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": Harmful()}, folder / "pytorch_model.bin")


def plainly_pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Harmful()}, 2))


def own_code(file: str, **auto_map: str) -> Damage:
    """Return damage that adds code which creates a file on import, named by a JSON file's auto_map."""

    def damage(folder: Path) -> None:
        (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(Harmful.touched)!r}).touch()\n")
        config(file=file, auto_map={name: f"evil.{value}" for name, value in auto_map.items()})(folder)

    return damage


def pickled_as(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes(pickle.dumps(Harmful())) and None


def rename_token(token: str) -> Damage:
    def damage(folder: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).is_file():
                content = (folder / name).read_text()
                (folder / name).write_text(content.replace(token, "<|other|>"))

    return damage


def twice(folder: Path) -> None:
    content = (folder / "config.json").read_text()
    (folder / "config.json").write_text(content.replace("{", '{"model_type": "qwen2",', 1))


def linked(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "nowhere")


IMAGES = "preprocessor_config.json"
HTML, EMPTY = b"<html><body>502 Bad Gateway</body></html>", b""
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
# (name; families; damage; what every error must contain)
CASES: list[tuple[str, str, Damage, str]] = [
    ("config-empty", "all", write("config.json", EMPTY), "config.json is not JSON: it is empty"),
    ("config-html", "all", write("config.json", HTML), "config.json is not JSON: it is a web page"),
    ("config-list", "all", write("config.json", b"[1]"), "config.json is not a JSON object"),
    ("config-cut", "all", cut("config.json", 0.5), "config.json is not JSON: it is cut or damaged"),
    ("config-binary", "all", write("config.json", b"\xff\xfe\0"), "config.json is not JSON"),
    ("config-deep", "all", write("config.json", b"[" * 100_000), "config.json is not JSON"),
    ("unknown-type", "text_encoder", config(model_type="llamma"), "model_type='llamma'"),
    ("type-of-no-name", "all", config(model_type=["qwen2"]), "model_type=['qwen2']"),
    ("another-kind", "text_encoder", config(model_type="bert"), "is a bert model; expected a text-only decoder"),
    ("null-size", "text_encoder", config(hidden_size=None), "Field 'hidden_size' expected int, got NoneType"),
    ("text-size", "text_encoder", config(hidden_size="32"), "Field 'hidden_size' expected int, got str"),
    ("list-size", "text_encoder", config(hidden_size=[32]), "config.json"),
    ("true-size", "text_encoder", config(num_hidden_layers=True), "Field 'num_hidden_layers' expected int, got bool"),
    ("no-heads", "text_encoder", config(num_attention_heads=0), "config.json: num_attention_heads=0 must be"),
    ("negative", "clip", config("vision_config", patch_size=-8), "config.json: vision_config.patch_size=-8 must be"),
    ("many-layers", "llave", config("text_config", num_hidden_layers=10**9), "text_config.num_hidden_layers=10000"),
    ("huge", "text_encoder", config(hidden_size=2**30, intermediate_size=2**30), "its files hold"),
    ("labels", "clip", lambda f: [config(num_labels=10**12)(f), remove("model.safetensors")(f)], "has no weights"),
    ("architectures", "llave text_encoder", config(architectures=3), "Field 'architectures' with value 3"),
    ("heads-do-not-divide", "clip", config("text_config", num_attention_heads=5), "config.json"),
    ("more-layers", "clip", config("text_config", num_hidden_layers=3), "lacks"),
    ("layer-types", "text_encoder", config(num_hidden_layers=3), "config.json cannot be used"),
    ("fewer-layers", "clip", config("vision_config", num_hidden_layers=1), "which the model of its config.json lacks"),
    ("fewer-rows", "text_encoder", config(vocab_size=590), "590"),
    (
        "rope",
        "text_encoder",
        config(rope_parameters={"rope_type": "default", "rope_theta": 0}),
        "gives NaN or infinity",
    ),
    ("rope-of-no-type", "text_encoder", config(rope_parameters={"rope_type": "spiral"}), "config.json"),
    ("activation", "text_encoder", config(hidden_act="sigh"), "config.json"),
    ("no-section", "llave clip", config(text_config=...), "config.json: text_config is missing"),
    ("null-section", "llave clip", config(vision_config=None), "config.json: vision_config is None"),
    ("dtype", "all", config(torch_dtype="banana", dtype="banana"), "has no attribute 'banana'"),
    ("quantised", "all", config(quantization_config={"quant_method": "gptq"}), "config.json has a quantization_config"),
    ("tower-of-another-kind", "llave", config("vision_config", model_type="clip_vision_model"), "clip_vision_model"),
    ("pinpoints", "llave", config(image_grid_pinpoints=[[24, 0]]), "image_grid_pinpoints=[[24, 0]]"),
    ("pinpoints-float", "llave", config(image_grid_pinpoints=[[24.0, 48.0]]), "image_grid_pinpoints=[[24.0, 48.0]]"),
    ("pinpoints-triples", "llave", config(image_grid_pinpoints=[[24, 24, 24]]), "image_grid_pinpoints"),
    ("without-its-biases", "llave", config(multimodal_projector_bias=False), "model of its config.json lacks"),
    ("features-without-first", "llave", config(vision_feature_select_strategy="default"), "full is"),
    ("ratio", "llave", config(vision_aspect_ratio="square"), "vision_aspect_ratio='square'"),
    ("mark-out-of-range", "llave", config(image_token_id=10**6), "image_token_id=1000000"),
    ("mark-of-a-text", "llave", config(image_token_id=70), "image_token_id=70"),
    ("settings", "text_encoder", config(text_encoder="mean"), "text_encoder='mean'"),
    ("instruction", "text_encoder", config(text_encoder={"instruction": 3}), "text_encoder={'instruction': 3}"),
    ("unknown-setting", "text_encoder", config(text_encoder={"pool": "last"}), "text_encoder={'pool': 'last'}"),
    ("key-twice", "all", twice, "has the key 'model_type' twice"),
    ("own-code", "every", own_code("config.json", AutoConfig="C", AutoModel="M"), "config.json has an auto_map"),
    (
        "unknown-own-code",
        "text_encoder",
        lambda f: [own_code("config.json", AutoConfig="C")(f), config(model_type="e")(f)],
        "has an auto_map",
    ),
    (
        "tokenizer-code",
        "text_encoder llave clip",
        own_code("tokenizer_config.json", AutoTokenizer="T"),
        "tokenizer_config.json has an auto_map",
    ),
    (
        "processor-code",
        "llave clip",
        own_code(IMAGES, AutoImageProcessor="P"),
        "preprocessor_config.json has an auto_map",
    ),
    ("weights-missing", "all", remove("model.safetensors"), "has no weights"),
    ("weights-empty", "all", write("model.safetensors", EMPTY), "model.safetensors: it is empty"),
    ("weights-cut", "every", cut("model.safetensors", 0.6), "model.safetensors: it is cut or damaged"),
    ("weights-html", "all", write("model.safetensors", HTML), "model.safetensors: it is a web page"),
    ("weights-pointer", "all", write("model.safetensors", POINTER), "git lfs pull"),
    ("weights-dangling", "all", linked, "has no weights"),
    ("weights-pickled", "every", pickled, "pytorch_model.bin: it is a pickle of more than tensors"),
    ("weights-plainly-pickled", "every", plainly_pickled, "pytorch_model.bin: it is a pickle of more than tensors"),
    ("adapters", "all", lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds adapters (LoRA)"),
    ("misshapen", "all", tensors(lambda w: w.update({last(w): w[last(w)][:-1].contiguous()})), "but its config needs"),
    ("lacking", "all", tensors(lambda w: w.pop(last(w))), "lacks 1 of the model's weights"),
    ("integers", "all", tensors(lambda w: w.update({last(w): w[last(w)].to(torch.int8)})), "of quantised weights"),
    ("nan", "every", tensors(spoil(float("nan"))), "has NaN or infinite weights"),
    ("zeros", "all", tensors(lambda w: [tensor.zero_() for tensor in w.values()]), "are zero, as a failed copy"),
    ("zeros-in-a-layer", "all", tensors(empty_layer), "layers.1 are zero, as a failed copy leaves them"),
    ("infinite", "all", tensors(spoil(float("-inf"))), "has NaN or infinite weights"),
    ("shard-missing", "all", sharded(lambda m: None, drop=1), "lacks model-1.safetensors"),
    ("shard-of-another", "all", sharded(lambda m: m.update({"x.weight": "model-0.safetensors"})), "lacks x.weight"),
    ("no-epsilon", "clip", config("text_config", layer_norm_eps=None), "text_config.layer_norm_eps=None must be"),
    ("shard-twice", "all", sharded(lambda m: None, twice=True), "remove one of the two files"),
    ("shard-elsewhere", "every", sharded(lambda m: m.update({min(m): "../x.safetensors"})), "names '../x.safetensors'"),
    ("shard-absolute", "all", sharded(lambda m: m.update({min(m): "/etc/passwd"})), "names '/etc/passwd'"),
    ("shard-number", "all", sharded(lambda m: m.update({min(m): 3})), "index.json has no weight_map"),
    (
        "index-html",
        "all",
        lambda f: [remove("model.safetensors")(f), write("model.safetensors.index.json", HTML)(f)],
        "index.json is not JSON",
    ),
    ("tokenizer-missing", "text_encoder llave", remove("tokenizer.json"), "has no tokenizer"),
    ("tokenizer-cut", "text_encoder llave clip", cut("tokenizer.json", 0.5), "tokenizer.json is not JSON"),
    ("tokenizer-object", "text_encoder llave clip", write("tokenizer.json", b"{}"), "tokenizer.json cannot be used"),
    (
        "tokenizer-settings",
        "text_encoder llave clip",
        write("tokenizer_config.json", b"[]"),
        "tokenizer_config.json is not a JSON",
    ),
    (
        "tokenizer-larger",
        "text_encoder",
        lambda f: [
            config(vocab_size=100)(f),
            tensors(lambda w: w.update({"embed_tokens.weight": w["embed_tokens.weight"][:100].contiguous()}))(f),
        ],
        "embedding 100 rows",
    ),
    ("tokenizer-larger", "clip", lambda f: [config("text_config", vocab_size=100)(f)], "embedding 100 rows"),
    ("tokenizer-of-another-end", "clip", config("text_config", eos_token_id=5), "eos_token_id=5"),
    ("tokenizer-without-turns", "llave", rename_token("<|im_start|>"), "no token <|im_start|>"),
    ("tokenizer-pickled", "text_encoder llave clip", pickled_as("tokenizer.json"), "tokenizer.json"),
    ("tokenizer-class", "text_encoder", config(file="tokenizer_config.json", tokenizer_class=3), "tokenizer"),
    ("processor-pickled", "llave clip llm2clip", pickled_as(IMAGES), "preprocessor_config.json is not JSON"),
    ("processor-missing", "llave clip llm2clip", remove(IMAGES), IMAGES),
    ("processor-html", "llave clip llm2clip", write(IMAGES, HTML), "preprocessor_config.json is not"),
    *(
        (f"processor-{name}", "llave", config(file=IMAGES, **{name: value}), f"has {name}={value}")
        for name, value in {"do_normalize": False, "do_rescale": False, "rescale_factor": 0.0078}.items()
    ),
    ("processor-resample", "llave", config(file=IMAGES, resample=0), "resample=0; only 3 is"),
    ("processor-list", "llave clip llm2clip", write(IMAGES, b"[]"), "preprocessor_config.json is not"),
    ("processor-size", "llave clip llm2clip", config(file=IMAGES, size={"height": 0, "width": 0}), "processor"),
    ("processor-negative", "clip llm2clip", config(file=IMAGES, crop_size=-3), "processor"),
    ("processor-mean", "llave clip llm2clip", config(file=IMAGES, image_mean=[0.5, 0.5]), "image_mean=[0.5, 0.5]"),
    ("patch-of-two", "llave", config("vision_config", patch_size=[8, 8]), "config.json"),
    ("no-crop", "clip llm2clip", config(file=IMAGES, crop_size=None), IMAGES),
    (
        "processor-std",
        "llave clip llm2clip",
        config(file=IMAGES, image_std=[0.5, 0.0, 0.5]),
        "image_std=[0.5, 0.0, 0.5]",
    ),
    ("no-adapter", "llm2clip", remove("adapter.safetensors"), "adapter.safetensors is missing"),
    ("adapter-cut", "llm2clip", cut("adapter.safetensors", 0.5), "adapter.safetensors: it is cut or damaged"),
    (
        "adapter-nan",
        "llm2clip",
        tensors(lambda w: w["norm.bias"].fill_(float("nan")), "adapter.safetensors"),
        "norm.bias has NaN",
    ),
    (
        "adapter-integers",
        "llm2clip",
        tensors(lambda w: w.update({name: tensor.to(torch.int8) for name, tensor in w.items()}), "adapter.safetensors"),
        "of quantised weights",
    ),
    (
        "adapter-other",
        "llm2clip",
        tensors(lambda w: w.pop("norm.bias"), "adapter.safetensors"),
        'Missing key(s) in state_dict: "norm.bias"',
    ),
    (
        "adapter-zeros",
        "llm2clip",
        tensors(lambda w: [tensor.zero_() for tensor in w.values()], "adapter.safetensors"),
        "all weights of",
    ),
    ("width", "llm2clip", write("llm2clip.json", b'{"width": "32"}'), "llm2clip.json: {'width': '32'}"),
    ("unknown-width", "llm2clip", config(file="llm2clip.json", depth=3), "'depth': 3} is not the width"),
    ("no-width", "llm2clip", write("llm2clip.json", HTML), "llm2clip.json is not JSON"),
    ("no-text-encoder", "llm2clip", lambda folder: shutil.rmtree(folder / "text_encoder"), "text_encoder"),
]


_turn = count()


def families(kinds: str) -> list[str]:
    """Return the families of a case. "all" gives a different one for each case, since they share the reading code."""
    every = ["llave", "text_encoder", "clip", "llm2clip"]
    return every if kinds == "every" else [every[next(_turn) % 4]] if kinds == "all" else kinds.split()


@pytest.mark.parametrize(
    ("kind", "damage", "named"),
    [
        pytest.param(kind, damage, named, id=f"{name}-{kind}")
        for name, kinds, damage, named in CASES
        for kind in families(kinds)
    ],
)
def test_damaged_or_hostile_folder_raises_and_runs_no_code(kind, damage, named, whole, tmp_path, monkeypatch):
    Harmful.touched = tmp_path / "touched"
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked at the terminal"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    folder = shutil.copytree(whole[kind], tmp_path / "model")
    damage(folder)
    for said in error_of(kind, folder):
        assert named in said
        assert str(folder) in said
        assert "trust_remote_code" not in said and "huggingface.co" not in said and "\n" not in said
    assert not Harmful.touched.exists()


def test_intact_folders_of_all_families_load_and_embed(whole):
    for kind, folder in whole.items():
        use(kind, folder)


@pytest.mark.parametrize("kind", ["llave", "text_encoder", "clip", "llm2clip"])
def test_execution_settings_in_config_are_ignored(kind, whole, tmp_path):
    """This project chooses the attention; kernels that a config names would be downloaded and run."""
    folder = shutil.copytree(whole[kind], tmp_path / "model")
    asked = {
        "_attn_implementation": "flash_attention_2",
        "attn_implementation": "someone/kernels",
        "_experts_implementation": "someone/kernels",
        "return_dict": False,
        "output_attentions": True,
        "output_hidden_states": True,
        "torchscript": True,
        "transformers_weights": "../../other.safetensors",
        "_name_or_path": "deepseek-ai/deepseek-coder-1",
        "num_labels": 10**9,
    }
    for file in folder.rglob("config.json"):
        values = json.loads(file.read_text())
        for part in (values, *(values[name] for name in ("text_config", "vision_config") if name in values)):
            part.update(asked)
        file.write_text(json.dumps(values))
    for file in folder.rglob("chat_template.jinja"):
        file.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    (folder / "generation_config.json").write_text("<html>")
    (folder / "training_args.bin").write_bytes(pickle.dumps(Harmful, 2))
    rows = [Embedder.load(path, "cpu").embed(["a red star", "a blue ring"]) for path in (whole[kind], folder)]
    assert torch.equal(*rows)
    encoder = load_encoder(str(folder), EvaluationRun(), CPU)
    found = encoder.embed([encoder.prepare(Item(text)) for text in ("a red star", "a blue ring")])
    torch.testing.assert_close(found, rows[0], rtol=0, atol=1e-6)


def test_damaged_generation_config_of_a_decoder_is_ignored(whole, tmp_path):
    """The config is irrelevant, since nothing is generated."""
    training("text_encoder", "masked_next_token").build(
        section("text_encoder", architecture={"text": TEXT}), CORPUS, 0, tmp_path / "mntp"
    )
    (tmp_path / "mntp/generation_config.json").write_bytes(HTML)
    training("text_encoder", "masked_next_token").check(section("text_encoder", path=str(tmp_path / "mntp")))
    MaskedLanguageModel.load(str(tmp_path / "mntp"), "auto")


def test_damaged_original_checkpoint_is_refused(tmp_path):
    golden = Path(__file__).parents[1] / "golden"
    for number, (damage, named) in enumerate(
        [
            (config(hidden_size="64"), "Field 'hidden_size' expected int, got str"),
            (config(num_attention_heads=5), "or is its config.json damaged?"),
            (config(file="vision_config.json", hidden_size=None), "Field 'hidden_size' expected int, got NoneType"),
            (config(image_grid_pinpoints=[[0, 384]]), "image_grid_pinpoints"),
            (cut("model.safetensors", 0.5), "model.safetensors: it is cut or damaged"),
            (pickled, "pytorch_model.bin: it is a pickle of more than tensors"),
            (cut("tokenizer.json", 0.5), "tokenizer.json is not JSON"),
            (tensors(lambda weights: weights["model.norm.weight"].fill_(float("nan"))), "model.norm.weight has NaN"),
        ]
    ):
        Harmful.touched = tmp_path / "touched"
        folder = shutil.copytree(golden, tmp_path / str(number), ignore=shutil.ignore_patterns("*.png"))
        damage(folder)
        with pytest.raises(PipelineError) as error:
            training("llave").check(section("llave", path=str(folder)))
            training("llave").resolve(str(folder), tmp_path / "cache")
        assert named in str(error.value) and str(folder) in str(error.value)
    assert not Harmful.touched.exists()


@pytest.mark.parametrize("offline", [False, True])
def test_unreachable_hub_raises_one_clear_error(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    asked = []

    def unreachable(*arguments: object, **named: object) -> None:
        asked.append(arguments)
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(files, "snapshot_download", unreachable)
    said = "may not be asked (HF_HUB_OFFLINE=1)" if offline else "cannot be reached from here"
    for way in (Embedder.load, lambda path: load_encoder(path, EvaluationRun(), CPU)):
        with pytest.raises(PipelineError) as error:
            way("someone/model")
        assert "no model at 'someone/model': there is no such folder, and the hub" in str(error.value)
        assert said in str(error.value)
    assert len(asked) == 2
    with pytest.raises(PipelineError, match=r"no model at '/nowhere/at/all': there is no such folder$"):
        Embedder.load("/nowhere/at/all")
