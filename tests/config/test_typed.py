"""Values in recipes and options are read as the user means them, or refused with the correct form."""

import math
from pathlib import Path

import pytest

from pipeline.config import EvaluationRun, Part, dump_recipe, load_recipe, parse_options
from pipeline.errors import PipelineError
from pipeline.models.registry import training

DEMO = Path(__file__).parents[2] / "pipeline/recipes/demo.yaml"


def value_of(override: str) -> object:
    value = load_recipe(DEMO, [override])
    for name in override.partition("=")[0].split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


# Fields that the demo's recipe does not have.
OF_OTHERS = {
    "model.text_encoder": "demo_llm2clip",
    "model.instruction": "demo_caption",
    "objective.mask_rate": "demo_masked",
}


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(PipelineError) as error:
        load_recipe(path, list(overrides))
    return str(error.value)


@pytest.fixture
def recipe(tmp_path):
    """Return a function that appends text to the demo's recipe and returns the new recipe's path."""

    def write(text: str | bytes, whole: bool = False) -> Path:
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "recipe.yaml").write_bytes(data if whole else DEMO.read_bytes() + b"\n" + data)
        return tmp_path / "recipe.yaml"

    return write


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        *((f"model.train.vision_tower={text}", True) for text in ("1", "true", "True", "yes", "on", "ON")),
        *((f"model.train.vision_tower={text}", False) for text in ("0", "false", "no", "off")),
        *((f"model.train.vision_tower={text}", 1e-5) for text in ("1e-5", "1E-5", "0.00001", ".1e-4", "'1e-5'")),
        ("ledger=1", True),
        ("ledger=off", False),
        *((f"seed={text}", 8) for text in ("8", '"8"', "8.0", "+8", "08")),
        ("seed=0", 0),
        ("seed=1_000", 1000),
        ("optimizer.lr=1e-5", 1e-5),
        ("optimizer.lr =1e-5", 1e-5),
        ("optimizer.betas=[9e-1, 0.95]", (0.9, 0.95)),
        ("objective.margin=0", 0.0),
        ("objective.margin=~", None),
        ("batch.chunk_tokens=auto", "auto"),
        ("batch.chunk_tokens=10000", 10000),
        *((f"run={text}", text) for text in ("no", "on", "08", "123", "1:30", "2026-11-28", "1e-5", ".inf", "true")),
        ("run='true'", "true"),
        ("run=~/run", f"{Path.home()}/run"),
        ("run=runs/a~b", "runs/a~b"),
        ("run=./~", "./~"),
        ("data.url=~/shards", f"{Path.home()}/shards"),
        ("evaluation.urls=[~/sets, flickr30k=~/f, s3://b/~/x]",
         [f"{Path.home()}/sets", f"flickr30k={Path.home()}/f", "s3://b/~/x"]),
        ("data.datasets=[on, {name: 08, weight: 5e-1, cap: 1000}]",
         [Part(name="on"), Part(name="08", weight=0.5, cap=1000)]),
        ("model.architecture.image_grid_pinpoints=[[56, 56.0]]", [(56, 56)]),
        ("model.architecture.text.rope_theta=1e6", 1e6),
        ("model.architecture.text.a={b: yes, c: '1', d: 1_0, e: 1e-5, f: ~, g: x}",
         {"b": True, "c": "1", "d": 10, "e": 1e-5, "f": None, "g": "x"}),
    ],
)  # fmt: skip
def test_override_values_are_parsed_to_intended_types(override, meant):
    value = value_of(override.replace(" =", "="))
    assert load_recipe(DEMO, [override]) == load_recipe(DEMO, [override.replace(" =", "=")])
    assert value == meant
    assert type(value) is type(meant)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        *(
            (f"model.train.vision_tower={text}", "give true, false or a positive learning")
            for text in ("1.0", "2", "-1e-5")
        ),
        ("model.train.vision_tower=~", "model.train.vision_tower: it is empty"),
        ("model.train.lora.rank=yes", "model.train.lora.rank: Input should be a valid integer, unable to parse"),
        ("optimizer.lr=5", "optimizer.lr is 5: give a learning rate such as 1e-5"),
        ("optimizer.lr=true", "optimizer.lr: Input should be a valid number"),
        *((f"optimizer.lr={text}", "lr: Input should be a") for text in (".inf", "-.inf", ".nan", "inf", "NaN")),
        ("optimizer.lr=1e400", "optimizer.lr: Input should be a finite number"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas.1: Input should be less than 1"),
        ("optimizer=", "optimizer.lr is missing"),
        ("optimizer=[1]", "optimizer is a section, of lr, betas"),
        ("model.train=on", "model.train is a section, of lora, projector"),
        ("optimizer.lr=1e-13", "optimizer.lr is 1e-13: give a learning rate such as 1e-5"),
        ("model.train.projector=1e-30", "give true, false or a positive learning rate"),
        ("objective.mask_rate=1e-9", "objective.mask_rate: Input should be greater"),
        ("objective.temperature=1e30", "objective.temperature: Input should be less than or equal to 100"),
        ("timeout_minutes=1e300", "timeout_minutes: Input should be less than"),
        ("data.timeout_s=1e300", "data.timeout_s: Input should be less than"),
        ("epochs=1e300", "epochs: Input should be less than"),
        ("model.train.lora.targets=[]", "model.train.lora.targets: List should have at least 1 item"),
        ("model.train.lora.targets=['']", "model.train.lora.targets.0: String should have at least 1 character"),
        ("model.architecture.image_grid_pinpoints=[[56, 0]]", "pinpoints.0.1: Input should be greater than 0, got '0'"),
        ("model.image_grid_pinpoints=[[-384, 384]]", "model.image_grid_pinpoints.0.0: Input should be greater than 0"),
        ("model.image_grid_pinpoints=[]", "model.image_grid_pinpoints: List should have at least 1 item"),
        ("evaluation.urls=[]", "evaluation.urls: List should have at least 1 item"),
        ("evaluation.urls=['']", "evaluation.urls.0: it is empty"),
        *((f"{name}=''", f"{name}: it is empty") for name in
          ("run", "deepspeed", "data.url", "data.text_embeddings", "data.teacher", "model.path", "model.text_encoder")),
        ("run=' '", "run: it is empty"),
        *((f"{name}=s3://bucket/x", "it is a URL: name a file or a folder") for name in ("run", "deepspeed")),
        ("data.url=/data/my set #2", "YAML takes what follows ' #' for a comment: use quotes in it"),
        *((f"model.instruction={text}", "write a text that has a colon and a space in quotes")
          for text in ("query:", "Instruct: Given a query")),
        ("run=~nobody-of-this-name/x", "run: ~nobody-of-this-name/x: there is no such home; write the whole path"),
        ("seed=true", "seed: Input should be a valid integer"),
        ("seed=8.5", "seed: Input should be a valid integer"),
        ("seed=99999999999999999999", "seed: Input should be less than"),
        *((f"seed={text}", "seed: Input should be a valid integer") for text in ("1:30", "1,000", "1e3", "0x8")),
        ("seed=\uff18", "seed: Input should be a valid integer"),
        ("data.workers=true", "data.workers: Input should be a valid integer"),
        ("data.datasets=[{name: a, weight: .inf}]", "data.datasets.0.weight: Input should be a valid number"),
        ("data.datasets=[{name: a, name: b}]", "'name' is there twice"),
        ("data.datasets=a", "data.datasets is a list: write [a]"),
        ("data.datasets=[[a]]", "data.datasets.0 is a section, of name, weight, cap"),
        ("data.datasets.0.weight=2", "set all of it, data.datasets=[...]"),
        ("evaluation.urls=sets", "evaluation.urls is a list: write [sets]"),
        ("run=", "run: it is empty: give a value"),
        ("data.url=!!python/object/apply:os.system [ls]", "write the value alone"),
        ("seed=!!int abc", "write the value alone"),
        ("data.datasets=&a [*a]", "contains itself"),
        ("optimizer.lr==1e-5", "write it as key=value"),
        ("=1e-5", "write it as key=value"),
        ("optimizer.lr.=1e-5", "a name is missing beside a dot"),
        ("optimizer..lr=1e-5", "a name is missing beside a dot"),
    ],
)  # fmt: skip
def test_invalid_override_values_are_refused_with_fix(override, said):
    recipe = next((name for field, name in OF_OTHERS.items() if override.startswith(field)), "demo")
    assert said in error_of(DEMO.with_name(f"{recipe}.yaml"), override)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2", "'seed' is there twice at line"),
        ("objective:\n\talpha: 1", "indent with spaces"),
        ("x: " + "[" * 5000, "nested too deeply"),
        ("---\na: 1", "single document"),
        ("a: &a [x, x, x, x, x, x, x, x, x]\n"
         + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
         "more than 100,000 values"),
        ("1: 2", "unknown field 1"),
    ],
)  # fmt: skip
def test_malformed_recipe_yaml_is_refused(recipe, text, said):
    assert said in error_of(recipe(text))


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("text.hidden_size=abc", "model.architecture.text: .*'hidden_size' expected int, got str"),
        ("text.hidden_size='128'", "model.architecture.text: .*'hidden_size' expected int, got str"),
        ("text.num_hidden_layers=yes", "model.architecture.text: .*'num_hidden_layers' expected int, got bool"),
        ("text.vocab_size=~", "model.architecture.text: .*'vocab_size' expected int"),
        ("vision.patch_size=[a]", "model.architecture.vision: .*'patch_size'"),
        ("text.hidden_size=-1", "model.architecture.text: hidden_size=-1 must be a whole number of 1 to"),
        ("text.num_attention_heads=0", "model.architecture.text: num_attention_heads=0 must be"),
    ],
)
def test_wrong_architecture_values_are_refused_before_model_build(field, said):
    model = load_recipe(DEMO, [f"model.architecture.{field}"]).model
    with pytest.raises(PipelineError, match=said):
        training(model.family).check(model)


