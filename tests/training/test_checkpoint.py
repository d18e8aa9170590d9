"""Which checkpoints are kept. Whole runs (tests/integration) show that they are complete."""

import logging
from dataclasses import replace
from types import SimpleNamespace

from pipeline.config import load_recipe
from pipeline.evaluation.report import DatasetResult, Report, Similarities
from pipeline.jobs.preflight.check import Check
from pipeline.jobs.preflight.run import show
from pipeline.jobs.program import configure_logging
from pipeline.training import manifest, resume
from pipeline.training.checkpoint import best, keep_best, remove_old
from pipeline.training.trainer import Trainer


def test_newest_and_best_checkpoints_are_kept(tmp_path):
    def there() -> list[int]:
        return [int(path.name[5:]) for path in sorted(tmp_path.glob("step-*"))]

    left = []
    for step, score in enumerate((0.2, 0.5, 0.4, 0.5, 0.3), 1):
        (tmp_path / f"step-{step:08d}").mkdir()
        remove_old(sorted(tmp_path.glob("step-*")), keep=1)
        keep_best(tmp_path, step, score, ["Scene-VQA"])
        left.append(there())
    assert left == [[1], [1, 2], [2, 3], [2, 4], [2, 5]]
    assert best(tmp_path).name == "step-00000002"
    keep_best(tmp_path, 5, 0.1, ["Scene-VQA", "clips"])  # scores on different sets cannot be compared
    assert best(tmp_path).name == "step-00000005"


def test_missing_best_checkpoint_is_none(tmp_path):
    assert best(tmp_path) is None
    keep_best(tmp_path, 3, 0.9, ["a"])
    assert best(tmp_path) is None
    (tmp_path / "step-00000004").mkdir()
    keep_best(tmp_path, 4, 0.1, ["a"])
    assert best(tmp_path).name == "step-00000004"


def test_control_characters_are_escaped_in_logs_and_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger("pipeline"), "handlers", [])
    configure_logging(0)
    for step in (1, 2):
        (folder := tmp_path / f"step-{step:08d}").mkdir()
        (folder / "conditions.json").write_text("{}")
        names = ["conditions.json", "\x1b[2J\u202e"][:step]
        manifest.write(folder, step, dict.fromkeys(names, manifest.File(bytes=2, crc32=[0])))
    assert resume.whole(tmp_path) == tmp_path / "step-00000001"
    show([Check("run", "red", "\x1b[2J [x] found\nthere", "mend \x1b[2J")], "runs/[b]\x1b[2J", 1.0)
    out, err = capsys.readouterr()
    assert not {*out, *err} & {"\x1b", "\u202e"}
    assert r"\x1b[2J\u202e is missing; the run continues from step-00000001" in err
    assert all(shown in out for shown in (r"runs/[b]\x1b[2J", r"\x1b[2J [x] found", r"mend \x1b[2J"))


def test_collapsed_model_is_never_the_best(tmp_path, caplog):
    similarities = Similarities([0] * 200, [0] * 200)
    result = DatasetResult("vqa", True, "", {"": 4}, {"P@1": 0.5}, 0.1, 0, similarities)
    reports = {1: replace(result, metrics={"P@1": 0.9}, collapsed=True), 2: result}
    recipe = load_recipe("pipeline/recipes/demo.yaml", [f"run={tmp_path}"])
    trainer = Trainer(recipe, SimpleNamespace())
    trainer.monitor = SimpleNamespace(evaluation=lambda step, report: None)
    trainer.saver = SimpleNamespace(finish=lambda: False)
    trainer.budget = SimpleNamespace(chunk_tokens=1)
    for step, each in reports.items():
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        trainer.evaluation = SimpleNamespace(report=lambda step, tokens, each=each: Report("m", {"A-OKVQA": each}))
        trainer._evaluate(step)
        assert best(tmp_path / "checkpoints") == (tmp_path / "checkpoints/step-00000002" if step == 2 else None)
    assert "step 1: THE MODEL HAS COLLAPSED: in A-OKVQA all queries" in caplog.text
