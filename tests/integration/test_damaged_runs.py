"""Damaged run directories: the run continues from the newest intact checkpoint, or reports why it cannot.

Two processes train one real run; each case damages a copy of it.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from launch import Ended, launch
from limits import HANG_MINUTES

from pipeline import export
from pipeline.config import load_recipe
from pipeline.convert.demo import TrainingPairs
from pipeline.convert.sharding import convert
from pipeline.data.source import Source
from pipeline.errors import PipelineError
from pipeline.evaluation.report import Report
from pipeline.training import checkpoint, manifest, resume
from pipeline.training.initial import initial_model

STEPS, EVERY = 6, 2
OPTIMIZER = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
LOGS = ("metrics.jsonl", "ledger/rank0.jsonl", "ledger/rank1.jsonl")


@pytest.fixture(scope="module")
def recipe(tiny_model, tmp_path_factory) -> list[str]:
    data = tmp_path_factory.mktemp("data") / "pairs"
    convert({str(data): TrainingPairs("Scene-T2I", 0, 40)}, options={}, shard_bytes=200_000)
    fields = ["deepspeed=ds_configs/zero2.json", "data.lanes=4", "data.block_samples=8", "data.window_blocks=2"]
    fields += ["batch.global_batch=8", "batch.chunk_tokens=2000", f"steps={STEPS}", f"checkpoint.every={EVERY}"]
    fields += [f"model.path={tiny_model}", f"data.url={data}", "data.datasets=[]", "ledger=true", "data.workers=0"]
    fields += [f"evaluation.urls=[{data}]", f"evaluation.every={EVERY}", "checkpoint.keep=9"]
    fields += [f"timeout_minutes={HANG_MINUTES}"]
    return ["pipeline/recipes/demo.yaml", *fields]


def train(recipe: list[str], run: Path, world: int = 2, *overrides: str) -> Ended:
    return launch(["-m", "pipeline.train", *recipe, f"run={run}", *overrides], world=world)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    """Return an undisturbed run with checkpoints after 2, 4 and 6 steps."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    ended = train(recipe, run)
    assert ended.status == [0, 0], ended.output[-4000:]
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(run: Path, number: int) -> Path:
    return run / f"checkpoints/step-{number:08d}"


def flip(file: Path, place: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 4
    file.write_bytes(content)


def cut(file: Path, size: int | None = None) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2 if size is None else size])


def grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + bytes(1))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_manifest(checkpoint: Path) -> None:
    """Change the checkpoint to the format of an older version."""
    (checkpoint / manifest.FILE).unlink()
    conditions = json.loads((checkpoint / "conditions.json").read_text())
    conditions.pop("the manifest's format")
    (checkpoint / "conditions.json").write_text(json.dumps(conditions))


def older(run: Path) -> None:
    for number in (2, 4, 6):
        without_manifest(step(run, number))