def test_invalid_recipe_file_is_refused(recipe, tmp_path):
    for data in (b"", b"# nothing\n", b"- a\n", b"~\n"):
        assert "is not a recipe" in error_of(recipe(data, whole=True))
    assert "not UTF-8 text (byte 0)" in error_of(recipe("seed: 1".encode("utf-16"), whole=True))
    assert "unacceptable character #x0000" in error_of(recipe(b"\x00"))
    assert "larger than 1 MiB" in error_of(recipe("#" * (1 << 20)))
    assert "Is a directory" in error_of(tmp_path)
    assert "no recipe at" in error_of(Path("x" * 5000))


def test_byte_order_mark_and_crlf_are_ignored(recipe):
    path = recipe(b"\xef\xbb\xbf" + DEMO.read_bytes().replace(b"\n", b"\r\n"), whole=True)
    assert load_recipe(path, []) == load_recipe(DEMO, [])


def test_empty_section_uses_defaults(recipe):
    path = recipe("video:  # frames: 8\nvariants:\n")
    assert load_recipe(path, []) == load_recipe(DEMO, [])


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ("{paper: }", "variants.paper: list below it what it sets"),
        ("{paper: 5}", "variants.paper: list below it what it sets"),
        ("[paper]", "has no variant 'paper'; it has none"),
        ("{paper: {lr: 1e-5}}", "unknown field lr; did you mean optimizer.lr?"),
        ("{paper: {optimizer.lr.x: 1e-5}}", "variants.paper: optimizer.lr.x': lr is a single value, not a section"),
    ],
)
def test_a_variant_that_cannot_be_meant_is_refused(recipe, variants, said):
    assert said in error_of(recipe(f"variants: {variants}"), "variant=paper")


