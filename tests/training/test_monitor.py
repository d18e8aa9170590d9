import json
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.errors import PipelineError
from pipeline.evaluation.report import BINS, DatasetResult, Report, Similarities, Variant
from pipeline.models.compact import Form
from pipeline.training.monitor import Monitor, StepLog, check_writable


def test_resumed_log_drops_repeated_steps_and_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    log = StepLog(path, 0)
    for step in range(1, 6):
        log.write({"step": step, "try": 1})
    with path.open("a") as file:
        file.write('{"step": 6, "tr')
    log = StepLog(path, 3)
    log.write({"step": 4, "try": 2})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["try"]) for line in lines] == [(1, 1), (2, 1), (3, 1), (4, 2)]


ONE, TWO, THREE = (b'{"step": %d, "loss": 0.5}\n' % step for step in (1, 2, 3))


@pytest.mark.parametrize(
    ("content", "kept", "damaged", "said"),
    [
        (b"", b"", b"", "has no line of 3 steps, the first of them 1"),
        (ONE + TWO + THREE, ONE + TWO + THREE, b"", ""),
        (ONE + TWO + THREE + b'{"step": 4, "lo', ONE + TWO + THREE, b'{"step": 4, "lo', "had 15 damaged bytes"),
        (ONE + TWO + THREE[:-1], ONE + TWO + THREE, b"", ""),
        (ONE + TWO + THREE + bytes(99), ONE + TWO + THREE, bytes(99), "had 99 damaged bytes"),
        (ONE + TWO + bytes(99) + THREE, ONE + TWO + THREE, bytes(99), "had 99 damaged bytes"),
        (b"\xef\xbb\xbf" + ONE + TWO + THREE, ONE + TWO + THREE, b"\xef\xbb\xbf", "had 3 damaged bytes"),
        ((ONE + TWO + THREE).replace(b"\n", b"\r\n"), ONE + TWO + THREE, b"", ""),
        (ONE + b'{"step": 2, "lo' + TWO + THREE, ONE + TWO + THREE, b'{"step": 2, "lo', "had 15 damaged bytes"),
        (ONE + TWO[:-1] + THREE, ONE + TWO + THREE, b"", ""),
        (ONE + bytes(26) + THREE, ONE + THREE, None, "has no line of 1 steps, the first of them 2"),
        (ONE + b"<html>\n<p>502\n" + TWO + THREE, ONE + TWO + THREE, b"<html>\n<p>502\n", "had 14 damaged bytes"),
        (ONE + TWO + THREE + b"\xff\xfe\x80\n", ONE + TWO + THREE, b"\xff\xfe\x80\n", "had 4 damaged bytes"),
        (ONE + b'{"loss": 1}\n[1]\n7\nnull\n\n' + TWO, ONE + TWO, b'{"loss": 1}\n[1]\n7\nnull\n\n', "had 24 damaged"),
        (ONE + TWO.replace(b"2", b'"2"'), ONE, TWO.replace(b"2", b'"2"'), "has no line of 2 steps"),
        (ONE + TWO.replace(b"2", b"2.0"), ONE, TWO.replace(b"2", b"2.0"), "has no line of 2 steps"),
        (ONE + TWO + TWO + THREE, ONE + TWO + THREE, b"", ""),
        (ONE + TWO.replace(b"0.5", b"0.7") + TWO + THREE, ONE + TWO + THREE, TWO.replace(b"0.5", b"0.7"), "had 25"),
        (THREE + ONE + TWO, ONE + TWO + THREE, b"", ""),
        (b"[" * 100_000 + b"\n" + ONE, ONE, b"[" * 100_000 + b"\n", "had 100001 damaged bytes"),
        (ONE + TWO, ONE + TWO, b"", "has no line of 1 steps, the first of them 3"),
    ],
)
def test_damaged_log_lines_are_moved_aside_with_a_warning(content, kept, damaged, said, tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    StepLog(path, 3)
    assert path.read_bytes() == kept
    aside = tmp_path / "metrics.jsonl.damaged"
    assert damaged is None or (aside.read_bytes() if aside.exists() else b"") == damaged
    assert said in caplog.text
    assert len(caplog.messages) == bool(said)
    caplog.clear()
    StepLog(path, 3)  # the file was already repaired
    assert "damaged bytes" not in caplog.text


def test_bad_samples_log_allows_several_lines_per_step(tmp_path, caplog):
    path = tmp_path / "bad_samples.jsonl"
    path.write_bytes(ONE + ONE + THREE + bytes(3))
    StepLog(path, 3, is_one_each=False)
    assert path.read_bytes() == ONE + ONE + THREE
    assert caplog.messages == [f"{path} had 3 damaged bytes, which are now in bad_samples.jsonl.damaged"]


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Limit the size of files, which then fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_log_write_on_full_disk_raises(tmp_path):
    log, path = StepLog(tmp_path / "log.jsonl", 0), tmp_path / "log.jsonl"
    with no_file_above(50):
        log.write({"step": 1, "loss": 0.5})
        with pytest.raises(PipelineError, match=r"log\.jsonl cannot be written: File too large \(.* MB free\)"):
            log.write({"step": 2, "loss": 0.123456789012345678})
    assert StepLog(path, 2).path.read_bytes() == ONE


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda run: run.write_text(""), "run cannot be written: File exists"),
        (lambda run: run.symlink_to("/proc/none/run"), "run cannot be written: "),
        (lambda run: run.symlink_to(run), "run cannot be written: "),
        (lambda run: [run.mkdir(), (run / "checkpoints").write_text("")], "checkpoints cannot be written: File exists"),
        (
            lambda run: [run.mkdir(), (run / "tensorboard").symlink_to("nowhere")],
            "tensorboard cannot be written: File exists",
        ),
        (lambda run: (run / "metrics.jsonl").mkdir(parents=True), r"metrics\.jsonl cannot be written: Is a directory"),
    ],
)
def test_unwritable_run_directory_is_refused(make, named, tmp_path):
    run = tmp_path / "run"
    make(run)
    with pytest.raises(PipelineError, match=named):
        check_writable(run)