def all_of(*damages: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda run: [damage(run) for damage in damages] and None


def pointer(text: bytes) -> Callable[[Path], int]:
    return lambda run: (run / "checkpoints/latest").write_bytes(text)


def newest(damage: Callable[..., object], file: str, *more: object, **options: object) -> Callable[[Path], object]:
    return lambda run: damage(step(run, 6) / file, *more, **options)


MODEL, CONDITIONS = "mp_rank_00_model_states.pt", "conditions.json"
NO_SUCH = "is missing"
# The damage to a run with checkpoints after 2, 4 and 6 steps; the checkpoint then used; the message.
CASES = {
    "nothing": (lambda run: None, 6, ""),
    "an optimizer's file is cut": (newest(cut, OPTIMIZER), 4, f"{OPTIMIZER} has "),
    "an optimizer's file is empty": (newest(cut, OPTIMIZER, 0), 4, f"{OPTIMIZER} has 0 bytes of "),
    "an optimizer's file is gone": (newest(Path.unlink, OPTIMIZER), 4, f"{OPTIMIZER} {NO_SUCH}"),
    "a bit of an optimizer's file": (newest(flip, OPTIMIZER), 4, f"{OPTIMIZER} is not as it was written"),
    "its first bits": (newest(flip, OPTIMIZER, 0.0), 4, "from byte 0 on"),
    "its last bits": (newest(flip, OPTIMIZER, 0.999999), 4, f"{OPTIMIZER} is not as it was written"),
    "a file that has grown": (newest(grow, OPTIMIZER), 4, f"{OPTIMIZER} has "),
    "a bit of the model's file": (newest(flip, MODEL), 4, f"{MODEL} is not as it was written"),
    "HTML in place of a file": (newest(Path.write_text, MODEL, "<html>502</html>"), 4, f"{MODEL} has 16 bytes of "),
    "a folder in place of a file": (
        all_of(newest(Path.unlink, MODEL), newest(Path.mkdir, MODEL)),
        4,
        f"{MODEL} is not a file",
    ),
    "a dangling link in place of a file": (
        all_of(newest(Path.unlink, MODEL), newest(Path.symlink_to, MODEL, "nowhere")),
        4,
        f"{MODEL} {NO_SUCH}",
    ),
    "empty conditions": (newest(cut, CONDITIONS, 0), 4, f"{CONDITIONS} is not JSON (0 bytes"),
    "conditions of zeros": (newest(Path.write_bytes, CONDITIONS, bytes(99)), 4, f"{CONDITIONS} is not JSON (99 bytes"),
    "conditions that are a list": (newest(Path.write_text, CONDITIONS, "[]"), 4, f"{CONDITIONS} is not a JSON object"),
    "conditions that lack one": (newest(Path.write_text, CONDITIONS, "{}"), 4, f"{CONDITIONS} has 2 bytes of"),
    "an older version's that lack one": (
        all_of(older, newest(Path.write_text, CONDITIONS, "{}")),
        4,
        "does not say by how many processes",
    ),
    "conditions of another seed": (newest(edit, CONDITIONS, seed=1), 4, f"{CONDITIONS} "),
    "no conditions": (newest(Path.unlink, CONDITIONS), 4, f"{CONDITIONS} {NO_SUCH}"),
    "no manifest": (newest(Path.unlink, manifest.FILE), 4, f"{manifest.FILE} {NO_SUCH}"),
    "an empty manifest": (newest(cut, manifest.FILE, 0), 4, f"{manifest.FILE} is not JSON (0 bytes"),
    "another's manifest": (
        lambda run: shutil.copy(step(run, 4) / manifest.FILE, step(run, 6)),
        4,
        f"{manifest.FILE} is of another folder",
    ),
    "a manifest that leads away": (
        newest(edit, manifest.FILE, files={"../latest": {"bytes": 1, "crc32": [1]}}),
        4,
        "which is not a file of the folder",
    ),
    "a manifest of other types": (newest(edit, manifest.FILE, files={MODEL: {"bytes": "1"}}), 4, "files"),
    "a manifest of no blocks": (newest(edit, manifest.FILE, block=0), 4, f"{manifest.FILE} is of another"),
    "an empty folder": (lambda run: [shutil.rmtree(step(run, 6)), step(run, 6).mkdir()], 4, f"{CONDITIONS} {NO_SUCH}"),
    "a file in place of the folder": (
        lambda run: [shutil.rmtree(step(run, 6)), step(run, 6).write_text("")],
        4,
        "it is not a folder",
    ),
    "two of them": (
        all_of(newest(cut, CONDITIONS, 0), lambda run: flip(step(run, 4) / OPTIMIZER)),
        2,
        f"step-00000004 is damaged: {OPTIMIZER} is not",
    ),
    "an empty pointer": (pointer(b""), 6, ""),
    "a pointer of zeros": (pointer(bytes(14)), 6, ""),
    "a pointer that is no text": (pointer(b"\xff\xfe\x00"), 6, ""),
    "a pointer to nowhere": (pointer(b"step-00000099\n"), 6, ""),
    "a pointer out of the folder": (pointer(b"../checkpoints/step-00000002\n"), 6, ""),
    "no pointer": (lambda run: (run / "checkpoints/latest").unlink(), 6, ""),
    "a pointer set back by hand": (pointer(b"step-00000004\n"), 4, ""),
    "a pointer with a Windows line end": (pointer(b"step-00000004\r\n"), 4, ""),
    "strange neighbours": (
        lambda run: [(run / "checkpoints" / name).mkdir() for name in ("step-x", "step-00000008.bak", "step-8", "a b")],
        6,
        "",
    ),
    "an older version's": (older, 6, ""),
    "a bit of an older version's": (
        all_of(older, newest(flip, OPTIMIZER)),
        4,
        f"{OPTIMIZER} is damaged",
    ),
    "an older version's that is cut": (all_of(older, newest(cut, MODEL)), 4, f"{MODEL} is damaged or cut"),
    "an older version's that is gone": (all_of(older, newest(Path.unlink, OPTIMIZER)), 4, f"{OPTIMIZER} {NO_SUCH}"),
    "an older version's empty conditions": (all_of(older, newest(cut, CONDITIONS, 0)), 4, f"{CONDITIONS} is not JSON"),
}


def conditions_of(run: Path) -> dict:
    """Return the run's conditions as a start computes them."""
    kept = checkpoint.conditions_of(step(run, 2))
    return {name: value for name, value in kept.items() if name not in (checkpoint.PROCESSES, checkpoint.MANIFEST)}


def contents(folder: Path) -> list[bytes | str]:
    """Return the contents of all files below a folder, and the names of all other entries."""
    return sorted((path.read_bytes() if path.is_file() else path.name.encode()) for path in folder.rglob("*"))


@pytest.mark.parametrize("case", CASES)
def test_damaged_checkpoint_is_set_aside_and_older_intact_one_is_used(case, run, group, caplog):
    damage, taken, said = CASES[case]
    conditions = conditions_of(run)
    damage(run)
    checkpoints = run / "checkpoints"
    before = {path.name: contents(path) for path in checkpoints.iterdir() if path.name.startswith("step-")}
    assert resume.whole(checkpoints, thorough=True) == step(run, taken)
    assert said in caplog.text  # an export reports it, too, and changes nothing
    assert {path.name: contents(path) for path in checkpoints.iterdir() if path.name.startswith("step-")} == before

    caplog.clear()
    assert resume.choose(checkpoints, conditions) == step(run, taken)
    assert said in caplog.text
    assert (checkpoints / "latest").read_text().split() == [f"step-{taken:08d}"]
    aside = {path.name: contents(path) for path in checkpoints.iterdir() if path.name.startswith("damaged-step-")}
    damaged = [] if not said else [number for number in (4, 6) if number > taken]
    assert aside == {f"damaged-step-{number:08d}": before[f"step-{number:08d}"] for number in damaged}
    assert caplog.text.count(" is damaged: ") == len(damaged)
    for name in before.keys() - {f"step-{number:08d}" for number in damaged}:
        assert contents(checkpoints / name) == before[name]


def test_second_damaged_checkpoint_does_not_overwrite_the_first(run, group):
    conditions = conditions_of(run)
    for number in (1, 2):
        shutil.rmtree(step(run, 6), ignore_errors=True)
        step(run, 6).mkdir()
        (step(run, 6) / "number").write_text(str(number))
        (run / "checkpoints/latest").write_text("step-00000006\n")
        assert resume.choose(run / "checkpoints", conditions) == step(run, 4)
    asides = [run / f"checkpoints/damaged-step-00000006{end}/number" for end in ("", "-2")]
    assert [path.read_text() for path in asides] == ["1", "2"]
    # Set-aside checkpoints do not count as kept ones.
    checkpoint.remove_old(list(reversed(checkpoint.candidates(run / "checkpoints"))), keep=2)
    assert all(path.exists() for path in (*asides, step(run, 2), step(run, 4)))


def test_changed_conditions_are_not_treated_as_damage(run, group):
    (step(run, 6) / OPTIMIZER).unlink()
    conditions = conditions_of(run) | {"seed": 7}
    before = contents(run)
    with pytest.raises(PipelineError, match=r"cannot resume from .*step-00000004: seed was 0 and is now 7"):
        resume.choose(run / "checkpoints", conditions)
    assert contents(run) == before


@pytest.mark.parametrize(
    "best",
    [
        *("", "{}", "[]", "7", "null", "<html>", '{"checkpoint": "step-00000099", "score": 9, "by": []}'),
        *('{"checkpoint": 3, "score": 1, "by": []}', '{"checkpoint": "..", "score": 1, "by": []}'),
    ],
)
def test_unreadable_best_file_is_rebuilt_from_reports(best, run, group):
    file = run / "checkpoints/best"
    expected = json.loads(file.read_text())
    file.write_text(best)
    assert checkpoint.best(run / "checkpoints") is None
    conditions = conditions_of(run)
    resume.choose(run / "checkpoints", conditions)
    assert json.loads(file.read_text()) == expected
    scores = {number: Report.read(run / f"evaluation/step-{number:08d}.json").score for number in (2, 4, 6)}
    assert expected["score"] == max(scores.values()) == scores[int(expected["checkpoint"][5:])]


def test_run_with_many_damaged_files_matches_undamaged_run(finished, recipe, run, tmp_path):
    cut(step(run, 6) / OPTIMIZER)
    flip(step(run, 4) / OPTIMIZER)
    (run / "checkpoints/latest").write_text("")
    (run / "checkpoints/best").write_text("")
    for log in ("metrics.jsonl", "speed.jsonl", "bad_samples.jsonl", "ledger/rank0.jsonl"):
        with (run / log).open("ab") as file:
            file.write(b'{"step": 7, "lo\0\0\0\0\xff<html>\n\n{"loss": 1}\n{"step": ')
    for name in ("status.json", "budget.json", "recipe.yaml", "evaluation/step-00000002.json"):
        (run / name).write_bytes(b"\0{")
    for events in (run / "tensorboard").iterdir():
        cut(events)
    (run / "export/config.json").unlink()
    for name in ("init", ".init.1.partial", ".export.1.partial", "checkpoints/unfinished-00000009"):
        (run / name).mkdir()
    ended = train(recipe, run)
    assert ended.status == [0, 0], ended.output[-4000:]
    assert "Traceback" not in ended.output
    assert "the run continues from step-00000002" in ended.output
    for log in LOGS:
        assert (run / log).read_bytes() == (finished / log).read_bytes(), log
    for log in ("metrics.jsonl", "speed.jsonl", "bad_samples.jsonl", "ledger/rank0.jsonl"):
        assert ended.output.count(f"{run / log} had ") == 1, ended.output[-4000:]
        assert b"<html>" in (run / f"{log}.damaged").read_bytes()
    for number in (2, 4, 6):
        ours, theirs = (Report.read(each / f"evaluation/step-{number:08d}.json") for each in (run, finished))
        assert ours.results == theirs.results
    ours, theirs = (json.loads((each / "checkpoints/best").read_text()) for each in (run, finished))
    assert ours == theirs
    weights = "export/model.safetensors"
    assert (run / weights).read_bytes() == (finished / weights).read_bytes()
    assert [path.name for path in run.glob(".*.partial")] == [".init.1.partial"]


def test_intact_checkpoint_is_converted_for_another_world_size(recipe, run, monkeypatch, capsys, caplog, tmp_path):
    flip(step(run, 6) / OPTIMIZER)
    without_manifest(step(run, 4))
    left = run / "checkpoints/unfinished-universal/step-00000004"
    left.mkdir(parents=True)
    (left / "zero").write_bytes(b"half")
    ended = train(recipe, run, 1, "steps=5")
    assert ended.status == [0], ended.output[-4000:]
    assert "step-00000004 is of 2 processes: converting it for 1" in ended.output
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]

    flip(step(run, 5) / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    monkeypatch.setattr("sys.argv", ["export", str(run), str(tmp_path / "out")])
    export.main.__wrapped__()
    assert "step-00000005 is damaged" in caplog.text
    assert "step-00000004 of" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["export", str(run), str(tmp_path / "other"), "--step", "5"])
    with pytest.raises(PipelineError, match=r"step-00000005 is damaged: .*; steps that have a checkpoint: 2, 4, 5"):
        export.main.__wrapped__()