def test_variants_are_typed_and_support_yaml_anchors(recipe):
    path = recipe("variants:\n  a: &a\n    optimizer.lr: 1e-4\n    ledger: on\n  b:\n    <<: *a\n    ledger: no\n")
    assert (load_recipe(path, ["variant=a"]).optimizer.lr, load_recipe(path, ["variant=a"]).ledger) == (1e-4, True)
    assert (load_recipe(path, ["variant=b"]).optimizer.lr, load_recipe(path, ["variant=b"]).ledger) == (1e-4, False)
    assert "has no variant 'c'; it has a, b" in error_of(path, "variant=c")


def test_dumped_recipe_reads_back_equal(tmp_path):
    text = "{a: '08', b: 'yes', c: '1e5', d: 'inf', e: '', f: 'null', g: '1:30', h: 1e-5, i: [1, '2'], j: '<<', k: =}"
    recipe = load_recipe(DEMO, [f"model.architecture.text.extra={text}", "run='1e-5'", "model.train.projector=1e-5"])
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml", []) == recipe


def test_evaluation_options_are_typed_like_recipe_fields():
    options = parse_options(EvaluationRun, ["timeout_s=1_0", "requester_pays=1", "max_tokens=1000", "out=", "part=0/4"])
    assert (options.timeout_s, options.requester_pays, options.max_tokens) == (10.0, True, 1000)
    assert (options.out, options.part) == (None, "0/4")
    for option, said in (("video=8", "video is a section, of frames"), ("chunk_tokens=yes", "valid integer")):
        with pytest.raises(PipelineError, match=said):
            parse_options(EvaluationRun, [option])


def test_values_of_python_are_checked():
    assert Part(name="a", weight=2).weight == 2.0
    for weight in (math.inf, math.nan, "fast"):
        with pytest.raises(ValueError, match="weight"):
            Part(name="a", weight=weight)