def test_run_directory_check_creates_parents_and_leaves_no_files(tmp_path):
    run = tmp_path / "a/b/run"
    check_writable(run)
    (run / "checkpoints").mkdir()
    with no_file_above(1000), pytest.raises(PipelineError, match="run cannot be written: File too large"):
        check_writable(run)
    with pytest.raises(PipelineError, match="/proc/none/run cannot be written: No such file"):
        check_writable(Path("/proc/none/run"))
    assert [path.name for path in run.rglob("*")] == ["checkpoints"]


def test_tensorboard_shows_metrics_speed_and_histograms(tmp_path):
    with Monitor(tmp_path, 0, 0, 2, ledger=False) as monitor:
        for step in (1, 2):
            metrics = {"step": step, "loss": 1 / step, "positive_similarity": None}
            monitor.step(metrics, {"seconds": 0.5}, {"positive": np.array([0.1])})
        none = Similarities(*[[0] * (len(BINS) - 1)] * 2)
        vqa = DatasetResult("vqa", True, "en", {"": 10}, {"P@1": 0.5}, 0.1, 0, none)
        clips = DatasetResult("text-video", None, "en", {"t2v": 10}, {"t2v R@1": 0.3, "t2v MdR": 4.0}, 0.1, 0, none)
        variants = [Variant(Form(48), {"Scene-VQA": 0.5, "clips": 0.3})]
        variants += [Variant(Form(size), {"Scene-VQA": size / 100, "clips": 0.2}) for size in (40, 20)]
        variants += [Variant(Form(size, "int8"), {"Scene-VQA": 0.1, "clips": 0.1}) for size in (48, 20)]
        monitor.evaluation(2, Report("model", {"Scene-VQA": vqa, "clips": clips}, variants=tuple(variants)))
    assert Report.read(tmp_path / "evaluation/step-00000002.json").averages()["vqa"] == 0.5
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("learning/loss")] == [1.0, 0.5]
    assert [event.value for event in board.Scalars("evaluation/vqa")] == [50.0]  # percent
    tags = board.Tags()
    assert {"speed/step_seconds", "evaluation_datasets/Scene-VQA/P@1"} <= set(tags["scalars"])
    assert [event.value for event in board.Scalars("evaluation_datasets/clips/t2v MdR")] == [4.0]
    averaged = ("vqa", "in distribution", "overall")
    cut = {tag: round(board.Scalars(tag)[0].value, 5) for tag in tags["scalars"] if re.search(r"@[24]\d", tag)}
    assert cut == {
        **{f"evaluation/{group}@{size}": size for size in (40, 20) for group in averaged},
        **{f"evaluation_datasets/Scene-VQA/P@1@{size}": size for size in (40, 20)},
        **{f"evaluation_datasets/clips/t2v R@1@{size}": 20.0 for size in (40, 20)},
        **{f"evaluation/{group}@{form}": 10.0 for form in ("48-int8", "20-int8") for group in averaged},
        **{f"evaluation_datasets/Scene-VQA/P@1@{form}": 10.0 for form in ("48-int8", "20-int8")},
        **{f"evaluation_datasets/clips/t2v R@1@{form}": 10.0 for form in ("48-int8", "20-int8")},
    }
    assert tags["histograms"] == ["similarity/positive"]
    assert "learning/similarity_positive" not in tags["scalars"]