def test_run_without_intact_checkpoint_is_not_restarted(recipe, run):
    for number in (2, 4, 6):
        cut(step(run, number) / OPTIMIZER)
    kept = contents(run / "checkpoints"), (run / "metrics.jsonl").read_bytes()
    for _ in range(2):  # the next start ends the same way
        ended = train(recipe, run, 1)
        assert ended.status == [2], ended.output[-4000:]
        assert "Traceback" not in ended.output
        assert ended.output.count("error: ") == 1
        assert "checkpoints has no whole checkpoint: " in ended.output
        assert (contents(run / "checkpoints"), (run / "metrics.jsonl").read_bytes()) == kept
        for each in (run / "checkpoints").glob("step-*"):
            each.rename(each.with_name(f"damaged-{each.name}"))
        kept = contents(run / "checkpoints"), kept[1]


def test_damaged_initial_model_is_refused_and_rebuilt_after_deletion(recipe, tmp_path):
    chosen = load_recipe(recipe[0], [field for field in recipe[1:] if "model.path" not in field])
    source, run = Source.open(chosen.data), tmp_path / "run"
    run.mkdir()
    weights = Path(initial_model(chosen, source, run / "init", anew=True), "model.safetensors")
    before = weights.read_bytes()
    assert initial_model(chosen, source, run / "init", anew=False) == str(weights.parent)
    flip(weights)
    with pytest.raises(PipelineError, match=r"model\.safetensors is not as it was written.* Delete it"):
        initial_model(chosen, source, run / "init", anew=False)
    shutil.rmtree(run / "init")
    initial_model(chosen, source, run / "init", anew=False)
    assert weights.read_bytes() == before
    (run / "init" / manifest.FILE).unlink()
    assert initial_model(chosen, source, run / "init", anew=False) == str(weights.parent)


def test_damaged_converted_initial_model_is_refused(recipe, tmp_path):
    chosen = load_recipe(recipe[0], [*recipe[1:], "model.path=tests/golden"])
    source, run = Source.open(chosen.data), tmp_path / "run"
    path = Path(initial_model(chosen, source, run / "init", anew=True))
    assert path.parent == run / "init"
    assert initial_model(chosen, source, run / "init", anew=False) == str(path)
    cut(path / "config.json")
    with pytest.raises(PipelineError, match=r"config\.json has .* bytes of .* Delete it and start again"):
        initial_model(chosen, source, run / "init", anew=False)
    shutil.rmtree(path)
    assert initial_model(chosen, source, run / "init", anew=False) == str(path)


def test_full_disk_leaves_previous_checkpoint_intact(recipe, finished, tmp_path):
    run = tmp_path / "run"
    arguments = [*recipe, f"run={run}", "evaluation=null"]
    ended = launch(["tests/integration/full_disk.py", "2", *arguments], world=1)
    assert ended.status == [2], ended.output[-4000:]
    assert "Traceback" not in ended.output
    assert "unfinished-00000004 cannot be written: " in ended.output
    warnings = [json.loads(line)["text"] for line in (run / "warnings.jsonl").read_text().splitlines()]
    assert "the run failed: " in warnings[-1] and "unfinished-00000004 cannot be written: " in warnings[-1]
    assert resume.whole(run / "checkpoints", thorough=True) == step(run, 2)
    ended = launch(["-m", "pipeline.train", *arguments], world=1)
    assert ended.status == [0], ended.output[-4000:]
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    assert not list((run / "checkpoints").glob("unfinished-*"))
